"""Wall time of several things in turn, so that a slow spell of the machine falls on all of them."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Clock = Callable[[], int]
"""Counts nanoseconds."""


def interleaved(
    calls: Sequence[Callable[[], Any]],
    rounds: int,
    order: random.Random,
    clock: Clock = time.perf_counter_ns,
    progress: Callable[[float, str], None] | None = None,
) -> list[list[int]]:
    """Nanoseconds of every call by round; each round makes every call once, in an order of its own.

    So none always follows the same other.
    """
    times: list[list[int]] = [[] for _ in calls]
    with collection_paused():
        for done in range(rounds):
            for i in order.sample(range(len(calls)), len(calls)):
                start = clock()
                calls[i]()
                times[i].append(clock() - start)
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
