"""Blocks and attentions that run through kernels: objects of a model change their class, and nothing else about them changes.

Names, tensors and hooks stay as they are, so that a fused model is saved, copied, sharded and trained like any other. The classes ask
`takes` at every call; where no kernel is taken, they do what the class behind them does.

Shape suffixes: B batch, S token, H head, D width of a head, P pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ppclc.kernels import takes
from ppclc.kernels.modulation import gated_residual, layer_norm_modulate, modulate
from ppclc.kernels.qk_norm_rope import qk_norm_rope

Kind = TypeVar("Kind", bound=type)
Model = TypeVar("Model", bound=nn.Module)
STOCK = "_class_without_kernels"
"""Attribute of a fused class: the class that its objects are of without kernels."""


def in_place_of(stock: type) -> Callable[[Kind], Kind]:
    """Decorator of a subclass whose objects stand where those of `stock` stood: it has that one's name, by which libraries know blocks."""

    def marked(kind: Kind) -> Kind:
        kind.__name__, kind.__qualname__ = stock.__name__, stock.__qualname__
        setattr(kind, STOCK, stock)
        return kind

    return marked


def fuse(model: Model, classes: Mapping[type, type]) -> Model:
    """The same model, its blocks and attention processors now of the fused classes, by the classes that they were of."""
    for part in _parts(model):
        if (kind := classes.get(type(part))) is not None:
            part.__class__ = kind
    return model


def unfuse(model: Model) -> Model:
    """The same model with all that `fuse` did undone."""
    for part in _parts(model):
        if (stock := type(part).__dict__.get(STOCK)) is not None:
            part.__class__ = stock
    return model


def _parts(model: nn.Module) -> list[Any]:
    """Modules, and the processors of those that have one."""
    modules = list(model.modules())
    return [*modules, *(p for m in modules if (p := m.__dict__.get("processor")) is not None)]


def takes_chains(x: torch.Tensor) -> bool:
    """Whether a kernel may be taken for the chains around attention and networks."""
    return takes("layer_norm_modulate", x) or takes("gated_residual", x)


def modulated(norm: Any, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """A state, normed and modulated: by a kernel, where the norm is a plain LayerNorm whose result nobody listens to."""
    if type(norm) is nn.LayerNorm and not norm.elementwise_affine and not hooked(norm, besides_inputs=True):
        return layer_norm_modulate(_given(norm, x), scale, shift, norm.eps)
    return modulate(norm(x), scale, shift)


def _given(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What reaches a module that is called with x: hooks on its input are called, and may put something else in its place."""
    for hook in module._forward_pre_hooks.values():
        changed = hook(module, (x,))
        if changed is not None:
            (x,) = changed if isinstance(changed, tuple) else (changed,)
    return x


def hooked(module: nn.Module, besides_inputs: bool = False) -> bool:
    """Whether something waits for a module to be called. besides_inputs: hooks that are given its positional inputs alone do not count."""
    inputs = module._forward_pre_hooks_with_kwargs if besides_inputs else module._forward_pre_hooks
    return bool(inputs or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


class KernelChains:
    """The chains of `ppclc.students.parts.Chains` through kernels, for a class in front of a student's block."""

    def modulated(self, norm: Any, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """A state, normed and modulated."""
        return modulated(norm, x, scale, shift)

    def gated(self, x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """A state with what is added to it behind its gate."""
        return gated_residual(x, gate, y)


@dataclass(frozen=True)
class Heads:
    """Queries or keys of some tokens (B, S, H, D), their norm, and cos and sin (S, P)."""

    x_BSHD: torch.Tensor
    norm: Any
    cos_SP: torch.Tensor
    sin_SP: torch.Tensor


def takes_heads(x: torch.Tensor, *norms: Any) -> bool:
    """Whether a kernel may be taken for queries and keys that come of a state x: without gradients, with norms that it knows."""
    if torch.is_grad_enabled() or not takes("qk_norm_rope", x) or torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu"):
        return False
    weights = [getattr(norm, "weight", None) for norm in norms]
    return all(w is not None and w.dtype == x.dtype for w in weights) and not any(
        hooked(norm) or getattr(norm, "bias", None) is not None for norm in norms
    )


def joined(parts: Sequence[Heads]) -> torch.Tensor:
    """All parts, normed and rotated, one after the other (B, all S, H, D), each written where it stands."""
    first = parts[0].x_BSHD
    lengths = [p.x_BSHD.shape[1] for p in parts]
    out = torch.empty(first.shape[0], sum(lengths), *first.shape[2:], dtype=first.dtype, device=first.device)
    for part, place in zip(parts, out.split(lengths, dim=1), strict=True):
        rounded = not isinstance(part.norm, nn.RMSNorm)
        eps = torch.finfo(torch.float32).eps if part.norm.eps is None else part.norm.eps
        qk_norm_rope(part.x_BSHD, part.norm.weight, part.cos_SP, part.sin_SP, eps, rounded, out=place)
    return out
