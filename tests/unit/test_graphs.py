"""CUDA graphs and events by stand-ins that keep what a device would do in order: there need be no GPU here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ppclc.benching import graphs
from ppclc.benching.graphs import captured
from ppclc.benching.timing import by_cuda_events
from ppclc.errors import UnavailableError
from ppclc.machine.gpu_state import FIELDS, NOT_TOLD, REASONS, gpu_state


class Device:
    """A GPU that does on the host what it is asked, and writes down in what state; a replay repeats what was recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, breaks: str = "") -> None:
        self.log, self.state, self.mode, self.recorded = list[str](), "default", "default", list[Callable[[], Any]]()
        self.breaks = breaks
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, stand_in in {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda _: self.within("aside"),
            "graph": lambda graph, stream: self.capture(),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: [call() for call in self.recorded]),
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "reset_peak_memory_stats": lambda: None,
            "max_memory_allocated": lambda: 77,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    @contextmanager
    def within(self, state: str) -> Iterator[None]:
        before, self.state = self.state, state
        yield
        self.state = before

    @contextmanager
    def capture(self) -> Iterator[None]:
        try:
            with self.within("capturing"):
                yield
        finally:
            if self.breaks:  # as leaving a recording does, whatever the reason was
                raise RuntimeError("operation failed due to a previous error during capture")

    def doubling(self, given: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
        """A call that doubles x in place of a kernel's."""
        output = torch.empty_like(given["x"])

        def kernel() -> None:
            torch.mul(given["x"], 2, out=output)

        def call() -> torch.Tensor:
            self.log.append(f"{self.state}/{self.mode}")
            if self.mode == "error" and self.breaks == "waits":
                raise RuntimeError("called a synchronizing CUDA operation")
            if self.state == "capturing":
                if self.breaks:
                    raise RuntimeError("operation not permitted when stream is capturing")
                self.recorded.append(kernel)
            kernel()
            return output

        return call


def test_a_call_is_recorded_after_others_on_inputs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    device, x = Device(monkeypatch), torch.ones(3)
    found = captured(device.doubling, {"x": x})
    assert device.log == ["aside/default"] * graphs.WARMUPS + ["aside/error", "capturing/default"]
    assert device.mode == "default"
    assert found.peak_bytes == 77
    x += 1  # not what is replayed
    assert torch.equal(found(), torch.full((3,), 2.0))
    found.put({"x": torch.full((3,), 5.0)})
    assert torch.equal(found(), torch.full((3,), 10.0))
    assert len(device.log) == graphs.WARMUPS + 2  # replays run no Python of the call


@pytest.mark.parametrize(
    ("breaks", "reason", "calls"),
    [("waits", "called a synchronizing CUDA operation", 4), ("late", "operation not permitted when stream is capturing", 5)],
)
def test_a_call_that_cannot_be_recorded_is_told_with_the_first_reason(
    breaks: str, reason: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_BROKEN", [])
    device = Device(monkeypatch, breaks)
    with pytest.raises(UnavailableError, match=f"cannot be captured as a CUDA graph: {reason}"):
        captured(device.doubling, {"x": torch.ones(3)})
    assert (len(device.log), device.mode) == (calls, "default")
    assert len(graphs._BROKEN) == (breaks == "late")  # one that began is kept


def test_events_stand_around_a_call_and_the_host_waits_behind_them() -> None:
    log, now = list[str](), [0.0]

    class Event:
        def record(self) -> None:
            log.append("record")
            self.at = now[0]

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return float(end.at - self.at)

    def call() -> None:
        log.append("call")
        now[0] += 1.5

    watch = by_cuda_events(Event)
    assert (watch.name, watch.ns(call)) == ("cuda events", 1_500_000)
    assert log == ["record", "call", "record", "wait"]


def test_what_a_gpu_does_is_told_by_either_name_of_its_reasons() -> None:
    def driver(*known: str) -> Callable[[Any], str]:
        return lambda fields: ", ".join(f"<{f}>" for f in fields) if set(fields) <= {*FIELDS, *known} else ""

    for reason in REASONS:
        told = gpu_state("cuda", driver(reason))
        assert told.startswith("clocks.sm <clocks.sm>, clocks.max.sm <")
        assert told.endswith(f"{reason} <{reason}>")
    assert gpu_state("cuda", driver()).endswith("power.limit <power.limit>")
    assert gpu_state("cuda", lambda fields: "") == NOT_TOLD
    assert gpu_state("cpu") == ""
