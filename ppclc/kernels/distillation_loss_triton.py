"""Triton code of the distillation loss: a program has one row of both states in registers.

Shape suffixes: N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ppclc.kernels import LEAST_NORM

FEW_WARPS, MANY_WARPS = 4, 8
SCALE_BLOCK, SCALE_PROGRAMS = 4096, 512
TOTAL_BLOCK, LONGEST_TOTAL = 4096, 2**16
"""What one program adds up at a time, and how much of it before it is left to PyTorch's many programs. Source: ours, not measured."""


@triton.jit
def loss_kernel(
    student, teacher, mask, share, gradient, losses,
    stride_s, stride_t, width, weight, each, magnitude, least,
    HAS_MASK: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its share of the weighted loss, and its gradient, of the share or of the row as it is.

    share: of a row in the mean, on the device where a mask tells it, else `each`.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    read = inside
    if HAS_MASK:
        counts = tl.load(mask + row) != 0
        read = inside & counts
    s = tl.load(student + row * stride_s + columns, mask=read, other=0.0, eviction_policy="evict_first").to(tl.float32)
    t = tl.load(teacher + row * stride_t + columns, mask=read, other=0.0, eviction_policy="evict_first").to(tl.float32)
    length_s, length_t, dot = tl.sqrt(tl.sum(s * s, 0)), tl.sqrt(tl.sum(t * t, 0)), tl.sum(s * t, 0)
    # NaN compares false with everything: these two keep it.
    norm_s = tl.where(length_s < least, least, length_s)
    norm_t = tl.where(length_t < least, least, length_t)
    cosine = dot / (norm_s * norm_t)
    stretch = norm_s / norm_t - 1
    whole = weight
    if HAS_MASK:
        weight *= tl.load(share)
    else:
        weight *= each
    loss = (2 - 2 * cosine + magnitude * stretch * stretch) * weight
    if not SHARED:
        weight = whole
    by_teacher = -2 / (norm_s * norm_t) * weight
    # A clamped norm does not move with the student.
    by_student = tl.where(length_s < least, 0.0, (2 * cosine / norm_s + 2 * magnitude * stretch / norm_t) / norm_s * weight)
    if HAS_MASK:
        loss = tl.where(counts, loss, 0.0)
        by_teacher = tl.where(counts, by_teacher, 0.0)
        by_student = tl.where(counts, by_student, 0.0)
    tl.store(losses + row, loss)
    tl.store(
        gradient + row * width + columns, (by_teacher * t + by_student * s).to(gradient.dtype.element_ty), mask=inside, cache_modifier=".cs"
    )


@triton.jit
def total_kernel(values, total, count, SHARE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of a few thousand values by one program, always in the same order; or one over how many are not zero, at least one."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        places = first + tl.arange(0, BLOCK)
        found = tl.load(values + places, mask=places < count, other=0)
        if SHARE:
            found = found != 0
        sums += found.to(tl.float32)
    found = tl.sum(sums, 0)
    if SHARE:
        found = 1 / tl.maximum(found, 1.0)
    tl.store(total, found)


@triton.jit
def scale_kernel(values, factor, share, count, HAS_SHARE: tl.constexpr, BLOCK: tl.constexpr):
    """Values times a number that lies on the device, and a second one; nothing where the product is one. Few programs: most often they only look."""
    by = tl.load(factor).to(tl.float32)
    if HAS_SHARE:
        by *= tl.load(share)
    if by != 1.0:
        for block in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
            places = tl.full((), BLOCK, tl.int64) * block + tl.arange(0, BLOCK)
            scaled = tl.load(values + places, mask=places < count, other=0.0).to(tl.float32) * by
            tl.store(values + places, scaled.to(values.dtype.element_ty), mask=places < count)


def run(
    student_ND: torch.Tensor, teacher_ND: torch.Tensor, magnitude: float, mask_N: torch.Tensor | None, weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weighted mean loss in float32, its gradient (N, D) in the student's dtype, and by what the gradient is still to be multiplied, where by anything.

    In float16 a row's share in the mean would push its gradient below the least number, so that it is left for later.
    """
    student_ND, teacher_ND = _rows(student_ND), _rows(teacher_ND)
    (rows, width), device = student_ND.shape, student_ND.device
    losses = torch.empty(rows, dtype=torch.float32, device=device)
    gradient = torch.empty((rows, width), dtype=student_ND.dtype, device=device)
    each, share, shared = 1 / max(rows, 1), None, student_ND.dtype != torch.float16
    if mask_N is not None:
        mask_N = mask_N.bool().contiguous()
        share = _total(mask_N, share=True)
    block = max(16, triton.next_power_of_2(width))
    loss_kernel[(rows,)](
        student_ND, teacher_ND, mask_N, share, gradient, losses,
        student_ND.stride(0), teacher_ND.stride(0), width, weight, each, magnitude, LEAST_NORM,
        HAS_MASK=mask_N is not None, SHARED=shared, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    loss = _total(losses)
    if shared:
        return loss, gradient, losses.new_empty(0)
    return loss, gradient, losses.new_full((), each) if share is None else share


def _total(values_N: torch.Tensor, share: bool = False) -> torch.Tensor:
    """The sum, or with `share` one over how many are not zero: of few values by one small program, one launch where PyTorch's are up to three."""
    count = len(values_N)
    if count > LONGEST_TOTAL:
        total = values_N.sum(dtype=torch.float32)
        return total.clamp(min=1).reciprocal() if share else total
    total = torch.empty((), dtype=torch.float32, device=values_N.device)
    total_kernel[(1,)](values_N, total, count, SHARE=share, BLOCK=TOTAL_BLOCK, num_warps=MANY_WARPS)
    return total


def scale(gradient_ND: torch.Tensor, factor: torch.Tensor, share: torch.Tensor) -> None:
    """Multiply in place."""
    count = gradient_ND.numel()
    programs = min(SCALE_PROGRAMS, triton.cdiv(count, SCALE_BLOCK))
    scale_kernel[(programs,)](gradient_ND, factor, share, count, HAS_SHARE=share.numel() > 0, BLOCK=SCALE_BLOCK, num_warps=FEW_WARPS)


def _rows(x_ND: torch.Tensor) -> torch.Tensor:
    return x_ND if x_ND.stride(-1) == 1 else x_ND.contiguous()


def _warps(block: int) -> int:
    return FEW_WARPS if block <= 2048 else MANY_WARPS


def variants() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Name, kernel, signature, constants and options of every configuration: what compiling one without a GPU takes."""
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        rows = {"student": f"*{dtype}", "teacher": f"*{dtype}", "mask": "*i1", "share": "*fp32", "gradient": f"*{dtype}", "losses": "*fp32"}
        signature = (
            rows | dict.fromkeys(("stride_s", "stride_t", "width"), "i32") | dict.fromkeys(("weight", "each", "magnitude", "least"), "fp32")
        )
        for block in (64, 2048, 4096, 8192):
            for masked in (False, True):
                constants = {"HAS_MASK": masked, "SHARED": dtype != "fp16", "BLOCK": block}
                found.append((f"loss-{dtype}-{block}-{masked}", loss_kernel, signature, constants, {"num_warps": _warps(block)}))
        signature = {"values": f"*{dtype}", "factor": "*fp32", "share": "*fp32", "count": "i32"}
        found.append((f"scale-{dtype}", scale_kernel, signature, {"HAS_SHARE": True, "BLOCK": SCALE_BLOCK}, {"num_warps": FEW_WARPS}))
    for share, kind in ((False, "fp32"), (True, "i1")):
        signature = {"values": f"*{kind}", "total": "*fp32", "count": "i32"}
        found.append((f"total-{kind}", total_kernel, signature, {"SHARE": share, "BLOCK": TOTAL_BLOCK}, {"num_warps": MANY_WARPS}))
    return found
