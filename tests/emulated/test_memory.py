"""Memory of a GPU that is too small, emulated: what there is no room for goes in smaller parts to the same values, or is told in one message."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import emulated_cuda
from ppclc import commands, room
from ppclc.analysis import moments
from ppclc.compiler import compress
from ppclc.costs.predictions import predict
from ppclc.data.samples import Samples, open_samples, parts_that_fit
from ppclc.errors import UnavailableError
from ppclc.forecast import memory as forecast_memory
from ppclc.forecast.work import Work
from ppclc.kernels.distillation_loss import one
from ppclc.loading.sources import open_source
from ppclc.machine.devices import Ranks, total_bytes
from ppclc.models import load_source
from ppclc.passes import bench as bench_pass
from ppclc.passes import calibrate as calibrate_pass
from ppclc.passes import distill as distill_pass
from ppclc.passes.distill import DistillSettings, edits_that_fit
from ppclc.plan import CompressionPlan
from ppclc.recipe import parse_recipe
from ppclc.screens.display import Display
from ppclc.teachers import ResidentTeacher
from ppclc.training.trainer import Trainer, TrainingSettings
from tests.e2e.test_pipelines import recipe, with_images
from tests.emulated.test_chain import BENCH

pytestmark = [
    pytest.mark.skipif(not emulated_cuda.started(), reason="pytest -p tests.emulated.plugin runs it, where there is a C++ compiler"),
    pytest.mark.slow,
]
CUDA = Ranks(device="cuda")


@pytest.fixture
def device() -> Iterator[emulated_cuda.Device]:
    """The device, with as much memory as it has again afterwards."""
    found = emulated_cuda.start()
    gc.collect()
    try:
        yield found
    finally:
        found.limit(emulated_cuda.MEMORY)


def peak_of(device: emulated_cuda.Device, run: Callable[[], Any]) -> int:
    gc.collect()
    before = device.held()
    device.reset_peak()
    run()
    return device.peak() - before


def test_a_training_that_is_done_leaves_nothing(device: emulated_cuda.Device) -> None:
    one(torch.device("cuda", 0), torch.float32)  # stays for good
    before = device.held()
    gc.disable()
    try:
        trainer = Trainer(nn.Linear(256, 256), 1, 1e-3, TrainingSettings(), CUDA)
        trainer.step([lambda m: {"loss": m(torch.ones(2, 256, device="cuda")).square().mean()}])
        assert device.held() > before + 4 * 3 * 256**2
        del trainer
        assert device.held() == before
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Samples]:
    """The same prompts for a teacher on the CPU and for one on the device."""
    folder = with_images("sd3", tmp_path_factory.mktemp("prompts"))
    (folder / "prompts.txt").write_text("\n".join(f"a cat in front of house {i}" for i in range(40)))
    given = recipe(folder) | {"export": []}
    given["calibrate"] = {"source": "prompts", "path": str(folder / "prompts.txt"), "resolution": [16, 32], "samples": 48, "longest": 2}
    run = compress(parse_recipe(given, "recipe"), "recipe", folder / "out", Display(0, -1), until="calibrate")
    on_cpu = ResidentTeacher(run.teacher, run.source.family)
    source = open_source(str(folder / "pipeline"))
    on_gpu = ResidentTeacher(load_source(source, "float32").to("cuda"), source.family)
    return {d: open_samples("prompts", source, t.model, "train", run.cache) for d, t in (("cpu", on_cpu), ("cuda", on_gpu))}


def test_trajectories_go_through_the_teacher_in_parts_that_have_room(prompts: dict[str, Samples], device: emulated_cuda.Device) -> None:
    draw = {where: partial(s.draw, 32, torch.Generator().manual_seed(3)) for where, s in prompts.items()}
    wanted = draw["cpu"]()
    found: list[Any] = []
    whole = peak_of(device, lambda: found.append(draw["cuda"]()))
    device.limit(device.held() + whole // 3)
    draw["cuda"] = partial(prompts["cuda"].draw, 32, torch.Generator().manual_seed(3))
    small = peak_of(device, lambda: found.append(draw["cuda"]()))
    assert small < whole / 3
    for x, t, _ in found:
        torch.testing.assert_close(x, wanted[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(t, wanted[1])


def test_parts_hold_every_sample_once(prompts: dict[str, Samples], device: emulated_cuda.Device) -> None:
    sample = prompts["cpu"].draw(10, torch.Generator().manual_seed(0))
    device.limit(device.held() + 40_000)
    parts = parts_that_fit(sample, "cuda", prompts["cpu"].source)
    assert len(parts) > 1
    assert len({len(t) for _, t, _ in parts[:-1]}) <= 1
    assert len(parts[0][1]).bit_count() == 1  # a power of two
    assert torch.equal(torch.cat([x for x, _, _ in parts]), sample[0])
    assert len(parts_that_fit(sample, "cpu", prompts["cpu"].source)) == 1


@pytest.mark.parametrize("accumulate", [1, 4])
def test_states_of_all_batches_of_a_step_are_reckoned_with(accumulate: int) -> None:
    class Edit:
        stops = (0, 1)

        def build(self) -> nn.Module:
            return nn.Linear(10, 10)

    settings = DistillSettings(accumulate=accumulate)
    one = 110 * 18 + 2 * accumulate * 2 * 1000
    edits: Any = [Edit()] * 5
    assert edits_that_fit(edits, 3 * one, settings, 1000) == 3
    assert edits_that_fit(edits, 3 * one - 1, settings, 1000) == 2


def given(folder: Path, **changes: Any) -> Any:
    found = recipe(folder) | {"export": [], "bench": BENCH}
    for key, value in changes.items():
        found[key] = found.get(key, {}) | value
    return parse_recipe(found, "recipe")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with a run in `out` that is done but for its bench and report. Tests go on with a copy of it."""
    folder = with_images("sd3", tmp_path_factory.mktemp("judged"))
    compress(given(folder), "recipe", folder / "out", Display(0, -1), "verify", CUDA)
    return folder


def test_a_bench_without_room_costs_the_report_nothing_but_its_latencies(
    judged: Path, tmp_path: Path, device: emulated_cuda.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is full of something else by then."""
    folder = judged
    shutil.copytree(judged / "out", tmp_path / "out")
    start = partial(compress, given(folder), "recipe", tmp_path / "out", Display(0, -1), ranks=CUDA)
    bench_models = bench_pass.bench_models

    def full(*args: Any, **more: Any) -> Any:
        device.limit(device.held() + 100_000)
        return bench_models(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(bench_pass, "bench_models", full)
        run = start()
    (told,) = run.failed
    assert told.startswith("bench failed: ")
    assert run.lacked
    assert "the GPU has no memory left" in told
    assert "wanted a smaller bench.size" in told
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert report["bench"] == []
    assert report["quality"]["velocity_error"]["student"] > 0
    device.limit(emulated_cuda.MEMORY)
    run = start()  # the same command again, once there is room
    assert not run.failed
    assert len(json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["bench"]) == 2


@pytest.mark.parametrize(("at", "gate", "wanted"), [("run_bench", 100, 3), ("work_of", 1e-6, 1)])
def test_memory_that_runs_out_within_a_bench_costs_no_report(
    at: str, gate: float, wanted: int, judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def runs_out(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_pass, at, runs_out)
    shutil.copytree(judged / "out", tmp_path / "out")
    asked = recipe(judged) | {"export": [], "bench": BENCH}
    asked["verify"]["gates"] = {"ssim": {"drop_percent": gate}}  # which goes first where it fails
    (tmp_path / "r.yaml").write_text(json.dumps(asked))
    code, document = commands.compress(str(tmp_path / "r.yaml"), [], tmp_path / "out", "report", 0)
    assert code == wanted
    assert document is not None
    assert document["student"]["parameters"] < document["teacher"]["parameters"]
    assert "bench failed: bench: the GPU has no memory left (CUDA out of memory); wanted a smaller bench.size" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["bench"] == []


def test_a_run_that_goes_on_draws_trajectories_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is brought there before what linear networks are fitted to is drawn, also where all before that was done by an earlier run."""
    folder = with_images("qwen_image", tmp_path)
    (folder / "prompts.txt").write_text("\n".join(f"a cat in front of house {i}" for i in range(12)))
    prompts = {"source": "prompts", "path": str(folder / "prompts.txt"), "resolution": [16, 32], "samples": 16, "longest": 3}
    plan = {"intervals": [[0, 1]], "ffn": [{"block": 0, "stream": "image"}], "text_stream": "none", "modulation_rank": "none"}
    asked = given(
        folder, calibrate=prompts, plan=plan, target={"parameters": 0.99}, distill={"steps": 1, "width_steps": 1, "finetune_steps": 0}
    )
    start = partial(compress, asked, "recipe", tmp_path / "out", Display(0, -1), "distill", CUDA)
    refit, drawn = distill_pass.refit_samples, Samples._trajectory
    places: list[str] = []

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distill_pass, "refit_samples", stopped)
        with pytest.raises(KeyboardInterrupt):
            start()

    def seen(self: Samples, *args: Any) -> Any:
        places.append(self.teacher.device.type)
        return drawn(self, *args)

    def fitted(*args: Any, **more: Any) -> Any:
        monkeypatch.setattr(Samples, "_trajectory", seen)
        return refit(*args, **more)

    monkeypatch.setattr(distill_pass, "refit_samples", fitted)
    start()
    assert places
    assert set(places) == {"cuda"}


def test_memory_that_runs_out_names_the_pass_and_what_takes_less(tmp_path: Path, device: emulated_cuda.Device) -> None:
    folder = with_images("sd3", tmp_path)
    start = partial(compress, given(folder), "recipe", tmp_path / "out", Display(0, -1), ranks=CUDA)
    start(until="calibrate")
    gc.collect()
    teacher = sum(f.stat().st_size for f in (folder / "pipeline" / "transformer").glob("*.safetensors"))
    device.limit(device.held() + int(1.1 * teacher))
    with pytest.raises(
        UnavailableError, match=r"^analyze: the GPU has no memory left .*; wanted fewer analyze\.probes, .*teacher: streamed"
    ):
        start()
    device.limit(teacher // 2)
    with pytest.raises(UnavailableError, match=r"^distill\.teacher = 'resident': its weights take .*; wanted distill\.teacher: streamed"):
        compress(given(folder), "recipe", tmp_path / "other", Display(0, -1), ranks=CUDA)
    assert not (tmp_path / "other").exists()


def test_training_whole_models_is_left_out_where_a_batch_has_no_room(tmp_path: Path, device: emulated_cuda.Device) -> None:
    """What a step computes counts beside the weights, and covers what trials and the supernet take."""
    folder = with_images("sd3", tmp_path)
    learning = {"analyze": {"probes": 16, "supernet_steps": 2, "supernet_sets": 2, "trials": 2, "trial_steps": 3}, "distill": {"batch": 32}}
    asked = given(folder, **learning)
    source = open_source(str(folder / "pipeline"))

    def learns(nbytes: int) -> bool:
        device.limit(nbytes)
        return room.analysis_here(asked, source, "cuda").learns

    low, high = 0, 2**32
    while high - low > 1000:
        middle = (low + high) // 2
        low, high = (low, middle) if learns(middle) else (middle, high)
    device.limit(emulated_cuda.MEMORY)
    taken = peak_of(device, lambda: compress(asked, "recipe", tmp_path / "out", Display(0, -1), until="analyze", ranks=CUDA))
    assert taken < high
    assert total_bytes("cuda") == emulated_cuda.MEMORY


@pytest.mark.parametrize(("chosen", "small"), [("triton", False), ("triton", True), ("torch", False)])
def test_sums_that_kernels_make_are_predicted_with_half_the_bytes(
    chosen: str, small: bool, make_teacher: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products in float32, those of networks and of few states in float64."""
    make_teacher(4).save_pretrained(tmp_path / "teacher")
    given = {
        "model": {"path": str(tmp_path / "teacher")},
        "calibrate": {"source": "noise", "samples": 512, "longest": 3},
        "kernels": chosen,
    }
    wanted, source = parse_recipe(given | {"target": {"parameters": 0.8}}, "r"), open_source(str(tmp_path / "teacher"))
    for module in (moments, forecast_memory, calibrate_pass):
        monkeypatch.setattr(module, "TOGETHER", 2**24 if small else 0)
    run = compress(wanted, "r", tmp_path / "out", Display(0, -1), until="calibrate", ranks=CUDA)
    assert run.stats is not None
    plan = CompressionPlan.of(source.family.name, 4)
    model = predict(source.family, source.config, plan, "float32")
    made = sum(tensor.nbytes for tensor in run.stats.tensors.values())
    predicted = forecast_memory.moment_bytes(Work(wanted, source, plan, model, model))
    assert (predicted >= made) if small else predicted == pytest.approx(made, rel=0.005)  # but for what the time embedding is summed up in
    assert forecast_memory.sums_by_kernel(Work(wanted, source, plan, model, model)) == (chosen == "triton" and not small)
