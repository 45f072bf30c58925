"""How fast this machine is, from a few seconds of random weights: on its GPU where there is one.

A configuration itself with random weights where it is small, else one matrix product of its width. Constants were fitted to runs of the embedded
teacher's recipe on two cores of a x86-64 server. Source: ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ppclc.costs.blocks import Call, example_call, width_of
from ppclc.costs.predictions import by_depth, dtype_for
from ppclc.families import Family
from ppclc.loading.classes import DTYPES, count_parameters, empty_model, model_outline, random_model, student_config
from ppclc.passes.calibrate import BATCH
from ppclc.plan import CompressionPlan

Size = Mapping[str, int]
JUDGE_BATCH = 256
"""Samples of a forward in the judging of a task."""

SMALL_PARAMETERS = 200_000_000
"""Models up to this size are built to be timed; of larger ones the operations are counted."""
CALL_S, TRAINING_CALL_S = 0.3, 0.5
"""Longest single forward, and training step, of the measurement, as guessed from one sample alone."""
LONGEST_S = 1.0
"""Rounds of calls end once they have taken so long: long calls differ little from round to round."""
TRAINING_RATIO = 3.5
"""Forward and backward over a forward, where that is not measured."""
PYTHON_REFERENCE_S = 0.035
"""Time of `python_seconds` where the constants were fitted."""


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


NOT_MEASURED = Speeds(*[math.nan] * 8)
"""Where nothing is asked that depends on them."""


def measure_speeds(family: Family, config: Mapping[str, Any], plan: CompressionPlan, dtype: str, size: Size, device: str = "cpu") -> Speeds:
    """How fast a device is on samples of a size."""
    edited = student_config(family, config, plan)
    products = _product_rate(width_of(config), BATCH * size["height"] * size["width"], dtype, device)
    python = python_seconds() / PYTHON_REFERENCE_S
    if count_parameters(model_outline(family, config)) > SMALL_PARAMETERS:
        whole = CompressionPlan.of(family.name, plan.num_blocks)
        counts = [by_depth(family, config, p, lambda c: forward_operations(family, c, size)) for p in (whole, plan)]
        teacher_s, student_s = (count / products for count in counts)
        return Speeds(teacher_s, student_s, teacher_s, student_s, TRAINING_RATIO, 1.0, products, python)
    models = [random_model(family, c, dtype, device=device) for c in (config, edited)]

    def call(which: int, batch: int) -> Call:
        return example_call(models[which], family, (config, edited)[which], {**size, "batch": batch})

    single = _best(device, call(0, 1), call(1, 1))
    batch = max(1, min(BATCH, int(4 * CALL_S / single[0])))
    steps = [call(0, batch), call(1, batch)]
    if TRAINING_RATIO * single[1] * batch < 8 * TRAINING_CALL_S:
        steps.append(_training_call(family, edited, {**size, "batch": batch}, dtype, device))
    teacher_s, student_s, *trained = _best(device, *steps)
    crowd = max(batch, min(JUDGE_BATCH, int(2 * CALL_S * batch / teacher_s)))
    again_s, crowded_s = _best(device, steps[0], call(0, crowd), rounds=2)
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


def _best(device: str, *calls: Call, rounds: int = 3) -> list[float]:
    """Least seconds of each call, over rounds in which every call is made once, fewer where calls are long; on a GPU until it is done, after a call that warms it up.

    Of one thread the processor's time is taken, which other programs lengthen little: predicted is a machine that
    is otherwise idle. Of several threads it says nothing, since they wait for each other.
    """
    clock = time.process_time if torch.get_num_threads() == 1 and device == "cpu" else time.perf_counter
    for call in calls if device != "cpu" else ():
        call()
    found: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    while not found[0] or (len(found[0]) < rounds and time.perf_counter() - begin < LONGEST_S):
        for times, call in zip(found, calls, strict=True):
            _settle(device)
            start = clock()
            call()
            _settle(device)
            times.append(clock() - start)
    return [min(times) for times in found]


def _settle(device: str) -> None:
    """Wait until a device has done all that it was asked."""
    if device != "cpu":
        torch.cuda.synchronize()


def _training_call(family: Family, config: Mapping[str, Any], size: Size, dtype: str, device: str) -> Call:
    """A forward and a backward of a model with random weights."""
    model = random_model(family, config, dtype, device=device).requires_grad_(True)
    inputs = family.example_inputs(config, **size)
    given = {k: v.to(device, dtype_for(v, dtype)) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}

    def step() -> None:
        model(**given, return_dict=False)[0].square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def _product_rate(width: int, rows: int, dtype: str, device: str) -> float:
    """Operations a second of a product (width, rows) x (rows, width), as moments and wide layers make them."""
    rows = max(64, min(rows, int(2e9 / width**2)))
    x = torch.randn(rows, width).to(device, DTYPES[dtype])
    return 2 * rows * width**2 / _best(device, lambda: x.T @ x)[0]


def forward_operations(family: Family, config: Mapping[str, Any], size: Size) -> int:
    """Multiply-adds, twice, of one sample's forward, counted on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    model = empty_model(family, config)
    inputs = family.example_inputs(config, **{**size, "batch": 1})
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

    return _best("cpu", work, rounds=6)[0]
