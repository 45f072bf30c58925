"""Triton code of the distillation loss: a program has one row in registers, or walks over rows that are too long for that.

Shape suffixes: N rows, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ppclc.kernels import LEAST_NORM

LONGEST = 8192
"""Widths up to it are held in registers as a whole."""
FEW_WARPS, MANY_WARPS = 4, 8
SCALE_BLOCK = 4096


@triton.jit
def loss_kernel(
    student, teacher, mask, share, gradient, losses,
    stride_s, stride_t, width, each, magnitude, least,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its share of the loss, and its gradient. share: of a row in the mean, on the device where a mask tells it, else `each`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    counts = 1
    if HAS_MASK:
        counts = tl.load(mask + row) != 0
    s = tl.load(student + row * stride_s + columns, mask=inside & counts, other=0.0).to(tl.float32)
    t = tl.load(teacher + row * stride_t + columns, mask=inside & counts, other=0.0).to(tl.float32)
    length_s, length_t, dot = tl.sqrt(tl.sum(s * s, 0)), tl.sqrt(tl.sum(t * t, 0)), tl.sum(s * t, 0)
    # NaN compares false with everything: these two keep it.
    norm_s = tl.where(length_s < least, least, length_s)
    norm_t = tl.where(length_t < least, least, length_t)
    cosine = dot / (norm_s * norm_t)
    stretch = norm_s / norm_t - 1
    weight = each
    if HAS_MASK:
        weight = tl.load(share)
    loss = (2 - 2 * cosine + magnitude * stretch * stretch) * weight
    by_teacher = -2 / (norm_s * norm_t) * weight
    # A clamped norm does not move with the student.
    by_student = tl.where(length_s < least, 0.0, (2 * cosine / norm_s + 2 * magnitude * stretch / norm_t) / norm_s * weight)
    if HAS_MASK:
        loss = tl.where(counts, loss, 0.0)
        by_teacher = tl.where(counts, by_teacher, 0.0)
        by_student = tl.where(counts, by_student, 0.0)
    tl.store(losses + row, loss)
    tl.store(gradient + row * width + columns, (by_teacher * t + by_student * s).to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def scale_kernel(values, factor, count, BLOCK: tl.constexpr):
    """Values times a number that lies on the device; nothing where it is one."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < count
        scaled = tl.load(values + places, mask=inside, other=0.0).to(tl.float32) * by
        tl.store(values + places, scaled.to(values.dtype.element_ty), mask=inside)


def run(
    student_ND: torch.Tensor, teacher_ND: torch.Tensor, magnitude: float, mask_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss in float32 and its gradient (N, D) in the student's dtype.

    Raises:
        ValueError: rows that are too long.
    """
    student_ND, teacher_ND = _rows(student_ND), _rows(teacher_ND)
    rows, width = student_ND.shape
    if width > LONGEST:
        raise ValueError(f"ppclc::distillation_loss: rows of {width}; wanted {LONGEST} or fewer")
    losses = torch.empty(rows, dtype=torch.float32, device=student_ND.device)
    gradient = torch.empty((rows, width), dtype=student_ND.dtype, device=student_ND.device)
    share = None
    if mask_N is not None:
        mask_N = mask_N.bool().contiguous()
        share = mask_N.sum(dtype=torch.float32).clamp(min=1).reciprocal()
    block = max(16, triton.next_power_of_2(width))
    loss_kernel[(rows,)](
        student_ND, teacher_ND, mask_N, share, gradient, losses,
        student_ND.stride(0), teacher_ND.stride(0), width, 1 / max(rows, 1), magnitude, LEAST_NORM,
        HAS_MASK=mask_N is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return losses.sum(), gradient


def scale(gradient_ND: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply in place."""
    count = gradient_ND.numel()
    scale_kernel[(triton.cdiv(count, SCALE_BLOCK),)](gradient_ND, factor, count, BLOCK=SCALE_BLOCK, num_warps=FEW_WARPS)


def _rows(x_ND: torch.Tensor) -> torch.Tensor:
    return x_ND if x_ND.stride(-1) == 1 else x_ND.contiguous()


def _warps(block: int) -> int:
    return FEW_WARPS if block <= 2048 else MANY_WARPS
