"""The training loop that distillation and the trials of the analysis share, with checkpoints as safetensors.

A stopped run goes on from its checkpoint to the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ppclc.records import write_tensors

Progress = Callable[[float, str], None]
WARMUP = 20
LOG_EVERY = 10


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
