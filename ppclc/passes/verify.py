"""verify: the quality table, teacher against student on the same prompts and noise, held against the gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ppclc import plugins
from ppclc.data import flow
from ppclc.data.samples import Sample, Samples, parts_that_fit
from ppclc.errors import RecipeError
from ppclc.judges import open_judges
from ppclc.loading.sources import Source
from ppclc.machine.devices import placed
from ppclc.quality import BANDS, PSNR_TOP, difference_quality, flow_losses, paired_quality, psnr, ssim, velocity_distances, velocity_table
from ppclc.records import Gate, Measured, Quality, Verdict

VERSION = 3
PREVIEWS = 24
SEED, BATCH = 77, 16
"""Of the samples that velocities are compared on; they are drawn so many at a time."""
Progress = Callable[[float, str], None]
Limit = Annotated[float, Field()] | Annotated[int, Field()]


class GateSettings(BaseModel):
    """Limits of one metric: its drop, and the upper end of the drop's 95 % interval, in percent."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    drop_percent: Limit | None = None
    upper_percent: Limit | None = None


class VerifySettings(BaseModel):
    """Section `verify` of a recipe: scenes a seed, sampling seeds, guidance scales, Euler steps, gates by metric.

    Of a model without a task: samples whose velocities are compared, images of both models that are drawn side by side, and what
    judges those: every judge that is at hand, none, or some by name with the weights that each takes, null for its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    scenes: Annotated[int, Field(ge=2, strict=True)] = 1024
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, strict=True)], ...], Field(min_length=1)] = (0, 1)
    guidance: Annotated[tuple[Annotated[float, Field(gt=0, strict=True)], ...], Field(min_length=1)] = (1.0, 2.0)
    steps: Annotated[int, Field(ge=1, strict=True)] = 10
    samples: Annotated[int, Field(ge=2, strict=True)] = 128
    images: Annotated[int, Field(ge=0, strict=True)] = 8
    judges: Literal["auto", "none"] | dict[str, str | None] = "auto"
    gates: dict[str, GateSettings] = {}

    @field_validator("seeds", "guidance")
    @classmethod
    def _once(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError("each once: the same scenes twice are no more scenes")
        return values

    @property
    def judges_by_name(self) -> dict[str, str | None] | None:
        """By name the weights of the judges that are asked for; None for all that are at hand."""
        return None if self.judges == "auto" else {} if self.judges == "none" else dict(self.judges)

    def measure_key(self) -> dict[str, Any]:
        """The settings on which a measurement depends."""
        return self.model_dump(include={"scenes", "seeds", "guidance", "steps"})


def check_gates(settings: VerifySettings, source: Source) -> None:
    """Raise RecipeError for gates on metrics that this model will not have."""
    known = ["velocity_error", *(f"velocity_error_t{b + 1}" for b in range(BANDS)), "flow_loss", "ssim", "psnr", *plugins.names("judges")]
    for name in settings.judges_by_name or {}:
        if name not in plugins.names("judges"):
            raise RecipeError(f"verify.judges.{name}: no such judge; wanted some of {', '.join(plugins.names('judges'))}")
    if source.task:
        by_guidance = [f"{m}_g{g:g}" for m in ("scene_accuracy", "frechet_distance") for g in settings.guidance]
        known = [*by_guidance, "flow_loss", "velocity_error"]
    for name in settings.gates:
        if name not in known:
            raise RecipeError(f"verify.gates.{name}: no such metric for {source.path}; wanted one of {', '.join(known)}")
        if source.task is None and settings.images < 2 and name in ("ssim", "psnr", *plugins.names("judges")):
            raise RecipeError(f"verify.images = {settings.images}: verify.gates.{name} is measured on images; wanted 2 or more")


def measure(model: Any, source: Source, settings: VerifySettings, progress: Progress, work: Path | None = None) -> Measured:
    """One model's raw outcomes on its task; nothing is kept in `work`."""
    if source.task is None:
        return Measured(values={})
    tensors, values = source.task.measure(model, settings, lambda done: progress(done, "judging"))
    return Measured(values=values, tensors=tensors)


def verify(
    teacher: Any,
    student: Any,
    source: Source,
    measured: tuple[Measured, Measured],
    samples: Samples,
    settings: VerifySettings,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    device: str = "cpu",
) -> Verdict:
    """The verdict: figures for both models, gates, and images from the same noise. device: where models without a task take turns."""
    if source.task is None:
        return judged_without_task(teacher, student, samples, settings, decode, device)
    quality = source.task.compare(measured[0].tensors, measured[1].tensors, settings)
    images = {}
    prompts: list[str] = []
    for name, model in (("teacher", teacher), ("student", student)):
        images[name], prompts = source.task.preview(model, PREVIEWS, settings.seeds[0], settings.guidance[0], settings.steps)
    return Verdict(quality=quality, gates=gates(quality, settings), prompts=prompts, tensors=images)


def judged_without_task(
    teacher: Any,
    student: Any,
    samples: Samples,
    settings: VerifySettings,
    decode: Callable[[torch.Tensor], torch.Tensor] | None,
    device: str = "cpu",
) -> Verdict:
    """What can be said of a user's own model: velocity error by band, flow-matching loss where there are images, and both models' images side by side.

    The models take turns on the device; one that it has no room for stays on the CPU.
    """
    generator = torch.Generator().manual_seed(SEED)
    counts = [min(BATCH, settings.samples - i) for i in range(0, settings.samples, BATCH)]
    with placed(teacher, device) as place:  # which prompts' samples are drawn with
        drawn = [samples.draw_with_target(count, generator) for count in counts]
        points = [sample for sample, _ in drawn]
        noise, given, prompts = samples.previews(settings.images, settings.seeds[0]) if decode and settings.images else (None, {}, [])
        theirs = answers(teacher, points, noise, given, settings.steps, place, samples.source)
    with placed(student, device) as place:
        ours = answers(student, points, noise, given, settings.steps, place, samples.source)
    distance, energy = velocity_distances(theirs.velocities, ours.velocities)
    quality = velocity_table(distance, energy, torch.cat([t for _, t, _ in points]).double(), [SEED])
    if targets := [target for _, target in drawn if target is not None]:
        teacher_loss, student_loss = (flow_losses(a.velocities, targets) for a in (theirs, ours))
        quality["flow_loss"] = paired_quality(teacher_loss, student_loss, [SEED], "mean squared velocity", "lower")
    if decode is None or theirs.latents is None or ours.latents is None:
        return Verdict(quality=quality, gates=gates(quality, settings), prompts=[])
    latents = {"teacher": theirs.latents, "student": ours.latents}
    images = {name: torch.cat([decode(x[None]) for x in sampled]).float() for name, sampled in latents.items()}
    quality |= image_table(images["teacher"], images["student"], settings.seeds[:1])
    judged, notes = judge_table(images["teacher"], images["student"], prompts, settings)
    quality |= judged
    return Verdict(quality=quality, gates=gates(quality, settings), prompts=prompts, notes=notes, tensors=images)


@dataclass(frozen=True)
class Answers:
    """What a model makes of samples: its velocity (B, S, C) on every batch, and latents that it samples from noise, where that was asked for."""

    velocities: list[torch.Tensor]
    latents: torch.Tensor | None


@torch.no_grad()
def answers(
    model: Any, points: Sequence[Sample], noise: torch.Tensor | None, given: flow.Conditioning, steps: int, device: str, source: Source
) -> Answers:
    """A model's answers, on the CPU; on a GPU no more samples at once than its memory has room for."""
    velocities = [torch.cat([flow.predict(model, *part) for part in parts_that_fit(sample, device, source)]) for sample in points]
    if noise is None:
        return Answers(velocities, None)
    starts = parts_that_fit((noise, torch.ones(len(noise)), given), device, source)
    return Answers(velocities, torch.cat([flow.sample(model, x, known, known, 1, steps) for x, _, known in starts]))


def judge_table(
    teacher: torch.Tensor, student: torch.Tensor, prompts: Sequence[str], settings: VerifySettings
) -> tuple[dict[str, Quality], list[str]]:
    """Figures of the judges that are at hand for both models' images (B, 3, H, W), and why others did not run.

    Raises:
        UnavailableError: a judge that the recipe names is not at hand.
    """
    if len(teacher) < 2:  # no spread to tell
        return {}, []
    found, left = open_judges(settings.judges_by_name)
    table = {}
    for name, (judge, run) in found.items():
        judged: Any = run
        theirs = torch.zeros(len(teacher)) if judge.paired else judged(teacher, prompts)
        ours = judged(student, teacher if judge.paired else prompts)
        told = paired_quality if judge.relative else difference_quality
        table[name] = told(theirs, ours, settings.seeds[:1], judge.unit, judge.better)
    return table, left


def image_table(teacher: torch.Tensor, student: torch.Tensor, seeds: Sequence[int]) -> dict[str, Quality]:
    """How near the student's images are to the teacher's from the same noise; beside it what the teacher's own would be."""
    if len(teacher) < 2:  # no spread to tell
        return {}
    top = torch.ones(len(teacher))
    return {
        "ssim": paired_quality(top, ssim(teacher, student), seeds, "1 for the teacher's own image", "higher"),
        "psnr": paired_quality(PSNR_TOP * top, psnr(teacher, student), seeds, f"dB, {PSNR_TOP:g} for the teacher's own image", "higher"),
    }


def gates(quality: Mapping[str, Quality], settings: VerifySettings) -> list[Gate]:
    """Every limit of the recipe held against what was measured."""
    rows = []
    for metric, limits in settings.gates.items():
        if metric not in quality:
            raise RecipeError(
                f"verify.gates.{metric}: was not measured; of {', '.join(quality)}, flow_loss wants images to calibrate on, ssim and psnr "
                "two images or more (verify.images) and a pipeline's VAE"
            )
        row = quality[metric]
        values = {"drop_percent": row.drop_percent, "upper_percent": row.ci95[1] if row.ci95 else row.drop_percent}
        for key, limit in limits.model_dump(exclude_none=True).items():
            rows.append(Gate(name=f"{metric}.{key}", value=values[key], limit=limit, passed=values[key] <= limit))
    return rows
