"""What `ppclc compress` will take of memory for a recipe. Nothing of the recipe is run.

Constants were fitted to runs of the embedded teacher's recipe. Source: ours.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ppclc import kernels
from ppclc.analysis import edit_costs, trials
from ppclc.analysis.moments import TOGETHER
from ppclc.costs.blocks import width_of
from ppclc.costs.predictions import Prediction, activation_bytes, by_depth
from ppclc.families import STREAMS, Family
from ppclc.forecast.speeds import JUDGE_BATCH
from ppclc.forecast.work import Work, shares_weights, start_students, trial_students
from ppclc.loading.classes import DTYPES, count_parameters, model_outline
from ppclc.machine.devices import device_here
from ppclc.passes import calibrate
from ppclc.passes.calibrate import BATCH
from ppclc.plan import CompressionPlan
from ppclc.teachers import HELD_BLOCKS, HELD_BYTES, PASSING_BYTES

LIBRARY_BYTES, TASK_BYTES, EXPORTER_BYTES = 450_000_000, 100_000_000, 200_000_000
"""Resident memory of Python with PyTorch and diffusers; of a task's data and judge; of an exporter's libraries."""
KEPT_BYTES = 256_000_000
"""Most of freed memory that the allocator keeps: larger pieces go back to the system."""
JUDGE_SCENE_BYTES = 65_000
"""Activations of the judge, a scene."""


def peak_bytes(work: Work) -> int:
    """Largest resident memory of the run: the largest of its passes, with what freed memory the allocator keeps."""
    recipe, family, config, dtype = work.recipe, work.source.family, work.source.config, work.recipe.model.dtype
    weights = _tensor_bytes(work.teacher, dtype)
    start = LIBRARY_BYTES + (TASK_BYTES if work.judged else 0)
    sums = moment_bytes(work)
    calibration = weights + _passing_bytes(work) + (0 if calibrate.lies_in_files(sums) else 2 * sums)
    probes = _state_bytes(work, work.analysis.probes)
    through_distill = weights
    if (
        recipe.distill.teacher == "streamed"
    ):  # a block and what it passes at once, what is held of states, and at most so many maps; sums lie in files
        through_distill = 3 * max(block_bytes(work)) + max(HELD_BYTES, HELD_BLOCKS * max(block_bytes(work)))
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
    judging = lanes * activation_bytes(family, _shallow(family, config), dtype, work.size | {"batch": batch})
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
    tokens = work.size["height"] * work.size["width"] + work.size["text"]
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
    family, dtype, size = work.source.family, work.recipe.model.dtype, work.size | {"batch": batch}
    return by_depth(family, work.source.config, work.plan, lambda c: activation_bytes(family, c, dtype, size, training=True))


def moment_bytes(work: Work) -> int:
    """Bytes of the calibration's record."""
    width, streams = width_of(work.source.config), len(STREAMS)
    made = work.moments
    # Sums: of every state, by group and for the far moments; of both sides of a network; of the time embedding.
    states = work.blocks + 1
    vectors = streams * states * made.groups + made.far_states + sum(made.ffn.values()) + 1
    outer = sum(made.ffn.values()) + 1  # in float64 wherever they are made
    products = (4 if sums_by_kernel(work) else 8) * (made.matrices - outer) * width**2
    return products + 8 * (outer * width**2 + vectors * width + streams * work.blocks * made.groups)


def sums_by_kernel(work: Work) -> bool:
    """Whether kernels on a GPU make the products of states, whose sums are in float32 then: not of states so few that they are summed up together."""
    if device_here() == "cpu" or work.recipe.kernels == "torch" or kernels.lacks():
        return False
    rows = [min(work.size["height"] * work.size["width"], work.recipe.calibrate.tokens or sys.maxsize), work.size["text"]]
    numbers = min(rows) * width_of(work.source.config)
    is_small = (work.blocks + 1) * max(rows) * width_of(work.source.config) <= TOGETHER
    return not is_small and (work.recipe.kernels == "triton" or numbers >= kernels.LEAST)


def block_bytes(work: Work) -> list[int]:
    """Of one block of each group."""
    family, low = work.source.family, _shallow(work.source.family, work.source.config)
    two = count_parameters(model_outline(family, low))
    deeper = [count_parameters(model_outline(family, low | {g.count_key: 3})) for g in family.groups]
    return [(three - two) * DTYPES[work.recipe.model.dtype].itemsize for three in deeper]
