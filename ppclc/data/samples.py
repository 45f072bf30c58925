"""Where noisy latents with their conditioning come from: for calibration, and for everything that trains.

`images`: real latents, a task's or a user's, pushed along the flow. `prompts`: points of the teacher's
own sampling trajectories, which need no images. `cached`: the one or the other from ready-made
embeddings. `noise`: random latents and embeddings, for a bare transformer that has neither text
encoder nor task.

Shape suffixes: B batch, S token, C channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ppclc.costs.blocks import default_size, width_of
from ppclc.data import flow
from ppclc.data.batches import WHOLE, Share
from ppclc.data.cache import LATENTS, MASK, TEXT, Cache
from ppclc.errors import RecipeError
from ppclc.loading.sources import Source
from ppclc.machine.devices import free_bytes

Sample = tuple[torch.Tensor, torch.Tensor, flow.Conditioning]
"""x_t (B, S, C), timestep (B,), conditioning."""
SourceKind = Literal["auto", "images", "prompts", "cached", "noise"]
TRAJECTORY_STEPS = 10
STATES = 40
"""Memory of a sample's forward in 16 bits over that of its states, both streams: four widths in a network, twice, and what attention reads."""
POSITIONS = {"img_ids", "txt_ids"}
"""Inputs (tokens, axes) that all samples of a batch share."""


@dataclass(frozen=True)
class Samples:
    """A source of (x_t (B, S, C), timestep (B,), conditioning), drawn from a generator that is its only state.

    `rows` are those of the cache that the split may use. `shift` moves timesteps towards noise above 1: `t` becomes
    `s t / (1 + (s - 1) t)`. Source: arXiv 2403.03206, section 5.3.2.
    """

    kind: str
    source: Source
    teacher: Any
    split: str
    cache: Cache | None = None
    rows: tuple[int, ...] = ()
    shift: float = 1.0

    @property
    def identity(self) -> str:
        """The kind, and the digest of the data where it is a user's: what a record that is made of it depends on."""
        return f"{self.kind}-{self.cache.digest}" if self.cache else self.kind

    @property
    def tokens(self) -> int:
        """Tokens of a sample, both streams."""
        if self.cache is not None:
            height, width = self.cache.grid
            return height * width + int(self.cache.shards[0].shapes[TEXT][1])
        size = default_size(self.source.family)
        return size["height"] * size["width"] + size["text"]

    def draw(self, count: int, generator: torch.Generator, share: Share = WHOLE) -> Sample:
        """The next `count` samples, timesteps spread evenly over 0..1, t = 1 included; of them, the rows of a share."""
        return self.draw_with_target(count, generator, share)[0]

    def draw_with_target(self, count: int, generator: torch.Generator, share: Share = WHOLE) -> tuple[Sample, torch.Tensor | None]:
        """The next `count` samples, and the velocity (B, S, C) that leads from their data to their noise, None without data.

        What is random is drawn for all of them; files are read, and the teacher is run, for the share's rows alone.
        """
        rows = share.of(count)
        if self.kind == "noise":
            noise, example = self._random(count, generator)
            return picked((noise, self._timesteps(count, generator), example), rows), None
        latents, conditioning = self._clean(count, generator, share)
        noise = torch.randn((count, *latents.shape[1:]), generator=generator)[rows.start : rows.stop]
        if self.kind == "images" or (self.kind == "cached" and self.cache and self.cache.has_latents):
            t = self._timesteps(count, generator)[rows.start : rows.stop]
            return (flow.interpolate(latents, noise, t), t, conditioning), noise - latents
        stop = torch.randint(TRAJECTORY_STEPS, (count,), generator=generator)[rows.start : rows.stop]
        return self._trajectory(noise, conditioning, stop), None

    def shifted(self, shift: float) -> Samples:
        """The same source with its timesteps moved."""
        return replace(self, shift=shift)

    def starts(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, flow.Conditioning]:
        """Where the sampler starts: noise (B, S, C) and the next `count` conditionings."""
        if self.kind == "noise":
            return self._random(count, generator)
        latents, conditioning = self._clean(count, generator)
        return torch.randn(latents.shape, generator=generator), conditioning

    def previews(self, count: int, seed: int) -> tuple[torch.Tensor, flow.Conditioning, list[str]]:
        """Noise, conditioning and prompts of the first samples of the split, at most so many."""
        generator = torch.Generator().manual_seed(seed)
        if self.cache is None:
            noise, given = self.starts(count, generator)
            return noise, given, [f"sample {i}" for i in range(count)]
        rows = list(self.rows[:count])
        latents, given = self._rows(rows)
        return torch.randn(latents.shape, generator=generator), given, self.cache.prompts(rows)

    def _random(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, flow.Conditioning]:
        example = self.source.family.example_inputs(self.source.config, batch=count, generator=generator)
        noise: torch.Tensor = example.pop("hidden_states")
        example.pop("timestep")
        return noise, example

    def _clean(self, count: int, generator: torch.Generator, share: Share = WHOLE) -> tuple[torch.Tensor, flow.Conditioning]:
        """Clean latents (B, S, C) of a share with their conditioning; where only prompts are there, zeros of the latents' shape."""
        rows = share.of(count)
        if self.cache is None:
            data, known = self.source.task.batch(count, generator, self.split)  # type: ignore[union-attr]
            clean, _, conditioning = picked((data, torch.empty(count), known), rows)
            return clean, conditioning
        order = torch.randperm(len(self.rows), generator=generator)
        while len(order) < count:
            order = torch.cat([order, torch.randperm(len(self.rows), generator=generator)])
        return self._rows([self.rows[i] for i in order[rows.start : rows.stop].tolist()])

    def _rows(self, rows: list[int]) -> tuple[torch.Tensor, flow.Conditioning]:
        """Latents and conditioning of rows of the cache."""
        assert self.cache is not None
        batch = self.cache.read(rows)
        (height, width), family = self.cache.grid, self.source.family
        latents = batch.pop(LATENTS, None)
        if latents is None:
            latents = torch.zeros(len(rows), *family.latents(self.source.config, height, width))
        if MASK in batch:
            batch[family.text_mask] = batch.pop(MASK)
        return latents.float(), batch | family.grid_inputs(self.source.config, len(rows), height, width, batch[TEXT].shape[1])

    def _timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        order = torch.randperm(count, generator=generator)
        spread = (order + torch.rand(count, generator=generator)) / count
        spread = self.shift * spread / (1 + (self.shift - 1) * spread)
        # The sampler starts at exactly 1, where no data is left: one sample in sixteen stands there.
        return torch.where(torch.rand(count, generator=generator) < 1 / 16, torch.ones(()), spread)

    @torch.no_grad()
    def _trajectory(self, noise: torch.Tensor, conditioning: flow.Conditioning, stop: torch.Tensor) -> Sample:
        """Points of the teacher's trajectories from that noise, each after `stop` (B,) of its steps."""
        at = noise.clone()
        for i in range(int(stop.max())):
            rows = (stop > i).nonzero().flatten()
            now = picked((at, torch.full((len(at),), 1 - i / TRAJECTORY_STEPS), conditioning), rows.tolist())
            parts = parts_that_fit(now, getattr(self.teacher, "device", "cpu"), self.source)
            at[rows] = now[0] - torch.cat([flow.predict(self.teacher, *part) for part in parts]) / TRAJECTORY_STEPS
        return at, 1 - stop / TRAJECTORY_STEPS, conditioning


def parts_that_fit(sample: Sample, device: Any, source: Source) -> list[Sample]:
    """A batch as it is for a CPU; for a GPU in parts of which half of the free memory holds `STATES` states each.

    Parts have a power of two of rows: a little more or less that is free gives the same parts, and so the same rounding.
    """
    x, t, given = sample
    if torch.device(device).type == "cpu":
        return [sample]
    tokens = x.shape[1] if x.dim() == 3 else x.shape[2] * x.shape[3] // 4
    tokens += sum(v.shape[1] for name, v in given.items() if name == TEXT)
    rows = max(1, int(free_bytes(device) / 2 / (STATES * 2 * tokens * width_of(source.config))))
    rows = 1 << rows.bit_length() - 1
    return [picked(sample, range(i, min(i + rows, len(t)))) for i in range(0, len(t), rows)]


def picked(sample: Sample, rows: Sequence[int]) -> Sample:
    """These rows of a batch, in that order: of every tensor and every list in the conditioning that is as long as the batch, too."""
    x, t, conditioning = sample
    count, index = len(t), torch.tensor(list(rows))
    if list(rows) == list(range(count)):
        return sample

    def pick(name: str, value: Any) -> Any:
        if name in POSITIONS:  # which no sample has of its own
            return value
        if isinstance(value, torch.Tensor):
            return value[index] if value.dim() and len(value) == count else value
        return [value[i] for i in rows] if isinstance(value, list) and len(value) == count else value

    return x[index], t[index], {k: pick(k, v) for k, v in conditioning.items()}


def moved(sample: Sample, device: str) -> Sample:
    """The batch on a device."""
    x, t, conditioning = sample
    return x.to(device), t.to(device), {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in conditioning.items()}


def open_samples(kind: SourceKind, source: Source, teacher: Any, split: str, cache: Cache | None = None) -> Samples:
    """The source of that kind for a model; `auto` is `images` where a task has them, else `noise`. A cache goes first.

    Raises:
        RecipeError: the model has no such source.
    """
    if cache is not None:
        return Samples(cache.kind, source, teacher, split, cache, tuple(cache.split(split)))
    if kind == "auto":
        kind = "images" if source.task else "noise"
    if kind == "cached" or (kind != "noise" and source.task is None):
        raise RecipeError(f"calibrate.source = {kind!r}: {source.path} brings no such data; wanted calibrate.path, or source: noise")
    return Samples(kind, source, teacher, split)
