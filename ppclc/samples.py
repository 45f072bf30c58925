"""Where noisy latents with their conditioning come from: for calibration, and for everything that trains.

`images`: real latents of the model's task, pushed along the flow. `prompts`: points of the teacher's
own sampling trajectories, which need no images. `noise`: random latents and embeddings, for a bare
transformer that has neither text encoder nor task.

Shape suffixes: B batch, S token, C channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ppclc import flow
from ppclc.errors import RecipeError
from ppclc.models import Source

Sample = tuple[torch.Tensor, torch.Tensor, flow.Conditioning]
"""x_t (B, S, C), timestep (B,), conditioning."""
SourceKind = Literal["auto", "images", "prompts", "cached", "noise"]
TRAJECTORY_STEPS = 10


@dataclass(frozen=True)
class Samples:
    """A source of (x_t (B, S, C), timestep (B,), conditioning), drawn from a generator that is its only state."""

    kind: str
    source: Source
    teacher: Any
    split: str

    def draw(self, count: int, generator: torch.Generator) -> Sample:
        """The next `count` samples, timesteps spread evenly over 0..1, t = 1 included."""
        if self.kind == "noise":
            example = self.source.family.example_inputs(self.source.config, batch=count, generator=generator)
            x = example.pop("hidden_states")
            example.pop("timestep")
            return x, self._timesteps(count, generator), example
        latents, conditioning = self.source.task.batch(count, generator, self.split)  # type: ignore[union-attr]
        noise = torch.randn(latents.shape, generator=generator)
        if self.kind == "images":
            t = self._timesteps(count, generator)
            return flow.interpolate(latents, noise, t), t, conditioning
        return self._trajectory(noise, conditioning, generator)

    def _timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        order = torch.randperm(count, generator=generator)
        spread = (order + torch.rand(count, generator=generator)) / count
        # The sampler starts at exactly 1, where no data is left: one sample in sixteen stands there.
        return torch.where(torch.rand(count, generator=generator) < 1 / 16, torch.ones(()), spread)

    @torch.no_grad()
    def _trajectory(self, noise: torch.Tensor, conditioning: flow.Conditioning, generator: torch.Generator) -> Sample:
        stop = torch.randint(TRAJECTORY_STEPS, (len(noise),), generator=generator)
        x, at = noise, noise.clone()
        for i in range(int(stop.max()) + 1):
            at = torch.where((stop == i)[:, None, None], x, at)
            t = torch.full((len(x),), 1 - i / TRAJECTORY_STEPS)
            x = x - flow.predict(self.teacher, x, t, conditioning) / TRAJECTORY_STEPS
        return at, 1 - stop / TRAJECTORY_STEPS, conditioning


def open_samples(kind: SourceKind, source: Source, teacher: Any, split: str) -> Samples:
    """The source of that kind for a model; `auto` is `images` where a task has them, else `noise`.

    Raises:
        RecipeError: the model has no such source.
    """
    if kind == "auto":
        kind = "images" if source.task else "noise"
    if kind == "cached":
        raise RecipeError("calibrate.source = 'cached': not supported by this version; wanted images, prompts or noise")
    if kind in ("images", "prompts") and source.task is None:
        raise RecipeError(
            f"calibrate.source = {kind!r}: {source.path} brings neither images nor a text encoder that this version reads; wanted noise"
        )
    return Samples(kind, source, teacher, split)
