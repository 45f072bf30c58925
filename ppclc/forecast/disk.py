"""What `ppclc compress` will take of the disk for a recipe: when all is done, and at most on the way. Nothing of the recipe is run.

Constants were fitted to runs of the embedded teacher's recipe. Source: ours.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ppclc.analysis.budget import even_plan
from ppclc.analysis.detection import removed_by
from ppclc.costs.blocks import width_of
from ppclc.costs.predictions import predict
from ppclc.errors import PpclcError
from ppclc.families import STREAMS
from ppclc.forecast.memory import block_bytes, moment_bytes
from ppclc.forecast.work import Work, distilled_spans
from ppclc.loading.classes import DTYPES, count_parameters, model_outline
from ppclc.loading.sources import Source
from ppclc.plan import CompressionPlan
from ppclc.recipe import Recipe
from ppclc.screens.words import bytes_text
from ppclc.training.trainer import checkpoint_bytes

GRAPH_BLOCK_BYTES, REPORT_BYTES = 15_000, 400_000
PLENTY = 100
"""Free room, in weights of the teacher, that no run takes: checkpoints and moments are a few dozen."""
TEXT_MAPS = 2
"""Linear maps of a text stream that learn: of the state that feeds its keys and values, and of its output."""


def disk_lacks(recipe: Recipe, source: Source, out: Path) -> str:
    """Why the disk of a run's folder will be full before it is done, by the plan if it is fixed and else by one spaced evenly; empty where it will not."""
    here = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    there = shutil.disk_usage(here).free + sum(p.stat().st_size for p in out.rglob("*") if p.is_file() and not p.is_symlink())
    family, dtype = source.family, recipe.model.dtype
    if there > PLENTY * count_parameters(model_outline(family, source.config)) * DTYPES[dtype].itemsize:
        return ""
    try:
        plans = CompressionPlan.of(family.name, family.num_blocks(source.config)), even_plan(source, recipe.target, recipe.plan, dtype)
    except PpclcError:  # what only the run's own analysis can choose
        return ""
    teacher, student = (predict(family, source.config, plan, dtype) for plan in plans)
    need = disk_peak_bytes(Work(recipe, source, plans[1], teacher, student))
    return (
        f"{out}: at most about {bytes_text(need)} are wanted on the disk, with checkpoints, and {bytes_text(there)} are there"
        if need > there
        else ""
    )


def disk_bytes(work: Work) -> int:
    """Bytes of the output folder when all is done: student, exports, records, report."""
    recipe, student, teacher = work.recipe, work.student.bytes, work.teacher.bytes
    tuned = student if recipe.distill.finetune_steps and not work.plan.is_empty else 0
    blocks = tuned + sum(_span_bytes(work)) + len(work.plan.adapters) * len(STREAMS) * _map_bytes(work)
    graphs = GRAPH_BLOCK_BYTES * (work.student.blocks + work.blocks)
    exports = len(recipe.export) * (student + teacher + graphs)
    judged = 0
    if work.judged:
        # Of each scene and model: right or wrong and features by guidance, loss, one velocity.
        velocity = work.size["height"] * work.size["width"] * int(work.source.config["in_channels"])
        judged = 2 * len(recipe.verify.seeds) * recipe.verify.scenes * 4 * (129 * len(recipe.verify.guidance) + 1 + velocity)
    return int(student + blocks + exports + moment_bytes(work) + judged + REPORT_BYTES)


def disk_peak_bytes(work: Work) -> int:
    """The most that the output folder takes on the way: moments, edits, and the checkpoints of what is learning.

    Those of a phase's edits lie beside each other, each with its optimizer's moments; a new one is whole before the old one goes.
    """
    recipe = work.recipe.distill
    always = recipe.teacher == "streamed"  # edits then lie there between sweeps
    spans, maps, moments = _span_bytes(work), _maps_bytes(work), moment_bytes(work)
    student = [work.student.parameters * DTYPES[work.recipe.model.dtype].itemsize]
    intervals = _checkpoints(work, spans, recipe.steps, always)
    widths = sum(spans) + _checkpoints(work, maps, recipe.width_steps, always)
    joint = 0.0
    if recipe.finetune_steps and not work.plan.is_empty:
        last = _checkpoints(work, student, min(recipe.finetune_steps, recipe.checkpoint_every + 1))
        # Its record is written while the last checkpoint is still there.
        joint = sum(spans) + sum(maps) + max(_checkpoints(work, student, recipe.finetune_steps), last + student[0])
    return int(max(moments + max(intervals, widths, joint), disk_bytes(work)))


def _checkpoints(work: Work, pieces: list[int], steps: int, always: bool = False) -> float:
    """The most that checkpoints of so many steps take of what learns beside each other: of all of it, and of the largest a new one beside the old.

    None where all is over before the first is due, unless they are written `always`.
    """
    recipe = work.recipe.distill
    each = checkpoint_bytes(recipe) / DTYPES[work.recipe.model.dtype].itemsize
    due = 2 if always else max(0, steps - 1) // recipe.checkpoint_every
    return each * (sum(pieces) * (due > 0) + max(pieces, default=0) * (due > 1))


def _span_bytes(work: Work) -> list[int]:
    """Of the block that is distilled for each interval."""
    each, sizes = block_bytes(work), work.source.family.sizes(work.source.config)
    return [sum(size for size, n in zip(each, removed_by([span], sizes), strict=True) if n) for span in distilled_spans(work)]


def _maps_bytes(work: Work) -> list[int]:
    """Of what learns of each width edit."""
    one = _map_bytes(work)
    return [TEXT_MAPS * one] * len(work.plan.text_stream) + [one] * len(work.plan.ffn)


def _map_bytes(work: Work) -> int:
    """Of a linear map of the model's width, with its offset."""
    width = width_of(work.source.config)
    return (width**2 + width) * DTYPES[work.recipe.model.dtype].itemsize
