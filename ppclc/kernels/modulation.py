"""LayerNorm with modulation, and gated residuals: the chains around every attention and feed-forward network of a block.

Shape suffixes: B batch, T token, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from ppclc.kernels import dispatched, learns, runs, takes

WIDEST = 8192
"""Widest row that a program holds in its registers."""


def layer_norm_modulate(x_BTD: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """LN(x) * (1 + scale) + shift (B, T, D), the norm without weights of its own. scale, shift: (B or 1, D) or (B or 1, 1, D).

    The kernel computes in float32 and rounds once; plain PyTorch rounds after every operator.
    """
    if takes("layer_norm_modulate", x_BTD, scale, shift) and x_BTD.shape[-1] <= WIDEST:
        scale_BD, shift_BD = _per_sample(scale, x_BTD), _per_sample(shift, x_BTD)
        if scale_BD is not None and shift_BD is not None:
            given = (x_BTD, scale_BD, shift_BD)
            if dispatched(*given):
                out: torch.Tensor = torch.ops.ppclc.layer_norm_modulate(*given, eps)
            else:
                out = (_LayerNormModulate.apply if learns(*given) else _layer_norm_modulate)(*given, eps)
            return out
    return layer_norm_modulate_reference(x_BTD, scale, shift, eps)


def gated_residual(x_BTD: torch.Tensor, gate: torch.Tensor, y_BTD: torch.Tensor) -> torch.Tensor:
    """x + gate * y (B, T, D). gate: (B or 1, D) or (B or 1, 1, D). The kernel rounds once, plain PyTorch after every operator."""
    if takes("gated_residual", x_BTD, gate, y_BTD) and x_BTD.shape == y_BTD.shape:
        gate_BD = _per_sample(gate, x_BTD)
        if gate_BD is not None:
            given = (x_BTD, gate_BD, y_BTD)
            if dispatched(*given):
                out: torch.Tensor = torch.ops.ppclc.gated_residual(*given)
            else:
                out = (_GatedResidual.apply if learns(*given) else _gated_residual)(*given)
            return out
    return gated_residual_reference(x_BTD, gate, y_BTD)


def layer_norm_modulate_reference(x_BTD: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """As `layer_norm_modulate`, in plain PyTorch, to the bit as diffusers' blocks compute it."""
    return modulate(functional.layer_norm(x_BTD, x_BTD.shape[-1:], eps=eps), scale, shift)


def modulate(normed_BTD: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """normed * (1 + scale) + shift (B, T, D). scale, shift: (B or 1, D) or (B or 1, 1, D)."""
    return normed_BTD * (1 + _broadcast(scale)) + _broadcast(shift)


def gated_residual_reference(x_BTD: torch.Tensor, gate: torch.Tensor, y_BTD: torch.Tensor) -> torch.Tensor:
    """As `gated_residual`, in plain PyTorch, to the bit as diffusers' blocks compute it."""
    return x_BTD + _broadcast(gate) * y_BTD


def layer_norm_modulate_backward_reference(
    grad_BTD: torch.Tensor, x_BTD: torch.Tensor, scale_BD: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, scale and shift in plain PyTorch, in float32 or better, and rounded once."""
    work = torch.promote_types(x_BTD.dtype, torch.float32)
    x, g = x_BTD.to(work), grad_BTD.to(work)
    centred = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed, h = centred * rstd, g * (1 + scale_BD[:, None].to(work))
    dx = rstd * (h - h.mean(-1, keepdim=True) - normed * (h * normed).mean(-1, keepdim=True))
    return dx.to(x_BTD.dtype), (g * normed).sum(1).to(scale_BD.dtype), g.sum(1).to(scale_BD.dtype)


def gated_residual_backward_reference(
    grad_BTD: torch.Tensor, gate_BD: torch.Tensor, y_BTD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and y in plain PyTorch, in float32 or better, and rounded once; that of x is what came in."""
    work = torch.promote_types(y_BTD.dtype, torch.float32)
    g = grad_BTD.to(work)
    return (g * y_BTD.to(work)).sum(1).to(gate_BD.dtype), (g * gate_BD[:, None].to(work)).to(y_BTD.dtype)


def _broadcast(rows: torch.Tensor) -> torch.Tensor:
    """(B, D) as (B, 1, D), which all else is already."""
    return rows[:, None] if rows.ndim == 2 else rows


def _per_sample(rows: torch.Tensor, like_BTD: torch.Tensor) -> torch.Tensor | None:
    """A row a sample (B, D), None where there is one a token or the state is not (B, T, D)."""
    if like_BTD.ndim != 3 or rows.ndim not in (2, 3) or (rows.ndim == 3 and rows.shape[1] != 1):
        return None
    return (rows if rows.ndim == 2 else rows[:, 0]).expand(like_BTD.shape[0], like_BTD.shape[2])


def _dense(x: torch.Tensor) -> torch.Tensor:
    """A tensor whose last axis is contiguous: the same one where it is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _runs(x: torch.Tensor) -> bool:
    """Whether an operator runs its kernel: on a GPU, or interpreted; it knows its formula besides, for the CPU."""
    return runs(x) and x.numel() > 0


def _promoted(first: torch.Tensor, *others: torch.Tensor) -> torch.dtype:
    dtype = first.dtype
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def _layer_norm_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    if not _runs(x):
        return layer_norm_modulate_reference(x, scale, shift, eps).to(_promoted(x, scale, shift)).contiguous()
    from ppclc.kernels import modulation_triton

    out = torch.empty(x.shape, dtype=_promoted(x, scale, shift), device=x.device)
    modulation_triton.layer_norm_modulate(_dense(x), _dense(scale), _dense(shift), eps, out)
    return out


_layer_norm_modulate_operator = torch.library.custom_op(
    "ppclc::layer_norm_modulate",
    _layer_norm_modulate,
    mutates_args=(),
    schema="(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor",
)


@_layer_norm_modulate_operator.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty(x.shape, dtype=_promoted(x, scale, shift), device=x.device)


def _layer_norm_modulate_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, eps: float, sums: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not _runs(x):
        dx, dscale, dshift = layer_norm_modulate_backward_reference(grad, x, scale, eps)
        none = scale.new_empty(len(scale), 0)
        return dx.contiguous(), *((dscale, dshift) if sums else (none, none.clone()))
    from ppclc.kernels import modulation_triton

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dscale, dshift = modulation_triton.layer_norm_modulate_backward(_dense(grad), _dense(x), _dense(scale), eps, dx, sums)
    return dx, dscale.to(scale.dtype), dshift.to(scale.dtype)


_layer_norm_modulate_backward_operator = torch.library.custom_op(
    "ppclc::layer_norm_modulate_backward",
    _layer_norm_modulate_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor scale, float eps, bool sums) -> (Tensor, Tensor, Tensor)",
)


@_layer_norm_modulate_backward_operator.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, eps: float, sums: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = (scale.shape[0], scale.shape[1] if sums else 0)
    dscale, dshift = (torch.empty(rows, dtype=scale.dtype, device=x.device) for _ in range(2))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dscale, dshift


def _keep_for_layer_norm_modulate(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, scale, shift, ctx.eps = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, scale)


def _layer_norm_modulate_gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    sums = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    called = torch.ops.ppclc.layer_norm_modulate_backward if dispatched(grad, x) else _layer_norm_modulate_backward
    dx, dscale, dshift = called(grad, x, scale, ctx.eps, sums)
    return dx, dscale if sums else None, dshift.to(ctx.shift_dtype) if sums else None, None


_layer_norm_modulate_operator.register_autograd(_layer_norm_modulate_gradients, setup_context=_keep_for_layer_norm_modulate)


def _gated_residual(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if not _runs(x):
        return gated_residual_reference(x, gate, y).to(_promoted(x, gate, y)).contiguous()
    from ppclc.kernels import modulation_triton

    out = torch.empty(x.shape, dtype=_promoted(x, gate, y), device=x.device)
    modulation_triton.gated_residual(_dense(x), _dense(gate), _dense(y), out)
    return out


_gated_residual_operator = torch.library.custom_op(
    "ppclc::gated_residual", _gated_residual, mutates_args=(), schema="(Tensor x, Tensor gate, Tensor y) -> Tensor"
)


@_gated_residual_operator.register_fake
def _(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=_promoted(x, gate, y), device=x.device)


def _gated_residual_backward(grad: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, sums: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if not _runs(y):
        dgate, dy = gated_residual_backward_reference(grad, gate, y)
        return dgate if sums else gate.new_empty(len(gate), 0), dy.contiguous()
    from ppclc.kernels import modulation_triton

    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    dgate = modulation_triton.gated_residual_backward(_dense(grad), _dense(gate), _dense(y), dy, sums)
    return dgate.to(gate.dtype), dy


_gated_residual_backward_operator = torch.library.custom_op(
    "ppclc::gated_residual_backward",
    _gated_residual_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor gate, Tensor y, bool sums) -> (Tensor, Tensor)",
)


@_gated_residual_backward_operator.register_fake
def _(grad: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, sums: bool) -> tuple[torch.Tensor, torch.Tensor]:
    dgate = torch.empty((gate.shape[0], gate.shape[1] if sums else 0), dtype=gate.dtype, device=y.device)
    return dgate, torch.empty(y.shape, dtype=y.dtype, device=y.device)


def _keep_for_gated_residual(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, gate, y = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(gate, y)


def _gated_residual_gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gate, y = ctx.saved_tensors
    wanted, sums = ctx.needs_input_grad[2], ctx.needs_input_grad[1]
    called = torch.ops.ppclc.gated_residual_backward if dispatched(grad, y) else _gated_residual_backward
    dgate, dy = called(grad, gate, y, sums) if wanted or sums else (None, None)
    return grad.to(ctx.x_dtype), dgate if sums else None, dy


_gated_residual_operator.register_autograd(_gated_residual_gradients, setup_context=_keep_for_gated_residual)


def _function(run: Callable[..., torch.Tensor], keep: Callable[..., None], gradients: Callable[..., Any]) -> Any:
    """An operator as a function of autograd's, without the dispatcher, which takes the host longer than all of it takes a GPU."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> torch.Tensor:
            out = run(*given)
            keep(ctx, given, out)
            return out

        backward = staticmethod(gradients)

    return Function


_LayerNormModulate = _function(_layer_norm_modulate, _keep_for_layer_norm_modulate, _layer_norm_modulate_gradients)
_GatedResidual = _function(_gated_residual, _keep_for_gated_residual, _gated_residual_gradients)
