"""distill: one student block an interval, each on its own; then everything together on the teacher's velocity.

Non-sequential (arXiv 2511.16156, equations 6 and 7): interval [u, v] learns from the teacher's own
input of block u and output of block v, whatever other intervals do. One record an edit, so that a
distilled interval serves every plan that contains it.

Shape suffixes: B batch, T token, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from ppclc import flow
from ppclc.families import Bank, Family
from ppclc.models import Trace, apply_plan, blocks_of, run_block, trace
from ppclc.plan import CompressionPlan, Interval
from ppclc.records import Distilled
from ppclc.samples import Sample, Samples
from ppclc.training import Training

VERSION = 2
Progress = Callable[[float, str], None]


class DistillSettings(BaseModel):
    """Section `distill` of a recipe.

    steps: local steps an interval. finetune_steps: joint steps on the teacher's velocity. Learning
    rates peak after a short warm-up and follow a cosine to zero. magnitude: weight of the
    magnitude term beside direction. checkpoint_every: steps between checkpoints.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    steps: Annotated[int, Field(ge=0)] = 150
    finetune_steps: Annotated[int, Field(ge=0)] = 800
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    finetune_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    batch: Annotated[int, Field(ge=1)] = 64
    magnitude: Annotated[float, Field(ge=0)] = 0.1
    bank: Literal["plan"] = "plan"
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    seed: Annotated[int, Field(ge=0)] = 0

    def local(self) -> dict[str, Any]:
        """The settings on which a local edit depends."""
        return self.model_dump(include={"steps", "learning_rate", "batch", "magnitude", "seed"})

    def joint(self) -> dict[str, Any]:
        """The settings on which the fine-tune depends."""
        return self.model_dump(include={"finetune_steps", "finetune_learning_rate", "batch", "seed"})


def state_loss(student_BTD: torch.Tensor, teacher_BTD: torch.Tensor, magnitude: float, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens of `2 - 2 cos` plus `magnitude` times the squared relative error of the norm.

    Source: arXiv 2511.16156, equation 6 (direction); the magnitude term is ours.
    """
    norm_s, norm_t = student_BTD.norm(dim=-1).clamp(min=1e-8), teacher_BTD.norm(dim=-1).clamp(min=1e-8)
    cosine = (student_BTD * teacher_BTD).sum(-1) / (norm_s * norm_t)
    loss = 2 - 2 * cosine + magnitude * (norm_s / norm_t - 1).square()
    mean: torch.Tensor = loss.mean() if mask_BT is None else (loss * mask_BT).sum() / mask_BT.sum()
    return mean


def distill_interval(
    model: Any, family: Family, interval: Interval, start: int, samples: Samples, settings: DistillSettings, progress: Progress, work: Path
) -> Distilled:
    """One block that stands for an interval, started from a copy of teacher block `start`.

    Text counts as much as image, but not after the last block, where nothing reads it.
    """
    blocks = blocks_of(model, family)
    student = copy.deepcopy(blocks[start]).requires_grad_(True).train()
    streams = ["image"] if interval.last == len(blocks) - 1 else list(family.groups[0].streams)

    def prepare(generator: torch.Generator) -> tuple[Trace, torch.Tensor | None]:
        x, t, conditioning = samples.draw(settings.batch, generator)
        seen = trace(model, family, flow.inputs_for(model, x, t, conditioning), last=interval.last)
        return seen, conditioning.get("encoder_hidden_states_mask")

    def loss(batch: tuple[Trace, torch.Tensor | None]) -> torch.Tensor:
        seen, mask = batch
        output = run_block(student, family, {s: v[interval.first] for s, v in seen.states.items()}, seen.shared)
        terms = [state_loss(output[s], seen.states[s][-1], settings.magnitude, mask if s == "text" else None) for s in streams]
        return torch.stack(terms).sum()

    job = Training(student, prepare, loss, settings.steps, settings.learning_rate, settings.checkpoint_every, settings.seed)
    losses = job.run(work, progress)
    return Distilled(edit=interval.key, steps=settings.steps, losses=losses, tensors=_state(student))


def finetune(
    model: Any, plan: CompressionPlan, bank: Bank, samples: Samples, settings: DistillSettings, progress: Progress, work: Path
) -> Distilled:
    """The whole student, trained end to end on the teacher's velocity (mean squared error)."""
    student = apply_plan(model, plan, bank).requires_grad_(True).train()

    @torch.no_grad()
    def prepare(generator: torch.Generator) -> tuple[Sample, torch.Tensor]:
        sample = samples.draw(settings.batch, generator)
        return sample, flow.predict(model, *sample)

    def loss(batch: tuple[Sample, torch.Tensor]) -> torch.Tensor:
        sample, wanted = batch
        return nn.functional.mse_loss(flow.predict(student, *sample), wanted)

    steps = 0 if plan.is_empty else settings.finetune_steps
    job = Training(student, prepare, loss, steps, settings.finetune_learning_rate, settings.checkpoint_every, settings.seed + 1)
    losses = job.run(work, progress)
    return Distilled(edit="finetune", steps=steps, losses=losses, tensors=_state(student))


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}
