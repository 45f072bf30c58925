"""What `ppclc compress` will take for a recipe: seconds by pass, peak memory, disk. Nothing of the recipe is run.

Work is counted in forwards of one sample and turned into seconds by a short measurement of this machine (`speeds.py`). `STAGES` holds one function a
pass; what a pass does more or less of is changed there.

Constants were fitted to runs of the embedded teacher's recipe on two cores of a x86-64 server. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pydantic import BaseModel, ConfigDict

from ppclc.analysis import trials
from ppclc.analysis.detection import removed_by
from ppclc.costs.blocks import width_of
from ppclc.costs.predictions import Prediction
from ppclc.data.samples import TRAJECTORY_STEPS
from ppclc.data_size import sample_size
from ppclc.forecast.disk import disk_bytes, disk_peak_bytes
from ppclc.forecast.memory import peak_bytes
from ppclc.forecast.speeds import measure_speeds
from ppclc.forecast.work import (
    SIDE_BY_SIDE,
    Work,
    distilled_spans,
    interval_forwards,
    intervals_of,
    shares_weights,
    start_students,
    trial_students,
)
from ppclc.loading.sources import Source
from ppclc.machine.devices import cores, device_here
from ppclc.passes import calibrate
from ppclc.plan import CompressionPlan
from ppclc.recipe import Recipe

JUDGE_DRAWS = 4
"""Forwards a scene for the held-out loss of a task."""
MOMENT_OVERHEAD = 4
"""Time of a batch's moments over that of their products alone."""
EXPORT_BLOCK_S, EXPORT_S = 3.2, 0.5
"""Capture, conversion, check and comparison of a model in one back end: by block, and beside blocks."""
OTHER_S = {"calibrate": 1.0, "analyze": 4.0, "distill": 0.5, "slice": 0.4, "verify": 3.0, "export": 0.0, "bench": 1.5, "report": 2.0}
"""Seconds of a pass beside the work that is counted: reading, writing, statistics, figures."""
DISK_BYTES_PER_S = 500e6


class RunCosts(BaseModel):
    """Predicted costs of a whole run; `seconds` by pass. disk_bytes: when all is done; disk_peak_bytes: at most, with checkpoints."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    peak_bytes: int
    disk_bytes: int
    disk_peak_bytes: int
    seconds: dict[str, float]


def run_costs(recipe: Recipe, source: Source, plan: CompressionPlan, teacher: Prediction, student: Prediction) -> RunCosts:
    """Costs of a whole run from nothing, its plan being known; measures this machine for a few seconds."""
    device = device_here()
    speeds = measure_speeds(source.family, source.config, plan, recipe.model.dtype, sample_size(recipe, source), device)
    lanes = max(1, cores() // torch.get_num_threads()) if device == "cpu" else 1
    work = Work(recipe, source, plan, teacher, student, speeds, lanes)
    seconds = {name: OTHER_S[name] * speeds.python + stage(work) for name, stage in STAGES.items()}
    return RunCosts(peak_bytes=peak_bytes(work), disk_bytes=disk_bytes(work), disk_peak_bytes=disk_peak_bytes(work), seconds=seconds)


def calibrate_seconds(work: Work) -> float:
    """The teacher on every sample, and the products of its states."""
    settings = work.recipe.calibrate
    width, made, size = width_of(work.source.config), work.moments, work.size
    image = size["height"] * size["width"]
    tokens = {"image": -(-image // -(-image // (settings.tokens or image))), "text": size["text"]}  # of many every second, third ...
    every = sum(rows * made.near * (2 if made.groups > 1 else 1) for rows in tokens.values())
    some = tokens["image"] * made.far["image"] + tokens["text"] * (made.far["text"] + made.far["text_input"])
    some += sum(rows * made.ffn[stream] for stream, rows in tokens.items())
    products = MOMENT_OVERHEAD * (every + some / calibrate.far_every(settings.samples))
    return settings.samples * (work.speeds.teacher_s + work.draw_s + 2 * products * width**2 / work.speeds.products_per_s)


def analyze_seconds(work: Work) -> float:
    """The teacher's forwards that the analysis spends on costs, what its trainings are taught and judged by, the supernet, then trials."""
    settings = work.analysis
    tried = trial_students(work) or start_students(work)
    steps = max(settings.supernet_steps if shares_weights(work) else 0, settings.trial_steps if tried else 0)
    judging = settings.probes * TRAJECTORY_STEPS if steps else 0
    taught = steps * work.recipe.distill.batch * (work.speeds.teacher_s + work.draw_s) + judging * work.speeds.teacher_s
    costs = analyze_forwards(work) * work.speeds.teacher_s + settings.probes * work.draw_s
    return costs + taught + _supernet_seconds(work) + _trial_seconds(work)


def analyze_forwards(work: Work) -> float:
    """Forwards of one sample, in whole teachers: intervals under the budget, every text run, rank and network, the probes themselves."""
    settings, wanted, blocks, free = work.analysis, work.recipe.plan, work.blocks, work.targeted
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
    return spent + min(settings.budget, sum(interval_forwards(work, *span) for span in intervals_of(work)))


def _beside(work: Work) -> float:
    """Wall time over work of many students, as many beside each other as there are lanes."""
    return SIDE_BY_SIDE / work.lanes if work.lanes > 1 else 1


def _supernet_seconds(work: Work) -> float:
    """Its steps one after the other, then sets of blocks judged beside each other."""
    if not shares_weights(work):
        return 0.0
    settings, speeds = work.analysis, work.speeds
    sample_s = speeds.teacher_s * len(work.plan.kept) / work.blocks
    trained = settings.supernet_steps * work.recipe.distill.batch * speeds.training
    sets = min(settings.supernet_sets, _sets_there_are(work))
    return sample_s * (trained + sets * settings.probes * TRAJECTORY_STEPS * _beside(work))


def _sets_there_are(work: Work) -> int:
    """Ways to leave as many blocks of each group out as the plan does; none its first."""
    sizes = [int(work.source.config[g.count_key]) for g in work.source.family.groups]
    gone = removed_by([(i.first, i.last) for i in work.plan.intervals], sizes)
    return math.prod(math.comb(size - 1, count) for size, count in zip(sizes, gone, strict=True) if size)


def _trial_seconds(work: Work) -> float:
    """Students beside each other, the worse half dropping out after every round, each judged at the start and after its rounds."""
    left, steps, settings = trial_students(work), work.analysis.trial_steps, work.analysis
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
