"""Triton code of RMSNorm over heads with rotary embedding.

A program has one token: its cosines and sines stay in registers while its heads pass, tile by tile. Pairs are split and joined within a
thread, because a thread holds neighbours.

Shape suffixes: B batch, S token, H head, D width of a head, P pair.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ppclc.kernels import interpreted
from ppclc.kernels.tuning import launch

CONFIGS = ((1, 8), (2, 8), (2, 16), (4, 32))
"""Warps and heads of a tile that are tried, each pair as (num_warps, heads)."""


@triton.jit
def qk_norm_rope_kernel(
    x,
    weight,
    cos,
    sin,
    out,
    x_b,
    x_s,
    x_h,
    cos_s,
    cos_p,
    sin_s,
    sin_p,
    out_b,
    out_s,
    out_h,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """All heads of one token, normed, rounded as the plain formula does, and rotated."""
    s = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK)
    p = tl.arange(0, BLOCK // 2)
    kind = out.dtype.element_ty
    gain = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    c = tl.load(cos + s * cos_s + p * cos_p, mask=p < D // 2, other=0.0).to(tl.float32)
    n = tl.load(sin + s * sin_s + p * sin_p, mask=p < D // 2, other=0.0).to(tl.float32)
    for first in range(0, H, HEADS):
        h = first + tl.arange(0, HEADS)
        there = (h < H)[:, None] & (d < D)[None, :]
        tile = tl.load(x + b * x_b + s * x_s + h[:, None] * x_h + d[None, :], mask=there, other=0.0).to(tl.float32)
        normed = tile * tl.rsqrt(tl.sum(tile * tile, 1) / D + eps)[:, None]
        if ROUNDED:
            normed = normed.to(kind).to(tl.float32)
        normed = (normed * gain[None, :]).to(kind).to(tl.float32)
        even, odd = tl.split(tl.reshape(normed, (HEADS, BLOCK // 2, 2)))
        turned = tl.join(even * c[None, :] - odd * n[None, :], even * n[None, :] + odd * c[None, :])
        place = b * out_b + s * out_s + h[:, None] * out_h + d[None, :]
        tl.store(out + place, tl.reshape(turned, (HEADS, BLOCK)).to(kind), mask=there)


def qk_norm_rope(
    x_BSHD: torch.Tensor,
    weight_D: torch.Tensor,
    cos_SP: torch.Tensor,
    sin_SP: torch.Tensor,
    eps: float,
    rounded: bool,
    out_BSHD: torch.Tensor,
) -> None:
    """Write the normed and rotated x into `out`. The last axes of both are contiguous, other strides are free."""
    B, S, H, D = x_BSHD.shape
    strides = (*x_BSHD.stride()[:3], *cos_SP.stride(), *sin_SP.stride(), *out_BSHD.stride()[:3])
    args = (x_BSHD, weight_D, cos_SP, sin_SP, out_BSHD, *strides, eps)
    constants = {"H": H, "D": D, "BLOCK": triton.next_power_of_2(D), "ROUNDED": rounded}
    heads = CONFIGS if not interpreted() else ((CONFIGS[0][0], min(CONFIGS[0][1], triton.next_power_of_2(H))),)
    configs = [({"HEADS": together}, warps) for warps, together in heads]
    launch(qk_norm_rope_kernel, configs, lambda _: (S, B), (H, D, x_BSHD.dtype, rounded), args, constants)


Variant = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]
"""Name, kernel, signature, constants and options: what compiling one without a GPU takes."""


def variants() -> list[Variant]:
    """Every configuration that may be run for bfloat16 and float32, of 24 and 48 heads of 128: widths 3072 and 6144."""
    found = []
    for dtype in ("bf16", "fp32"):
        for H in (24, 48):
            for warps, heads in CONFIGS:
                for rounded in (False, True):
                    constants = {"H": H, "D": 128, "BLOCK": 128, "HEADS": heads, "ROUNDED": rounded}
                    kinds = dict.fromkeys(("x", "weight", "out"), f"*{dtype}") | {"cos": "*fp32", "sin": "*fp32", "eps": "fp32"}
                    kinds |= dict.fromkeys(constants, "constexpr")
                    signature = {name: kinds.get(name, "i32") for name in qk_norm_rope_kernel.arg_names}
                    name = f"qk_norm_rope-{dtype}-{H}-{warps}-{heads}-{rounded}"
                    found.append((name, qk_norm_rope_kernel, signature, constants, {"num_warps": warps}))
    return found
