"""How a GPU is measured: by events and by replayed graphs, over inputs that no cache holds, beside what the device can do at best.

On a CPU the same functions measure wall time, so that everything that is said of a GPU can be tried without one.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch

from ppclc.benching.targets import pinned
from ppclc.benching.timing import collection_paused
from ppclc.kernels import lacks, switched

L2_BYTES = 50 * 2**20
FEWEST, MOST, REPLAY_MS = 20, 400, 5.0
"""Calls of a CUDA graph, and how long one is to last: starting it takes some microseconds, whatever is in it."""
BEYOND_L2 = 4
"""Inputs are rotated among so many sets that together they are this many times the L2."""
Row = dict[str, Any]
Call = Callable[[], Any]


class NotRun(Exception):  # noqa: N818
    """Something that this machine cannot run, or has no time for; what it says is the reason."""


@dataclass
class Proof:
    """One run: where, how large, until when; and what devices can do at best, once it was measured.

    ends_at: of `time.perf_counter`. failing: name of a part that is made to fail, which the tests use.
    """

    device: str
    tiny: bool = False
    ends_at: float = float("inf")
    failing: str = ""
    started: float = field(default_factory=time.perf_counter)
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def is_cuda(self) -> bool:
        """Whether a GPU is measured."""
        return self.device == "cuda"

    def say(self, text: str) -> None:
        """A line of progress, with the seconds since the start."""
        print(f"{time.perf_counter() - self.started:7.1f} s  {text}", flush=True)

    def needs(self, seconds: float) -> None:
        """Raise NotRun where less time than that is left."""
        left = self.ends_at - time.perf_counter()
        if not self.tiny and left < seconds:
            raise NotRun(f"no time left: about {seconds:.0f} s wanted, {max(left, 0):.0f} s left")

    def on_gpu(self, what: str) -> None:
        """Raise NotRun where there is no GPU."""
        if not self.is_cuda:
            raise NotRun(f"{what}: there is no CUDA device")


def rows_of(proof: Proof, cases: Sequence[tuple[Row, Callable[[], Sequence[Row]]]]) -> list[Row]:
    """The rows of all cases; a case that cannot be run, or breaks, gives one row that says why.

    Each case is what its rows have in common, and a function that gives what they have of their own.
    """
    rows: list[Row] = []
    for same, run in cases:
        try:
            found = [same | row for row in run()]
            rows += found
            for row in found[:-1]:
                if row.get("passed") is False:
                    proof.say(told(row))
        except NotRun as reason:
            rows.append(same | {"not_run": str(reason)})
        except Exception as error:
            rows.append(same | {"not_run": f"{type(error).__name__}: {short(error)}", "broke": True})
            if proof.is_cuda and not alive():
                raise
        proof.say(told(rows[-1]))
    return rows


def short(error: BaseException | str, most: int = 300) -> str:
    """What an error says, in one line of a readable length; paths of files are left out."""
    words = str(error).split()
    text = " ".join(w if w.count("/") < 2 else "..." for w in words)
    return text if len(text) <= most else text[: most - 3] + "..."


def told(row: Row) -> str:
    """A row as one line of progress."""
    return ", ".join(f"{k} {shown(v)}" for k, v in row.items() if v not in (None, "") and k != "rounds_ms")


def shown(value: Any) -> str:
    """A value with as many digits as mean something."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value and abs(value) < 1e-2:
            return f"{value:.1e}"
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return " x ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def alive() -> bool:
    """Whether the GPU still answers: after some errors this process cannot use it any more."""
    try:
        torch.cuda.synchronize()
        return bool((torch.ones(8, device="cuda") * 2).sum().item() == 16)
    except RuntimeError:
        return False


def reclaim() -> None:
    """Give back all memory of the GPU that nothing holds."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    """Wait for a device."""
    if device == "cuda":
        torch.cuda.synchronize()


def kernels_here() -> str:
    """`triton` where kernels can run, else `torch`."""
    return "torch" if lacks() else "triton"


@contextmanager
def kernels(name: str) -> Iterator[None]:
    """A block with the switch set."""
    with switched(name):  # type: ignore[arg-type]
        yield


def elapsed_ms(call: Call, device: str) -> float:
    """Milliseconds of a call: between two events on a GPU, which is waited for, else of wall time."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def host_ms(call: Call, device: str) -> float:
    """Milliseconds until a call is back, the device not waited for: where that is all of what it takes, the host is what is measured."""
    synchronize(device)
    start = time.perf_counter()
    call()
    found = (time.perf_counter() - start) * 1e3
    synchronize(device)
    return found


def events_us(calls: Sequence[Call], device: str, repeats: int) -> float:
    """Median microseconds of one call, each with events of its own around it; the calls take turns."""
    if device != "cuda":
        return 1e3 * median(elapsed_ms(call, device) for call in islice(cycle(calls), repeats))
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for (first, last), call in zip(pairs, cycle(calls), strict=False):
        first.record()
        call()
        last.record()
    torch.cuda.synchronize()
    return 1e3 * float(median(first.elapsed_time(last) for first, last in pairs))


def graph_of(calls: Sequence[Call], count: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of so many of the calls, in turn: replayed, the host has no part in them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in islice(cycle(calls), count):
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def graph_us(calls: Sequence[Call], count: int, replays: int = 7) -> float:
    """Microseconds of one call when `count` of them are captured in one CUDA graph, in turn. Median of replays."""
    graph = graph_of(calls, count)
    found: float = 1e3 * median(elapsed_ms(graph.replay, "cuda") for _ in range(replays)) / count
    graph.reset()
    return found


@dataclass
class Captured:
    """Calls in a CUDA graph that is long enough for what starting it takes not to count."""

    graph: Any
    count: int

    @classmethod
    def of(cls, calls: Sequence[Call]) -> Captured:
        """As many of the calls as last for `REPLAY_MS`."""
        rough = graph_us(calls, FEWEST, 3)
        count = max(FEWEST, min(MOST, round(1e3 * REPLAY_MS / rough)))
        return cls(graph_of(calls, count), count)

    def us(self) -> float:
        """Microseconds of one call, by one replay."""
        return 1e3 * elapsed_ms(self.graph.replay, "cuda") / self.count


def replayed_us(graphs: Mapping[str, Captured], rounds: int) -> dict[str, list[float]]:
    """Microseconds of a call by round of each graph; each round replays every one once, in an order of its own, so that all of them meet the same clocks."""
    order, times = random.Random(0), {name: list[float]() for name in graphs}
    with collection_paused():
        for _ in range(rounds):
            for name in order.sample(list(graphs), len(graphs)):
                times[name].append(graphs[name].us())
    return times


def timed(calls: Sequence[Call], proof: Proof, repeats: int = 30, captured: int = 20) -> Row:
    """`event_us` and `graph_us` of calls that do the same on inputs of their own, each measured twice: `spread` is the share between both.

    `graph_us` is None on a CPU, and where the calls cannot be captured, which `graph_note` then tells. captured: how many go into a graph, 0 for none.
    """
    repeats = 3 if proof.tiny else repeats
    for call in calls:
        call()
    synchronize(proof.device)
    first, second = (events_us(calls, proof.device, repeats) for _ in range(2))
    row: Row = {"event_us": min(first, second), "graph_us": None, "spread": abs(first - second) / min(first, second)}
    if proof.is_cuda and captured:
        try:
            one, two = (graph_us(calls, captured) for _ in range(2))
            row |= {"graph_us": min(one, two), "spread": abs(one - two) / min(one, two)}
        except Exception as error:
            row["graph_note"] = not_captured(error)
    return row


def not_captured(error: Exception) -> str:
    """Why calls are not in a graph. Raises the error itself where the GPU does not answer any more."""
    if not alive():
        raise error
    return f"not captured: {short(error, 120)}"


def best_us(row: Row) -> float:
    """What comparisons are made on: a graph's figure where there is one."""
    return float(row["graph_us"] or row["event_us"])


def sets_for(bytes_of_one: int, proof: Proof) -> int:
    """How many sets of inputs exceed the L2 by far."""
    return 2 if proof.tiny else max(2, -(-BEYOND_L2 * L2_BYTES // max(1, bytes_of_one)))


def interleaved_ms(calls: Mapping[str, Call], proof: Proof, rounds: int, warmups: int = 2) -> dict[str, list[float]]:
    """Milliseconds of every call by round; each round makes every call once, in an order of its own."""
    for call in calls.values():
        for _ in range(warmups):
            call()
    synchronize(proof.device)
    order, times = random.Random(0), {label: list[float]() for label in calls}
    with collection_paused():
        for _ in range(rounds):
            for label in order.sample(list(calls), len(calls)):
                times[label].append(elapsed_ms(calls[label], proof.device))
    return times


def peak_above(call: Call, device: str) -> int:
    """Most bytes that PyTorch had allocated on the GPU while a call ran, above what was there before; 0 on a CPU."""
    if device != "cuda":
        call()
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def measure_ceilings(proof: Proof) -> list[Row]:
    """What this device can do at best: bytes read and written a second by a copy, operations a second by products of square matrices."""
    device, side = proof.device, 256 if proof.tiny else 8192
    size = 2**20 if proof.tiny else 2**31
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    rows = [_ceiling(proof, "copy", "uint8", 2 * size, [partial(target.copy_, source)], [size])]
    del source, target
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rows.append(_ceiling(proof, "matrix", str(dtype).removeprefix("torch."), 2 * side**3, [partial(torch.mm, a, b)], [side] * 3))
    reclaim()
    for row in rows:
        proof.say(told(row))
    return rows


def _ceiling(proof: Proof, what: str, dtype: str, work: int, calls: list[Call], shape: list[int]) -> Row:
    row = timed(calls, proof, repeats=8, captured=3)
    # A copy within a graph may go by another way, and slower.
    rate = work / min(us for us in (row["event_us"], row["graph_us"]) if us) * 1e6
    proof.ceilings[what if what == "copy" else f"{what} {dtype}"] = rate
    return {"ceiling": what, "dtype": dtype, "shape": shape, **row, "per_s": rate}


def ceiling(proof: Proof, name: str) -> float:
    """Bytes or operations a second at best: `copy`, `matrix bfloat16`, ...; measured now where it was not yet."""
    if not proof.ceilings:
        measure_ceilings(proof)
    return proof.ceilings[name]


def quietly(call: Call) -> Any:
    """What a call gives, without gradients."""
    with torch.no_grad():
        return call()


def pinned_or_not(sdpa: str | None) -> Any:
    """A block in which PyTorch's attention is that one, or its own choice."""

    return nullcontext() if sdpa is None else pinned(sdpa)  # type: ignore[arg-type]
