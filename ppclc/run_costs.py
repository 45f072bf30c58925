"""What `ppclc compress` will take for a recipe: seconds by pass, peak memory, disk. Nothing of the recipe is run.

Work is counted in forwards of one sample and turned into seconds by a short measurement of this machine: the
configuration itself with random weights where it is small, else one matrix product of its width. `STAGES` holds
one function a pass; what a pass does more or less of is changed there.

Constants were fitted to runs of the embedded teacher's recipe on two cores of a x86-64 server. Source: ours.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from ppclc import edit_costs, trials
from ppclc.block_costs import Call, blocks_by_group, default_size, example_call, width_of
from ppclc.budget import allows
from ppclc.classes import DTYPES, count_parameters, empty_model, model_outline, random_model, student_config
from ppclc.detection import group_ranges, removed_by
from ppclc.devices import cores
from ppclc.edit_costs import kept_choices
from ppclc.families import STREAMS, Family
from ppclc.moments import TOGETHER
from ppclc.passes import calibrate
from ppclc.plan import CompressionPlan
from ppclc.predictions import Prediction, activation_bytes
from ppclc.reach import MomentCounts, moment_counts, reach_of
from ppclc.recipe import Recipe
from ppclc.samples import TRAJECTORY_STEPS
from ppclc.selection import Span
from ppclc.sources import Source
from ppclc.teachers import HELD_BLOCKS, HELD_BYTES, PASSING_BYTES

SMALL_PARAMETERS = 200_000_000
"""Models up to this size are built to be timed; of larger ones the operations are counted."""
BATCH, JUDGE_BATCH = calibrate.BATCH, 256
"""Samples of a forward in calibration and probing, and in the judging of a task."""
JUDGE_DRAWS = 4
"""Forwards a scene for the held-out loss of a task."""
CALL_S, TRAINING_CALL_S = 0.3, 0.5
"""Longest single forward, and training step, of the measurement, as guessed from one sample alone."""
TRAINING_RATIO = 3.5
"""Forward and backward over a forward, where that is not measured."""
MOMENT_OVERHEAD = 4
"""Time of a batch's moments over that of their products alone."""
SIDE_BY_SIDE = 1.1
"""What threads that run beside each other lose."""
EXPORT_BLOCK_S, EXPORT_S = 3.2, 0.5
"""Capture, conversion, check and comparison of a model in one back end: by block, and beside blocks."""
PYTHON_REFERENCE_S = 0.035
"""Time of `python_seconds` where the constants were fitted."""
OTHER_S = {"calibrate": 1.0, "analyze": 4.0, "distill": 0.5, "slice": 0.4, "verify": 3.0, "export": 0.0, "bench": 1.5, "report": 2.0}
"""Seconds of a pass beside the work that is counted: reading, writing, statistics, figures."""
DISK_BYTES_PER_S = 500e6

LIBRARY_BYTES, TASK_BYTES, EXPORTER_BYTES = 450_000_000, 100_000_000, 200_000_000
"""Resident memory of Python with PyTorch and diffusers; of a task's data and judge; of an exporter's libraries."""
KEPT_BYTES = 256_000_000
"""Most of freed memory that the allocator keeps: larger pieces go back to the system."""
JUDGE_SCENE_BYTES = 65_000
"""Activations of the judge, a scene."""
GRAPH_BLOCK_BYTES, REPORT_BYTES = 15_000, 400_000


class RunCosts(BaseModel):
    """Predicted costs of a whole run; `seconds` by pass."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    peak_bytes: int
    disk_bytes: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Speeds:
    """How fast this machine is on two models.

    teacher_s, student_s: a sample of a forward in a batch. single_teacher_s, single_student_s: a forward of batch 1.
    training: a training step over a forward. crowded: a sample in a judge's batch over one in a smaller batch.
    products_per_s: multiply-adds of a product of moments, twice. python: time of plain Python over the reference.
    """

    teacher_s: float
    student_s: float
    single_teacher_s: float
    single_student_s: float
    training: float
    crowded: float
    products_per_s: float
    python: float


@dataclass(frozen=True)
class Work:
    """What the passes have before them."""

    recipe: Recipe
    source: Source
    plan: CompressionPlan
    teacher: Prediction
    student: Prediction
    speeds: Speeds
    lanes: int

    @property
    def blocks(self) -> int:
        """Blocks of the teacher."""
        return self.plan.num_blocks

    @property
    def judged(self) -> bool:
        """Whether the model has a task that judges images."""
        return self.source.task is not None

    @property
    def targeted(self) -> bool:
        """Whether the analysis is to reach a target, and so weighs what is left free."""
        return self.recipe.target.is_given

    @cached_property
    def moments(self) -> MomentCounts:
        """What the calibration keeps."""
        recipe, family, config = self.recipe, self.source.family, self.source.config
        reach = reach_of(family, config, recipe.plan, self.targeted, recipe.analyze.reading)
        return moment_counts(family, config, recipe.calibrate.longest, reach)

    @cached_property
    def draw_s(self) -> float:
        """Seconds that a sample takes to be drawn, beside the teacher's own forward."""
        return TRAJECTORY_STEPS * self.speeds.teacher_s if self.recipe.calibrate.source == "prompts" else 0.0

    def beside(self, *seconds: float) -> float:
        """Wall time of things that run beside each other in threads of their own."""
        return max(max(seconds), sum(seconds) / min(self.lanes, len(seconds))) * (SIDE_BY_SIDE if len(seconds) > 1 else 1)


def run_costs(recipe: Recipe, source: Source, plan: CompressionPlan, teacher: Prediction, student: Prediction) -> RunCosts:
    """Costs of a whole run from nothing, its plan being known; measures this machine for two or three seconds."""
    speeds = measure_speeds(source.family, source.config, plan, recipe.model.dtype)
    work = Work(recipe, source, plan, teacher, student, speeds, max(1, cores() // torch.get_num_threads()))
    seconds = {name: OTHER_S[name] * speeds.python + stage(work) for name, stage in STAGES.items()}
    return RunCosts(peak_bytes=peak_bytes(work), disk_bytes=disk_bytes(work), seconds=seconds)


def calibrate_seconds(work: Work) -> float:
    """The teacher on every sample, and the products of its states."""
    settings = work.recipe.calibrate
    family, width = work.source.family, width_of(work.source.config)
    size, made = default_size(family), work.moments
    tokens = {"image": size["height"] * size["width"], "text": size["text"]}
    every = sum(rows * made.near * (2 if made.groups > 1 else 1) for rows in tokens.values())
    some = tokens["image"] * made.far["image"] + tokens["text"] * (made.far["text"] + made.far["text_input"])
    some += sum(rows * made.ffn[stream] for stream, rows in tokens.items())
    products = MOMENT_OVERHEAD * (every + some / calibrate.far_every(settings.samples))
    return settings.samples * (work.speeds.teacher_s + work.draw_s + 2 * products * width**2 / work.speeds.products_per_s)


def analyze_seconds(work: Work) -> float:
    """The teacher's forwards that the analysis spends on costs, what its trainings are taught and judged by, the supernet, then trials."""
    settings = work.recipe.analysis
    tried = trial_students(work) or start_students(work)
    steps = max(settings.supernet_steps if shares_weights(work) else 0, settings.trial_steps if tried else 0)
    judging = settings.probes * TRAJECTORY_STEPS if steps else 0
    taught = steps * work.recipe.distill.batch * (work.speeds.teacher_s + work.draw_s) + judging * work.speeds.teacher_s
    costs = analyze_forwards(work) * work.speeds.teacher_s + settings.probes * work.draw_s
    return costs + taught + _supernet_seconds(work) + _trial_seconds(work)


def analyze_forwards(work: Work) -> float:
    """Forwards of one sample, in whole teachers: intervals under the budget, every text run, rank and network, the probes themselves."""
    settings, wanted, blocks, free = work.recipe.analysis, work.recipe.plan, work.blocks, work.targeted
    longest = min(work.recipe.calibrate.longest, blocks)
    forwards = 1.0
    if wanted.text_stream == "auto" and free:
        forwards += max(0, min(8, longest - 1, len(work.source.family.text_blocks(work.source.config)) - 1))
    if work.source.family.modulations and (isinstance(wanted.modulation_rank, int) or (wanted.modulation_rank == "auto" and free)):
        forwards += max(0, (width_of(work.source.config) - 1).bit_length() - 2)
    if wanted.ffn == "auto" and free:
        # A network made linear is followed from its own block on.
        forwards += sum((blocks - b) / blocks * len(work.source.family.ffn_streams(work.source.config, b)) for b in range(blocks))
    spent = settings.probes * forwards
    if wanted.intervals != "auto":
        return spent
    if settings.strategy != "output_error":
        return spent + settings.probes * blocks * 1.5
    if shares_weights(work):
        spent += settings.probes * (blocks - 1) / 2  # every block left out on its own
    return spent + min(settings.budget, sum(_interval_forwards(work, *span) for span in _intervals(work)))


def _intervals(work: Work) -> list[Span]:
    """Every interval that the recipe allows, short ones first."""
    longest = min(work.recipe.calibrate.longest, work.blocks)
    ranges = group_ranges(work.source.family.sizes(work.source.config))
    pairs = [(u, v) for first, end in ranges for u in range(first, end) for v in range(u + 1, min(u + longest, end))]
    spans = [(u, v) for u, v in pairs if allows(work.recipe.plan, u, v)]
    return sorted(spans, key=lambda s: (s[1] - s[0], s))


def _interval_forwards(work: Work, u: int, v: int) -> float:
    """Forwards of one sample that the cost of an interval takes."""
    return work.recipe.analysis.probes * len(kept_choices(u, v)) * (work.blocks - v) / work.blocks


def distilled_spans(work: Work) -> list[Span]:
    """Intervals that are distilled: the plan's, and with `distill.bank: all` every other one whose cost the budget lets be measured."""
    own, settings = [(i.first, i.last) for i in work.plan.intervals], work.recipe.analysis
    measured = work.targeted and work.recipe.plan.intervals == "auto" and settings.strategy == "output_error"
    if work.recipe.distill.bank == "plan" or not measured:
        return own
    spent = itertools.accumulate((_interval_forwards(work, *span) for span in _intervals(work)), initial=0.0)
    considered = [
        s for s, after in zip(_intervals(work), itertools.islice(spent, 1, None), strict=True) if after <= settings.budget - settings.probes
    ]
    return list(dict.fromkeys([*own, *considered]))


def shares_weights(work: Work) -> bool:
    """Whether a supernet says which blocks go."""
    settings = work.recipe.analysis
    searched = work.targeted and settings.strategy == "output_error" and work.recipe.plan.intervals == "auto"
    return searched and settings.supernet_steps > 0 and bool(work.plan.intervals)


def trial_students(work: Work) -> int:
    """Students that are trained for a while before one plan is taken: of one depth a supernet leaves one, if no width is free."""
    settings, wanted = work.recipe.analysis, work.recipe.plan
    several = "auto" in (wanted.text_stream, wanted.ffn, wanted.modulation_rank) or not shares_weights(work)
    return settings.trials if work.targeted and settings.strategy == "output_error" and settings.trials > 1 and several else 0


def start_students(work: Work) -> int:
    """Students of the plan that start from first, middle or last blocks, less the one that was tried with other plans: the search most often found one of these."""
    settings, plan = work.recipe.analysis, work.plan
    if not (work.targeted and settings.strategy == "output_error" and settings.trials > 1):
        return 0
    lengths = [i.last - i.first for i in plan.intervals if i not in plan.adapters]
    return min(max(lengths), 2) + (trial_students(work) == 0) if lengths else 0


def _beside(work: Work) -> float:
    """Wall time over work of many students, as many beside each other as there are lanes."""
    return SIDE_BY_SIDE / work.lanes if work.lanes > 1 else 1


def _supernet_seconds(work: Work) -> float:
    """Its steps one after the other, then sets of blocks judged beside each other."""
    if not shares_weights(work):
        return 0.0
    settings, speeds = work.recipe.analysis, work.speeds
    sample_s = speeds.teacher_s * len(work.plan.kept) / work.blocks
    trained = settings.supernet_steps * work.recipe.distill.batch * speeds.training
    return sample_s * (trained + settings.supernet_sets * settings.probes * TRAJECTORY_STEPS * _beside(work))


def _trial_seconds(work: Work) -> float:
    """Students beside each other, the worse half dropping out after every round, each judged at the start and after its rounds."""
    left, steps, settings = trial_students(work), work.recipe.analysis.trial_steps, work.recipe.analysis
    trained, judged, before = 0.0, float(left), 0.0
    for share in trials.ROUNDS if left else ():
        trained, judged, before = trained + left * (share - before) * steps, judged + left, share
        left = max(1, left // 2)
    elsewhere = start_students(work)
    trained, judged = trained + elsewhere * steps, judged + 2 * elsewhere
    learning = work.recipe.distill.batch * trained * work.speeds.training
    return work.speeds.student_s * (learning + settings.probes * TRAJECTORY_STEPS * judged) * _beside(work)


def distill_seconds(work: Work) -> float:
    """Edits beside each other from one sweep of the teacher, intervals first; then joint steps, the teacher a batch ahead."""
    settings, plan = work.recipe.distill, work.plan
    spans = distilled_spans(work)
    ends = [(i.last if (i := plan.interval_at(b)) else b) for b in [*(e.block for e in plan.text_stream), *(e.block for e in plan.ffn)]]
    local = _edits_seconds(work, max((last + 1 for _, last in spans), default=0), len(spans))
    width = _edits_seconds(work, max(ends, default=-1) + 1, len(ends))
    joint = work.beside(work.speeds.teacher_s + work.draw_s, work.speeds.student_s * work.speeds.training)
    steps = 0 if plan.is_empty else settings.finetune_steps
    learned = settings.local_samples * (settings.steps * local + settings.width_steps * width)
    return settings.accumulate * (learned + settings.batch * steps * joint)


def _edits_seconds(work: Work, reach: int, edits: int) -> float:
    """A sample of a local step of so many edits: the teacher up to the last block that any of them reads, and every edit's own block."""
    if not edits:
        return 0.0
    block_s = work.speeds.teacher_s / work.blocks
    total = reach * block_s + work.draw_s + edits * block_s * work.speeds.training
    return total * (SIDE_BY_SIDE / work.lanes if work.lanes > 1 else 1)


def slice_seconds(work: Work) -> float:
    """The student's files written, read back and hashed."""
    return 3 * work.student.bytes / DISK_BYTES_PER_S


def verify_seconds(work: Work) -> float:
    """Both models judged, jobs beside each other; without a task, both on a few batches."""
    both = work.speeds.teacher_s + work.speeds.student_s
    if not work.judged:
        return 8 * 16 * both
    settings = work.recipe.verify
    forwards = sum(settings.steps * (1 if g == 1 else 2) for g in settings.guidance) + JUDGE_DRAWS
    jobs = len(settings.seeds) * (len(settings.guidance) + 1)
    lanes = min(work.lanes, jobs)
    share = (SIDE_BY_SIDE if lanes > 1 else 1) / lanes
    return len(settings.seeds) * settings.scenes * forwards * both * work.speeds.crowded * share


def export_seconds(work: Work) -> float:
    """Student and teacher lowered to every target."""
    blocks = work.student.blocks + work.blocks
    written = 2 * (work.student.bytes + work.teacher.bytes) / DISK_BYTES_PER_S
    return len(work.recipe.export) * ((EXPORT_BLOCK_S * blocks + 2 * EXPORT_S) * work.speeds.python + written)


def bench_seconds(work: Work) -> float:
    """Both models, eager and in every back end; a back end is taken to be as fast as eager or faster."""
    speeds, more = work.speeds, work.recipe.bench.batch - 1
    both = speeds.single_teacher_s + speeds.single_student_s + more * (speeds.teacher_s + speeds.student_s)
    return (work.recipe.bench.runs + 3) * both * (1 + 0.5 * len(work.recipe.export))


STAGES: dict[str, Callable[[Work], float]] = {
    "calibrate": calibrate_seconds,
    "analyze": analyze_seconds,
    "distill": distill_seconds,
    "slice": slice_seconds,
    "verify": verify_seconds,
    "export": export_seconds,
    "bench": bench_seconds,
    "report": lambda work: 0.0,
}
"""Seconds of each pass beside `OTHER_S`."""


def peak_bytes(work: Work) -> int:
    """Largest resident memory of the run: the largest of its passes, with what freed memory the allocator keeps."""
    recipe, family, config, dtype = work.recipe, work.source.family, work.source.config, work.recipe.model.dtype
    size = default_size(family)
    weights = _tensor_bytes(work.teacher, dtype)
    start = LIBRARY_BYTES + (TASK_BYTES if work.judged else 0)
    sums = moment_bytes(work)
    calibration = weights + _passing_bytes(work) + (0 if calibrate.lies_in_files(sums) else 2 * sums)
    probes = _state_bytes(work, recipe.analysis.probes)
    through_distill = weights
    if (
        recipe.distill.teacher == "streamed"
    ):  # a block and what it passes at once, what is held of states, and at most so many maps; sums lie in files
        through_distill = 3 * max(_block_bytes(work)) + max(HELD_BYTES, HELD_BLOCKS * max(_block_bytes(work)))
        calibration, probes = through_distill, 4 * probes // (work.blocks + 1) + edit_costs.KEPT_BYTES
    student = _tensor_bytes(work.student, dtype)
    training = 0 if work.plan.is_empty else _training_bytes(work, recipe.distill.batch)
    # Weights and two moments; gradients are in `training`.
    distill = 3 * student + training + min(training, KEPT_BYTES)
    taught = min(max(trial_students(work), start_students(work)), work.lanes)
    analysis = probes + _searching_bytes(work, training)
    kept = max(1, taught) * min(2 * training, 2 * KEPT_BYTES)
    lanes = work.lanes if work.judged else 1
    batch = min(JUDGE_BATCH, recipe.verify.scenes) if work.judged else 16
    judging = lanes * activation_bytes(family, _shallow(family, config), dtype, size | {"batch": batch})
    judge = lanes * JUDGE_SCENE_BYTES * recipe.verify.scenes if work.judged else 0
    verify = kept + 2 * student + judging + judge
    export = kept + 2 * student + EXPORTER_BYTES + 3 * weights if recipe.export else 0
    return int(start + max(calibration, export, through_distill + max(analysis, distill, verify)))


def _searching_bytes(work: Work, training: int) -> int:
    """What is trained before the plan is taken: the supernet, then students of trials beside each other.

    Both are as deep as the plan's student or deeper: activations half way between it and the teacher are taken.
    """
    whole = CompressionPlan.of(work.source.family.name, work.blocks)
    step = (training + _training_bytes(replace(work, plan=whole), work.recipe.distill.batch)) // 2
    freed = min(step, KEPT_BYTES)
    shared = trials.STATE_BYTES * work.teacher.parameters + step + freed if shares_weights(work) else 0
    students = max(trial_students(work), start_students(work))
    taught = min(students, work.lanes)
    held = students * trials.STATE_BYTES * work.student.parameters
    held = held if held <= trials.HELD_BYTES else held * taught // students
    left = freed if shared else 0  # of the supernet, by the thread that trained it
    return max(shared, held + taught * (step + freed) + left)


def _tensor_bytes(model: Prediction, dtype: str) -> int:
    return model.parameters * DTYPES[dtype].itemsize


def _state_bytes(work: Work, batch: int) -> int:
    """Every block's states of one batch, in all streams."""
    size = default_size(work.source.family)
    tokens = size["height"] * size["width"] + size["text"]
    return batch * tokens * width_of(work.source.config) * (work.blocks + 1) * DTYPES[work.recipe.model.dtype].itemsize


def _passing_bytes(work: Work) -> int:
    """States of the calibration: small ones of all blocks, of which copies are made; of large ones two and a window, and no more samples than fit."""
    samples, states = min(BATCH, work.recipe.calibrate.samples), work.blocks + 1
    every = _state_bytes(work, samples)
    if every <= TOGETHER * DTYPES[work.recipe.model.dtype].itemsize:
        return 2 * every
    one = _state_bytes(work, 1) // states
    return one * min(samples, max(1, PASSING_BYTES // one)) * (3 + min(work.recipe.calibrate.longest, work.blocks))


def _shallow(family: Family, config: Mapping[str, Any], blocks: int = 2) -> dict[str, Any]:
    return dict(config) | {g.count_key: blocks for g in family.groups}


def _training_bytes(work: Work, batch: int) -> int:
    """Activations and gradients of a training step of the student."""
    family, dtype, size = work.source.family, work.recipe.model.dtype, default_size(work.source.family) | {"batch": batch}
    return _by_depth(family, work.source.config, work.plan, lambda c: activation_bytes(family, c, dtype, size, training=True))


def _by_depth(family: Family, config: Mapping[str, Any], plan: CompressionPlan, measured: Callable[[dict[str, Any]], int]) -> int:
    """What is measured of a student's configuration, where it is linear in depth: shallow students of like blocks tell it."""
    rank = (plan.modulation_rank or width_of(config)) if plan.has_width_edits else None
    low = [2] * len(family.groups)

    def at(
        first: int, text_stream: tuple[int, ...] = (), ffn: tuple[tuple[int, str], ...] = (), pairs: tuple[tuple[int, int], ...] = ()
    ) -> int:
        """With so many blocks in the first group, which is the one that width edits are tried in."""
        return of([first, *low[1:]], text_stream, ffn, pairs)

    def of(
        sizes: Sequence[int],
        text_stream: tuple[int, ...] = (),
        ffn: tuple[tuple[int, str], ...] = (),
        pairs: tuple[tuple[int, int], ...] = (),
    ) -> int:
        shallow = dict(config) | {g.count_key: size for g, size in zip(family.groups, sizes, strict=True)}
        like = CompressionPlan.of(family.name, family.num_blocks(shallow), pairs, text_stream, rank, ffn=ffn, adapters=pairs)
        return measured(student_config(family, shallow, like))

    two, three, mapped = of(low), at(3), len(plan.text_stream)
    saved = mapped * (three - at(3, (2,))) if mapped else 0
    for stream in {e.stream for e in plan.ffn}:
        saved += sum(e.stream == stream for e in plan.ffn) * (three - at(3, (), ((2, stream),)))
    if plan.adapters:
        saved += len(plan.adapters) * (three - at(4, pairs=((2, 3),)))
    total = two - saved
    for n, count in enumerate(blocks_by_group(family, config, plan).values()):
        deeper = three if n == 0 else of([*low[:n], 3, *low[n + 1 :]])
        total += (deeper - two) * (count - 2)
    return max(0, total)


def moment_bytes(work: Work) -> int:
    """Bytes of the calibration's record."""
    width, streams = width_of(work.source.config), len(STREAMS)
    made = work.moments
    # Sums: of every state, by group and for the far moments; of both sides of a network; of the time embedding.
    states = work.blocks + 1
    vectors = streams * states * made.groups + made.far_states + sum(made.ffn.values()) + 1
    return 8 * (made.matrices * width**2 + vectors * width + streams * work.blocks * made.groups)


def disk_bytes(work: Work) -> int:
    """Bytes of the output folder when all is done: student, exports, records, report."""
    recipe, student, teacher = work.recipe, work.student.bytes, work.teacher.bytes
    each, sizes = _block_bytes(work), work.source.family.sizes(work.source.config)
    kept = sum(size * n for span in distilled_spans(work) for size, n in zip(each, map(bool, removed_by([span], sizes)), strict=True))
    blocks = student + kept + len(work.plan.adapters) * _adapter_bytes(work)
    graphs = GRAPH_BLOCK_BYTES * (work.student.blocks + work.blocks)
    exports = len(recipe.export) * (student + teacher + graphs)
    judged = 0
    if work.judged:
        # Of each scene and model: right or wrong and features by guidance, loss, one velocity.
        size = default_size(work.source.family)
        velocity = size["height"] * size["width"] * int(work.source.config["in_channels"])
        judged = 2 * len(recipe.verify.seeds) * recipe.verify.scenes * 4 * (129 * len(recipe.verify.guidance) + 1 + velocity)
    return int(student + blocks + exports + moment_bytes(work) + judged + REPORT_BYTES)


def _block_bytes(work: Work) -> list[int]:
    """Of one block of each group."""
    family, low = work.source.family, _shallow(work.source.family, work.source.config)
    two = count_parameters(model_outline(family, low))
    deeper = [count_parameters(model_outline(family, low | {g.count_key: 3})) for g in family.groups]
    return [(three - two) * DTYPES[work.recipe.model.dtype].itemsize for three in deeper]


def _adapter_bytes(work: Work) -> int:
    """Of one interval's record: a matrix and an offset a stream."""
    width = width_of(work.source.config)
    return len(STREAMS) * (width**2 + width) * DTYPES[work.recipe.model.dtype].itemsize


def measure_speeds(family: Family, config: Mapping[str, Any], plan: CompressionPlan, dtype: str) -> Speeds:
    """How fast this machine is, from two or three seconds of random weights."""
    edited = student_config(family, config, plan)
    width, size = width_of(config), default_size(family)
    products = _product_rate(width, BATCH * size["height"] * size["width"], dtype)
    python = python_seconds() / PYTHON_REFERENCE_S
    if count_parameters(model_outline(family, config)) > SMALL_PARAMETERS:
        whole = CompressionPlan.of(family.name, plan.num_blocks)
        counts = [_by_depth(family, config, p, lambda c: forward_operations(family, c)) for p in (whole, plan)]
        teacher_s, student_s = (count / products for count in counts)
        return Speeds(teacher_s, student_s, teacher_s, student_s, TRAINING_RATIO, 1.0, products, python)
    models = [random_model(family, c, dtype) for c in (config, edited)]

    def call(which: int, batch: int) -> Call:
        return example_call(models[which], family, (config, edited)[which], {**size, "batch": batch})

    single = _best(call(0, 1), call(1, 1))
    batch = max(1, min(BATCH, int(4 * CALL_S / single[0])))
    steps = [call(0, batch), call(1, batch)]
    if TRAINING_RATIO * single[1] * batch < 8 * TRAINING_CALL_S:
        steps.append(_training_call(family, edited, size | {"batch": batch}, dtype))
    teacher_s, student_s, *trained = _best(*steps)
    crowd = max(batch, min(JUDGE_BATCH, int(2 * CALL_S * batch / teacher_s)))
    again_s, crowded_s = _best(steps[0], call(0, crowd), rounds=2)
    teacher_s = min(teacher_s, again_s)
    return Speeds(
        teacher_s=teacher_s / batch,
        student_s=student_s / batch,
        single_teacher_s=single[0],
        single_student_s=single[1],
        training=trained[0] / student_s if trained else TRAINING_RATIO,
        crowded=max(1.0, crowded_s / crowd * batch / teacher_s),
        products_per_s=products,
        python=python,
    )


def _best(*calls: Call, rounds: int = 3) -> list[float]:
    """Least seconds of each call, over rounds in which every call is made once.

    Of one thread the processor's time is taken, which other programs lengthen little: predicted is a machine that
    is otherwise idle. Of several threads it says nothing, since they wait for each other.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for times, call in zip(found, calls, strict=True):
            start = clock()
            call()
            times.append(clock() - start)
    return [min(times) for times in found]


def _training_call(family: Family, config: Mapping[str, Any], size: Mapping[str, int], dtype: str) -> Call:
    """A forward and a backward of a model with random weights."""
    model = random_model(family, config, dtype).requires_grad_(True)
    inputs = family.example_inputs(config, **size)
    given = {k: v.to(DTYPES[dtype]) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}

    def step() -> None:
        model(**given, return_dict=False)[0].square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def _product_rate(width: int, rows: int, dtype: str) -> float:
    """Operations a second of a product (width, rows) x (rows, width), as moments and wide layers make them."""
    rows = max(64, min(rows, int(2e9 / width**2)))
    x = torch.randn(rows, width).to(DTYPES[dtype])
    return 2 * rows * width**2 / _best(lambda: x.T @ x)[0]


def forward_operations(family: Family, config: Mapping[str, Any]) -> int:
    """Multiply-adds, twice, of one sample's forward, counted on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    model = empty_model(family, config)
    inputs = family.example_inputs(config, **default_size(family))
    given = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**given, return_dict=False)
    return int(counter.get_total_flops())


def python_seconds() -> float:
    """Least seconds of a fixed piece of plain Python, one thread."""

    def work() -> None:
        table = {}
        for i in range(200_000):
            table[i & 1023] = (i, str(i))
            len(table)

    return _best(work, rounds=6)[0]
