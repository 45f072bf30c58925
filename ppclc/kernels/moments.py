"""Second moments in place: `S += X'X` and `C += X'Y`, of S one triangle alone.

Sums stay in float32 on the device over many batches. Both products read the same rows, and are one launch.

Shape suffixes: N rows, D and E widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ppclc.kernels import dispatched, runs, takes

PIECE = 64
"""Rows that are added up in float32, where sums of rows are not made in float64 at once."""


def add_moments(
    second_DD: torch.Tensor | None,
    cross_DE: torch.Tensor | None,
    x_ND: torch.Tensor,
    y_NE: torch.Tensor | None = None,
    mask_N: torch.Tensor | None = None,
    centres: Sequence[torch.Tensor] = (),
) -> None:
    """Add `X'X` to `second_DD` and `X'Y` to `cross_DE`, in place in float32; either may be None.

    Of `second_DD` the upper triangle is kept up to date, the rest is undefined: see `symmetric`. Rows in half precision are multiplied as
    they are, products added up in float32. mask_N: rows that count, whatever the others hold. centres: means of X and of Y in float32,
    taken away before the product; in half precision the difference is rounded once more.

    Raises:
        ValueError: sums that are not contiguous float32 of fitting shapes, or no sum at all.
    """
    _check(second_DD, cross_DE, x_ND, y_NE)
    rows = [x_ND] if y_NE is None else [x_ND, y_NE]
    if takes("moments", *rows):
        called = torch.ops.ppclc.add_moments if dispatched(*rows) else _add_moments
        called(second_DD, cross_DE, x_ND, y_NE, mask_N, list(centres))
    else:
        reference(second_DD, cross_DE, x_ND, y_NE, mask_N, centres)


def reference(
    second_DD: torch.Tensor | None,
    cross_DE: torch.Tensor | None,
    x_ND: torch.Tensor,
    y_NE: torch.Tensor | None = None,
    mask_N: torch.Tensor | None = None,
    centres: Sequence[torch.Tensor] = (),
) -> None:
    """The same in plain PyTorch, all of `second_DD`: on a GPU matrix products that add in float32, elsewhere products in float32."""
    x_ND = _prepared(x_ND, mask_N, centres[0] if centres else None)
    if second_DD is not None:
        _add_product(second_DD, x_ND, x_ND)
    if cross_DE is not None and y_NE is not None:
        _add_product(cross_DE, x_ND, _prepared(y_NE, mask_N, centres[1] if len(centres) > 1 else None))


def difference(x_ND: torch.Tensor, before_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`d = x - before` (N, D) in their dtype, the sum of `x` over rows (D,) and that of all `d^2`, both in float64, in one pass."""
    if takes("moments", x_ND, before_ND):
        called = torch.ops.ppclc.difference if dispatched(x_ND, before_ND) else _difference
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = called(x_ND, before_ND)
        return found
    return difference_reference(x_ND, before_ND)


def difference_reference(x_ND: torch.Tensor, before_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch."""
    d_ND = x_ND - before_ND
    return d_ND, x_ND.sum(0, dtype=torch.float64), d_ND.double().square().sum()


def sum_of_rows(x_ND: torch.Tensor) -> torch.Tensor:
    """The sum of `x` over rows (D,) in float64: where kernels are taken, of pieces that are added up in float32, for which no copy in float64 is made."""
    if not takes("moments", x_ND):
        return x_ND.sum(0, dtype=torch.float64)
    whole = len(x_ND) // PIECE * PIECE
    pieces = (
        x_ND[:whole].unflatten(0, (-1, PIECE)).sum(1, dtype=torch.float32)
        if whole
        else x_ND.new_empty((0, x_ND.shape[1]), dtype=torch.float32)
    )
    return torch.cat([pieces, x_ND[whole:].sum(0, dtype=torch.float32, keepdim=True)]).sum(0, dtype=torch.float64)


def symmetric(second_DD: torch.Tensor) -> torch.Tensor:
    """The whole of a second moment of which the upper triangle is known."""
    return torch.triu(second_DD) + torch.triu(second_DD, 1).mT


def _prepared(x_ND: torch.Tensor, mask_N: torch.Tensor | None, centre_D: torch.Tensor | None) -> torch.Tensor:
    if centre_D is not None:
        x_ND = (x_ND.float() - centre_D).to(x_ND.dtype)
    return x_ND if mask_N is None else x_ND.where(mask_N.bool()[:, None], 0)


def _add_product(sums_DE: torch.Tensor, x_ND: torch.Tensor, y_NE: torch.Tensor) -> None:
    if x_ND.is_cuda and x_ND.dtype in (torch.float16, torch.bfloat16):
        sums_DE += torch.mm(x_ND.T, y_NE, out_dtype=torch.float32)
    else:
        sums_DE.addmm_(x_ND.T.float(), y_NE.float())


def _check(second_DD: torch.Tensor | None, cross_DE: torch.Tensor | None, x_ND: torch.Tensor, y_NE: torch.Tensor | None) -> None:
    width, other = x_ND.shape[1], None if y_NE is None else y_NE.shape[1]
    if second_DD is None and cross_DE is None:
        raise ValueError("add_moments: got no sum to add to; wanted second_DD, cross_DE or both")
    for name, sums, shape in (("second_DD", second_DD, (width, width)), ("cross_DE", cross_DE, (width, other))):
        if sums is not None and (sums.shape != shape or sums.dtype != torch.float32 or not sums.is_contiguous()):
            raise ValueError(f"add_moments: {name} is {tuple(sums.shape)} in {sums.dtype}; wanted {shape}, contiguous, in float32")
    if y_NE is not None and (len(y_NE) != len(x_ND) or y_NE.dtype != x_ND.dtype):
        raise ValueError(f"add_moments: {len(y_NE)} rows of y in {y_NE.dtype}, {len(x_ND)} of x in {x_ND.dtype}; wanted the same")


def _add_moments(
    second_DD: torch.Tensor | None,
    cross_DE: torch.Tensor | None,
    x_ND: torch.Tensor,
    y_NE: torch.Tensor | None,
    mask_N: torch.Tensor | None,
    centres: list[torch.Tensor],
) -> None:
    if runs(x_ND):
        from ppclc.kernels import moments_triton, tuning

        with tuning.on_device_of(x_ND):
            moments_triton.run(second_DD, cross_DE, x_ND, y_NE, mask_N, centres)
    else:
        reference(second_DD, cross_DE, x_ND, y_NE, mask_N, centres)


torch.library.custom_op("ppclc::add_moments", _add_moments, mutates_args=("second_DD", "cross_DE"))


def _difference(x_ND: torch.Tensor, before_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if runs(x_ND):
        from ppclc.kernels import moments_triton

        return moments_triton.difference(x_ND, before_ND)
    return difference_reference(x_ND, before_ND)


_difference_operator = torch.library.custom_op("ppclc::difference", _difference, mutates_args=())


@_difference_operator.register_fake
def _(x_ND: torch.Tensor, before_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    d_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    return d_ND, x_ND.new_empty(x_ND.shape[1:], dtype=torch.float64), x_ND.new_empty((), dtype=torch.float64)
