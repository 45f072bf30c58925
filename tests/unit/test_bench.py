"""Bench: figures from a clock that is known, and a run whose order favours no one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ppclc import plugins
from ppclc.classes import model_class
from ppclc.errors import RecipeError
from ppclc.families import Family
from ppclc.passes.bench import BenchTarget, eager_target, run_bench
from ppclc.records import Benchmark

FAMILY: Family = plugins.load("families", "qwen_image")
SHAPE = {"batch": 1, "image_tokens": 4}


class World:
    """A clock that only targets move, and the order in which they ran."""

    def __init__(self) -> None:
        self.now = 0
        self.calls: list[str] = []

    def target(self, label: str, backend: str, durations: Callable[[int], int]) -> BenchTarget:
        """A target whose n-th call, warm-up included, takes `durations(n)` nanoseconds."""
        calls = [0]

        def run(inputs: dict[str, torch.Tensor]) -> None:
            self.calls.append(f"{label}/{backend}")
            self.now += durations(calls[0])
            calls[0] += 1

        def peak(run_once: Callable[[], None]) -> int:
            run_once()
            return len(label)

        return BenchTarget(label, backend, run, peak)

    def bench(self, targets: list[BenchTarget], runs: int, **more: Any) -> Benchmark:
        return run_bench(targets, {}, SHAPE, runs, "cpu", "float32", clock=lambda: self.now, **more)


def test_figures_are_those_of_numpy() -> None:
    world, generator = World(), np.random.default_rng(0)
    durations = generator.integers(1_000_000, 90_000_000, 40)
    (row,) = world.bench([world.target("teacher", "eager", lambda n: int(durations[n]))], runs=37, warmup=3).rows
    ms = durations[3:] / 1e6
    assert row.mean_ms == pytest.approx(ms.mean(), rel=1e-12)
    for got, percent in ((row.p50_ms, 50), (row.p90_ms, 90), (row.p99_ms, 99)):
        assert got == pytest.approx(np.percentile(ms, percent), rel=1e-12)
    assert (row.runs, row.warmup, row.device, row.dtype, row.shape) == (37, 3, "cpu", "float32", SHAPE)


def test_figures_by_hand() -> None:
    world = World()
    (row,) = world.bench([world.target("teacher", "eager", lambda n: (n + 1) * 1_000_000)], runs=5, warmup=1).rows
    assert (row.mean_ms, row.p50_ms) == (4.0, 4.0)
    assert row.p90_ms == pytest.approx(5.6, rel=1e-12)
    assert row.p99_ms == pytest.approx(5.96, rel=1e-12)


def test_one_run_is_all_its_percentiles() -> None:
    world = World()
    (row,) = world.bench([world.target("teacher", "eager", lambda n: 7_000_000)], runs=1).rows
    assert row.mean_ms == row.p50_ms == row.p90_ms == row.p99_ms == 7.0


def test_speedup_is_against_the_teacher_in_the_same_back_end() -> None:
    world = World()
    times = {("teacher", "eager"): 8, ("student", "eager"): 4, ("teacher", "onnx"): 6, ("student", "onnx"): 2, ("out/a", "trt"): 1}
    targets = [world.target(label, backend, lambda n, ms=ms: ms * 1_000_000) for (label, backend), ms in times.items()]  # type: ignore[misc]
    rows = world.bench(targets, runs=3).rows
    assert [(r.target, r.backend) for r in rows] == list(times)
    assert [r.speedup for r in rows] == [1.0, 2.0, 1.0, 3.0, None]
    assert [r.peak_bytes for r in rows] == [7, 7, 7, 7, 5]


def test_every_round_runs_each_target_once_in_changing_order() -> None:
    world = World()
    targets = [world.target(label, "eager", lambda n: 1) for label in "abc"]
    world.bench(targets, runs=30, warmup=2)
    warm, timed = world.calls[:6], world.calls[6:]
    assert warm == ["a/eager"] * 2 + ["b/eager"] * 2 + ["c/eager"] * 2
    rounds = [tuple(timed[i : i + 3]) for i in range(0, 90, 3)]
    assert all(sorted(r) == ["a/eager", "b/eager", "c/eager"] for r in rounds)
    assert len(set(rounds)) == 6


def test_the_order_is_that_of_the_seed() -> None:
    orders = []
    for seed in (0, 0, 1):
        world = World()
        world.bench([world.target(label, "eager", lambda n: 1) for label in "abcd"], runs=5, seed=seed)
        orders.append(world.calls)
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("before", [True, False])
def test_no_garbage_is_collected_while_timing(before: bool) -> None:
    seen: list[bool] = []
    target = BenchTarget("teacher", "eager", lambda inputs: seen.append(gc.isenabled()), lambda run: 0)
    was = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        run_bench([target], {}, SHAPE, 4, "cpu", "float32")
        assert seen == [False] * 4
        assert gc.isenabled() is before
    finally:
        (gc.enable if was else gc.disable)()


def test_a_target_that_fails_leaves_the_collector_on() -> None:
    def fail(inputs: dict[str, torch.Tensor]) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run_bench([BenchTarget("teacher", "eager", fail, lambda run: 0)], {}, SHAPE, 1, "cpu", "float32")
    assert gc.isenabled()


@pytest.mark.parametrize(("runs", "warmup", "name"), [(0, 3, "runs"), (5, 0, "warmup")])
def test_counts_below_one_are_refused(runs: int, warmup: int, name: str) -> None:
    with pytest.raises(RecipeError, match=rf"bench\.{name} = 0: wanted a whole number above 0"):
        World().bench([], runs, warmup=warmup)


def test_progress_counts_rounds() -> None:
    world, seen = World(), []
    world.bench([world.target("teacher", "eager", lambda n: 1)], runs=4, progress=lambda done, what: seen.append(done))
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_eager_targets_on_the_real_clock() -> None:
    torch.manual_seed(0)
    models = []
    for layers in (3, 1):
        config = {**FAMILY.tiny_config, "num_layers": layers}
        models.append(model_class(FAMILY, config).from_config(config).eval())
    lowered = [FAMILY.lowered(model) for model in models]
    inputs = lowered[0].inputs(**lowered[0].sizes[0])
    targets = [eager_target(label, one.reference) for label, one in zip(("teacher", "student"), lowered, strict=True)]
    assert not targets[0].run(inputs).requires_grad
    teacher, student = run_bench(targets, inputs, dict(lowered[0].sizes[0]), 15, "cpu", "float32").rows
    assert 0 < student.p50_ms < teacher.p50_ms <= teacher.p90_ms <= teacher.p99_ms
    assert student.speedup == teacher.p50_ms / student.p50_ms
    assert min(teacher.peak_bytes, student.peak_bytes) > 50_000_000
