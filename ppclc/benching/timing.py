"""Time of several things in turn, so that a slow spell of the machine falls on all of them."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Clock = Callable[[], int]
"""Counts nanoseconds."""
Call = Callable[[], Any]


@dataclass(frozen=True)
class Stopwatch:
    """A way to time a call. name: as results tell it. ns: nanoseconds that a call takes, until all that it asked of a device is done."""

    name: str
    ns: Callable[[Call], int]


def by_clock(clock: Clock = time.perf_counter_ns, name: str = "perf_counter_ns") -> Stopwatch:
    """The host's clock before and after: right for calls that have done their work when they return."""

    def ns(call: Call) -> int:
        start = clock()
        call()
        return clock() - start

    return Stopwatch(name, ns)


def by_cuda_events(event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True)) -> Stopwatch:
    """Two events on the current stream, around what a call puts between them; `event` makes one.

    The device has nothing to do when the first is recorded, so that launching counts, and the host's waiting for the end does not.
    """

    def ns(call: Call) -> int:
        start: Any = event()
        end: Any = event()
        start.record()
        call()
        end.record()
        end.synchronize()
        return round(float(start.elapsed_time(end)) * 1e6)

    return Stopwatch("cuda events", ns)


def stopwatch(device: str) -> Stopwatch:
    """CUDA events on a GPU, the host's clock on a CPU."""
    return by_clock() if device == "cpu" else by_cuda_events()


def interleaved(
    calls: Sequence[Call],
    rounds: int,
    order: random.Random,
    watch: Stopwatch | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> list[list[int]]:
    """Nanoseconds of every call by round, by the host's clock unless there is a `watch`; each round makes every call once, in an order of its own.

    So none always follows the same other.
    """
    times: list[list[int]] = [[] for _ in calls]
    ns = (watch or by_clock()).ns
    with collection_paused():
        for done in range(rounds):
            for i in order.sample(range(len(calls)), len(calls)):
                times[i].append(ns(calls[i]))
            if progress:
                progress((done + 1) / rounds, "timing")
    return times


@contextmanager
def collection_paused() -> Iterator[None]:
    """A block in which Python collects no garbage; what was there is collected before."""
    before = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
