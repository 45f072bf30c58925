"""Running sums that lie on the device of the rows until they are added to those in float64 on the CPU: bringing one there takes longer than making it.

Shape suffixes: N rows, D and E widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from ppclc.kernels.moments import add_moments, symmetric
from ppclc.machine.devices import free_bytes

Place = tuple[str, int, int]
"""Name of a running sum, row of it, count of its rows; 0 rows where the sum has none."""
SHARE = 0.5
"""Of the memory that is free on a GPU, what sums may take."""


@dataclass
class DeviceSums:
    """Sums by place.

    seconds, crosses: in float32, to which kernels add; of second moments the upper triangle is kept. values: whatever else is summed up, in
    its own dtype. outers: vectors in float64 whose outer products are still to be added to a second or cross moment. held_bytes: of all but those.
    """

    seconds: dict[Place, torch.Tensor] = field(default_factory=dict)
    crosses: dict[Place, torch.Tensor] = field(default_factory=dict)
    values: dict[Place, torch.Tensor] = field(default_factory=dict)
    outers: dict[Place, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    held_bytes: int = 0

    def add(
        self, second: Place | None, cross: Place | None, x_ND: torch.Tensor, y_NE: torch.Tensor | None, centres: Sequence[torch.Tensor] = ()
    ) -> None:
        """Add `x'x` at one place and `x'y` at another, of rows less their centres."""
        width = x_ND.shape[1]
        second_DD = None if second is None else self._at(self.seconds, second, width, width, x_ND.device)
        cross_DE = None if cross is None or y_NE is None else self._at(self.crosses, cross, width, y_NE.shape[1], x_ND.device)
        add_moments(second_DD, cross_DE, x_ND, None if cross is None else y_NE, None, centres)

    def add_value(self, place: Place, value: torch.Tensor) -> None:
        """Add any value."""
        if place in self.values:
            self.values[place] += value
        else:
            self.values[place] = value.clone()
            self.held_bytes += value.nbytes

    def add_outer(self, place: Place, a_D: torch.Tensor, b_E: torch.Tensor) -> None:
        """Add `a b'` to the moment at a place."""
        self.outers.setdefault(place, []).append((a_D, b_E))

    def is_full(self, places: Sequence[Place | None], nbytes: int, device: torch.device) -> bool:
        """Whether those of the places that are new, each of so many bytes, would take more memory than sums may have; never where none is held."""
        new = sum(place is not None and not any(place in kind for kind in (self.seconds, self.crosses, self.values)) for place in places)
        if not (new and self.held_bytes and device.type == "cuda"):
            return False
        return self.held_bytes + new * nbytes > SHARE * (free_bytes(device) + self.held_bytes)

    def taken(self, prefixes: tuple[str, ...] = ("",)) -> Iterator[tuple[Place, Taken]]:
        """Every sum whose name begins so; it is let go once the next is asked for."""
        for kind, half in ((self.seconds, True), (self.crosses, False), (self.values, False)):
            for place in [place for place in kind if place[0].startswith(prefixes)]:
                sums = kind.pop(place)
                self.held_bytes -= sums.nbytes
                yield place, Taken(sums, half, self.outers.pop(place, []))

    def _at(self, sums: dict[Place, torch.Tensor], place: Place, width: int, other: int, device: torch.device) -> torch.Tensor:
        if place not in sums:
            sums[place] = torch.zeros(width, other, dtype=torch.float32, device=device)
            self.held_bytes += sums[place].nbytes
        return sums[place]


@dataclass(frozen=True)
class Taken:
    """A sum that is taken away: half of it where it is symmetric, and the vectors whose outer products it is still to get."""

    sums_DE: torch.Tensor
    half: bool = False
    outers: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()

    def whole(self) -> torch.Tensor:
        """The whole sum, which takes memory of its own: in float64 where there are outer products."""
        sums_DE = symmetric(self.sums_DE) if self.half else self.sums_DE
        if not self.outers:
            return sums_DE
        a_KD, b_KE = (torch.stack(vectors) for vectors in zip(*self.outers, strict=True))
        return sums_DE.double() + a_KD.T @ b_KE


class HostCopies:
    """Sums on their way to the CPU, brought and taken there by a thread while the GPU goes on; one lot at a time, whose memory goes as it is read."""

    def __init__(self) -> None:
        self._lot: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._stream: Any = None

    def bring(self, sums: Iterable[tuple[Place, Taken]], take: Callable[[Place, torch.Tensor], None]) -> None:
        """Begin with a lot, once the one before is done: each sum is handed to `take`, in memory that is the next one's after."""
        self.wait()
        lot = list(sums)
        if not lot:
            return
        self._thread = self._thread or ThreadPoolExecutor(1, "sums")
        cuda = next((taken.sums_DE.device for _, taken in lot if taken.sums_DE.is_cuda), None)
        ready = None if cuda is None else torch.cuda.current_stream(cuda).record_event()
        self._lot = self._thread.submit(self._bring, lot, take, cuda, ready)

    def wait(self) -> None:
        """Wait for what is under way. Raises what went wrong with it."""
        lot, self._lot = self._lot, None
        if lot is not None:
            lot.result()

    def _bring(
        self, lot: list[tuple[Place, Taken]], take: Callable[[Place, torch.Tensor], None], cuda: torch.device | None, ready: Any
    ) -> None:
        if cuda is not None and self._stream is None:
            self._stream = torch.cuda.Stream(cuda)
        if cuda is not None:
            self._stream.wait_event(ready)
        lot.reverse()
        while lot:
            place, taken = lot.pop()
            take(place, self._on_cpu(taken))

    def _on_cpu(self, taken: Taken) -> torch.Tensor:
        """By memory that the bus reads and writes at its full speed, and on a stream of its own, so that nothing else is waited for.

        Made whole there, one at a time, so that a lot takes no more memory than its sums did.
        """
        if not taken.sums_DE.is_cuda:
            return taken.whole()
        with torch.cuda.stream(self._stream):
            value = taken.whole()
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            host.copy_(value, non_blocking=True)
        self._stream.synchronize()
        return host
