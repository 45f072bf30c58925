"""Metrics that need no task, paired statistics, and the seam for tasks that bring judges of their own.

Shape suffixes: B batch, S token, C channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ppclc import flow
from ppclc.records import Quality


class Task(Protocol):
    """What a model is for: its data, and how its output is judged.

    `batch` gives clean latents (B, S, C) with their conditioning from a split that training
    (`train`) or choices (`choose`) may use; `measure` judges a model on the split that nothing else
    touches and returns per-sample outcomes; `compare` turns two of those into figures; `preview`
    gives images (B, 3, H, W) in 0..1 and their prompts.
    """

    name: str
    model_folder: Path

    def batch(self, count: int, generator: torch.Generator, split: str) -> tuple[torch.Tensor, dict[str, Any]]: ...

    def measure(
        self, model: Any, settings: MeasureSettings, progress: Callable[[float], None]
    ) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]: ...

    def compare(
        self, teacher: dict[str, torch.Tensor], student: dict[str, torch.Tensor], settings: MeasureSettings
    ) -> dict[str, Quality]: ...

    def preview(self, model: Any, count: int, seed: int, guidance: float, steps: int) -> tuple[torch.Tensor, list[str]]: ...


class MeasureSettings(Protocol):
    """How much to judge: scenes a seed, seeds, guidance scales, sampling steps."""

    @property
    def scenes(self) -> int: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...
    @property
    def guidance(self) -> tuple[float, ...]: ...
    @property
    def steps(self) -> int: ...


@torch.no_grad()
def velocity_error(teacher: Any, student: Any, samples: Sequence[tuple[torch.Tensor, torch.Tensor, flow.Conditioning]]) -> float:
    """Squared distance of the student's velocity from the teacher's, as a share of the teacher's energy.

    Samples are (x_t (B, S, C), timestep (B,), conditioning). No measure of quality: see `docs/glossary.md`.
    """
    distance = energy = 0.0
    for x, t, conditioning in samples:
        wanted = flow.predict(teacher, x, t, conditioning)
        distance += (flow.predict(student, x, t, conditioning) - wanted).double().square().sum().item()
        energy += wanted.double().square().sum().item()
    return distance / energy


@dataclass(frozen=True)
class SampledDistance:
    """How far what a student samples lies from what its teacher does, from the same noise and conditioning, without guidance.

    The median over samples of the squared distance, as a share of the mean energy of the teacher's. A sample that
    turns into another image is far away whatever the student, so that means are ruled by few samples; medians are not.
    Nearer to judged quality than the velocity error: see docs/decisions/004-selection.md. Source: ours.
    """

    starts: Sequence[tuple[torch.Tensor, flow.Conditioning]]
    wanted: Sequence[torch.Tensor]
    steps: int

    @classmethod
    def of_teacher(cls, teacher: Any, starts: Sequence[tuple[torch.Tensor, flow.Conditioning]], steps: int) -> SampledDistance:
        """From batches of noise (B, S, C) with conditioning, in `steps` Euler steps."""
        return cls(starts, [flow.sample(teacher, noise, given, given, 1, steps) for noise, given in starts], steps)

    def each(self, student: Any) -> torch.Tensor:
        """Every sample's squared distance (n,), float64, as a share of the mean energy."""
        pairs = zip(self.starts, self.wanted, strict=True)
        gaps = [flow.sample(student, noise, given, given, 1, self.steps) - wanted for (noise, given), wanted in pairs]
        energy = torch.cat([w.double().square().flatten(1).sum(1) for w in self.wanted]).mean()
        return torch.cat([g.double().square().flatten(1).sum(1) for g in gaps]).nan_to_num(nan=float("inf")) / energy

    def __call__(self, student: Any) -> float:
        """The student's distance."""
        return self.each(student).median().item()


def paired_drop(teacher: torch.Tensor, student: torch.Tensor, better: str = "higher") -> tuple[float, tuple[float, float]]:
    """Drop of the mean in percent of the teacher's, and its 95 % interval from pairs.

    The interval is that of a ratio of means by the delta method: the spread of `s - r t` over the
    pairs, `r` being the ratio. Positive is worse. Source: ours (textbook).
    """
    t, s = teacher.double(), student.double()
    mean = t.mean()
    ratio = s.mean() / mean
    spread = (s - ratio * t).std() / (mean.abs() * len(t) ** 0.5)
    sign = 1.0 if better == "higher" else -1.0
    drop = sign * 100 * (1 - ratio.item())
    half = 196 * spread.item()
    return drop, (drop - half, drop + half)


def paired_quality(
    teacher: torch.Tensor, student: torch.Tensor, seeds: Sequence[int], unit: str, better: str, scale: float = 1.0
) -> Quality:
    """The figure of a per-sample metric for both models; `noise` is the standard error of the student's mean."""
    drop, interval = paired_drop(teacher, student, better)
    noise = student.double().std().item() / len(student) ** 0.5
    return Quality(
        teacher=scale * teacher.double().mean().item(),
        student=scale * student.double().mean().item(),
        drop_percent=drop,
        ci95=interval,
        n=len(teacher),
        seeds=list(seeds),
        noise=scale * noise,
        unit=unit,
        better=better,
    )
