"""Metrics that need no task, paired statistics, and the seam for tasks that bring judges of their own.

Shape suffixes: B batch, S token, C channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ppclc.data import flow
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


BANDS = 4
"""Bands of equal width that timesteps in 0..1 are told by."""


def velocity_distances(teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every sample (n,), float64: squared distance of the student's velocity from the teacher's, and energy of the teacher's; both by batch."""
    rows = []
    for wanted, got in ((a.double().flatten(1), b.double().flatten(1)) for a, b in zip(teacher, student, strict=True)):
        rows.append(torch.stack([(got - wanted).square().sum(1), wanted.square().sum(1)]))
    distance, energy = torch.cat(rows, dim=1)
    return distance, energy


def velocity_table(distance: torch.Tensor, energy: torch.Tensor, timestep: torch.Tensor, seeds: Sequence[int]) -> dict[str, Quality]:
    """`velocity_error`, the squared distance as a share of the energy, and the same by band of timesteps from data to noise, `velocity_error_t1` to `_t4`.

    With the 95 % interval of a ratio of sums by the delta method.
    """
    band = (timestep * BANDS).long().clamp(max=BANDS - 1)
    rows = {"velocity_error": torch.ones_like(band, dtype=torch.bool)} | {f"velocity_error_t{b + 1}": band == b for b in range(BANDS)}
    found = {}
    for name, taken in rows.items():
        n = int(taken.sum())
        if n:
            d, e = distance[taken], energy[taken]
            error = (d.sum() / e.sum()).item()
            spread = (d - error * e).std().item() / (e.mean().item() * n**0.5) if n > 1 else math.nan
            half = 196 * spread
            found[name] = Quality(
                teacher=0.0,
                student=error,
                drop_percent=100 * error,
                ci95=(100 * error - half, 100 * error + half) if n > 1 else None,
                n=n,
                seeds=list(seeds),
                noise=spread if n > 1 else 0.0,
                unit="share of the teacher's velocity energy",
                better="lower",
            )
    return found


def flow_losses(velocities: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Flow-matching loss (n,) of every sample, float64: mean squared distance of a model's velocity from that of the data. Source: arXiv 2210.02747."""
    return torch.cat([(v - target).double().square().flatten(1).mean(1) for v, target in zip(velocities, targets, strict=True)])


PSNR_TOP = 100.0
"""What equal images have, whose peak signal-to-noise ratio is infinite."""


def psnr(a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images in 0..1, at most PSNR_TOP."""
    error = (a_BCHW.double() - b_BCHW.double()).square().flatten(1).mean(1)
    return (-10 * torch.log10(error.clamp(min=1e-30))).clamp(max=PSNR_TOP)


def ssim(a_BCHW: torch.Tensor, b_BCHW: torch.Tensor, size: int = 11, sigma: float = 1.5) -> torch.Tensor:
    """Structural similarity (B,) of images in 0..1, mean over places that the window fits on, and over channels.

    Source: Wang et al., Image Quality Assessment (2004), equation 13, with its Gaussian window and constants. Smaller
    images get a window as large as they are.
    """
    a, b = a_BCHW.double(), b_BCHW.double()
    size = min(size, a.shape[-1] - (a.shape[-1] + 1) % 2, a.shape[-2] - (a.shape[-2] + 1) % 2)
    line = torch.exp(-((torch.arange(size, dtype=torch.float64) - size // 2) ** 2) / (2 * sigma**2))
    window = torch.outer(line, line) / line.sum() ** 2
    channels = a.shape[1]

    def blurred(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, window.expand(channels, 1, size, size), groups=channels)

    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    both = blurred(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    table = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return table.flatten(1).mean(1)


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
    pairs, `r` being the ratio. Positive is worse. Outcomes of 0 or 1 of which no pair differs have no spread: there it is what share
    of pairs may differ in truth and none of so many show it (Clopper and Pearson). Source: ours (textbook).
    """
    t, s = teacher.double(), student.double()
    mean = t.mean()
    ratio = s.mean() / mean
    spread = (s - ratio * t).std() / (mean.abs() * len(t) ** 0.5)
    sign = 1.0 if better == "higher" else -1.0
    drop = sign * 100 * (1 - ratio.item())
    half = 196 * spread.item()
    if bool((t == s).all()) and bool(((t == 0) | (t == 1)).all()) and mean > 0:
        half = 100 * (1 - 0.025 ** (1 / len(t))) / mean.item()
    return drop, (drop - half, drop + half)


def difference_quality(teacher: torch.Tensor, student: torch.Tensor, seeds: Sequence[int], unit: str, better: str) -> Quality:
    """As `paired_quality`, for a metric whose zero means nothing or is the teacher's own: the drop is in hundredths of its unit, not of the mean."""
    t, s = teacher.double(), student.double()
    worse = t - s if better == "higher" else s - t
    drop, half = 100 * worse.mean().item(), 196 * worse.std().item() / len(worse) ** 0.5
    return Quality(
        teacher=t.mean().item(),
        student=s.mean().item(),
        drop_percent=drop,
        ci95=(drop - half, drop + half),
        n=len(t),
        seeds=list(seeds),
        noise=s.std().item() / len(s) ** 0.5,
        unit=unit,
        better=better,
    )


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
