"""Linear maps that stand in for feed-forward networks, in closed form from streamed second moments.

A block turns the state after its attention residual, `mid`, into `mid + added`. The map is ridge least
squares of `added` on `mid`, with a constant: `added ~ W mid + b`. Source: arXiv 2511.16156, width pruning
of the feed-forward networks, for the form; the ridge is ours.

For a block that starts an interval, `mid` and `added` are those of the teacher's first block, of which
the student block is a copy at first: see docs/decisions/006-linear-ffn.md.

Shape suffixes: B batch, T token, D width, N row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ppclc.analysis.moments import CPU, Moments, ridge_solution, rows_of
from ppclc.kernels import takes
from ppclc.kernels.moments import difference, sum_of_rows

Tensors = Mapping[str, torch.Tensor]


class FfnMoments:
    """Running float64 moments of `mid` and `added` by stream and block, among others or on their own.

    `tensors`, for stream s and block i: `ffn.s.sum.i` (D,) = sum of mid, `ffn.s.added.i` (D,) = sum of
    added, `ffn.s.square.i` (D, D) = sum of `mid' mid`, `ffn.s.cross.i` (D, D) = sum of `mid' added`.
    `rows["ffn.s"]` counts the rows.
    """

    def __init__(self, moments: Moments | None = None) -> None:
        self.moments = moments or Moments()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All sums by name."""
        self.moments.drain()
        return self.moments.tensors

    @property
    def rows(self) -> dict[str, int]:
        """Rows that were added, by stream."""
        return self.moments.rows

    def add(self, stream: str, block: int, mid_BTD: torch.Tensor, output_BTD: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        """Add one batch of one block: its mid and its output. kept: as `rows_of` takes it, of the rows that enter."""
        mid_ND, output_ND = rows_of(mid_BTD, kept), rows_of(output_BTD, kept)
        self.moments.count(f"ffn.{stream}", block, len(mid_ND))
        if takes("moments", mid_ND, output_ND):
            self._add_by_kernel(stream, block, mid_ND, output_ND)
            return
        added_ND = output_ND.double() - mid_ND.double()
        for name, value in _moments(mid_ND.double(), added_ND, torch.promote_types(mid_ND.dtype, torch.float32)).items():
            self.moments.accumulate(f"ffn.{stream}.{name}.{block}", value)

    def _add_by_kernel(self, stream: str, block: int, mid_ND: torch.Tensor, output_ND: torch.Tensor) -> None:
        """The same with products of what is left without the batch's means made by a kernel."""
        added_ND, output_D, _ = difference(output_ND, mid_ND)
        count, mid_D = max(len(mid_ND), 1), sum_of_rows(mid_ND)
        added_D = output_D - mid_D  # what is added is rounded, row by row
        square, cross = ((f"ffn.{stream}.{name}.{block}", 0, 0) for name in ("square", "cross"))
        self.moments.add_by_kernel(square, cross, mid_ND, added_ND, [(x / count).float() for x in (mid_D, added_D)])
        self.moments.on_device.add_outer(square, mid_D, mid_D / count)
        self.moments.on_device.add_outer(cross, mid_D, added_D / count)
        for name, value in (("sum", mid_D), ("added", added_D)):
            self.moments.accumulate(f"ffn.{stream}.{name}.{block}", value)


def _moments(mid_ND: torch.Tensor, added_ND: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Sums and products of one batch, float64; products of what is left without the batch's mean are taken in `dtype`.

    A state's mean may be far larger than its spread, which float32 products of the raw rows would drown.
    """
    count = max(len(mid_ND), 1)
    sums = {"sum": mid_ND.sum(0), "added": added_ND.sum(0)}
    centred, added = ((x - s / count).to(dtype) for x, s in zip((mid_ND, added_ND), sums.values(), strict=True))
    products = {"square": centred.T @ centred, "cross": centred.T @ added}
    outer = {"square": torch.outer(sums["sum"], sums["sum"]), "cross": torch.outer(sums["sum"], sums["added"])}
    return sums | {n: p.double() + outer[n] / count for n, p in products.items()}


def linear_map(
    square_DD: torch.Tensor, cross_DD: torch.Tensor, mid_sum_D: torch.Tensor, added_sum_D: torch.Tensor, rows: int, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` (D, D) and `bias` (D,), float64, with `added ~ mid @ weight.T + bias` by ridge least squares.

    `square_DD` is the sum of `mid' mid`, `cross_DD` of `mid' added`, both not centred. The ridge is relative
    to the mean of the centred diagonal and pulls the weight towards zero, the bias towards the mean of `added`.
    """
    mid_mean, added_mean = mid_sum_D.double() / rows, added_sum_D.double() / rows
    square = square_DD.double() - rows * torch.outer(mid_mean, mid_mean)
    cross = cross_DD.double() - rows * torch.outer(mid_mean, added_mean)
    weight = ridge_solution(square, cross, ridge).T
    return weight.contiguous(), added_mean - weight @ mid_mean


def ffn_map(
    tensors: Tensors, rows: Mapping[str, int], block: int, stream: str, ridge: float, device: torch.device = CPU
) -> dict[str, torch.Tensor]:
    """`weight` and `bias` of one edit as the bank holds them, float32, from what FfnMoments summed up; solved on a device."""
    names = ("square", "cross", "sum", "added")
    square, cross, mid_sum, added_sum = (tensors[f"ffn.{stream}.{n}.{block}"].to(device) for n in names)
    weight, bias = linear_map(square, cross, mid_sum, added_sum, rows[f"ffn.{stream}"], ridge)
    return {"weight": weight.float().contiguous(), "bias": bias.float()}
