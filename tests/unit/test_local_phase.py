"""The local phase: the same bits whoever holds the teacher, whatever learns beside, however often it is stopped."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ppclc.analysis.closed_forms import closed_form_bank, interval_adapters
from ppclc.analysis.refits import refitted, text_blocks
from ppclc.data.samples import Sample, Samples, open_samples
from ppclc.families import Family
from ppclc.loading.sources import open_source
from ppclc.models import apply_plan
from ppclc.passes import distill
from ppclc.passes.calibrate import CalibrateSettings, calibrate
from ppclc.passes.distill import DistillSettings
from ppclc.plan import CompressionPlan
from ppclc.records import CalibrationStats, Distilled
from ppclc.teachers import ResidentTeacher, StreamedTeacher, Teacher
from ppclc.training import local_phase
from ppclc.training.local_edits import LocalEdit, Teaching, Weights, interval_edit, relative_error, width_edits
from ppclc.training.local_phase import LocalPhase, LocalSettings, batch_states
from ppclc.training.trainer import CHECKPOINT, Trainer, TrainingSettings

NAME = "qwen_image"
STEPS = 8
PLAN = CompressionPlan.of(NAME, 6, [(1, 2), (3, 4)], [3], 6, ffn=[(0, "text"), (1, "image"), (5, "image")], adapters=[(3, 4)])


def quiet(*_: Any) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def samples(teacher_folder: Path, teacher: Any) -> Samples:
    return open_samples("noise", open_source(str(teacher_folder)), teacher, "train")


@pytest.fixture(scope="module")
def stats(teacher: Any, family: Family, samples: Samples) -> CalibrationStats:
    return calibrate(ResidentTeacher(teacher, family), samples, CalibrateSettings(samples=128, longest=4), quiet)


@pytest.fixture(scope="module")
def resident(teacher: Any, family: Family) -> Teacher:
    return ResidentTeacher(teacher, family)


@pytest.fixture
def streamed(teacher_folder: Path) -> Teacher:
    return StreamedTeacher(open_source(str(teacher_folder)), "float32")


def edits_of(teacher: Teacher, stats: CalibrationStats, plan: CompressionPlan = PLAN, weights: Weights = Weights()) -> list[LocalEdit]:  # noqa: B008
    """Every edit of the plan; width edits stand on intervals in closed form here."""
    teaching = Teaching(teacher.family, teacher.config, teacher.block_tensors)
    bank: dict[str, Any] = dict(closed_form_bank(stats, 1e-4, plan))
    starts = {}
    for i in plan.intervals:
        adapters = interval_adapters(stats, 1e-4, i.first, i.last) if i in plan.adapters else {}
        starts[i] = teacher.block_tensors(i.last) | adapters
        bank[plan.interval_key(i)] = starts[i]
    local = [interval_edit(teaching, plan, i, lambda i=i: starts[i], weights) for i in plan.intervals]  # type: ignore[misc]
    return local + width_edits(teaching, plan, bank, weights)


def learn(
    teacher: Teacher,
    edits: Sequence[LocalEdit],
    samples: Samples,
    work: Path,
    together: int = 1,
    progress: Any = quiet,
    training: TrainingSettings = TrainingSettings(),  # noqa: B008
    steps: int = STEPS,
) -> dict[str, Distilled]:
    works = [work / e.key for e in edits]
    for folder in works:
        folder.mkdir(parents=True, exist_ok=True)
    settings = LocalSettings(steps, 4, 3e-3, 3, 5, together, training)
    phase = LocalPhase(teacher, lambda g: samples.draw(4, g), edits, works, settings, progress)
    return {d.edit: d for d in phase.run()}


def same(a: dict[str, Distilled], b: dict[str, Distilled]) -> bool:
    assert a.keys() == b.keys()
    return all(
        x.losses == b[k].losses
        and x.tensors.keys() == b[k].tensors.keys()
        and all(torch.equal(v, b[k].tensors[n]) for n, v in x.tensors.items())
        for k, x in a.items()
    )


@pytest.fixture(scope="module")
def wanted(resident: Teacher, stats: CalibrationStats, samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Distilled]:
    return learn(resident, edits_of(resident, stats), samples, tmp_path_factory.mktemp("whole"))


class StopError(Exception):
    """Power goes."""


def stop_at(step: int) -> Callable[[float, str], None]:
    def progress(done: float, _: str) -> None:
        if round(done * STEPS) >= step:
            raise StopError

    return progress


@pytest.mark.slow
def test_every_edit_of_the_plan_is_there(wanted: dict[str, Distilled]) -> None:
    assert set(wanted) == {"interval-1-2", "interval-3-4-adapted", "text-3-4a-1-2", "ffn-0-text", "ffn-1-2-image", "ffn-5-image"}
    assert set(wanted["ffn-5-image"].tensors) == {"weight", "bias"}
    assert set(wanted["text-3-4a-1-2"].tensors) == {"text_in.weight", "text_in.bias", "text_out.weight", "text_out.bias"}
    assert {k for k in wanted["interval-3-4-adapted"].tensors if "adapter" in k} == {
        f"{s}_adapter.{p}" for s in ("image", "text") for p in ("weight", "bias")
    }


def test_on_a_gpu_edits_learn_in_the_thread_that_asks(
    resident: Teacher, stats: CalibrationStats, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread a step would plan attention anew in every step, and keep all those plans."""
    monkeypatch.setattr(local_phase, "_on_cpu", lambda chunk: False)
    edits, threads = edits_of(resident, stats)[:2], set()

    def seen(edit: LocalEdit) -> LocalEdit:
        def loss(*given: Any) -> Any:
            threads.add(threading.current_thread())
            return edit.loss(*given)

        return replace(edit, loss=loss)

    learn(resident, [seen(e) for e in edits], samples, tmp_path, steps=2)
    assert threads == {threading.current_thread()}


@pytest.mark.slow
@pytest.mark.parametrize("together", [3, 20])
def test_a_streamed_teacher_gives_the_same_bits(
    streamed: Teacher, stats: CalibrationStats, samples: Samples, wanted: dict[str, Distilled], tmp_path: Path, together: int
) -> None:
    assert same(learn(streamed, edits_of(streamed, stats), samples, tmp_path, together), wanted)


@pytest.mark.slow
def test_an_edit_knows_nothing_of_those_beside_it(
    resident: Teacher, stats: CalibrationStats, samples: Samples, wanted: dict[str, Distilled], tmp_path: Path
) -> None:
    for edit in edits_of(resident, stats):
        assert same(learn(resident, [edit], samples, tmp_path / edit.key), {edit.key: wanted[edit.key]})


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stops"), [("resident", [3]), ("resident", [2, 5, 7]), ("streamed", [3, 6])])
def test_a_stopped_phase_ends_on_the_same_bits(
    request: pytest.FixtureRequest,
    stats: CalibrationStats,
    samples: Samples,
    wanted: dict[str, Distilled],
    tmp_path: Path,
    stops: list[int],
    kind: str,
) -> None:
    teacher: Teacher = request.getfixturevalue(kind)
    for stop in stops:
        with pytest.raises(StopError):
            learn(teacher, edits_of(teacher, stats), samples, tmp_path, 2, stop_at(stop))
    # One edit lost its last checkpoint, as if power had gone between two of them.
    (tmp_path / "ffn-5-image" / CHECKPOINT).unlink()
    assert same(learn(teacher, edits_of(teacher, stats), samples, tmp_path, 2), wanted)


def test_accumulated_batches_are_one_step(resident: Teacher, stats: CalibrationStats, samples: Samples, tmp_path: Path) -> None:
    """Two batches a step: the mean of both losses, and as many steps."""
    edits = edits_of(resident, stats)[:1]
    twice = learn(resident, edits, samples, tmp_path / "a", training=TrainingSettings(accumulate=2), steps=1)
    generator = torch.Generator().manual_seed(5)
    drawn = [samples.draw(4, generator) for _ in range(2)]
    module = edits[0].build()
    values = [sum(v.item() for v in edits[0].loss(module, s).values()) for s in states(resident, edits, drawn)]
    assert twice["interval-1-2"].losses == [(1, pytest.approx(sum(values) / 2, rel=1e-6))]


def states(teacher: Teacher, edits: Sequence[LocalEdit], drawn: Sequence[Sample]) -> list[Any]:
    stops, inputs = {s for e in edits for s in e.stops}, {s for e in edits for s in e.text_inputs}
    _, sweep = list(teacher.sweep(drawn, stops, inputs))[-1]
    return [batch_states(teacher.family, sweep, drawn, n) for n in range(len(drawn))]


@pytest.mark.slow
def test_width_edits_learn_and_nothing_else_of_their_block_does(
    resident: Teacher, stats: CalibrationStats, samples: Samples, tmp_path: Path
) -> None:
    """On batches that they did not see; their start is the closed form, which gradient steps must better."""
    edits = [e for e in edits_of(resident, stats) if not e.key.startswith("interval")]
    learnt = learn(resident, edits, samples, tmp_path, steps=60)
    generator = torch.Generator().manual_seed(99)
    held = states(resident, edits, [samples.draw(16, generator) for _ in range(4)])

    def judged(edit: LocalEdit, module: Any) -> float:
        with torch.no_grad():
            return sum(v.item() for batch in held for v in edit.loss(module, batch).values())

    for edit in edits:
        module = edit.build()
        free = {n for n, p in module.named_parameters() if p.requires_grad}
        assert {n.split(".")[0] for n in free} <= {"text_in", "text_out", "img_ffn", "txt_ffn"}
        before = judged(edit, module)
        names = {n.removeprefix("img_ffn.").removeprefix("txt_ffn."): n for n in free}
        module.load_state_dict({names[k]: v for k, v in learnt[edit.key].tensors.items()}, strict=False)
        assert judged(edit, module) < before, edit.key


@pytest.mark.slow
def test_trained_edits_are_what_a_student_is_made_of(
    teacher: Any, family: Family, stats: CalibrationStats, wanted: dict[str, Distilled]
) -> None:
    bank: dict[str, Any] = dict(closed_form_bank(stats, 1e-4, PLAN))
    bank |= {k: d.tensors for k, d in wanted.items()}
    student = apply_plan(teacher, PLAN, bank).state_dict()
    for name, key in (("1.img_ffn", "ffn-1-2-image"), ("0.txt_ffn", "ffn-0-text"), ("3.img_ffn", "ffn-5-image")):
        assert torch.equal(student[f"transformer_blocks.{name}.weight"], wanted[key].tensors["weight"])
    assert torch.equal(student["transformer_blocks.2.text_in.bias"], wanted["text-3-4a-1-2"].tensors["text_in.bias"])
    adapted = wanted["interval-3-4-adapted"].tensors
    assert torch.equal(student["transformer_blocks.2.image_adapter.weight"], adapted["image_adapter.weight"])
    assert torch.equal(student["transformer_blocks.2.attn.to_q.weight"], adapted["attn.to_q.weight"])


@pytest.mark.slow
def test_networks_of_distilled_blocks_are_refitted(
    resident: Teacher, family: Family, stats: CalibrationStats, samples: Samples, wanted: dict[str, Distilled]
) -> None:
    """Against least squares on the rows themselves; better than the map that the interval's first block would have had."""
    teaching = Teaching(family, resident.config, resident.block_tensors)
    bank: dict[str, Any] = dict(closed_form_bank(stats, 1e-4, PLAN)) | {k: d.tensors for k, d in wanted.items()}
    generator = torch.Generator().manual_seed(3)
    drawn = [samples.draw(16, generator) for _ in range(6)]
    made = refitted(resident, teaching, PLAN, bank, drawn, 1e-9, 4)
    assert set(made) == {"ffn-1-2-image", "text-3-4a-1-2"}
    block, mids, targets = teaching.block(teaching.plan(PLAN, [PLAN.intervals[0]]), 1, bank), [], []
    block.img_norm2.register_forward_pre_hook(lambda _, args: mids.append(args[0]))
    _, sweep = list(resident.sweep(drawn, {1, 3}))[-1]
    for n in range(len(drawn)):
        given = sweep.states[1][n]
        block(hidden_states=given["image"], encoder_hidden_states=given["text"], **sweep.shared[n][1])
        targets.append(sweep.states[3][n]["image"])
    mid, target = torch.cat(mids).flatten(0, 1).double(), torch.cat(targets).flatten(0, 1).double()
    rows = torch.cat([mid, torch.ones(len(mid), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(rows, target - mid).solution
    assert torch.allclose(made["ffn-1-2-image"]["weight"].double(), solution[:-1].T, atol=2e-4)
    assert torch.allclose(made["ffn-1-2-image"]["bias"].double(), solution[-1], atol=2e-4)

    def error(maps: dict[str, torch.Tensor]) -> float:
        return relative_error(mid + mid @ maps["weight"].double().T + maps["bias"].double(), target).item()

    assert error(made["ffn-1-2-image"]) < error(closed_form_bank(stats, 1e-4, PLAN)["ffn-1-2-image"])


@pytest.mark.slow
def test_text_maps_of_distilled_blocks_are_refitted(
    resident: Teacher, family: Family, stats: CalibrationStats, samples: Samples, wanted: dict[str, Distilled]
) -> None:
    """Between what the student's own blocks make of the teacher's text states: against least squares on the rows themselves."""
    teaching = Teaching(family, resident.config, resident.block_tensors)
    closed = closed_form_bank(stats, 1e-4, PLAN)
    bank: dict[str, Any] = dict(closed) | {k: d.tensors for k, d in wanted.items() if k.startswith("interval")}
    generator = torch.Generator().manual_seed(3)
    drawn = [samples.draw(16, generator) for _ in range(6)]
    made = refitted(resident, teaching, PLAN, bank, drawn, 1e-12, 4)["text-3-4a-1-2"]
    assert torch.equal(made["text_out.weight"], closed["text-3-4a-1-2"]["text_out.weight"])  # between the teacher's states in any case
    blocks = {i.first: teaching.block(teaching.plan(PLAN, [i]), i.first, bank) for i in PLAN.intervals}
    _, sweep = list(resident.sweep(drawn, {1, 3}))[-1]
    rows: dict[int, list[torch.Tensor]] = {1: [], 3: []}
    for n, (x, t, conditioning) in enumerate(drawn):
        with torch.no_grad():
            given = {"temb": resident.model.time_text_embed(t.to(x), x)}  # type: ignore[attr-defined]
            mask = conditioning.get("encoder_hidden_states_mask")
            for number, block in blocks.items():
                own = family.groups[0].text_input(block, sweep.states[number][n]["text"], given).flatten(0, 1)
                rows[number].append(own if mask is None else own[mask.flatten().bool()])
    x, y = (torch.cat(rows[number]).double() for number in (1, 3))
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1), y).solution
    assert torch.allclose(made["text_in.weight"].double(), solution[:-1].T, atol=1e-3)
    assert torch.allclose(made["text_in.bias"].double(), solution[-1], atol=1e-3)


def test_text_edits_learn_between_what_the_students_own_blocks_make(
    resident: Teacher, streamed: Teacher, family: Family, samples: Samples, wanted: dict[str, Distilled]
) -> None:
    """The modulated text in a sweep is that of the student's block where an interval begins, else of the teacher's."""
    teaching = Teaching(family, resident.config, resident.block_tensors)
    blocks = text_blocks(teaching, PLAN, {k: d.tensors for k, d in wanted.items()})
    drawn = [samples.draw(4, torch.Generator().manual_seed(3))]
    seen = {}
    for name, teacher, given in (("own", resident, blocks), ("teacher", resident, lambda _: None), ("streamed", streamed, blocks)):
        _, sweep = list(teacher.sweep(drawn, {0, 1, 3}, {0, 1, 3}, given))[-1]
        seen[name] = {n: sweep.states[n][0]["text_input"] for n in (0, 1, 3)}
    assert torch.equal(seen["own"][0], seen["teacher"][0])
    assert all(torch.equal(seen["own"][n], seen["streamed"][n]) for n in (0, 1, 3))
    assert not any(torch.allclose(seen["own"][n], seen["teacher"][n], rtol=1e-3) for n in (1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "auto", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_in_half_precision_teaches_in_every_precision(
    dtype: torch.dtype, precision: str, make_teacher: Callable[..., Any], family: Family, samples: Samples, tmp_path: Path
) -> None:
    """Float32 products of the same rounded weights and states: the loss is near that of the model raised to float32."""
    losses = []
    half = make_teacher(6).to(dtype)
    for model in (half, copy.deepcopy(half).float()):
        teacher = ResidentTeacher(model, family)
        edit = interval_edit(
            Teaching(family, teacher.config, teacher.block_tensors),
            PLAN,
            PLAN.intervals[0],
            lambda t=teacher: t.block_tensors(1),
            Weights(),
        )
        settings = LocalSettings(1, 4, 1e-3, 10, 5, 1, TrainingSettings(precision=precision if model is half else "float32"))
        work = tmp_path / str(len(losses))
        work.mkdir()
        (made,) = LocalPhase(teacher, lambda g: samples.draw(4, g), [edit], [work], settings, lambda share, note: None).run()
        losses.append(made.losses[0][1])
        assert all(t.dtype == model.dtype for t in made.tensors.values())
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("fit", [1, 2, 4])
def test_edits_that_do_not_fit_beside_each_other_learn_some_at_a_time_to_the_same_bits(
    fit: int,
    resident: Teacher,
    stats: CalibrationStats,
    samples: Samples,
    wanted: dict[str, Distilled],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edits, shares, waves = edits_of(resident, stats), list[float](), list[int]()
    settings = DistillSettings(steps=STEPS, local_batch=4, learning_rate=3e-3, checkpoint_every=3, seed=5)
    passing = samples.tokens * 32 * 4 * 4
    largest = max(distill.training_bytes(e.build(), settings) + 2 * len(e.stops) * passing for e in edits)
    monkeypatch.setattr(distill, "room_for_edits", lambda teacher, device, passing: fit * largest)
    works = [tmp_path / e.key for e in edits]
    for work in works:
        work.mkdir()
    run = LocalPhase.run
    monkeypatch.setattr(LocalPhase, "run", lambda self: waves.append(len(self.edits)) or run(self))
    made = distill.distill_edits(resident, edits, STEPS, samples, settings, lambda done, _: shares.append(done), works)
    assert same({d.edit: d for d in made}, wanted)
    assert sum(waves) == len(edits)
    assert waves[0] >= fit
    assert len(waves) > 1 or fit == 4
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


def test_training_takes_what_its_tensors_take() -> None:
    """Weights, gradients, the optimizer's moments and the average, as they are after a step; what does not learn is there once."""
    module = torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.Linear(40, 30).requires_grad_(False))
    settings = TrainingSettings(ema=0.9)
    trainer = Trainer(module, 2, 1e-3, settings)
    trainer.step([lambda m: {"loss": m(torch.ones(3, 50)).square().mean()}])
    learned = [p for p in module.parameters() if p.requires_grad]
    held = sum(p.nbytes for p in module.parameters()) + sum(p.grad.nbytes for p in learned if p.grad is not None)
    held += sum(v.nbytes for p in learned for v in trainer.optimizer.state[p].values() if v.dim()) + sum(
        a.nbytes for a in trainer.average.values()
    )
    halves = 2 * sum(p.numel() for p in learned)  # of a forward in 16 bits
    assert distill.training_bytes(module, settings) == held + halves


def test_there_is_no_limit_on_a_cpu_nor_where_edits_come_one_by_one(
    resident: Teacher, streamed: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "free_bytes", lambda device: 1000)
    assert distill.room_for_edits(resident, "cpu", 1) is None
    assert distill.room_for_edits(streamed, "cuda", 1) is None
    assert distill.room_for_edits(resident, "cuda", 2) == 0.9 * 1000 - 2 * distill.STATES
