"""The switch, and who goes through it: on the CPU each operator runs its twin in plain PyTorch, which is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ppclc import kernels
from ppclc.analysis import device_sums, ffn_maps, moments, reach
from ppclc.data.samples import Samples, open_samples, picked
from ppclc.errors import UnavailableError
from ppclc.kernels import distillation_loss
from ppclc.kernels import moments as moment_kernels
from ppclc.loading.sources import Source, open_source
from ppclc.models import load_source
from ppclc.passes import calibrate as calibrate_pass
from ppclc.passes.calibrate import CalibrateSettings, calibrate
from ppclc.passes.distill import DistillSettings, distill_edits
from ppclc.plan import CompressionPlan, Interval
from ppclc.records import CalibrationStats
from ppclc.teachers import ResidentTeacher, StreamedTeacher
from ppclc.training.local_edits import Teaching, interval_edit

EVERYWHERE = (moments, device_sums, ffn_maps, moment_kernels, distillation_loss)


def quiet(share: float, note: str) -> None:
    """No progress."""


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Kernels are taken as on a GPU; calls of their twins, by name."""
    calls = dict.fromkeys(("add_moments", "difference_reference", "_loss_and_gradient", "_scale"), 0)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        return call

    for module in EVERYWHERE:
        if hasattr(module, "takes"):
            monkeypatch.setattr(module, "takes", lambda name, *tensors: not torch.compiler.is_exporting())
    for module, name in (
        (device_sums, "add_moments"),
        (moment_kernels, "difference_reference"),
        (distillation_loss, "_loss_and_gradient"),
        (distillation_loss, "_scale"),
    ):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return calls


# -- the switch --------------------------------------------------------------------------------------------------------


def test_without_a_gpu_nothing_is_taken_and_insisting_is_refused() -> None:
    x = torch.zeros(2, 64)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert kernels.chosen() == "auto"
    assert not any(kernels.takes(name, x) for name in kernels.NAMES)
    with pytest.raises(UnavailableError, match=r"kernels = 'triton': .*; wanted auto or torch here"), kernels.switched("triton"):
        pass
    assert kernels.chosen() == "auto"


def test_the_switch_is_set_for_a_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_lacks", lambda here: "")
    monkeypatch.setattr(kernels, "interpreted", lambda: True)
    x = torch.zeros(2, 64)
    with kernels.switched("triton"):
        assert all(kernels.takes(name, x) for name in kernels.NAMES)
        assert not kernels.takes("moments", x, x.double())  # float64 is exact, and stays so
        with kernels.switched("torch"):
            assert not any(kernels.takes(name, x) for name in kernels.NAMES)
        assert kernels.chosen() == "triton"
    assert not any(kernels.takes(name, x) for name in kernels.NAMES)  # too small to be worth a launch
    large = torch.zeros(kernels.LEAST)
    assert {name for name in kernels.NAMES if kernels.takes(name, large)} == kernels.AUTO


# -- who goes through it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(teacher_folder: Path) -> Source:
    return open_source(str(teacher_folder))


@pytest.fixture(scope="module")
def samples(source: Source, teacher: Any) -> Samples:
    return open_samples("noise", source, teacher, "train")


def moments_of(source: Source, samples: Samples, streamed: bool, folder: Path | None = None) -> CalibrationStats:
    teacher = StreamedTeacher(source, "float32") if streamed else ResidentTeacher(load_source(source), source.family)
    return calibrate(teacher, samples, CalibrateSettings(samples=70, longest=2, seed=4), quiet, folder)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_calibrate_adds_its_moments_through_the_kernel(
    source: Source, samples: Samples, taken: dict[str, int], streamed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every product of near and far moments of both streams, and each step's difference; the same sums come of it."""
    monkeypatch.setattr(reach, "GROUPED_BYTES", 0)
    for module in (moments, calibrate_pass):
        monkeypatch.setattr(module, "TOGETHER", 0)
    with monkeypatch.context() as plain:
        for module in (moments, ffn_maps):
            plain.setattr(module, "takes", lambda name, *tensors: False)
        wanted = moments_of(source, samples, streamed, tmp_path)
        assert not any(taken.values())
    monkeypatch.setattr(moments, "stays", lambda value: True)  # as what lies on a GPU does
    found = moments_of(source, samples, streamed, tmp_path)
    blocks, streams, batches = 6, 2, 2
    near, far, ffns = blocks + 1, 3 * (blocks + 1) - 3, blocks
    others = 3 * blocks - 3 + 1  # of what text's keys are made of, and of the time embedding
    assert taken["add_moments"] == batches * (streams * (near + far + ffns) + others)
    assert taken["difference_reference"] == batches * streams * (blocks + ffns)
    assert found.tensors.keys() == wanted.tensors.keys()
    assert found.rows == wanted.rows
    for name, tensor in wanted.tensors.items():
        products = name.endswith(("second", "residual")) or ".cross." in name
        by_kernel = products and not name.startswith("ffn.")  # to those of a network something in float64 is added
        assert found.tensors[name].dtype == (torch.float32 if by_kernel else torch.float64)
        assert (found.tensors[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


@pytest.mark.slow
def test_sums_that_take_too_much_memory_are_let_go_and_come_out_the_same(
    source: Source, samples: Samples, taken: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (moments, calibrate_pass):
        monkeypatch.setattr(module, "TOGETHER", 0)
    wanted = moments_of(source, samples, streamed=False)
    monkeypatch.setattr(device_sums.DeviceSums, "is_full", lambda self, *places: bool(self.seconds))
    found = moments_of(source, samples, streamed=False)
    assert all((found.tensors[n] - t).norm() <= 1e-5 * t.norm() for n, t in wanted.tensors.items())


@pytest.mark.parametrize("thinned", [None, 4])
def test_batches_with_far_moments_that_pass_together_give_the_same_sums(
    source: Source, samples: Samples, taken: dict[str, int], thinned: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: near sums stay to the end, far ones are let go after each block."""
    for module in (moments, calibrate_pass):
        monkeypatch.setattr(module, "TOGETHER", 0)
    settings = CalibrateSettings(samples=70, longest=2, seed=4, tokens=thinned)
    teacher = ResidentTeacher(load_source(source), source.family)
    with monkeypatch.context() as plain:
        for module in (moments, ffn_maps):
            plain.setattr(module, "takes", lambda name, *tensors: False)
        wanted = calibrate(teacher, samples, settings, quiet)
    monkeypatch.setattr(moments, "stays", lambda value: True)
    monkeypatch.setattr(calibrate_pass.Calibration, "far_together", lambda self, piece: 2)
    drained: list[tuple[tuple[str, ...], bool]] = []
    drain = moments.Moments.drain

    def noted(self: moments.Moments, prefixes: tuple[str, ...] = ("",), wait: bool = True) -> None:
        drained.append((prefixes, wait))
        drain(self, prefixes, wait)

    monkeypatch.setattr(moments.Moments, "drain", noted)
    found = calibrate(teacher, samples, settings, quiet)
    assert drained == [(("far.", "ffn."), False)] * 7 + [(("",), True)]
    assert found.rows == wanted.rows
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert (found.tensors[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


@pytest.mark.parametrize("room", [0.5, 7.5, 1000])
def test_as_many_batches_pass_together_as_there_is_room_for(
    source: Source, samples: Samples, room: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of what near sums leave free, over two states and a window of thinned ones."""
    teacher = ResidentTeacher(load_source(source), source.family)
    found = calibrate_pass.Calibration(teacher, 2, moments.Moments(), 1, quiet, tokens=4)
    piece = next(calibrate_pass.drawn_pieces(teacher, samples, CalibrateSettings(samples=2)))
    assert found.far_together(piece) == 1  # on a CPU
    embedded = teacher.embed(picked(piece.sample, [0]))
    image, text = embedded.states["image"], embedded.states["text"]
    kept = image[:, :: -(-image.shape[1] // 4)].nbytes + text.nbytes
    each = len(piece) * (2 * (image.nbytes + text.nbytes) + 4 * kept)
    near = 4 * 2 * (2 * teacher.num_blocks + 1) * image.shape[-1] ** 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(near + 2 * room * each), 10**9))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(teacher, "embed", lambda sample: embedded)
    monkeypatch.setattr(teacher, "device", torch.device("cuda", 0))
    assert found.far_together(piece) == max(1, min(calibrate_pass.FAR_TOGETHER, int(room)))


@pytest.mark.parametrize(("free", "full"), [(600, False), (100, True)])
def test_sums_may_take_half_of_what_is_free(free: int, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted are those that are there and those that would be new; what is there already takes nothing more."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    sums, device = device_sums.DeviceSums(), torch.device("cuda", 0)
    old, new = ("a", 0, 0), ("b", 0, 0)
    assert not sums.is_full((old,), 10**12, device)  # nothing there that could be let go
    sums.add_value(old, torch.zeros(25))
    assert sums.held_bytes == 100
    assert not sums.is_full((old,), 100, device)
    assert sums.is_full((old, new, None), 100, device) == full
    assert [place for place, _ in sums.taken()] == [old]
    assert sums.held_bytes == 0


def test_distill_takes_its_loss_from_the_kernel(
    source: Source, samples: Samples, taken: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Twice a step, of both streams; the same training comes of it, and no gradient is gone over again, whatever its stream's weight."""
    teacher = ResidentTeacher(load_source(source), source.family)
    settings = DistillSettings(steps=5, batch=4, text_weight=0.5)
    teaching = Teaching(source.family, source.config, teacher.block_tensors)
    plan = CompressionPlan.of(source.family.name, teacher.num_blocks, [(1, 2)])

    def losses(folder: Path) -> list[float]:
        folder.mkdir()
        edit = interval_edit(teaching, plan, Interval(first=1, last=2), lambda: teacher.block_tensors(1), settings.weights)
        (made,) = distill_edits(teacher, [edit], 5, samples, settings, quiet, [folder])
        return [loss for _, loss in made.losses]

    with monkeypatch.context() as plain:
        plain.setattr(distillation_loss, "takes", lambda name, *tensors: False)
        wanted = losses(tmp_path / "plain")
    assert not any(taken.values())
    assert losses(tmp_path / "taken") == pytest.approx(wanted, rel=1e-5)
    assert taken["_loss_and_gradient"] == 2 * 5
    assert taken["_scale"] == 0


# -- operators ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_what_pytorch_expects(dtype: torch.dtype) -> None:
    x, y, z = (torch.randn(9, width).to(dtype) for width in (64, 64, 32))
    mask = torch.arange(9) % 2 == 0
    second, cross = torch.zeros(64, 64), torch.zeros(64, 32)
    for operator, args in (
        ("distillation_loss", (x.clone().requires_grad_(), y, 0.1, None, 1.0)),
        ("distillation_loss", (x.clone().requires_grad_(), y, 0.1, mask, 0.5)),
        ("scale_gradient", (x.clone(), torch.tensor(2.0), torch.empty(0))),
        ("add_moments", (second, cross, x, z, None, [])),
        ("add_moments", (second, None, x, None, mask, [torch.zeros(64)])),
        ("difference", (x, y)),
    ):
        torch.library.opcheck(getattr(torch.ops.ppclc, operator).default, args)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("magnitude", [0.0, 0.7])
def test_the_twin_has_the_gradient_of_the_formula(masked: bool, magnitude: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 64, dtype=torch.float64, requires_grad=True), torch.randn(7, 64, dtype=torch.float64)
    mask = torch.arange(7) % 3 != 0 if masked else None
    (wanted,) = torch.autograd.grad(0.7 * distillation_loss.reference(student, teacher, magnitude, mask), student)
    _, found, _ = torch.ops.ppclc.distillation_loss(student.detach(), teacher, magnitude, mask, 0.7)
    assert (found - wanted).norm() <= 1e-12 * wanted.norm()


def test_a_masked_token_does_not_count_whatever_it_holds() -> None:
    student, teacher = torch.randn(1, 4, 64), torch.randn(1, 4, 64)
    mask = torch.tensor([[True, False, True, True]])
    wanted = distillation_loss.state_loss(student[:, [0, 2, 3]], teacher[:, [0, 2, 3]], 0.1)
    student[0, 1], teacher[0, 1] = torch.nan, torch.inf
    student.requires_grad_()
    loss = distillation_loss.state_loss(student, teacher, 0.1, mask)
    loss.backward()
    assert student.grad is not None
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.isfinite(student.grad).all()


def test_sums_that_do_not_fit_are_refused() -> None:
    x = torch.randn(5, 64)
    for second, cross, y in (
        (None, None, None),
        (torch.zeros(64, 63), None, None),
        (torch.zeros(64, 64, dtype=torch.float64), None, None),
        (torch.zeros(64, 64), torch.zeros(64, 8), torch.randn(4, 8)),
        (torch.zeros(64, 64), torch.zeros(64, 8), torch.randn(5, 8).half()),
    ):
        with pytest.raises(ValueError, match=r"add_moments: .*wanted"):
            moment_kernels.add_moments(second, cross, x, y)


def test_what_is_exported_is_the_plain_formula(taken: dict[str, int]) -> None:
    class Loss(torch.nn.Module):
        def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            return distillation_loss.state_loss(student, teacher, 0.1)

    graph = torch.export.export(Loss(), (torch.randn(1, 4, 64), torch.randn(1, 4, 64))).graph
    assert not [n for n in graph.nodes if "ppclc" in str(n.target)]
    assert len(list(graph.nodes)) > 10
