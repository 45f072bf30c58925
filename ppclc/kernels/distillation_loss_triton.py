"""Triton code of the distillation loss: a program has one row of both states in registers, and is done with it before the next.

Shape suffixes: N rows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ppclc.kernels import LEAST_NORM, interpreted
from ppclc.kernels.tuning import early

FEW_WARPS, MANY_WARPS = 4, 8
PIECE = 16
"""Losses are filled up with zeros to a multiple of it, so that they are read four at a time."""
SCALE_BLOCK, SCALE_PROGRAMS = 4096, 512
TOTAL_BLOCK, LONGEST_TOTAL = 8192, 2**16
"""What one program adds up at a time, and how much of it before it is left to PyTorch's many programs. Source: ours; 7,401 take 1.6 us on an H100."""


@triton.jit
def _add(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def loss_kernel(
    student, teacher, mask, share, gradient, losses,
    stride_s, stride_t, width, weight, each, magnitude, least,
    HAS_MASK: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row: its share of the weighted loss, and its gradient, of the share or of the row as it is.

    share: of a row in the mean, on the device where a mask tells it, else `each`. EARLY: the kernel behind this one may be started meanwhile.
    """
    if EARLY:
        gdc_launch_dependents()
    program, rows = tl.program_id(0), tl.num_programs(0)
    row = program.to(tl.int64)
    shared = weight
    if HAS_MASK:
        shared *= tl.load(share)
    else:
        shared *= each
    by = weight
    if SHARED:
        by = shared
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    read = inside
    if HAS_MASK:
        counts = tl.load(mask + row) != 0
        read = inside & counts
    s = tl.load(student + row * stride_s + columns, mask=read, other=0.0, eviction_policy="evict_first").to(tl.float32)
    t = tl.load(teacher + row * stride_t + columns, mask=read, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if TOGETHER:  # each reduction on its own has the warps of a program wait for one another
        square_s, square_t, dot = tl.reduce((s * s, t * t, s * t), 0, _add)
    else:
        square_s, square_t, dot = tl.sum(s * s, 0), tl.sum(t * t, 0), tl.sum(s * t, 0)
    length_s, length_t = tl.sqrt(square_s), tl.sqrt(square_t)
    # NaN compares false with everything: these two keep it.
    norm_s = tl.where(length_s < least, least, length_s)
    norm_t = tl.where(length_t < least, least, length_t)
    cosine = dot / (norm_s * norm_t)
    stretch = norm_s / norm_t - 1
    loss = (2 - 2 * cosine + magnitude * stretch * stretch) * shared
    by_teacher = -2 / (norm_s * norm_t) * by
    # A clamped norm does not move with the student.
    by_student = tl.where(length_s < least, 0.0, (2 * cosine / norm_s + 2 * magnitude * stretch / norm_t) / norm_s * by)
    if HAS_MASK:
        loss = tl.where(counts, loss, 0.0)
        by_teacher = tl.where(counts, by_teacher, 0.0)
        by_student = tl.where(counts, by_student, 0.0)
    made = (by_teacher * t + by_student * s).to(gradient.dtype.element_ty)
    tl.store(gradient + row * width + columns, made, mask=inside, cache_modifier=".cs")
    tl.store(losses + row, loss)
    if program == rows - 1:
        pad = rows + tl.arange(0, PIECE)
        tl.store(losses + pad, tl.zeros((PIECE,), tl.float32), mask=pad < tl.cdiv(rows, PIECE) * PIECE)


@triton.jit
def total_kernel(values, total, count, SHARE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """The sum of a few thousand values by one program, always in the same order; or one over how many are not zero, at least one."""
    if EARLY:
        gdc_wait()
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
    losses = torch.empty(triton.cdiv(rows, PIECE) * PIECE, dtype=torch.float32, device=device)
    gradient = torch.empty((rows, width), dtype=student_ND.dtype, device=device)
    each, share, shared = 1 / max(rows, 1), None, student_ND.dtype != torch.float16
    if mask_N is not None:
        mask_N = mask_N.bool().contiguous()
        share = _total(mask_N, share=True)
    block, options = max(16, triton.next_power_of_2(width)), early(device)
    if rows:
        loss_kernel[(rows,)](
            student_ND, teacher_ND, mask_N, share, gradient, losses,
            student_ND.stride(0), teacher_ND.stride(0), width, weight, each, magnitude, LEAST_NORM,
            HAS_MASK=mask_N is not None, SHARED=shared, BLOCK=block, PIECE=PIECE, TOGETHER=not interpreted(), EARLY=bool(options),
            num_warps=_warps(block),
        )  # fmt: skip
    loss = _total(losses, options=options)
    if shared:
        return loss, gradient, losses.new_empty(0)
    return loss, gradient, losses.new_full((), each) if share is None else share


def _total(values_N: torch.Tensor, share: bool = False, options: Mapping[str, bool] | None = None) -> torch.Tensor:
    """The sum, or with `share` one over how many are not zero: of few values by one small program, one launch where PyTorch's are up to three.

    options: of an early launch, where the kernel before it lets one begin; elsewhere that takes longer.
    """
    count, options = len(values_N), options or {}
    if count > LONGEST_TOTAL:
        total = values_N.sum(dtype=torch.float32)
        return total.clamp(min=1).reciprocal() if share else total
    total = torch.empty((), dtype=torch.float32, device=values_N.device)
    block, warps = _total_size(count)
    total_kernel[(1,)](values_N, total, count, SHARE=share, BLOCK=block, EARLY=bool(options), num_warps=warps, **options)
    return total


def _total_size(count: int) -> tuple[int, int]:
    """Numbers that are added up at a time, eight a thread at most, and warps."""
    block = max(PIECE, min(TOTAL_BLOCK, triton.next_power_of_2(count)))
    return block, max(1, block // 256)


def scale(gradient_ND: torch.Tensor, factor: torch.Tensor, share: torch.Tensor) -> None:
    """Multiply in place."""
    count = gradient_ND.numel()
    programs = min(SCALE_PROGRAMS, triton.cdiv(count, SCALE_BLOCK))
    scale_kernel[(programs,)](gradient_ND, factor, share, count, HAS_SHARE=share.numel() > 0, BLOCK=SCALE_BLOCK, num_warps=FEW_WARPS)


def _rows(x_ND: torch.Tensor) -> torch.Tensor:
    return x_ND if x_ND.stride(-1) == 1 else x_ND.contiguous()


def _warps(block: int) -> int:
    return FEW_WARPS if block <= 2048 else MANY_WARPS


Variant = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]
"""Name, kernel, signature, constants and options: what compiling one without a GPU takes."""
EARLY_OR_LATE: tuple[tuple[str, dict[str, bool], dict[str, bool]], ...] = (
    ("early", {"EARLY": True}, {"launch_pdl": True}),
    ("late", {"EARLY": False}, {}),
)
"""As `early` has it: by name what kernels are told, and what the launch of the second one is."""


def variants() -> list[Variant]:
    """Every configuration; those that start a kernel early are of compute capability 9.0 and newer."""
    found: list[Variant] = []
    for dtype in ("bf16", "fp16", "fp32"):
        rows = {"student": f"*{dtype}", "teacher": f"*{dtype}", "mask": "*i1", "share": "*fp32", "gradient": f"*{dtype}", "losses": "*fp32"}
        signature = rows | dict.fromkeys(("stride_s", "stride_t", "width"), "i32")
        signature |= dict.fromkeys(("weight", "each", "magnitude", "least"), "fp32")
        for block in (64, 2048, 4096, 8192):
            for masked in (False, True):
                constants = {"HAS_MASK": masked, "SHARED": dtype != "fp16", "BLOCK": block, "PIECE": PIECE, "TOGETHER": True}
                for name, more, _ in EARLY_OR_LATE:
                    options = {"num_warps": _warps(block)}
                    found.append((f"loss-{dtype}-{block}-{masked}-{name}", loss_kernel, signature, constants | more, options))
        signature = {"values": f"*{dtype}", "factor": "*fp32", "share": "*fp32", "count": "i32"}
        found.append((f"scale-{dtype}", scale_kernel, signature, {"HAS_SHARE": True, "BLOCK": SCALE_BLOCK}, {"num_warps": FEW_WARPS}))
    for share, kind in ((False, "fp32"), (True, "i1")):
        signature = {"values": f"*{kind}", "total": "*fp32", "count": "i32"}
        for count in (TOTAL_BLOCK, 1024):
            block, warps = _total_size(count)
            for name, more, launch in EARLY_OR_LATE:
                constants = {"SHARE": share, "BLOCK": block} | more
                found.append((f"total-{kind}-{count}-{name}", total_kernel, signature, constants, {"num_warps": warps} | launch))
    return found
