"""What a bench times: a model in a back end as a call from inputs to an output, plain or as a CUDA graph, and how much memory it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ppclc import kernels, plugins
from ppclc.backends import Backend, Session, Subject, Tensors
from ppclc.benching.graphs import Captured, captured
from ppclc.benching.roofline import Work
from ppclc.benching.timing import Call
from ppclc.errors import UnavailableError
from ppclc.records import measured

EAGER = "eager"
Sdpa = Literal["flash", "efficient", "cudnn", "math"]
Provider = Literal["tensorrt", "nv_tensorrt_rtx", "cuda", "cpu"]
"""Those of the back end `onnxruntime`, by its names."""


def peak_resident(run: Callable[[], None]) -> int:
    """Largest resident memory of this process and its children, in bytes, while `run` runs; all that is loaded counts."""
    with measured("bench", every_s=0.005) as stages:
        run()
    return stages[0].peak_rss_bytes


def peak_on_device(run: Callable[[], None]) -> int:
    """Most bytes that PyTorch had allocated on the current GPU while `run` ran, and those that others hold there; all that is loaded counts."""
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) + held_by_others()


def held_by_others() -> int:
    """Bytes of the current GPU that PyTorch's allocator has not: its context, and runtimes with allocators of their own."""
    free, total = torch.cuda.mem_get_info()
    return max(0, int(total - free - torch.cuda.memory_reserved()))


@dataclass(frozen=True)
class BenchTarget:
    """What is timed: `teacher`, `student` or a path, in a back end.

    run: from inputs to the output; on a GPU that may not be there yet. peak: bytes at the peak of a call. work: what a call is, where that is
    known. sdpa: how eager attention was computed, empty where a back end has its own. cuda_graph: whether a recorded call is replayed. session: how
    the back end runs, in its own words.
    """

    label: str
    backend: str
    run: Callable[[Tensors], Any]
    peak: Callable[[Callable[[], None]], int] = peak_resident
    work: Work | None = None
    sdpa: str = ""
    cuda_graph: bool = False
    session: Mapping[str, Any] = field(default_factory=dict)


class BoundRun:
    """From inputs to an output, by a call that `bind` makes of them: at the first run, and when others are given."""

    def __init__(self, bind: Callable[[Tensors], Call]) -> None:
        self.bind = bind
        self.inputs: Tensors | None = None
        self.call: Call = lambda: None

    def __call__(self, inputs: Tensors) -> Any:
        """The output."""
        if inputs is not self.inputs:
            self.call, self.inputs = self.bind(inputs), inputs
        return self.call()


def session_target(
    label: str,
    backend: str,
    folder: Path,
    subject: Subject,
    device: str,
    sdpa: Sdpa | None,
    work: Work | None = None,
    options: Mapping[str, Any] | None = None,
) -> BenchTarget:
    """A model in a back end: itself, or the artefact in a folder. options: those of the back end's `load`.

    Raises:
        UnavailableError: it would run on another device than the one that is timed.
        PpclcError: as the back end's `load` does.
    """
    plugin: Backend = plugins.load("backends", backend)
    session = plugin.load(folder, subject, **(options or {}))
    runs_on = session.options.get("device", device)
    if runs_on != device:
        raise UnavailableError(f"{backend} runs it on {runs_on}, wanted {device} as everything that it is timed beside")
    shown = (sdpa or f"PyTorch's choice on {device}") if is_eager(plugin) else ""
    peak = peak_resident if device == "cpu" else peak_on_device
    told = {**session.options, **({"kernels": _kernels_of(device)} if backend == EAGER else {})}
    return BenchTarget(label, backend, BoundRun(partial(_bound, session, sdpa)), peak, work, shown, session=told)


def _kernels_of(device: str) -> str:
    """What an eager model's blocks are made of there."""
    return "torch" if device == "cpu" or kernels.lacks() else kernels.chosen()


def is_eager(plugin: Backend) -> bool:
    """Whether a back end runs the model itself, with PyTorch's attention."""
    return plugin.export is None and not plugin.artefact


def _bound(session: Session, sdpa: Sdpa | None, inputs: Tensors) -> Call:
    call = session.bound(inputs)
    if sdpa is None:
        return call

    def run() -> Any:
        with pinned(sdpa):
            return call()

    return run


def graph_target(plain: BenchTarget) -> BenchTarget:
    """The same calls, captured as a CUDA graph at the first run, which raises UnavailableError where that cannot be."""
    assert isinstance(plain.run, BoundRun)
    run = BoundRun(partial(captured, plain.run.bind))

    def peak(calls: Callable[[], None]) -> int:
        most = peak_on_device(calls)
        # A replay allocates nothing: its memory was taken when it was recorded.
        return max(most, run.call.peak_bytes + held_by_others()) if isinstance(run.call, Captured) else most

    return replace(plain, run=run, peak=peak, cuda_graph=True)


@contextmanager
def pinned(sdpa: Sdpa | None) -> Iterator[None]:
    """A block in which PyTorch's attention is that one."""
    kinds = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    with contextlib.nullcontext() if sdpa is None else sdpa_kernel(kinds[sdpa]):
        yield


@contextmanager
def own_stream(device: str) -> Iterator[None]:
    """A block whose GPU work goes to a stream of its own: on the default one TensorRT waits for the device around every call."""
    if device == "cpu":
        yield
        return
    aside, outside = torch.cuda.Stream(), torch.cuda.current_stream()
    aside.wait_stream(outside)
    with torch.cuda.stream(aside):
        yield
    outside.wait_stream(aside)
