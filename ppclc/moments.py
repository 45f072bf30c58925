"""Second moments of a teacher's states, streamed over batches: what probes, CKA and closed-form maps are made of.

Two kinds are kept. *Near* moments, over every row, are all that linear probes and CKA need: of each block's
input `x` and of its step `d = T(x) - x`. *Far* moments, over a share of the batches, relate states many
blocks apart, for the linear maps that stand in for whole intervals and for text streams. Memory is
O(L D^2), times the longest interval for the far ones, whatever the number of rows.

Shape suffixes: B batch, T token, N rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

Tensors = Mapping[str, torch.Tensor]
TOGETHER = 2**24
"""States of up to so many numbers are stacked, which saves operators; larger ones are taken a block at a time."""
BANDS = 4
"""Bands of equal width that timesteps in 0..1 fall into."""
CHUNKS = 8
"""Groups that batches fall into by turns, to be resampled."""


def rows_of(states_BTD: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """Tokens as rows (N, D); those where the mask is zero are left out."""
    return states_BTD.reshape(-1, states_BTD.shape[-1]) if mask_BT is None else states_BTD[mask_BT.bool()]


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


def _near_in_turn(states: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same, a block at a time, so that no second copy of the states is made."""
    found: dict[str, list[torch.Tensor]] = {"sum": [], "second": [], "residual": [], "step": []}
    for i, x in enumerate(states):
        found["sum"].append(x.sum(0, dtype=torch.float64))
        found["second"].append(product(x, x))
        if i + 1 < len(states):
            d = states[i + 1] - x
            found["residual"].append(product(x, d))
            found["step"].append(d.square().sum(dtype=torch.float64))
    return {name: torch.stack(values) for name, values in found.items() if values}


@dataclass
class Moments:
    """Running sums by name, float64, and the rows that went into each stream."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def add_near(self, stream: str, states: Sequence[torch.Tensor], prefixes: Iterable[str] = ("",)) -> None:
        """Add rows (N, D) of one stream, by block, to the near moments under every prefix.

        `sum` (S, D) and `second` (S, D, D) of all states; `residual` (S - 1, D, D), the sums of `x' d`, and
        `step` (S - 1,), those of `|d|^2`, of all blocks. A step's own sum is the difference of two sums.
        """
        made = _near_together(torch.stack(list(states))) if len(states) * states[0].numel() <= TOGETHER else _near_in_turn(states)
        for key in prefixes:
            self.rows[key + stream] = self.rows.get(key + stream, 0) + len(states[0])
            for name, value in made.items():
                if len(value):  # one state alone has no step
                    self.accumulate(f"{key}{stream}.{name}", value)

    def add_far(self, stream: str, states: Sequence[torch.Tensor], longest: int) -> None:
        """Add rows (N, D) to the far moments: `far.<stream>.sum.i` and `far.<stream>.cross.i.j` for i <= j <= i + longest."""
        name = f"far.{stream}"
        self.rows[name] = self.rows.get(name, 0) + len(states[0])
        for i, x in enumerate(states):
            self.accumulate(f"{name}.sum.{i}", x.sum(0, dtype=torch.float64))
            last = min(i + longest, len(states) - 1)
            joined = product(x, torch.cat(list(states[i : last + 1]), dim=1))
            for j, block in zip(range(i, last + 1), joined.split(x.shape[1], dim=1), strict=True):
                self.accumulate(f"{name}.cross.{i}.{j}", block)

    def add_up(self, prefixes: Sequence[str], streams: Sequence[str]) -> None:
        """Make the whole of each stream from groups that every row entered once."""
        for stream in streams:
            there = [p for p in prefixes if p + stream in self.rows]
            self.rows[stream] = sum(self.rows[p + stream] for p in there)
            for name in ("sum", "second", "residual", "step"):
                self.tensors[f"{stream}.{name}"] = torch.stack([self.tensors[f"{p}{stream}.{name}"] for p in there]).sum(0)

    def accumulate(self, key: str, value: torch.Tensor) -> None:
        """Add a value to a running sum."""
        if key in self.tensors:
            self.tensors[key] += value
        else:
            self.tensors[key] = value.clone()


@dataclass(frozen=True)
class Near:
    """Centred near moments of one stream, ready to be solved."""

    tensors: Tensors
    stream: str
    rows: int
    num_blocks: int

    def mean(self, i: int) -> torch.Tensor:
        """Mean (D,) of state i."""
        return self.tensors[f"{self.stream}.sum"][i] / self.rows

    def second(self, i: int) -> torch.Tensor:
        """Centred `x' x` (D, D) of state i."""
        return self.tensors[f"{self.stream}.second"][i] - self.rows * torch.outer(self.mean(i), self.mean(i))

    def residual(self, i: int) -> torch.Tensor:
        """Centred `x' d` (D, D) of block i's input and step."""
        return self.tensors[f"{self.stream}.residual"][i] - self.rows * torch.outer(self.mean(i), self.mean(i + 1) - self.mean(i))

    def step(self, i: int) -> float:
        """Centred energy of block i's step."""
        energy = self.tensors[f"{self.stream}.step"][i] - self.rows * (self.mean(i + 1) - self.mean(i)).square().sum()
        return max(0.0, energy.item())


@dataclass(frozen=True)
class Far:
    """Centred far moments of one stream."""

    tensors: Tensors
    stream: str
    rows: int

    def has(self, i: int, j: int) -> bool:
        """Whether states i and j are near enough for their cross moment to have been kept."""
        return f"far.{self.stream}.cross.{min(i, j)}.{max(i, j)}" in self.tensors

    def mean(self, i: int) -> torch.Tensor:
        """Mean (D,) of state i."""
        return self.tensors[f"far.{self.stream}.sum.{i}"] / self.rows

    def cross(self, i: int, j: int) -> torch.Tensor:
        """Centred cross moment (D, D) of states i and j."""
        a, b = min(i, j), max(i, j)
        centred = self.tensors[f"far.{self.stream}.cross.{a}.{b}"] - self.rows * torch.outer(self.mean(a), self.mean(b))
        return centred if i <= j else centred.T


def near_of(tensors: Tensors, rows: Mapping[str, int], stream: str, num_blocks: int, weights: Mapping[str, float] | None = None) -> Near:
    """The near moments of a stream: all of them, or a weighted sum of the groups whose prefixes are given."""
    if weights is None:
        return Near(tensors, stream, rows[stream], num_blocks)
    suffixes = [k for k in tensors if k.startswith(f"{stream}.")]
    summed = {k: torch.stack([w * tensors[p + k] for p, w in weights.items()]).sum(0) for k in suffixes}
    return Near(summed, stream, round(sum(w * rows[p + stream] for p, w in weights.items())), num_blocks)


def symmetric_eigenvectors(second_DD: torch.Tensor) -> torch.Tensor:
    """Eigenvectors (D, D) as columns, by falling eigenvalue."""
    vectors: torch.Tensor = torch.linalg.eigh(second_DD)[1]
    return vectors.flip(1)
