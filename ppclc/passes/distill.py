"""distill: one student block an interval, each on its own; then everything together on the teacher's velocity.

Non-sequential (arXiv 2511.16156, equations 6 and 7): interval [u, v] learns from the teacher's own
input of block u and output of block v, whatever other intervals do. One record an edit, so that a
distilled interval serves every plan that contains it. Training state is checkpointed as safetensors,
and a stopped run goes on from it to the same bits.

Shape suffixes: B batch, T token, D width.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from torch import nn

from ppclc import flow
from ppclc.families import Bank, Family
from ppclc.models import Trace, apply_plan, blocks_of, run_block, trace
from ppclc.plan import CompressionPlan, Interval
from ppclc.records import Distilled, write_tensors
from ppclc.samples import Sample, Samples

VERSION = 1
Progress = Callable[[float, str], None]
WARMUP = 20
LOG_EVERY = 10


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
    model: Any, family: Family, interval: Interval, samples: Samples, settings: DistillSettings, progress: Progress, work: Path
) -> Distilled:
    """One block that stands for an interval, started from the interval's first block.

    Text counts as much as image, but not after the last block, where nothing reads it.
    """
    blocks = blocks_of(model, family)
    student = copy.deepcopy(blocks[interval.first]).requires_grad_(True).train()
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


@dataclass
class Training:
    """AdamW on a module under a warm-up and a cosine to zero, with checkpoints that hold all of its state.

    `prepare` draws a batch and runs the teacher on it, one batch ahead of the student and in a thread of
    its own. The generator that it is given is the only source of chance, so weights, optimizer state, its
    state and the step number are the whole of a run, whatever the timing.
    """

    module: nn.Module
    prepare: Callable[[torch.Generator], Any]
    loss: Callable[[Any], torch.Tensor]
    steps: int
    learning_rate: float
    checkpoint_every: int
    seed: int

    def run(self, work: Path, progress: Progress) -> list[tuple[int, float]]:
        """Train to the end, from the checkpoint in `work` if there is one; the mean loss of every ten steps."""
        parameters = dict(self.module.named_parameters())
        optimizer = torch.optim.AdamW(parameters.values(), lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.02, fused=True)
        generator = torch.Generator().manual_seed(self.seed)
        losses = _restore(work / "checkpoint.safetensors", parameters, optimizer, generator)
        for step, (batch, state) in enumerate(self._batches(generator, self.steps - len(losses)), start=len(losses)):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * self.rate(step)
            loss = self.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            progress((step + 1) / self.steps, f"loss {loss.item():.4g}")
            if (step + 1) % self.checkpoint_every == 0 and step + 1 < self.steps:
                _checkpoint(work / "checkpoint.safetensors", parameters, optimizer, state, losses)
        windows = [losses[i : i + LOG_EVERY] for i in range(0, len(losses), LOG_EVERY)]
        return [(i * LOG_EVERY + len(w), sum(w) / len(w)) for i, w in enumerate(windows)]

    def _batches(self, generator: torch.Generator, count: int) -> Iterator[tuple[Any, torch.Tensor]]:
        """`count` batches, each with the generator's state once it was drawn; the next is made while one is used."""

        def make() -> tuple[Any, torch.Tensor]:
            return self.prepare(generator), generator.get_state()

        with ThreadPoolExecutor(1) as pool:
            upcoming = pool.submit(make) if count > 0 else None
            for left in range(count - 1, -1, -1):
                assert upcoming is not None
                ready = upcoming.result()
                upcoming = pool.submit(make) if left else None
                yield ready

    def rate(self, step: int) -> float:
        """Learning rate at a step, as a share of its peak."""
        return min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))


def _checkpoint(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: torch.Tensor, losses: list[float]
) -> None:
    tensors: dict[str, torch.Tensor] = {"generator": state}
    for name, parameter in parameters.items():
        tensors[f"weight.{name}"] = parameter.data
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    write_tensors(path, tensors, {"losses": json.dumps(losses)})


def _restore(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> list[float]:
    if not path.exists():
        return []
    with safe_open(path, "pt") as file:
        generator.set_state(file.get_tensor("generator"))
        held = set(file.keys())  # parameters that nothing reads get no gradient, and have no state
        for name, parameter in parameters.items():
            parameter.data.copy_(file.get_tensor(f"weight.{name}"))
            if f"step.{name}" in held:
                keys = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[parameter] = {key: file.get_tensor(f"{key}.{name}").clone() for key in keys}
        losses: list[float] = json.loads(file.metadata()["losses"])
    return losses
