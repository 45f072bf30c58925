"""bench: latency and memory of several targets in one interleaved run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ppclc import plugins
from ppclc.backends import Subject, Tensors
from ppclc.errors import RecipeError
from ppclc.receipts import read_export
from ppclc.records import Benchmark, BenchRow, Export, measured
from ppclc.sources import Source
from ppclc.timing import Clock, interleaved

VERSION = 1
TEACHER = "teacher"
ONNX_MODEL = Path("transformer") / "model.onnx"
"""Where an ONNX export holds its model."""
Progress = Callable[[float, str], None]


def peak_resident(run: Callable[[], None]) -> int:
    """Largest resident memory of this process and its children, in bytes, while `run` runs; all that is loaded counts."""
    with measured("bench", every_s=0.005) as stages:
        run()
    return stages[0].peak_rss_bytes


def peak_on_device(run: Callable[[], None]) -> int:
    """Most bytes that PyTorch had allocated on the current GPU while `run` ran."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    run()
    return int(torch.cuda.max_memory_allocated())


@dataclass(frozen=True)
class BenchTarget:
    """What is timed: `teacher`, `student` or a path, in a back end.

    run: from inputs to the output, back when it is there. peak: bytes at the peak of a call.
    """

    label: str
    backend: str
    run: Callable[[Tensors], Any]
    peak: Callable[[Callable[[], None]], int] = peak_resident


def eager_target(label: str, lowered: Subject, device: str = "cpu") -> BenchTarget:
    """The eager model."""
    session = plugins.load("backends", "eager").load(Path(), lowered)
    return BenchTarget(label, "eager", session.run, peak_resident if device == "cpu" else peak_on_device)


def onnxruntime_target(label: str, folder: Path, lowered: Subject) -> BenchTarget:
    """The ONNX model in an export's folder, in ONNX Runtime on the CPU."""
    session = plugins.load("backends", "onnxruntime").load(folder, lowered)
    return BenchTarget(label, "onnxruntime", session.run)


def run_bench(
    targets: Sequence[BenchTarget],
    inputs: Tensors,
    shape: Mapping[str, int],
    runs: int,
    device: str,
    dtype: str,
    progress: Progress | None = None,
    *,
    warmup: int = 3,
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
) -> Benchmark:
    """Latencies of the targets on the same inputs, in milliseconds, by `timing.interleaved`.

    Memory is watched while warming up, where it costs no time that counts.

    Raises:
        RecipeError: fewer than one run or one warm-up run.
    """
    for name, value in (("runs", runs), ("warmup", warmup)):
        if value < 1:
            raise RecipeError(f"bench.{name} = {value}: wanted a whole number above 0")
    peaks = [target.peak(partial(_repeat, target.run, inputs, warmup)) for target in targets]
    nanoseconds = interleaved([partial(target.run, inputs) for target in targets], runs, random.Random(seed), clock, progress)
    rows = [
        _row(target, times, peak, device=device, dtype=dtype, shape=dict(shape), warmup=warmup)
        for target, times, peak in zip(targets, nanoseconds, peaks, strict=True)
    ]
    return Benchmark(rows=[row.model_copy(update={"speedup": _speedup(row, rows)}) for row in rows])


def _repeat(run: Callable[[Tensors], Any], inputs: Tensors, times: int) -> None:
    for _ in range(times):
        run(inputs)


def _row(target: BenchTarget, nanoseconds: list[int], peak: int, **same: Any) -> BenchRow:
    ms = np.array(nanoseconds) / 1e6
    p50, p90, p99 = (float(p) for p in np.percentile(ms, [50, 90, 99]))
    return BenchRow(
        target=target.label,
        backend=target.backend,
        runs=len(nanoseconds),
        mean_ms=float(ms.mean()),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        peak_bytes=peak,
        speedup=None,
        **same,
    )


def _speedup(row: BenchRow, rows: Sequence[BenchRow]) -> float | None:
    """The teacher's p50 over this row's, in the same back end; None where the teacher was not run there."""
    teacher = next((r for r in rows if r.target == TEACHER and r.backend == row.backend), None)
    return teacher.p50_ms / row.p50_ms if teacher and row.p50_ms > 0 else None


def is_fair(export: Export, dtype: str) -> bool:
    """Whether an artefact is timed beside eager in a dtype: it is in that dtype, and this machine has kernels for it."""
    return export.dtype == dtype and "arithmetic" not in export.options.get("session", {})


def bench_models(
    source: Source, models: dict[str, Any], exports: dict[str, list[Path]], batch: int, runs: int, progress: Callable[[float, str], None]
) -> Benchmark:
    """Latency of models by label, eager and as the artefacts in `exports`, on one set of inputs.

    Raises:
        RecipeError: models that do not take the same inputs.
    """
    lowered = {label: source.family.lowered(model) for label, model in models.items()}
    widths = {label: (model.config["in_channels"], model.config["joint_attention_dim"]) for label, model in models.items()}
    if len(set(widths.values())) > 1:
        raise RecipeError(f"bench: {', '.join(models)} take inputs of different widths; wanted a teacher and its students")
    first = next(iter(lowered.values()))
    size = {**first.sizes[0], "batch": batch}
    targets = [eager_target(label, low) for label, low in lowered.items()]
    dtype = str(next(next(iter(models.values())).parameters()).dtype).removeprefix("torch.")
    for label, low in lowered.items():
        found = [f for f in exports.get(label, []) if (f / ONNX_MODEL).is_file() and is_fair(read_export(f), dtype)]
        targets += [onnxruntime_target(label, folder, low) for folder in found]
    return run_bench(targets, first.inputs(**size), size, runs, "cpu", dtype, progress)
