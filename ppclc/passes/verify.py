"""verify: the quality table, teacher against student on the same prompts and noise, held against the gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ppclc.errors import RecipeError
from ppclc.models import Source
from ppclc.quality import velocity_error
from ppclc.records import Gate, Measured, Quality, Verdict
from ppclc.samples import Samples

VERSION = 1
PREVIEWS = 24
Progress = Callable[[float, str], None]
Limit = Annotated[float, Field()] | Annotated[int, Field()]


class GateSettings(BaseModel):
    """Limits of one metric: its drop, and the upper end of the drop's 95 % interval, in percent."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    drop_percent: Limit | None = None
    upper_percent: Limit | None = None


class VerifySettings(BaseModel):
    """Section `verify` of a recipe: scenes a seed, sampling seeds, guidance scales, Euler steps, gates by metric."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scenes: Annotated[int, Field(ge=2, strict=True)] = 1024
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, strict=True)], ...], Field(min_length=1)] = (0, 1)
    guidance: Annotated[tuple[Annotated[float, Field(gt=0, strict=True)], ...], Field(min_length=1)] = (1.0, 2.0)
    steps: Annotated[int, Field(ge=1, strict=True)] = 10
    gates: dict[str, GateSettings] = {}

    def measure_key(self) -> dict[str, Any]:
        """The settings on which a measurement depends."""
        return self.model_dump(include={"scenes", "seeds", "guidance", "steps"})


def check_gates(settings: VerifySettings, source: Source) -> None:
    """Raise RecipeError for gates on metrics that this model will not have."""
    known = ["velocity_error"]
    if source.task:
        by_guidance = [f"{m}_g{g:g}" for m in ("scene_accuracy", "frechet_distance") for g in settings.guidance]
        known = [*by_guidance, "flow_loss", "velocity_error"]
    for name in settings.gates:
        if name not in known:
            raise RecipeError(f"verify.gates.{name}: no such metric for {source.path}; wanted one of {', '.join(known)}")


def measure(model: Any, source: Source, settings: VerifySettings, progress: Progress, work: Path | None = None) -> Measured:
    """One model's raw outcomes on its task; nothing is kept in `work`."""
    if source.task is None:
        return Measured(values={})
    tensors, values = source.task.measure(model, settings, lambda done: progress(done, "judging"))
    return Measured(values=values, tensors=tensors)


def verify(
    teacher: Any, student: Any, source: Source, measured: tuple[Measured, Measured], samples: Samples, settings: VerifySettings
) -> Verdict:
    """The verdict: figures for both models, gates, and images from the same noise."""
    if source.task is None:
        return Verdict(quality=(q := _untasked(teacher, student, samples)), gates=gates(q, settings), prompts=[])
    quality = source.task.compare(measured[0].tensors, measured[1].tensors, settings)
    images = {}
    prompts: list[str] = []
    for name, model in (("teacher", teacher), ("student", student)):
        images[name], prompts = source.task.preview(model, PREVIEWS, settings.seeds[0], settings.guidance[0], settings.steps)
    return Verdict(quality=quality, gates=gates(quality, settings), prompts=prompts, tensors=images)


def _untasked(teacher: Any, student: Any, samples: Samples) -> dict[str, Quality]:
    import torch

    generator = torch.Generator().manual_seed(77)
    error = velocity_error(teacher, student, [samples.draw(16, generator) for _ in range(8)])
    row = Quality(
        teacher=0.0,
        student=error,
        drop_percent=100 * error,
        ci95=None,
        n=128,
        seeds=[77],
        noise=0.0,
        unit="share of the teacher's velocity energy",
        better="lower",
    )
    return {"velocity_error": row}


def gates(quality: Mapping[str, Quality], settings: VerifySettings) -> list[Gate]:
    """Every limit of the recipe held against what was measured."""
    rows = []
    for metric, limits in settings.gates.items():
        row = quality[metric]
        values = {"drop_percent": row.drop_percent, "upper_percent": row.ci95[1] if row.ci95 else row.drop_percent}
        for key, limit in limits.model_dump(exclude_none=True).items():
            rows.append(Gate(name=f"{metric}.{key}", value=values[key], limit=limit, passed=values[key] <= limit))
    return rows
