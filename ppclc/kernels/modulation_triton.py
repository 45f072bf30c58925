"""Triton code of LayerNorm with modulation and of gated residuals.

A program of a row kernel holds whole rows in registers, so that memory is read once; all arithmetic is in float32. What is summed over
tokens is summed in chunks of a fixed number of them, and those are added by one more reduction: the same in every run.

Shape suffixes: B batch, T token, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from ppclc.kernels import interpreted
from ppclc.kernels.tuning import launch

CONFIGS = ((64, 1), (32, 1), (64, 2), (32, 2))
"""Bytes of a row that a thread holds and rows of a program that are tried for LayerNorm with modulation: more does not fit its registers."""
GATED_CONFIGS = ((4, 1), (4, 2), (4, 4), (4, 8))
"""Warps and rows of a program that are tried for gated residuals: more warps would leave a thread less than 16 bytes of `COLUMNS`."""
WAVES, LEAST_CHUNK = 2, 8
"""Programs a multiprocessor that sum gradients of a modulation over tokens, and the fewest tokens of one: more of either writes more partial sums."""
MOST_UNDER_WAY = 8192
"""Bytes of a row up to which a program that sums over tokens may read the next before it is done with one."""
GATED_CHUNK = 16
"""Tokens whose gradients of a gate are summed by one program."""
COLUMNS = 1024
"""Columns of a program where no sum goes over a row."""


@triton.jit
def layer_norm_modulate_kernel(
    x, scale, shift, out, T, x_b, x_t, scale_b, shift_b, eps, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """`ROWS` rows of LN(x) * (1 + scale) + shift."""
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    gain = 1.0 + tl.load(scale + b * scale_b + d, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + b * shift_b + d, mask=inside, other=0.0).to(tl.float32)
    for r in tl.static_range(ROWS):
        t = tl.program_id(0).to(tl.int64) * ROWS + r
        there = inside & (t < T)
        row = tl.load(x + b * x_b + t * x_t + d, mask=there, other=0.0).to(tl.float32)
        centred = tl.where(inside, row - tl.sum(row, 0) / D, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
        tl.store(out + (b * T + t) * D + d, (normed * gain + offset).to(out.dtype.element_ty), mask=there)


@triton.jit
def layer_norm_modulate_backward_kernel(
    grad,
    x,
    scale,
    dx,
    dscale,
    dshift,
    T,
    grad_b,
    grad_t,
    x_b,
    x_t,
    scale_b,
    eps,
    tokens,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The input's gradient of so many rows and, with `SUMS`, what they add to those of scale and shift."""
    b = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    gain = 1.0 + tl.load(scale + b * scale_b + d, mask=inside, other=0.0).to(tl.float32)
    sum_scale = tl.zeros((BLOCK,), tl.float32)
    sum_shift = tl.zeros((BLOCK,), tl.float32)
    for r in tl.range(0, tokens, num_stages=STAGES):
        t = chunk * tokens + r
        there = inside & (t < T)
        row = tl.load(x + b * x_b + t * x_t + d, mask=there, other=0.0).to(tl.float32)
        g = tl.load(grad + b * grad_b + t * grad_t + d, mask=there, other=0.0).to(tl.float32)
        centred = tl.where(inside, row - tl.sum(row, 0) / D, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
        normed = centred * rstd
        if SUMS:
            sum_scale += g * normed
            sum_shift += g
        g = g * gain
        d_row = rstd * (g - tl.sum(g, 0) / D - normed * (tl.sum(g * normed, 0) / D))
        tl.store(dx + (b * T + t) * D + d, d_row.to(dx.dtype.element_ty), mask=there)
    if SUMS:
        place = (b * tl.num_programs(0) + chunk) * D + d
        tl.store(dscale + place, sum_scale, mask=inside)
        tl.store(dshift + place, sum_shift, mask=inside)


@triton.jit
def gated_residual_kernel(x, gate, y, out, T, x_b, x_t, gate_b, y_b, y_t, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """`ROWS` rows of x + gate * y, `BLOCK` columns of them."""
    b = tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    gain = tl.load(gate + b * gate_b + d, mask=inside, other=0.0).to(tl.float32)
    for r in tl.static_range(ROWS):
        t = tl.program_id(0).to(tl.int64) * ROWS + r
        there = inside & (t < T)
        row = tl.load(x + b * x_b + t * x_t + d, mask=there, other=0.0, eviction_policy="evict_first").to(tl.float32)
        added = tl.load(y + b * y_b + t * y_t + d, mask=there, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tl.store(out + (b * T + t) * D + d, (row + gain * added).to(out.dtype.element_ty), mask=there)


@triton.jit
def gated_residual_backward_kernel(
    grad,
    gate,
    y,
    dy,
    dgate,
    T,
    grad_b,
    grad_t,
    gate_b,
    y_b,
    y_t,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """The gradient of y in `ROWS` rows, `BLOCK` columns of them, and, with `SUMS`, what they add to that of the gate."""
    b = tl.program_id(2).to(tl.int64)
    chunk = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    gain = tl.load(gate + b * gate_b + d, mask=inside, other=0.0).to(tl.float32)
    sum_gate = tl.zeros((BLOCK,), tl.float32)
    for r in range(ROWS):
        t = chunk * ROWS + r
        there = inside & (t < T)
        g = tl.load(grad + b * grad_b + t * grad_t + d, mask=there, other=0.0).to(tl.float32)
        if SUMS:
            sum_gate += g * tl.load(y + b * y_b + t * y_t + d, mask=there, other=0.0).to(tl.float32)
        tl.store(dy + (b * T + t) * D + d, (g * gain).to(dy.dtype.element_ty), mask=there)
    if SUMS:
        tl.store(dgate + (b * tl.num_programs(0) + chunk) * D + d, sum_gate, mask=inside)


Configs = tuple[tuple[int, int], ...]


def row_configs(width: int, itemsize: int) -> Configs:
    """Warps and rows of a program that are tried for rows of a width, by `CONFIGS`, each pair as (num_warps, rows)."""
    size = triton.next_power_of_2(width) * itemsize
    return tuple(dict.fromkeys((max(1, min(16, size // (32 * held))), rows) for held, rows in CONFIGS))


def _launch(kernel: Any, configs: Configs, grid: Callable[[int], tuple[int, ...]], *args: Any, **constants: Any) -> None:
    """Run a forward kernel, with its rows and warps chosen by width and dtype; `grid` has the programs by the rows of one."""
    tried = [({"ROWS": rows}, warps) for warps, rows in (configs[-1:] if interpreted() else configs)]
    launch(kernel, tried, lambda config: grid(config["ROWS"]), (constants["D"], args[0].dtype), args, constants)


def _launch_backward(
    kernel: Any, grid: tuple[int, ...], warps: int, *args: Any, tried: Sequence[Mapping[str, int]] = ({},), **constants: Any
) -> None:
    """Run a backward kernel, whose sums are the same in every run because nothing that is tuned changes their order."""
    launch(kernel, [(values, warps) for values in tried], lambda _: grid, (warps, args[0].dtype), args, constants)


def backward_warps(width: int) -> int:
    """Warps of a program that holds rows of a width: 32 elements a thread at most. Fewer threads wait less for one another."""
    block: int = triton.next_power_of_2(width)
    return max(1, min(16, block // 1024))


def backward_stages(width: int, itemsize: int) -> tuple[int, ...]:
    """Rows that are under way at once to a program which sums over tokens, that are tried: a second one of many bytes has no registers."""
    return (1, 2) if triton.next_power_of_2(width) * itemsize <= MOST_UNDER_WAY else (1,)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def layer_norm_modulate(x_BTD: torch.Tensor, scale_BD: torch.Tensor, shift_BD: torch.Tensor, eps: float, out_BTD: torch.Tensor) -> None:
    """Write LN(x) * (1 + scale) + shift into `out`, which is contiguous. The last axes are contiguous, other strides are free."""
    B, T, D = x_BTD.shape
    strides = (*x_BTD.stride()[:2], scale_BD.stride(0), shift_BD.stride(0))
    _launch(
        layer_norm_modulate_kernel,
        row_configs(D, x_BTD.element_size()),
        lambda rows: (triton.cdiv(T, rows), B),
        *(x_BTD, scale_BD, shift_BD, out_BTD, T, *strides, eps),
        D=D,
        BLOCK=triton.next_power_of_2(D),
    )


def layer_norm_modulate_backward(
    grad_BTD: torch.Tensor, x_BTD: torch.Tensor, scale_BD: torch.Tensor, eps: float, dx_BTD: torch.Tensor, sums: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the gradient of x into `dx`, which is contiguous; those of scale and shift (B, D) in float32, of no rows without `sums`."""
    B, T, D = x_BTD.shape
    tokens = max(LEAST_CHUNK, triton.cdiv(T * B, WAVES * _processors(x_BTD.device)))
    chunks = triton.cdiv(T, tokens)
    dscale, dshift = (torch.empty(B, chunks, D if sums else 0, dtype=torch.float32, device=x_BTD.device) for _ in range(2))
    strides = (*grad_BTD.stride()[:2], *x_BTD.stride()[:2], scale_BD.stride(0))
    _launch_backward(
        layer_norm_modulate_backward_kernel,
        (chunks, B),
        backward_warps(D),
        *(grad_BTD, x_BTD, scale_BD, dx_BTD, dscale, dshift, T, *strides, eps, tokens),
        tried=[{"STAGES": stages} for stages in backward_stages(D, x_BTD.element_size())],
        D=D,
        BLOCK=triton.next_power_of_2(D),
        SUMS=sums,
    )
    return dscale.sum(1), dshift.sum(1)


def gated_residual(x_BTD: torch.Tensor, gate_BD: torch.Tensor, y_BTD: torch.Tensor, out_BTD: torch.Tensor) -> None:
    """Write x + gate * y into `out`, which is contiguous. The last axes are contiguous, other strides are free."""
    B, T, D = x_BTD.shape
    block = min(COLUMNS, triton.next_power_of_2(D))
    _launch(
        gated_residual_kernel,
        GATED_CONFIGS,
        lambda rows: (triton.cdiv(T, rows), triton.cdiv(D, block), B),
        *(x_BTD, gate_BD, y_BTD, out_BTD, T, *x_BTD.stride()[:2], gate_BD.stride(0), *y_BTD.stride()[:2]),
        D=D,
        BLOCK=block,
    )


def gated_residual_backward(
    grad_BTD: torch.Tensor, gate_BD: torch.Tensor, y_BTD: torch.Tensor, dy_BTD: torch.Tensor, sums: bool
) -> torch.Tensor:
    """Write the gradient of y into `dy`, which is contiguous; that of the gate (B, D) in float32, of no rows without `sums`."""
    B, T, D = y_BTD.shape
    chunks, block = triton.cdiv(T, GATED_CHUNK), min(COLUMNS, triton.next_power_of_2(D))
    dgate = torch.empty(B, chunks, D if sums else 0, dtype=torch.float32, device=y_BTD.device)
    _launch_backward(
        gated_residual_backward_kernel,
        (chunks, triton.cdiv(D, block), B),
        4,
        *(grad_BTD, gate_BD, y_BTD, dy_BTD, dgate, T, *grad_BTD.stride()[:2], gate_BD.stride(0), *y_BTD.stride()[:2]),
        D=D,
        BLOCK=block,
        ROWS=GATED_CHUNK,
        SUMS=sums,
    )
    return dgate.sum(1)


Variant = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]
"""Name, kernel, signature, constants and options: what compiling one without a GPU takes."""


def _variant(name: str, kernel: Any, dtype: str, constants: dict[str, Any], warps: int) -> Variant:
    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in ("dscale", "dshift", "dgate"):
            return "*fp32"
        if argument in ("x", "scale", "shift", "out", "grad", "dx", "gate", "y", "dy"):
            return f"*{dtype}"
        return "fp32" if argument == "eps" else "i32"

    return name, kernel, {argument: kind(argument) for argument in kernel.arg_names}, constants, {"num_warps": warps}


def variants() -> list[Variant]:
    """Every configuration that may be run for bfloat16 and float32 of widths 3072 and 6144."""
    found = []
    for dtype in ("bf16", "fp32"):
        for D in (3072, 6144):
            whole = {"D": D, "BLOCK": triton.next_power_of_2(D)}
            columns = {"D": D, "BLOCK": COLUMNS}
            for warps, rows in row_configs(D, 2 if dtype == "bf16" else 4):
                name = f"{dtype}-{D}-{warps}-{rows}"
                found.append(_variant(f"layer_norm_modulate-{name}", layer_norm_modulate_kernel, dtype, {**whole, "ROWS": rows}, warps))
            for warps, rows in GATED_CONFIGS:
                name = f"{dtype}-{D}-{warps}-{rows}"
                found.append(_variant(f"gated_residual-{name}", gated_residual_kernel, dtype, {**columns, "ROWS": rows}, warps))
            for sums in (False, True):
                name, kernel = f"{dtype}-{D}-{sums}", layer_norm_modulate_backward_kernel
                for stages in backward_stages(D, 2 if dtype == "bf16" else 4):
                    more = {**whole, "SUMS": sums, "STAGES": stages}
                    found.append(_variant(f"layer_norm_modulate_backward-{name}-{stages}", kernel, dtype, more, backward_warps(D)))
                more = {**columns, "ROWS": GATED_CHUNK, "SUMS": sums}
                found.append(_variant(f"gated_residual_backward-{name}", gated_residual_backward_kernel, dtype, more, 4))
    return found
