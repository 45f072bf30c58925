"""The records of the distill pass, in the order in which they stand on each other: intervals, width edits, the fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppclc.analysis.closed_forms import interval_adapters
from ppclc.analysis.refits import refitted, text_blocks
from ppclc.bank import held_edits, interval_job, intervals_to_distill, joined, start_of, width_job
from ppclc.families import Bank
from ppclc.models import build_student
from ppclc.passes import distill as distill_pass
from ppclc.plan import CompressionPlan, Interval
from ppclc.records import CalibrationStats, Distilled, Job
from ppclc.room import check_finetune
from ppclc.run import Run, made
from ppclc.training.local_edits import LocalEdit, Teaching, interval_edit, width_edits

BlockTensors = Callable[[int], Mapping[str, torch.Tensor]]
"""A teacher's block by number, its tensors on the CPU."""


def distill(run: Run, progress: Callable[[float, str], None]) -> None:
    """One record an edit: intervals, then the width edits of what they became; then the fine-tune of the whole."""
    plan, settings, ridge, stats = made(run.plan), run.recipe.distill, run.recipe.analyze.ridge, made(run.stats)
    samples, family = run.samples("train"), run.source.family
    # Asked for late: where nothing is left to train, the teacher is not brought to the device.
    block_tensors: BlockTensors = lambda block: run.by_blocks.block_tensors(block)  # noqa: E731
    teaching = Teaching(family, run.source.config, block_tensors)
    total = max(1, settings.steps + settings.width_steps + settings.finetune_steps)

    def part(before: int, steps: int, name: str) -> Callable[[float, str], None]:
        return lambda share, note: progress((before + share * steps) / total, f"{name}: {note}")

    jobs, edits = [], []
    for alone in intervals_to_distill(made(run.analysis), plan, settings, run.recipe.plan):
        (interval,) = alone.intervals
        start = start_of(made(run.analysis), alone.interval_key(interval), interval)
        given = partial(_interval_start, block_tensors, stats, ridge, alone, interval, start)
        edits.append(interval_edit(teaching, alone, interval, given, settings.weights))
        jobs.append(interval_job(edits[-1].key, start, settings, samples.identity, run.base, stats, ridge))
    trained = train_edits(run, edits, jobs, settings.steps, part(0, settings.steps, "intervals"))
    own = trained[: len(plan.intervals)]
    bank = dict(joined(stats, ridge, plan, family, own))

    def refit() -> None:
        if any(e.stands_on for e in widths):
            teacher = run.by_blocks  # on the device before trajectories of prompts are drawn
            drawn = distill_pass.refit_samples(samples, settings, run.ranks.device)
            bank.update(refitted(teacher, teaching, plan, bank, drawn, ridge, max(1, settings.chunk // settings.batch)))

    widths = width_edits(teaching, plan, bank, settings.weights)
    under = {e.edit: e for e in own}
    jobs = [width_job(e.key, settings, samples.identity, run.base, stats, ridge, [under[k] for k in e.stands_on]) for e in widths]
    own += train_edits(
        run,
        widths,
        jobs,
        settings.width_steps,
        part(settings.steps, settings.width_steps, "width"),
        refit,
        text_blocks(teaching, plan, bank),
    )
    bank |= {e.edit: e.tensors for e in own}
    tuned = finetune(run, plan, bank, own, settings, part(settings.steps + settings.width_steps, settings.finetune_steps, "fine-tune"))
    run.edits = [*own, *trained[len(plan.intervals) :], tuned]


def _interval_start(
    block_tensors: BlockTensors, stats: CalibrationStats, ridge: float, plan: CompressionPlan, interval: Interval, start: int
) -> dict[str, Any]:
    """What an interval's block starts from: a teacher's block, with adapters in closed form where the plan has them."""
    adapters = interval_adapters(stats, ridge, interval.first, start) if interval in plan.adapters else {}
    return {**block_tensors(start), **adapters}


def train_edits(
    run: Run,
    edits: list[LocalEdit],
    jobs: list[Job],
    steps: int,
    progress: Callable[[float, str], None],
    before: Callable[[], None] = lambda: None,
    text_blocks: Callable[[int], nn.Module | None] = lambda _: None,
) -> list[Distilled]:
    """The records of some edits, those that are not there trained beside each other. before: what is done once there are any.

    text_blocks: as `Teacher.sweep` takes it.
    """
    settings, samples = run.recipe.distill, run.samples("train")

    def build(left: list[int], works: list[Path]) -> Iterable[Distilled]:
        before()
        chosen = [edits[i] for i in left]
        return distill_pass.distill_edits(
            run.by_blocks, chosen, steps, samples, settings, progress, works, run.out / "curves", run.ranks.device, text_blocks
        )

    return run.store.make_all(Distilled, jobs, build, "distill", on="each") if edits else []


def finetune(
    run: Run,
    plan: CompressionPlan,
    bank: Bank,
    edits: Sequence[Distilled],
    settings: distill_pass.DistillSettings,
    progress: Callable[[float, str], None],
    curve_name: str = "finetune",
) -> Distilled:
    """The whole student of a plan, trained end to end from the bank and the plan's distilled edits; without steps, no tensors."""
    samples, ridge = run.samples("train"), run.recipe.analyze.ridge
    told = settings.model_copy(update={"finetune_steps": 0 if plan.is_empty else settings.finetune_steps})

    def whole(work: Path) -> Distilled:
        if not told.finetune_steps:  # the student follows from teacher and bank, neither of which need fit in memory
            return Distilled(edit="finetune", steps=0, losses=[])
        check_finetune(run.recipe, run.source, plan, run.ranks)
        teacher = run.by_blocks
        student = build_student(run.source.family, run.source.config, plan, teacher.tensors(), bank)
        return distill_pass.finetune(teacher, student, samples, told, progress, work, run.out / "curves", run.ranks, plan.ends, curve_name)

    what = [told.joint() | {"source": samples.identity}, plan.model_dump(), ridge]
    inputs = (run.base, made(run.stats), *edits)
    return run.store.make(Distilled, "finetune", distill_pass.VERSION, what, inputs, whole, stage="distill", on="all")


def bank_of(run: Run) -> dict[str, Path]:
    """Folder by key of every distilled edit that a run's recipe holds."""
    settings, ridge = run.recipe.distill, run.recipe.analyze.ridge
    return held_edits(run.store, made(run.analysis), made(run.stats), ridge, settings, run.samples("train").identity, run.base)
