"""CUDA graphs: a call on fixed tensors, recorded once and replayed without Python and without a launch for every kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ppclc.errors import UnavailableError, first_line

WARMUPS = 3
"""Calls before the one that is recorded: what is compiled, tuned or cached at first use must be by then."""
Bind = Callable[[dict[str, torch.Tensor]], Callable[[], Any]]
"""From tensors to a call on them, where they lie."""
_BROKEN: list[Any] = []
"""Graphs whose recording failed: the allocator goes on asking them whether memory is theirs, so that they must not be freed."""


@dataclass(frozen=True)
class Captured:
    """A recorded call. inputs: the tensors that it reads. output: what each replay writes anew. peak_bytes: most that PyTorch had allocated while recording."""

    graph: Any
    inputs: Mapping[str, torch.Tensor]
    output: Any
    peak_bytes: int

    def put(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Copy inputs of the same shapes into those that replays read."""
        for name, held in self.inputs.items():
            held.copy_(inputs[name])

    def __call__(self) -> Any:
        """Replay on the current stream; the output, which the next replay overwrites."""
        self.graph.replay()
        return self.output


def captured(bind: Bind, inputs: Mapping[str, torch.Tensor]) -> Captured:
    """The call that `bind` makes of copies of the inputs, recorded on a stream of its own after `WARMUPS` calls there.

    Raises:
        UnavailableError: the call waits for the device or copies from the host, which a graph cannot, or its recording fails.
    """
    held = {name: tensor.clone() for name, tensor in inputs.items()}
    call, aside = bind(held), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARMUPS):
            call()
        # A recording that fails leaves its mark on the allocator: what would make it fail is looked for before.
        with _told(), _without_waiting():
            call()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    try:
        with _told(), torch.cuda.graph(graph, stream=aside):
            output = call()
    except UnavailableError:
        _BROKEN.append(graph)
        raise
    return Captured(graph, held, output, int(torch.cuda.max_memory_allocated()))


@contextmanager
def _told() -> Iterator[None]:
    """Tell what goes wrong as UnavailableError; leaving a failed recording raises once more, and the first error is the reason."""
    try:
        yield
    except Exception as error:
        reason = error.__context__ if isinstance(error.__context__, Exception) else error
        raise UnavailableError(f"cannot be captured as a CUDA graph: {first_line(reason)}") from error


@contextmanager
def _without_waiting() -> Iterator[None]:
    """A block in which PyTorch refuses every operation that waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
