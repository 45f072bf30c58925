"""Second moments of a teacher's states, streamed over batches: what probes, CKA and closed-form maps are made of.

Two kinds are kept. *Near* moments, over every row, are all that linear probes and CKA need: of each block's
input `x` and of its step `d = T(x) - x`. *Far* moments, over a share of the batches, relate states many
blocks apart, for the linear maps that stand in for whole intervals and for text streams. They take
O(L D^2), times the longest interval for the far ones, whatever the number of rows: in memory, or in files that the system maps.

Shape suffixes: B batch, T token, N rows, D width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ppclc.analysis.device_sums import DeviceSums, HostCopies, Place
from ppclc.kernels import takes
from ppclc.kernels.moments import difference, sum_of_rows
from ppclc.records import disk_errors

Tensors = Mapping[str, torch.Tensor]
TOGETHER = 2**24
"""States of up to so many numbers are stacked, which saves operators; larger ones are taken a block at a time."""
LARGE_BYTES = 2**20
"""Sums from this size on lie in files, where a folder is given."""
CPU = torch.device("cpu")
BANDS = 4
"""Bands of equal width that timesteps in 0..1 fall into."""
CHUNKS = 8
"""Groups that batches fall into by turns, to be resampled."""


def solving_device(device: torch.device) -> torch.device:
    """Where closed forms of a teacher on a device are solved: there, if it is a CUDA device, whose float64 is that of the CPU and faster."""
    return device if device.type == "cuda" else CPU


def rows_of(states_BTD: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Tokens as rows (N, D): all, or those where a mask (B, T) is not zero, or those whose numbers (N,) among all rows are given.

    A mask on a GPU, or for what lies there, is waited for; numbers are not.
    """
    rows = states_BTD.reshape(-1, states_BTD.shape[-1])
    if kept is None:
        return rows
    return rows[kept] if kept.dim() == 1 else states_BTD[kept.bool()]


def numbers_of(mask_BT: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """The rows that a mask keeps, as numbers on a device; None where it keeps all."""
    return None if mask_BT is None else mask_BT.flatten().nonzero().flatten().to(device)


def product(x_ND: torch.Tensor, y_NE: torch.Tensor) -> torch.Tensor:
    """`x' y` (D, E) in float64. Half precision is multiplied in float32, all else in its own."""
    if x_ND.dtype in (torch.float16, torch.bfloat16):
        x_ND, y_NE = x_ND.float(), y_NE.float()
    return (x_ND.T @ y_NE).double()


def ridge_solution(second_DD: torch.Tensor, cross_DE: torch.Tensor, ridge: float) -> torch.Tensor:
    """`(S + penalty)^-1 C` (D, E); the penalty is `ridge` times the mean of `S`'s diagonal."""
    mean = second_DD.diagonal().mean().clamp(min=1e-30)
    eye = torch.eye(len(second_DD), dtype=second_DD.dtype, device=second_DD.device)
    solved: torch.Tensor = torch.linalg.solve(second_DD + ridge * mean * eye, cross_DE)
    return solved


def _near_together(x_SND: torch.Tensor) -> dict[str, torch.Tensor]:
    """The near moments of small states in a few operators."""
    x_SND = x_SND if x_SND.dtype == torch.float64 else x_SND.float()
    d_SND = x_SND[1:] - x_SND[:-1]
    turned = x_SND.transpose(1, 2)
    return {
        "sum": x_SND.sum(1, dtype=torch.float64),
        "second": (turned @ x_SND).double(),
        "residual": (turned[:-1] @ d_SND).double(),
        "step": d_SND.square().sum((1, 2), dtype=torch.float64),
    }


def _near_of_one(x_ND: torch.Tensor, before_ND: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The near moments of one state, and of the step that led to it."""
    found = {"sum": x_ND.sum(0, dtype=torch.float64), "second": product(x_ND, x_ND)}
    if before_ND is not None:
        d_ND = x_ND - before_ND
        found |= {"residual": product(before_ND, d_ND), "step": d_ND.square().sum(dtype=torch.float64)}
    return found


@dataclass
class Moments:
    """Running sums by name, on the CPU, and the rows that went into each stream. In float64; those that kernels add up in float32, which are these too.

    With a `folder`, large sums lie in files there that the system maps: it writes them back as it needs the memory. Near moments
    that are added one state at a time wait in `pending`, on the device where they were computed, until `settle`; what kernels add up lies in
    `on_device` until `drain`. by_block: whether a block comes once for many samples, so that its sums are drained once it is settled.
    `firsts`: of each stream the state that its rows are counted at.
    """

    folder: Path | None = None
    by_block: bool = False
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    firsts: dict[str, int] = field(default_factory=dict)
    pending: dict[Place, torch.Tensor] = field(default_factory=dict)
    on_device: DeviceSums = field(default_factory=DeviceSums)
    copies: HostCopies = field(default_factory=HostCopies)

    def add_near(self, stream: str, states: Sequence[torch.Tensor], prefixes: Iterable[str] = ("",)) -> None:
        """Add rows (N, D) of one stream, every state of it, to the near moments under every prefix.

        `sum` (S, D) and `second` (S, D, D) of all states; `residual` (S - 1, D, D), the sums of `x' d`, and
        `step` (S - 1,), those of `|d|^2`, of all blocks. A step's own sum is the difference of two sums.
        """
        prefixes = list(prefixes)
        if not small(states):
            for i, x in enumerate(states):
                self.add_near_one(stream, i, len(states), x, states[i - 1] if i else None, prefixes)
            self.settle()
            return
        made = _near_together(torch.stack(list(states)))
        for key in prefixes:
            self.count(key + stream, 0, len(states[0]))
            for name, value in made.items():
                if len(value):  # one state alone has no step
                    self.accumulate(f"{key}{stream}.{name}", value)

    def add_near_one(
        self, stream: str, i: int, states: int, x_ND: torch.Tensor, before_ND: torch.Tensor | None, prefixes: Iterable[str] = ("",)
    ) -> None:
        """Of `states` states, add rows of number i, and of the step to it from the one before: in the end the same as `add_near`."""
        prefixes = list(prefixes)
        made = (
            self._add_on_device(stream, i, states, x_ND, before_ND, prefixes) if takes("moments", x_ND) else _near_of_one(x_ND, before_ND)
        )
        for key in prefixes:
            self.count(key + stream, i, len(x_ND))
            for name, value in made.items():
                step = name in ("residual", "step")
                place = (f"{key}{stream}.{name}", i - 1 if step else i, states - 1 if step else states)
                self.pending[place] = self.pending[place] + value if place in self.pending else value

    def _add_on_device(
        self, stream: str, i: int, states: int, x_ND: torch.Tensor, before_ND: torch.Tensor | None, prefixes: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Leave products to a kernel, those of the step together with those of the state that it starts from; what else is to be added."""
        made = {}
        if before_ND is None:
            made = {"sum": sum_of_rows(x_ND)}
        else:
            d_ND, made["sum"], made["step"] = difference(x_ND, before_ND)
            self._add_products(stream, i - 1, states, before_ND, d_ND, prefixes)
        if i == states - 1:
            self._add_products(stream, i, states, x_ND, None, prefixes)
        return made

    def _add_products(
        self, stream: str, i: int, states: int, x_ND: torch.Tensor, step_ND: torch.Tensor | None, prefixes: Sequence[str]
    ) -> None:
        for key in prefixes:
            second: Place = (f"{key}{stream}.second", i, states)
            cross: Place | None = None if step_ND is None else (f"{key}{stream}.residual", i, states - 1)
            self.add_by_kernel(second, cross, x_ND, step_ND)

    def add_by_kernel(
        self, second: Place | None, cross: Place | None, x_ND: torch.Tensor, y_ND: torch.Tensor | None, centres: Sequence[torch.Tensor] = ()
    ) -> None:
        """Add `x'x` at one place and `x'y` at another, where the rows are; what lies there is added up first if there is no room."""
        if self.on_device.is_full((second, cross), 4 * x_ND.shape[1] ** 2, x_ND.device):
            self.drain()
        self.on_device.add(second, cross, x_ND, y_ND, centres)

    def drain(self, prefixes: tuple[str, ...] = ("",), wait: bool = True) -> None:
        """Add up what lies on a device under names that begin so, and let it go; without waiting, in a thread that other sums are not touched beside."""
        self.copies.bring(self.on_device.taken(prefixes), self._take)
        if wait:
            self.copies.wait()

    def _take(self, place: Place, value: torch.Tensor) -> None:
        key, row, rows = place
        self._accumulate(key, value, row if rows else None, rows)

    def add_far(self, stream: str, j: int, window: Mapping[int, torch.Tensor]) -> None:
        """Add rows (N, D) of state j to the far moments, with those of the states before it that are in the window, which has j too.

        `far.<stream>.sum.j` and `far.<stream>.cross.i.j`, for every i of the window.
        """
        name, x = f"far.{stream}", window[j]
        self.count(name, j, len(x))
        self.accumulate(f"{name}.sum.{j}", sum_of_rows(x))
        for i in sorted(window):
            place: Place = (f"{name}.cross.{i}.{j}", 0, 0)
            if takes("moments", x):
                self.add_by_kernel(place if i == j else None, None if i == j else place, window[i], x)
            else:
                self.accumulate(place[0], product(window[i], x))

    def add_up(self, prefixes: Sequence[str], streams: Sequence[str]) -> None:
        """Make the whole of each stream from groups that every row entered once."""
        for stream in streams:
            there = [p for p in prefixes if p + stream in self.rows]
            self.rows[stream] = sum(self.rows[p + stream] for p in there)
            for name in ("sum", "second", "residual", "step"):
                self.tensors[f"{stream}.{name}"] = torch.stack([self.tensors[f"{p}{stream}.{name}"] for p in there]).sum(0)

    def count(self, stream: str, state: int, rows: int) -> None:
        """Count rows of a stream, at the first of its states alone."""
        if self.firsts.setdefault(stream, state) == state:
            self.rows[stream] = self.rows.get(stream, 0) + rows

    def accumulate(self, key: str, value: torch.Tensor, row: int | None = None, rows: int = 0) -> None:
        """Add a value to a running sum, or to one row of `rows`. One on a GPU stays there until `drain`."""
        if not stays(value):
            self._accumulate(key, value, row, rows)
            return
        place = (key, row or 0, rows)
        if self.on_device.is_full((place,), value.nbytes, value.device):
            self.drain()
        self.on_device.add_value(place, value)

    def _accumulate(self, key: str, value: torch.Tensor, row: int | None, rows: int) -> None:
        if key not in self.tensors:
            dtype = torch.float32 if value.dtype == torch.float32 else torch.float64
            if row is None and not self._in_file(value.numel() * dtype.itemsize):  # fresh memory is touched once, and not to be zero first
                self.tensors[key] = value.to(dtype, copy=True, memory_format=torch.contiguous_format)
                return
            self.tensors[key] = self._zeros(value.shape if row is None else (rows, *value.shape), dtype)
        place = self.tensors[key] if row is None else self.tensors[key][row]
        place += value.to(place)

    def settle(self) -> None:
        """Add up what waits."""
        for (key, row, rows), value in self.pending.items():
            self.accumulate(key, value, row, rows)
        self.pending.clear()
        if self.by_block:  # a teacher whose blocks come one by one is done with this one for a while
            self.drain()

    def _in_file(self, nbytes: int) -> bool:
        return self.folder is not None and nbytes >= LARGE_BYTES

    def _zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        count = math.prod(shape)
        if self.folder is None or not self._in_file(dtype.itemsize * count):
            return torch.zeros(*shape, dtype=dtype)
        path = self.folder / f"{len(self.tensors)}.sum"
        path.unlink(missing_ok=True)  # one that is there would be taken as it is
        with disk_errors(path), path.open("wb") as file:  # a mapped page that the disk has no room for would be a signal, and no error
            allocate(file.fileno(), dtype.itemsize * count)
        sums = torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(*shape)
        with suppress(OSError):  # its room is free again with the last use of the sum, however that ends; not on Windows
            path.unlink()
        return sums


def allocate(descriptor: int, nbytes: int) -> None:
    """Give a file its room on the disk, where the system can; raises OSError where there is none."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)


def stays(value: torch.Tensor) -> bool:
    """Whether a value is added up where it is."""
    return value.device.type != "cpu"


def small(states: Sequence[torch.Tensor]) -> bool:
    """Whether states are so small that all of them in one operator are faster than one by one."""
    return len(states) * states[0].numel() <= TOGETHER


@dataclass(frozen=True)
class Near:
    """Centred near moments of one stream, in float64 on a device, ready to be solved there."""

    tensors: Tensors
    stream: str
    rows: int
    num_blocks: int
    device: torch.device = CPU

    def mean(self, i: int) -> torch.Tensor:
        """Mean (D,) of state i."""
        return self._row("sum", i) / self.rows

    def second(self, i: int) -> torch.Tensor:
        """Centred `x' x` (D, D) of state i."""
        return self._row("second", i) - self.rows * torch.outer(self.mean(i), self.mean(i))

    def residual(self, i: int) -> torch.Tensor:
        """Centred `x' d` (D, D) of block i's input and step."""
        return self._row("residual", i) - self.rows * torch.outer(self.mean(i), self.mean(i + 1) - self.mean(i))

    def step(self, i: int) -> float:
        """Centred energy of block i's step."""
        energy = self._row("step", i) - self.rows * (self.mean(i + 1) - self.mean(i)).square().sum()
        return max(0.0, energy.item())

    def _row(self, name: str, i: int) -> torch.Tensor:
        return self.tensors[f"{self.stream}.{name}"][i].to(self.device)


@dataclass(frozen=True)
class Far:
    """Centred far moments of one stream, in float64 on a device."""

    tensors: Tensors
    stream: str
    rows: int
    device: torch.device = CPU

    def has(self, i: int, j: int) -> bool:
        """Whether states i and j are near enough for their cross moment to have been kept."""
        return f"far.{self.stream}.cross.{min(i, j)}.{max(i, j)}" in self.tensors

    def mean(self, i: int) -> torch.Tensor:
        """Mean (D,) of state i."""
        return self.tensors[f"far.{self.stream}.sum.{i}"].to(self.device) / self.rows

    def cross(self, i: int, j: int) -> torch.Tensor:
        """Centred cross moment (D, D) of states i and j."""
        a, b = min(i, j), max(i, j)
        products = self.tensors[f"far.{self.stream}.cross.{a}.{b}"].to(self.device)
        centred = products - self.rows * torch.outer(self.mean(a), self.mean(b))
        return centred if i <= j else centred.T


def near_of(
    tensors: Tensors,
    rows: Mapping[str, int],
    stream: str,
    num_blocks: int,
    weights: Mapping[str, float] | None = None,
    device: torch.device = CPU,
) -> Near:
    """The near moments of a stream: all of them, or a weighted sum of the groups whose prefixes are given."""
    if weights is None:
        return Near(tensors, stream, rows[stream], num_blocks, device)
    suffixes = [k for k in tensors if k.startswith(f"{stream}.")]
    summed = {k: torch.stack([w * tensors[p + k] for p, w in weights.items()]).sum(0) for k in suffixes}
    return Near(summed, stream, round(sum(w * rows[p + stream] for p, w in weights.items())), num_blocks, device)


def symmetric_eigenvectors(second_DD: torch.Tensor) -> torch.Tensor:
    """Eigenvectors (D, D) as columns, by falling eigenvalue."""
    vectors: torch.Tensor = torch.linalg.eigh(second_DD)[1]
    return vectors.flip(1)
