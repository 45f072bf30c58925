"""The token-normalised distillation loss with its gradient in one pass over memory.

Eager reads and writes some 112 bytes an element for the loss and its gradient, of states in bfloat16. Here each row of both states is
read once, its sums and the gradient are made while it is in registers, and the gradient is written: 6 bytes an element.

Shape suffixes: B batch, T token, N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch

from ppclc.kernels import LEAST_NORM, plain, runs, takes

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_ones: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
WIDEST = 8192
"""Rows up to it fit into registers."""


def state_loss(
    student_BTD: torch.Tensor, teacher_BTD: torch.Tensor, magnitude: float, mask_BT: torch.Tensor | None = None, weight: float = 1.0
) -> torch.Tensor:
    """`weight` times the mean over tokens of `2 - 2 cos` plus `magnitude` times the squared relative error of the norm, in float32 or better.

    Tokens where the mask is zero do not count, whatever they hold. The gradient goes to the student's states alone. A weight that is given here,
    and a backward from `one`, leave the gradient as the forward wrote it.

    Source: arXiv 2511.16156, equation 6 (direction); the magnitude term is ours.
    """
    if not takes("distillation_loss", student_BTD, teacher_BTD) or student_BTD.shape[-1] > WIDEST:
        return reference(student_BTD, teacher_BTD, magnitude, mask_BT, weight)
    if torch.compiler.is_compiling() or not (plain(student_BTD) and plain(teacher_BTD)):
        width = student_BTD.shape[-1]
        mask_N = None if mask_BT is None else mask_BT.flatten()
        loss: torch.Tensor = torch.ops.ppclc.distillation_loss(
            student_BTD.reshape(-1, width), teacher_BTD.detach().reshape(-1, width), magnitude, mask_N, weight
        )[0]
    else:  # the dispatcher takes longer on the host than all of this on a GPU
        loss = _Loss.apply(student_BTD, teacher_BTD, magnitude, mask_BT, weight)  # type: ignore[no-untyped-call]
    return loss


def one(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A scalar one, always the same, not to be written to: as the upstream of a loss it is known without a look at the device, and no kernel makes it."""
    known = _ones.get((device, dtype))
    if known is None:
        known = torch.ones((), device=device, dtype=dtype)
        # What stands for a tensor, or is made while a graph is captured, holds no one afterwards.
        if plain(known) and not (known.is_cuda and torch.cuda.is_current_stream_capturing()):
            if known.is_cuda:
                torch.cuda.current_stream(known.device).synchronize()  # other streams read it without asking
            _ones[device, dtype] = known
    return known


def _is_one(upstream: torch.Tensor) -> bool:
    """Whether a scalar is `one`, or a view of it."""
    known = _ones.get((upstream.device, upstream.dtype))
    return known is not None and plain(upstream) and upstream.numel() == 1 and upstream.data_ptr() == known.data_ptr()


def reference(
    student_BTD: torch.Tensor, teacher_BTD: torch.Tensor, magnitude: float, mask_BT: torch.Tensor | None = None, weight: float = 1.0
) -> torch.Tensor:
    """The same in plain PyTorch."""
    student_BTD, teacher_BTD = _at_least_single(student_BTD), _at_least_single(teacher_BTD)
    if mask_BT is not None:
        kept = mask_BT.bool()[..., None]
        student_BTD, teacher_BTD = student_BTD.where(kept, 0), teacher_BTD.where(kept, 0)
    norm_s, norm_t = student_BTD.norm(dim=-1).clamp(min=LEAST_NORM), teacher_BTD.norm(dim=-1).clamp(min=LEAST_NORM)
    cosine = (student_BTD * teacher_BTD).sum(-1) / (norm_s * norm_t)
    loss = 2 - 2 * cosine + magnitude * (norm_s / norm_t - 1).square()
    mean: torch.Tensor = loss.mean() if mask_BT is None else _masked_mean(loss, mask_BT.bool())
    return mean if weight == 1 else weight * mean  # what kernels are measured against takes no step more for it


def _masked_mean(loss_BT: torch.Tensor, counts_BT: torch.Tensor) -> torch.Tensor:
    return (loss_BT * counts_BT).sum() / counts_BT.sum().clamp(min=1)


def _at_least_single(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _loss_and_gradient(
    student_ND: torch.Tensor, teacher_ND: torch.Tensor, magnitude: float, mask_N: torch.Tensor | None, weight: float
) -> Parts:
    if runs(student_ND):
        from ppclc.kernels import distillation_loss_triton, tuning

        with tuning.on_device_of(student_ND):
            return distillation_loss_triton.run(student_ND, teacher_ND, magnitude, mask_N, weight)
    gradient_ND = weight * _gradient(_at_least_single(student_ND), _at_least_single(teacher_ND), magnitude, mask_N)
    loss = reference(student_ND, teacher_ND, magnitude, mask_N, weight)
    return loss.float(), gradient_ND.to(student_ND.dtype), loss.new_empty(0, dtype=torch.float32)


def _gradient(s_ND: torch.Tensor, t_ND: torch.Tensor, magnitude: float, mask_N: torch.Tensor | None) -> torch.Tensor:
    """The gradient as the kernel has it, in plain PyTorch: below the dispatcher there is no autograd."""
    counts = s_ND.new_ones(len(s_ND), dtype=torch.bool) if mask_N is None else mask_N.bool()
    s_ND, t_ND = s_ND.where(counts[:, None], 0), t_ND.where(counts[:, None], 0)
    length_s, length_t = s_ND.norm(dim=-1, keepdim=True), t_ND.norm(dim=-1, keepdim=True)
    norm_s, norm_t = length_s.clamp(min=LEAST_NORM), length_t.clamp(min=LEAST_NORM)
    cosine = (s_ND * t_ND).sum(-1, keepdim=True) / (norm_s * norm_t)
    along = (2 * cosine / norm_s + 2 * magnitude * (norm_s / norm_t - 1) / norm_t) / norm_s
    gradient_ND = along.where(length_s >= LEAST_NORM, 0) * s_ND - 2 / (norm_s * norm_t) * t_ND
    shared: torch.Tensor = gradient_ND.where(counts[:, None], 0) / counts.sum().clamp(min=1)
    return shared


def _scale(gradient_ND: torch.Tensor, factor: torch.Tensor, share: torch.Tensor) -> None:
    if runs(gradient_ND):
        from ppclc.kernels import distillation_loss_triton, tuning

        with tuning.on_device_of(gradient_ND):
            distillation_loss_triton.scale(gradient_ND, factor, share)
    else:
        gradient_ND.mul_(factor)


@torch.library.custom_op("ppclc::distillation_loss", mutates_args=())
def distillation_loss(
    student_ND: torch.Tensor, teacher_ND: torch.Tensor, magnitude: float, mask_N: torch.Tensor | None, weight: float
) -> Parts:
    """The loss, a scalar in float32, its gradient (N, D) in the dtype of the student's rows, and what is still to be multiplied with it, if anything."""
    return _loss_and_gradient(student_ND, teacher_ND, magnitude, mask_N, weight)


@torch.library.custom_op("ppclc::scale_gradient", mutates_args=("gradient_ND",))
def scale_gradient(gradient_ND: torch.Tensor, factor: torch.Tensor, share: torch.Tensor) -> None:
    """Multiply in place by a number on the device, and by a second one if there is one. Where the product is one, nothing is read or written."""
    _scale(gradient_ND, factor, share)


@distillation_loss.register_fake
def _(student_ND: torch.Tensor, teacher_ND: torch.Tensor, magnitude: float, mask_N: torch.Tensor | None, weight: float) -> Parts:
    scalar = student_ND.new_empty((), dtype=torch.float32)
    late = student_ND.dtype == torch.float16 and runs(student_ND)
    gradient_ND = torch.empty_like(student_ND, memory_format=torch.contiguous_format)
    return scalar, gradient_ND, scalar.new_empty(() if late else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, upstream: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
    gradient_ND, share = ctx.saved_tensors
    scaled = gradient_ND.clone()  # compiled code leaves the copy out
    torch.ops.ppclc.scale_gradient(scaled, upstream, share)
    return scaled, None, None, None, None


distillation_loss.register_autograd(_backward, setup_context=_keep)


class _Loss(torch.autograd.Function):
    """The same without the dispatcher. The gradient is scaled where it lies, if at all: one backward a forward."""

    @staticmethod
    def forward(
        ctx: Any, student_BTD: torch.Tensor, teacher_BTD: torch.Tensor, magnitude: float, mask_BT: torch.Tensor | None, weight: float
    ) -> torch.Tensor:
        width = student_BTD.shape[-1]
        rows = student_BTD.reshape(-1, width), teacher_BTD.reshape(-1, width)
        loss, gradient_ND, share = _loss_and_gradient(*rows, magnitude, None if mask_BT is None else mask_BT.flatten(), weight)
        ctx.made = gradient_ND.view(student_BTD.shape), share
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        if ctx.made is None:
            raise RuntimeError("distillation loss: its gradient is made once, in the forward; wanted one backward a forward")
        (gradient_BTD, share), ctx.made = ctx.made, None
        if share.numel() or not _is_one(upstream):
            _scale(gradient_BTD, upstream, share)
        return gradient_BTD, None, None, None, None
