"""RMSNorm of queries or keys over each head, and rotary embedding of neighbouring pairs behind it. Forward only.

Shape suffixes: B batch, S token, H head, D width of a head, P pair.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ppclc.kernels import dispatched, runs, takes


def qk_norm_rope(
    x_BSHD: torch.Tensor,
    weight_D: torch.Tensor,
    cos_SP: torch.Tensor,
    sin_SP: torch.Tensor,
    eps: float = 1e-6,
    rounded: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normed, rounded to the dtype of x, rotated in float32, and rounded again (B, S, H, D). `x` may be a view.

    rounded: whether the norm is rounded before its weight too, as diffusers' RMSNorm does and PyTorch's does not. out: what
    the result is written into, a slice of the joint queries for example; not where gradients are wanted.
    """
    given = (x_BSHD, weight_D, cos_SP, sin_SP)
    if takes_qk_norm_rope(*given):
        written = torch.empty_like(x_BSHD, memory_format=torch.contiguous_format) if out is None else out
        called = torch.ops.ppclc.qk_norm_rope if dispatched(*given) else _qk_norm_rope
        called(*given, eps, rounded, written)
        return written
    result = qk_norm_rope_reference(*given, eps, rounded)
    return result if out is None else out.copy_(result)


def takes_qk_norm_rope(x_BSHD: torch.Tensor, weight_D: torch.Tensor, cos_SP: torch.Tensor, sin_SP: torch.Tensor) -> bool:
    """Whether a kernel is taken: not where a gradient is to come back, nor where dtypes or shapes are such as the plain formula promotes."""
    learns = torch.is_grad_enabled() and (x_BSHD.requires_grad or weight_D.requires_grad)
    alike = weight_D.dtype == x_BSHD.dtype and cos_SP.dtype == sin_SP.dtype == torch.float32
    paired = cos_SP.shape == sin_SP.shape == (x_BSHD.shape[1], x_BSHD.shape[3] / 2)
    return not learns and alike and paired and takes("qk_norm_rope", x_BSHD, weight_D, cos_SP, sin_SP)


def qk_norm_rope_reference(
    x_BSHD: torch.Tensor, weight_D: torch.Tensor, cos_SP: torch.Tensor, sin_SP: torch.Tensor, eps: float = 1e-6, rounded: bool = False
) -> torch.Tensor:
    """As `qk_norm_rope`, in plain PyTorch, with the roundings of diffusers' attention; in float64 for float64."""
    work = torch.promote_types(x_BSHD.dtype, torch.float32)
    if rounded:
        x = x_BSHD.to(work)
        normed = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(weight_D.dtype) * weight_D
    else:
        normed = functional.rms_norm(x_BSHD, (x_BSHD.shape[-1],), weight_D, eps)
    even, odd = normed.to(work).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_SP[:, None], sin_SP[:, None]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(3)
    return turned.to(x_BSHD.dtype)


def _qk_norm_rope(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float, rounded: bool, out: torch.Tensor
) -> None:
    if not runs(x) or x.numel() == 0 or out.stride(-1) != 1:
        out.copy_(qk_norm_rope_reference(x, weight, cos, sin, eps, rounded))
        return
    from ppclc.kernels import qk_norm_rope_triton

    dense = x if x.stride(-1) == 1 else x.contiguous()
    qk_norm_rope_triton.qk_norm_rope(dense, weight.contiguous(), cos, sin, eps, rounded, out)


_operator = torch.library.custom_op(
    "ppclc::qk_norm_rope",
    _qk_norm_rope,
    mutates_args=("out",),
    schema="(Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps, bool rounded, Tensor(a!) out) -> ()",
)


@_operator.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float, rounded: bool, out: torch.Tensor) -> None:
    return None
