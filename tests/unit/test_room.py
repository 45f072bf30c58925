"""What has no room on a device is told, or left out, before hours are spent; what has goes on as ever."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import fake_cuda
from benchmarks.fake_cuda import DEVICE
from ppclc import room
from ppclc.analysis import edit_costs, moments
from ppclc.analysis.closed_forms import closed_form_bank
from ppclc.analysis.edit_costs import EditCosts
from ppclc.analysis.moments import Moments, numbers_of, rows_of
from ppclc.analysis.refits import PairMoments
from ppclc.analysis.supernet import Supernet
from ppclc.analysis.trials import Trial, lessons
from ppclc.compiler import compress
from ppclc.data import flow
from ppclc.data import samples as samples_module
from ppclc.data.samples import TRAJECTORY_STEPS, Samples, open_samples
from ppclc.errors import OutputError, UnavailableError
from ppclc.families import Family
from ppclc.loading.published import published_config
from ppclc.loading.sources import Source, open_source
from ppclc.machine.devices import Ranks
from ppclc.models import apply_plan
from ppclc.passes.analyze import probe_set
from ppclc.passes.calibrate import CalibrateSettings, calibrate
from ppclc.plan import CompressionPlan
from ppclc.quality import SampledDistance
from ppclc.recipe import find_recipe, parse_recipe, read_recipe
from ppclc.records import CalibrationStats
from ppclc.room import analysis_here, check_finetune
from ppclc.screens.display import Display
from ppclc.teachers import ResidentTeacher
from ppclc.training.trainer import SAVING_SHARE, Saving
from tests.contracts.test_families import subject_of

H100 = 85 * 10**9


def quiet(*_: Any) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def qwen() -> Source:
    family, config = published_config("Qwen/Qwen-Image")
    return Source("Qwen/Qwen-Image", Path(), config, family)


@pytest.fixture(scope="module")
def source(teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("room") / "teacher"
    teacher.save_pretrained(folder)
    return open_source(str(folder))


@pytest.fixture(scope="module")
def noise(source: Source, teacher: Any) -> Samples:
    return open_samples("noise", source, teacher, "choose")


@pytest.fixture(scope="module")
def stats(teacher: Any, family: Family, noise: Samples) -> CalibrationStats:
    return calibrate(ResidentTeacher(teacher, family), noise, CalibrateSettings(samples=64, longest=4), quiet)


@pytest.mark.slow
@pytest.mark.parametrize(("total", "learns"), [(16 * 10**9, False), (10**12, True)])
def test_whole_models_are_trained_where_there_is_room_for_them(
    total: int, learns: bool, qwen: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "total_bytes", lambda device: total)
    free = parse_recipe({"model": {"path": "x", "dtype": "bfloat16"}, "target": {"parameters": 0.6}}, "free")
    assert analysis_here(free, qwen, "cuda") == (free.analysis if learns else free.analysis.untrained())
    fixed = read_recipe(find_recipe("qwen_image_12b"))
    assert analysis_here(fixed, qwen, "cuda") == fixed.analysis  # nothing is decided, so nothing trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "ranks", "told"),
    [
        ([], Ranks(device="cuda"), "takes 215 GB beside 40.9 GB of its teacher and more for what it computes, the GPU has 85 GB"),
        (["distill.optimizer=adamw8bit"], Ranks(device="cuda"), "takes 143 GB beside 40.9 GB"),
        (["distill.teacher=streamed"], Ranks(world=2, device="cuda", sharded=True), "takes 107 GB and more"),
        (["distill.teacher=streamed"], Ranks(world=4, device="cuda", sharded=True), None),
        (["distill.finetune_steps=0"], Ranks(device="cuda"), None),
        ([], Ranks(), None),
    ],
)
def test_a_fine_tune_that_no_gpu_holds_is_refused_with_the_ways_out(
    changes: list[str], ranks: Ranks, told: str | None, qwen: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "total_bytes", lambda device: H100)
    recipe = read_recipe(find_recipe("qwen_image_12b"), changes)
    intervals = recipe.plan.intervals
    assert isinstance(intervals, list)
    plan = CompressionPlan.of("qwen_image", 60, [(a, b) for a, b in intervals])
    if told is None:
        check_finetune(recipe, qwen, plan, ranks)
        return
    with pytest.raises(UnavailableError, match=r"distill\.finetune_steps = 1000") as caught:
        check_finetune(recipe, qwen, plan, ranks)
    assert told in str(caught.value)
    assert "distill.finetune_steps: 0, or more GPUs with --use_fsdp" in str(caught.value)


def test_a_target_that_the_fixed_intervals_alone_do_not_meet_is_left_to_the_analysis(source: Source, tmp_path: Path) -> None:
    """What else is free may meet it: the look at the fine-tune's room refuses nothing on that account."""
    recipe = {
        "model": {"path": source.path},
        "calibrate": {"source": "noise", "samples": 64, "longest": 3},
        "analyze": {"probes": 16, "trials": 0, "supernet_steps": 0},
        "target": {"parameters": 0.75},
        "plan": {"intervals": [[1, 2]], "modulation_rank": "none"},
    }
    run = compress(parse_recipe(recipe, "recipe"), "recipe", tmp_path / "out", Display(1, -1), until="analyze")
    assert run.plan is not None
    assert [(i.first, i.last) for i in run.plan.intervals] == [(1, 2)]
    assert run.plan.text_stream or run.plan.ffn


def test_a_fine_tune_that_is_done_is_not_asked_for_room(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after several GPUs, one goes on with what is left."""
    recipe = parse_recipe(
        {
            "model": {"path": source.path},
            "calibrate": {"source": "noise", "samples": 64, "longest": 3},
            "plan": {"intervals": [[1, 2]], "text_stream": "none", "ffn": "none", "modulation_rank": "none"},
            "distill": {"steps": 1, "finetune_steps": 1, "batch": 2},
        },
        "recipe",
    )
    asked: list[str] = []
    for module in ("run", "compiler", "distilling"):
        monkeypatch.setattr(f"ppclc.{module}.check_finetune", lambda *_, module=module: asked.append(module))
    for wanted in (["run", "compiler", "distilling"], []):
        asked.clear()
        compress(recipe, "recipe", tmp_path / "out", Display(1, -1), until="distill")
        assert asked == wanted


def test_costs_are_the_same_where_states_of_all_blocks_have_no_room(
    teacher: Any, family: Family, noise: Samples, stats: CalibrationStats, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for free in (10**12, 0):
        monkeypatch.setattr(edit_costs, "free_bytes", lambda device, free=free: free)
        costs = EditCosts(ResidentTeacher(teacher, family), probe_set(noise, 20), stats, 1e-4)
        assert len(costs._states) == (7 if free else 1)
        intervals = costs.intervals([(1, 2), (0, 2), (3, 5)])
        found[free] = [*(errors for errors, _ in intervals.values()), *costs.dropped([0, 4]), *costs.ffns([(2, "image")])]
        assert len(costs._states) <= (7 if free else 2)
    assert all(torch.equal(a, b) for a, b in zip(found[10**12], found[0], strict=True))


@pytest.mark.slow
@pytest.mark.skipif(bool(fake_cuda.lacks()), reason=fake_cuda.lacks())
@pytest.mark.parametrize("name", ["qwen_image", "flux", "sd3"])
def test_a_plan_with_every_edit_is_applied_to_a_model_on_a_gpu(name: str) -> None:
    """Closed forms come from the CPU, weights are on the device: the student's are there too."""
    subject = subject_of(name)
    resident = ResidentTeacher(subject.model, subject.family)
    drawn = open_samples("noise", SimpleNamespace(family=subject.family, config=subject.config), subject.model, "choose")  # type: ignore[arg-type]
    made = calibrate(resident, drawn, CalibrateSettings(samples=64, longest=3), quiet)
    plan = CompressionPlan.of(name, resident.num_blocks, [], [], 4, subject.family.has_dead_code)
    bank = closed_form_bank(made, 1e-4, plan)
    model = subject.model.to("meta")
    with fake_cuda.fake_cuda(10**9):
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE))
        student = apply_plan(model, plan, bank)
    assert {p.device for p in student.parameters()} == {DEVICE}


@pytest.mark.skipif(bool(fake_cuda.lacks()), reason=fake_cuda.lacks())
def test_text_maps_are_fitted_anew_where_the_states_are() -> None:
    with fake_cuda.fake_cuda(10**9), fake_cuda.Counted() as found:
        pairs = PairMoments()
        for _ in range(2):
            pairs.add(*(torch.empty(2, 5, 8, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)), None)
        maps = pairs.text_in(1e-4)
    assert {tensor.device.type for tensor in maps.values()} == {"cpu"}
    assert sum(nbytes for _, nbytes in found.to_host) == 4 * (8 * 8 + 8)  # the maps and nothing else


def test_trajectories_send_each_sample_as_far_as_it_goes(teacher: Any, noise: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that have stopped are not sent on, and the last step's result is not asked for; where they stop is where the sampler would be."""
    rows: list[int] = []
    predict = flow.predict
    monkeypatch.setattr(samples_module.flow, "predict", lambda model, x, t, given: rows.append(len(x)) or predict(model, x, t, given))
    start, given = noise.starts(4, torch.Generator().manual_seed(0))
    stop = torch.tensor([0, 3, 1, 3])
    at, t, _ = noise._trajectory(start, given, stop)
    assert rows == [3, 2, 2]
    assert torch.allclose(t, 1 - stop / TRAJECTORY_STEPS)
    assert torch.equal(at[0], start[0])
    x = start
    for i in range(3):
        x = x - predict(teacher, x, torch.full((4,), 1 - i / TRAJECTORY_STEPS), given) / TRAJECTORY_STEPS
    assert torch.allclose(at[[1, 3]], x[[1, 3]], atol=1e-5)


def test_checkpoints_take_a_small_share_of_the_time() -> None:
    now = [0.0]
    saving = Saving(10, lambda: now[0])

    def save(seconds: float) -> None:
        now[0] += seconds

    assert not saving.due(5)
    assert saving.due(10)
    saving.timed(partial(save, 3.0))
    now[0] += 3 / SAVING_SHARE - 1
    assert not saving.due(20)
    now[0] += 2
    assert saving.due(30)
    saving.timed(partial(save, 0.0))
    assert saving.due(40)


def test_a_disk_without_room_for_sums_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("ppclc.analysis.moments.LARGE_BYTES", 1)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises((OutputError, UnavailableError), match=r"No space left|no room|full"):
        Moments(tmp_path).accumulate("sum", torch.ones(8, 8))


def test_sums_in_files_have_their_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppclc.analysis.moments.LARGE_BYTES", 1)
    given, allocate = list[int](), moments.allocate

    def watched(descriptor: int, nbytes: int) -> None:
        allocate(descriptor, nbytes)
        given.append(os.fstat(descriptor).st_blocks * 512)

    monkeypatch.setattr(moments, "allocate", watched)
    Moments(tmp_path).accumulate("sum", torch.ones(512, 512, dtype=torch.float64))
    assert given
    assert given[0] >= 8 * 512**2


def test_rows_are_told_by_a_mask_or_by_their_numbers() -> None:
    x = torch.randn(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]])
    numbers = numbers_of(mask, torch.device("cpu"))
    assert numbers is not None
    assert numbers.tolist() == [0, 1, 8, 10, 11]
    assert torch.equal(rows_of(x, numbers), rows_of(x, mask))
    assert numbers_of(None, torch.device("cpu")) is None


@pytest.fixture
def in_half(make_teacher: Callable[..., Any]) -> Any:
    return make_teacher(3).to(torch.bfloat16)


def test_a_trial_of_a_model_in_half_precision_takes_small_steps(in_half: Any, noise: Samples) -> None:
    """Steps of 1e-6 on weights of 0.1 would be lost in bfloat16; what is judged has its products in it."""
    taught = lessons(in_half, noise, 3, 4)
    trial = Trial(CompressionPlan.of("qwen_image", 3), {}, 1e-6)
    trial.prepare(in_half)
    before = {n: p.detach().clone() for n, p in trial.student.named_parameters()}
    seen: list[torch.dtype] = []
    trial.student.proj_out.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    judge, stopped = SampledDistance.of_teacher(in_half, [noise.starts(2, torch.Generator().manual_seed(1))], 2), threading.Event()
    trial.advance(taught, 3, judge, stopped)
    moved = [n for n, p in trial.student.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > 0.9 * len(before)
    assert set(seen) == {torch.bfloat16}


def test_a_supernet_of_a_model_in_half_precision_has_weights_in_float32(in_half: Any, family: Family, noise: Samples) -> None:
    net = Supernet(in_half, family, 1e-6)
    before = net.model.proj_out.weight.detach().clone()
    net.train(lessons(in_half, noise, 2, 4), lambda: (1,), quiet)
    assert net.model.proj_out.weight.dtype == torch.float32
    assert not torch.equal(net.model.proj_out.weight, before)
    assert in_half.proj_out.weight.dtype == torch.bfloat16
