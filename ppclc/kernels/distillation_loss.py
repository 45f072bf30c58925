"""The token-normalised distillation loss with its gradient in one pass over memory.

Eager reads and writes some 112 bytes an element for the loss and its gradient, of states in bfloat16. Here each row of both states is
read once, its sums and the gradient are made while it is in registers, and the gradient is written: 6 bytes an element.

Shape suffixes: B batch, T token, N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch

from ppclc.kernels import LEAST_NORM, interpreted, takes

Parts = tuple[torch.Tensor, torch.Tensor]


def state_loss(student_BTD: torch.Tensor, teacher_BTD: torch.Tensor, magnitude: float, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens of `2 - 2 cos` plus `magnitude` times the squared relative error of the norm, in float32 or better.

    Tokens where the mask is zero do not count, whatever they hold. The gradient goes to the student's states alone.

    Source: arXiv 2511.16156, equation 6 (direction); the magnitude term is ours.
    """
    if takes("distillation_loss", student_BTD, teacher_BTD):
        width = student_BTD.shape[-1]
        mask_N = None if mask_BT is None else mask_BT.reshape(-1)
        loss: torch.Tensor = torch.ops.ppclc.distillation_loss(
            student_BTD.reshape(-1, width), teacher_BTD.detach().reshape(-1, width), magnitude, mask_N
        )[0]
        return loss
    return reference(student_BTD, teacher_BTD, magnitude, mask_BT)


def reference(student_BTD: torch.Tensor, teacher_BTD: torch.Tensor, magnitude: float, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
    """The same in plain PyTorch."""
    student_BTD, teacher_BTD = _at_least_single(student_BTD), _at_least_single(teacher_BTD)
    if mask_BT is not None:
        kept = mask_BT.bool()[..., None]
        student_BTD, teacher_BTD = student_BTD.where(kept, 0), teacher_BTD.where(kept, 0)
    norm_s, norm_t = student_BTD.norm(dim=-1).clamp(min=LEAST_NORM), teacher_BTD.norm(dim=-1).clamp(min=LEAST_NORM)
    cosine = (student_BTD * teacher_BTD).sum(-1) / (norm_s * norm_t)
    loss = 2 - 2 * cosine + magnitude * (norm_s / norm_t - 1).square()
    if mask_BT is not None:
        return _masked_mean(loss, mask_BT.bool())
    mean: torch.Tensor = loss.mean()
    return mean


def _masked_mean(loss_BT: torch.Tensor, counts_BT: torch.Tensor) -> torch.Tensor:
    return (loss_BT * counts_BT).sum() / counts_BT.sum().clamp(min=1)


def _at_least_single(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _loss_and_gradient(student_ND: torch.Tensor, teacher_ND: torch.Tensor, magnitude: float, mask_N: torch.Tensor | None) -> Parts:
    if student_ND.is_cuda or interpreted():
        from ppclc.kernels import distillation_loss_triton

        return distillation_loss_triton.run(student_ND, teacher_ND, magnitude, mask_N)
    with torch.enable_grad():
        student = student_ND.detach().requires_grad_(True)
        loss = reference(student, teacher_ND, magnitude, mask_N)
        (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach().float(), gradient


@torch.library.custom_op("ppclc::distillation_loss", mutates_args=())
def distillation_loss(student_ND: torch.Tensor, teacher_ND: torch.Tensor, magnitude: float, mask_N: torch.Tensor | None) -> Parts:
    """The loss, a scalar in float32, and its gradient (N, D) by the student's rows, in their dtype."""
    return _loss_and_gradient(student_ND, teacher_ND, magnitude, mask_N)


@torch.library.custom_op("ppclc::scale_gradient", mutates_args=("gradient_ND",))
def scale_gradient(gradient_ND: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply in place by a number on the device. A factor of one is seen there, and then nothing is read or written."""
    if gradient_ND.is_cuda or interpreted():
        from ppclc.kernels import distillation_loss_triton

        distillation_loss_triton.scale(gradient_ND, factor)
    else:
        gradient_ND.mul_(factor)


@distillation_loss.register_fake
def _(student_ND: torch.Tensor, teacher_ND: torch.Tensor, magnitude: float, mask_N: torch.Tensor | None) -> Parts:
    return student_ND.new_empty((), dtype=torch.float32), torch.empty_like(student_ND, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
    ctx.gradient = output[1]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    if ctx.gradient is None:
        raise RuntimeError("ppclc::distillation_loss: its gradient is made once, in the forward; wanted one backward a forward")
    gradient, ctx.gradient = ctx.gradient, None  # scaled in place: it is used up
    scale_gradient(gradient, upstream)
    return gradient, None, None, None


distillation_loss.register_autograd(_backward, setup_context=_keep)
