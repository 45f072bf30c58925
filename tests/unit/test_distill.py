"""Distillation: the loss by formula, training that can be stopped anywhere, and edits that do not know of each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ppclc.analysis.closed_forms import closed_form_bank
from ppclc.data import flow
from ppclc.data.batches import WHOLE
from ppclc.data.samples import Samples, open_samples
from ppclc.families import Family
from ppclc.kernels.distillation_loss import state_loss
from ppclc.loading.sources import open_source
from ppclc.models import apply_plan, block_state, groups_of
from ppclc.passes.analyze import probe_set
from ppclc.passes.calibrate import CalibrateSettings, calibrate
from ppclc.passes.distill import DistillSettings, Lesson, distill_edits, finetune, image_states, joint_terms
from ppclc.plan import CompressionPlan, Interval
from ppclc.quality import velocity_error
from ppclc.records import Distilled
from ppclc.teachers import ResidentTeacher
from ppclc.training.local_edits import LocalEdit, Teaching, interval_edit
from tests.tracing import trace

NAME = "qwen_image"
SHORT = DistillSettings(steps=9, finetune_steps=9, batch=4, checkpoint_every=3)
FIRST, SECOND = Interval(first=1, last=2), Interval(first=3, last=4)
LAST = Interval(first=4, last=5)


def quiet(*_: Any) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def samples(teacher_folder: Path, teacher: Any) -> Samples:
    return open_samples("noise", open_source(str(teacher_folder)), teacher, "train")


def edit_of(model: Any, family: Family, interval: Interval, settings: DistillSettings) -> LocalEdit:
    config = {"_class_name": type(model).__name__, **model.config}
    teaching = Teaching(family, config, lambda block: block_state(model.transformer_blocks[block]))
    plan = CompressionPlan.of(NAME, 6, [(interval.first, interval.last)])
    return interval_edit(teaching, plan, interval, lambda: block_state(model.transformer_blocks[interval.first]), settings.weights)


def local(model: Any, family: Family, interval: Interval, samples: Samples, work: Path, **changes: Any) -> Distilled:
    progress = changes.pop("progress", quiet)
    chosen = SHORT.model_copy(update=changes)
    edits = [edit_of(model, family, interval, chosen)]
    return distill_edits(ResidentTeacher(model, family), edits, chosen.steps, samples, chosen, progress, [work]).__next__()


def tune(
    model: Any,
    family: Family,
    plan: CompressionPlan,
    bank: Any,
    samples: Samples,
    settings: DistillSettings,
    work: Path,
    progress: Any = quiet,
) -> Distilled:
    return finetune(ResidentTeacher(model, family), apply_plan(model, plan, bank), samples, settings, progress, work)


def same(a: Distilled, b: Distilled) -> bool:
    return a.losses == b.losses and a.tensors.keys() == b.tensors.keys() and all(torch.equal(v, b.tensors[k]) for k, v in a.tensors.items())


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", [0.0, 0.1, 3.0])
def test_state_loss_is_its_formula_token_by_token(magnitude: float) -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 7, 5, generator=g)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1]] * 3, dtype=torch.float32)
    terms = []
    for s, t in zip(student.double().reshape(-1, 5).numpy(), teacher.double().reshape(-1, 5).numpy(), strict=True):
        norm_s, norm_t = (s @ s) ** 0.5, (t @ t) ** 0.5
        direction = ((s / norm_s - t / norm_t) ** 2).sum()  # equation 6, which is 2 - 2 cos
        terms.append(direction + magnitude * (norm_s / norm_t - 1) ** 2)
    assert state_loss(student, teacher, magnitude).item() == pytest.approx(sum(terms) / 21, rel=1e-5)
    kept = [v for v, m in zip(terms, mask.flatten().tolist(), strict=True) if m]
    assert state_loss(student, teacher, magnitude, mask).item() == pytest.approx(sum(kept) / 12, rel=1e-5)
    assert state_loss(student, teacher, magnitude, mask.bool()).item() == pytest.approx(sum(kept) / 12, rel=1e-5)


def test_state_loss_of_equal_states_is_zero_and_direction_sees_no_scale() -> None:
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    y = torch.randn(2, 4, 6, dtype=torch.float64)
    assert state_loss(x, x, 5.0).item() == pytest.approx(0, abs=1e-12)
    assert state_loss(x, 100 * x, 0.0).item() == pytest.approx(0, abs=1e-12)
    assert state_loss(3 * x, y / 7, 0.0).item() == pytest.approx(state_loss(x, y, 0.0).item(), rel=1e-12)
    assert state_loss(2 * x, x, 0.5).item() == pytest.approx(0.5, rel=1e-9)
    assert state_loss(-x, x, 0.0).item() == pytest.approx(4, rel=1e-9)
    assert torch.isfinite(state_loss(torch.zeros_like(x), torch.zeros_like(x), 1.0))


# -- training ----------------------------------------------------------------------------------------------------------


class StopError(Exception):
    """Power goes."""


def stop_after(step: int, steps: int) -> Callable[[float, str], None]:
    def progress(done: float, _: str) -> None:
        if round(done * steps) == step:
            raise StopError

    return progress


@pytest.mark.slow
@pytest.mark.parametrize("interval", [FIRST, LAST])
@pytest.mark.parametrize("stops", [[3], [5], [2, 4, 4, 7]])
def test_a_stopped_interval_goes_on_to_the_same_bits(
    teacher: Any, family: Family, samples: Samples, tmp_path: Path, stops: list[int], interval: Interval
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = local(teacher, family, interval, samples, tmp_path / "whole")
    for step in stops:
        with pytest.raises(StopError):
            local(teacher, family, interval, samples, tmp_path / "parts", progress=stop_after(step, 9))
    seen: list[float] = []
    again = local(teacher, family, interval, samples, tmp_path / "parts", progress=lambda done, _: seen.append(done))
    assert len(seen) == 9 - max(stops) // 3 * 3
    assert same(again, whole)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [7])
def test_a_stopped_finetune_goes_on_to_the_same_bits(teacher: Any, family: Family, samples: Samples, tmp_path: Path, stop: int) -> None:
    plan = CompressionPlan.of(NAME, 6, [(1, 2)])
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = tune(teacher, family, plan, {}, samples, SHORT, tmp_path / "whole")
    with pytest.raises(StopError):
        tune(teacher, family, plan, {}, samples, SHORT, tmp_path / "parts", stop_after(stop, 9))
    assert (tmp_path / "parts" / "checkpoint.safetensors").exists() == (stop >= 3)
    again = tune(teacher, family, plan, {}, samples, SHORT, tmp_path / "parts")
    assert same(again, whole)


# -- edits -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interval_knows_nothing_of_the_others_nor_of_global_chance(
    teacher: Any, family: Family, samples: Samples, tmp_path: Path
) -> None:
    for name in ("alone", "second", "after"):
        (tmp_path / name).mkdir()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    alone = local(teacher, family, FIRST, samples, tmp_path / "alone")
    torch.manual_seed(12345)
    second = local(teacher, family, SECOND, samples, tmp_path / "second")
    after = local(teacher, family, FIRST, samples, tmp_path / "after")
    assert same(alone, after)
    assert not same(alone, second)
    assert (alone.edit, second.edit) == ("interval-1-2", "interval-3-4")
    assert all(torch.equal(teacher.state_dict()[k], v) for k, v in before.items())
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.slow
def test_an_interval_learns(teacher: Any, family: Family, samples: Samples, tmp_path: Path) -> None:
    learnt = local(teacher, family, FIRST, samples, tmp_path, steps=40, batch=4)
    assert learnt.losses[-1][1] < 0.7 * learnt.losses[0][1]
    assert learnt.losses[-1][0] == 40
    plan = CompressionPlan.of(NAME, 6, [(1, 2)])
    probes = probe_set(samples, 32)
    plain = velocity_error(teacher, apply_plan(teacher, plan), probes)
    assert velocity_error(teacher, apply_plan(teacher, plan, {FIRST.key: learnt.tensors}), probes) < 0.8 * plain


def test_zero_steps_give_the_closed_form_student(teacher: Any, family: Family, samples: Samples, tmp_path: Path) -> None:
    untrained = local(teacher, family, SECOND, samples, tmp_path, steps=0)
    assert untrained.losses == []
    block = teacher.transformer_blocks[3].state_dict()
    assert all(torch.equal(v, block[k]) for k, v in untrained.tensors.items())
    plan = CompressionPlan.of(NAME, 6, [(3, 4)], [5], 6, True)
    stats = calibrate(ResidentTeacher(teacher, family), samples, CalibrateSettings(samples=64, longest=3), quiet)
    bank = closed_form_bank(stats, 1e-4, plan)
    tuned = tune(teacher, family, plan, bank, samples, SHORT.model_copy(update={"finetune_steps": 0}), tmp_path)
    wanted = apply_plan(teacher, plan, bank).state_dict()
    assert tuned.tensors.keys() == wanted.keys()
    assert all(torch.equal(v, tuned.tensors[k]) for k, v in wanted.items())


@pytest.mark.slow
def test_finetune_brings_the_student_nearer_to_the_teacher(teacher: Any, family: Family, samples: Samples, tmp_path: Path) -> None:
    plan = CompressionPlan.of(NAME, 6, [(1, 2), (4, 5)])
    probes = probe_set(samples, 32)
    student = apply_plan(teacher, plan)
    before = velocity_error(teacher, student, probes)
    settings = DistillSettings(finetune_steps=30, batch=4, finetune_learning_rate=3e-3)
    tuned = tune(teacher, family, plan, {}, samples, settings, tmp_path)
    student.load_state_dict(tuned.tensors)
    assert velocity_error(teacher, student, probes) < 0.7 * before


@pytest.mark.parametrize(("interval", "read"), [(LAST, False), (SECOND, True)])
def test_text_counts_unless_nothing_reads_it(
    teacher: Any, family: Family, samples: Samples, tmp_path: Path, interval: Interval, read: bool
) -> None:
    """Another text output of the interval's last block is another target, but not after the last block of all."""
    for name in ("plain", "other"):
        (tmp_path / name).mkdir()
    other = copy.deepcopy(teacher)
    other.transformer_blocks[interval.last].txt_mlp.net[2].weight.mul_(-3)
    plain = local(teacher, family, interval, samples, tmp_path / "plain", steps=3)
    assert same(plain, local(other, family, interval, samples, tmp_path / "other", steps=3)) != read


# -- the joint loss ----------------------------------------------------------------------------------------------------


def test_the_joint_loss_is_its_formula(teacher: Any, family: Family, samples: Samples) -> None:
    """Velocity, data and image states, each against the states that a trace of the student finds."""
    plan = CompressionPlan.of(NAME, 6, [(1, 2), (4, 5)])
    assert plan.ends == (1, 3, 4, 6)
    student = apply_plan(teacher, plan)
    settings = DistillSettings(data_weight=0.25, state_weight=0.5, magnitude=0.3)
    generator = torch.Generator().manual_seed(7)
    sample = samples.draw(3, generator)
    data = torch.randn(sample[0].shape, generator=generator)
    ((velocity, found),) = ResidentTeacher(teacher, family).outputs([sample], set(plan.ends))
    lesson = Lesson(sample, velocity, data, [found[end]["image"] for end in plan.ends])
    states = image_states(list(student.transformer_blocks), groups_of(student, family))
    terms = joint_terms(settings, states, student, lesson)
    assert states == []  # nothing of a step stays behind
    inputs = flow.inputs_for(student, *sample)
    seen, own = trace(student, family, inputs), trace(teacher, family, inputs)
    assert terms["velocity"].item() == pytest.approx(0.75 * (seen.velocity - own.velocity).square().mean().item(), rel=1e-5)
    assert terms["data"].item() == pytest.approx(0.25 * (seen.velocity - data).square().mean().item(), rel=1e-5)
    pairs = [(seen.states["image"][n + 1], own.states["image"][end]) for n, end in enumerate(plan.ends)]
    wanted = sum(state_loss(s, t, 0.3).item() for s, t in pairs) / 4
    assert terms["states"].item() == pytest.approx(0.5 * wanted, rel=1e-5)


def test_the_teacher_itself_has_no_joint_loss(teacher: Any, family: Family, samples: Samples) -> None:
    copied = apply_plan(teacher, CompressionPlan.of(NAME, 6))
    sample = samples.draw(3, torch.Generator().manual_seed(7))
    ((velocity, found),) = ResidentTeacher(teacher, family).outputs([sample], range(1, 7))
    lesson = Lesson(sample, velocity, None, [found[n]["image"] for n in range(1, 7)])
    states = image_states(list(copied.transformer_blocks), groups_of(copied, family))
    terms = joint_terms(DistillSettings(data_weight=0.5, state_weight=1.0), states, copied, lesson)
    assert set(terms) == {"velocity", "states"}  # without data there is no share for them
    assert terms["velocity"].item() == 0
    assert terms["states"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("data_weight", "asked"), [(0.5, True), (1.0, False)])
def test_the_teacher_is_not_asked_where_data_alone_teach(
    data_weight: float, asked: bool, teacher: Any, family: Family, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses are those that they are with its answers."""
    without = Samples.draw_with_target

    def with_data(self: Samples, batch: int, generator: torch.Generator, share: Any = WHOLE) -> tuple[Any, torch.Tensor]:
        sample, _ = without(self, batch, generator, share)
        return sample, torch.randn(sample[0].shape, generator=generator)

    monkeypatch.setattr(Samples, "draw_with_target", with_data)
    calls: list[int] = []
    by_blocks = ResidentTeacher(teacher, family)
    monkeypatch.setattr(
        by_blocks, "outputs", lambda batches, stops: calls.append(1) or ResidentTeacher(teacher, family).outputs(batches, stops)
    )
    settings, plan = DistillSettings(finetune_steps=1, batch=2, data_weight=data_weight), CompressionPlan.of(NAME, 6, [(1, 2)])
    trained = finetune(by_blocks, apply_plan(teacher, plan), samples, settings, quiet, tmp_path)
    assert bool(calls) is asked
    sample, data = samples.draw_with_target(2, torch.Generator().manual_seed(settings.seed + 1))
    lesson = Lesson(sample, by_blocks.outputs([sample], set())[0][0], data)
    terms = joint_terms(settings, [], apply_plan(teacher, plan), lesson)
    assert trained.losses == [(1, pytest.approx(sum(t.item() for t in terms.values())))]


@pytest.mark.slow
def test_states_help_a_student_to_follow_its_teacher(teacher: Any, family: Family, samples: Samples, tmp_path: Path) -> None:
    plan = CompressionPlan.of(NAME, 6, [(1, 2), (4, 5)])
    tuned = {}
    for weight in (0.0, 1.0):
        settings = DistillSettings(finetune_steps=20, batch=4, finetune_learning_rate=3e-3, state_weight=weight)
        student = apply_plan(teacher, plan)
        (tmp_path / str(weight)).mkdir()
        trained = finetune(ResidentTeacher(teacher, family), student, samples, settings, quiet, tmp_path / str(weight), ends=plan.ends)
        student.load_state_dict(trained.tensors)
        x, t, conditioning = samples.draw(16, torch.Generator().manual_seed(1))
        inputs = flow.inputs_for(student, x, t, conditioning)
        seen, own = trace(student, family, inputs), trace(teacher, family, inputs)
        pairs = zip(seen.states["image"][1:], (own.states["image"][end] for end in plan.ends), strict=True)
        tuned[weight] = sum(state_loss(s, t, 0.1).item() for s, t in pairs)
    assert tuned[1.0] < tuned[0.0]


@pytest.mark.slow
@pytest.mark.parametrize("edits", [{}, {"text_stream": [3], "modulation_rank": 6, "dead_code": True}], ids=["stock", "narrow"])
def test_gradient_checkpointing_runs_blocks_twice_and_changes_nothing(
    teacher: Any, family: Family, samples: Samples, tmp_path: Path, edits: dict[str, Any]
) -> None:
    plan = CompressionPlan.of(NAME, 6, [(1, 2)], **edits)
    stats = calibrate(ResidentTeacher(teacher, family), samples, CalibrateSettings(samples=64, longest=3), quiet)
    bank = closed_form_bank(stats, 1e-4, plan)
    tuned, calls = [], []
    for kept in (True, False):
        student, count = apply_plan(teacher, plan, bank), [0]

        def counted(*_: Any, count: list[int] = count) -> None:
            count[0] += 1

        student.transformer_blocks[0].register_forward_pre_hook(counted)
        settings = SHORT.model_copy(update={"gradient_checkpointing": not kept, "state_weight": 0.1})
        (tmp_path / str(kept)).mkdir()
        work = tmp_path / str(kept)
        tuned.append(finetune(ResidentTeacher(teacher, family), student, samples, settings, quiet, work, ends=plan.ends))
        calls.append(count[0])
    assert calls == [9, 18]
    assert [n for n, _ in tuned[0].losses] == [n for n, _ in tuned[1].losses]
    assert all(torch.allclose(v, tuned[1].tensors[k], rtol=1e-5, atol=1e-6) for k, v in tuned[0].tensors.items())


def test_a_local_step_takes_a_quarter_of_the_batch_unless_told() -> None:
    assert [DistillSettings(batch=b).local_samples for b in (64, 4, 1)] == [16, 1, 1]
    told = DistillSettings(local_batch=5)
    assert told.local_samples == 5
    assert told.local() == DistillSettings(batch=20).local()  # what counts is what a step takes
    assert told.local() != DistillSettings(batch=64).local()
    assert DistillSettings(batch=64, chunk=64).together(16) == 4
