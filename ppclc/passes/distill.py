"""distill: every edit on its own, from the teacher's states; then everything together, on the teacher's velocity and on data.

The local phase is `ppclc.training.local_phase`, what each edit learns in it `ppclc.training.local_edits`. One record an edit, so
that a distilled edit serves every plan that contains it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from ppclc.costs.blocks import width_of
from ppclc.data import flow
from ppclc.data.batches import Feed, Share
from ppclc.data.samples import Sample, Samples, moved
from ppclc.families import Group
from ppclc.kernels.distillation_loss import state_loss
from ppclc.machine.devices import Ranks, free_bytes, has_spare_core
from ppclc.models import blocks_of, groups_of
from ppclc.records import Distilled
from ppclc.teachers import StreamedTeacher, Teacher
from ppclc.training.curves import Curve
from ppclc.training.local_edits import LocalEdit, Weights
from ppclc.training.local_phase import LocalPhase, LocalSettings
from ppclc.training.trainer import ALONE, Progress, Terms, Trainer, TrainingSettings, state_bytes, train

VERSION = 4
EDITS_SHARE, STATES = 0.9, 60
"""Of the memory that is free on a GPU, what is taken into account; and what a batch takes there in a training step, in states of it: what a block's
forward keeps for its backward, and the teacher's own beside it."""
REFIT_BATCHES = 16
LOCAL_KEYS = {"learning_rate", "seed", *TrainingSettings.model_fields}
JOINT_KEYS = {
    *("finetune_steps", "finetune_learning_rate", "data_weight", "state_weight", "magnitude", "timestep_shift", "batch", "seed"),
    *TrainingSettings.model_fields,
}


@dataclass(frozen=True)
class Lesson:
    """A batch, the teacher's velocity on it, that of the data where there are data, and the teacher's image states by student block, if asked for.

    The velocity is None where nothing learns from it.
    """

    sample: Sample
    velocity: torch.Tensor | None
    data: torch.Tensor | None
    states: Sequence[torch.Tensor] = ()


class DistillSettings(TrainingSettings):
    """Section `distill` of a recipe.

    steps: local steps of an interval; width_steps: of a text stream's or a feed-forward network's linear maps.
    finetune_steps: joint steps. Learning rates are peaks. batch: samples a batch, in the fine-tune for each of the
    processes. local_batch: samples a local step, a quarter of `batch` where it is null. magnitude: weight of the magnitude
    term beside direction; image_weight, text_weight: of the streams in the local phase; map_weight: of a linear map's own
    error beside its block's. data_weight: share of the flow-matching loss on data in the fine-tune, where data are given; the
    rest is the teacher's velocity. state_weight: in the fine-tune, of the image states after every block beside both.
    timestep_shift: above 1 moves the fine-tune's timesteps towards noise. bank: which intervals are distilled, those of the
    plan or all that the analysis considered, so that other sizes can be sliced later. teacher: `streamed` reads its blocks
    one at a time from disk, `chunk` samples a sweep. checkpoint_every: steps between checkpoints.
    """

    steps: Annotated[int, Field(ge=0)] = 150
    width_steps: Annotated[int, Field(ge=0)] = 50
    finetune_steps: Annotated[int, Field(ge=0)] = 800
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    finetune_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    batch: Annotated[int, Field(ge=1)] = 64
    local_batch: Annotated[int, Field(ge=1)] | None = None
    magnitude: Annotated[float, Field(ge=0)] = 0.1
    image_weight: Annotated[float, Field(ge=0)] = 1.0
    text_weight: Annotated[float, Field(ge=0)] = 1.0
    map_weight: Annotated[float, Field(ge=0)] = 0.01
    data_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    state_weight: Annotated[float, Field(ge=0)] = 0.0
    timestep_shift: Annotated[float, Field(gt=0)] = 1.0
    gradient_checkpointing: bool = False
    bank: Literal["plan", "all"] = "plan"
    teacher: Literal["resident", "streamed"] = "resident"
    chunk: Annotated[int, Field(ge=1)] = 64
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def weights(self) -> Weights:
        """What the terms of a local loss count."""
        return Weights(self.magnitude, self.image_weight, self.text_weight, self.map_weight)

    def local(self, kind: Literal["interval", "text", "ffn"] = "interval") -> dict[str, Any]:
        """The settings on which a local edit of a kind depends."""
        own = {
            "interval": {"steps", "image_weight", "text_weight"},
            "text": {"width_steps", "map_weight", "image_weight", "text_weight"},
            "ffn": {"width_steps", "map_weight"},
        }
        return self.model_dump(include={*own[kind], "magnitude", *LOCAL_KEYS}) | {"local_batch": self.local_samples}

    def joint(self) -> dict[str, Any]:
        """The settings on which the fine-tune depends."""
        return self.model_dump(include=JOINT_KEYS)

    @property
    def local_samples(self) -> int:
        """Samples a batch of a local step: one learns much from each token, so that many small steps go further."""
        return self.local_batch or max(1, self.batch // 4)

    def together(self, batch: int) -> int:
        """Steps whose batches of so many samples go through a streamed teacher in one sweep."""
        return max(1, self.chunk // (batch * self.accumulate))


def refit_samples(samples: Samples, settings: DistillSettings, device: str = "cpu") -> list[Sample]:
    """What linear networks of distilled blocks are fitted to: the same batches in every run."""
    generator = torch.Generator().manual_seed(settings.seed + 2)
    return [moved(samples.draw(settings.batch, generator), device) for _ in range(REFIT_BATCHES)]


def distill_edits(
    teacher: Teacher,
    edits: Sequence[LocalEdit],
    steps: int,
    samples: Samples,
    settings: DistillSettings,
    progress: Progress,
    works: Sequence[Path],
    curves: Path | None = None,
    device: str = "cpu",
    text_blocks: Callable[[int], nn.Module | None] = lambda _: None,
) -> Iterator[Distilled]:
    """A record for each edit, all taught on the same batches, on a device that the teacher is on; one after the other once all are.

    On a GPU that has no room for all of them beside a teacher that stays there, some at a time, which changes nothing but the teacher's work.
    """
    local = LocalSettings(
        steps,
        settings.local_samples,
        settings.learning_rate,
        settings.checkpoint_every,
        settings.seed,
        settings.together(settings.local_samples),
        settings,
    )
    draw = partial(_draw, samples, settings.local_samples, device)
    itemsize = 4 if settings.precision == "float32" else teacher.dtype.itemsize
    done, passing = 0, samples.tokens * width_of(samples.source.config) * itemsize * settings.local_samples
    while done < len(edits):
        some = edits[done : done + edits_that_fit(edits[done:], room_for_edits(teacher, device, passing), settings, passing)]
        told = partial(_told_of_some, progress, done / len(edits), len(some) / len(edits))
        folders = works[done : done + len(some)]
        yield from LocalPhase(teacher, draw, some, folders, local, told, curves, device, text_blocks).run()
        done += len(some)


def room_for_edits(teacher: Teacher, device: str, passing: int) -> float | None:
    """Bytes that edits may take beside a teacher that stays on a GPU, where a batch's state has `passing` bytes.

    None where there is no limit: on a CPU, and where edits come one by one.
    """
    if device == "cpu" or isinstance(teacher, StreamedTeacher):
        return None
    return EDITS_SHARE * free_bytes(device) - STATES * passing


def edits_that_fit(edits: Sequence[LocalEdit], room: float | None, settings: TrainingSettings, passing: int) -> int:
    """How many of the first edits there is room for, with all that their training holds and the states that they read; one at least."""
    if room is None:
        return len(edits)
    count, taken = 0, 0
    for edit in edits:
        taken += training_bytes(edit.build(), settings) + 2 * settings.accumulate * len(edit.stops) * passing  # of this step and the next
        if count and taken > room:
            break
        count += 1
    return count


def training_bytes(module: nn.Module, settings: TrainingSettings) -> int:
    """Bytes of a module in training: weights in float32, and what those that learn take beside them."""
    return sum(p.numel() * (4 + state_bytes(settings) * p.requires_grad) for p in module.parameters())


def _told_of_some(progress: Progress, before: float, share: float, done: float, note: str) -> None:
    progress(before + share * done, note)


def finetune(
    teacher: Teacher,
    student: Any,
    samples: Samples,
    settings: DistillSettings,
    progress: Progress,
    work: Path,
    curves: Path | None = None,
    ranks: Ranks = ALONE,
    ends: Sequence[int] = (),
    curve_name: str = "finetune",
) -> Distilled:
    """The whole student, trained end to end on the teacher's velocity and, by `data_weight`, on that of the data. Mean squared errors.

    By `state_weight` also on the teacher's image states, whose numbers after every student block are `ends`. All ranks
    train it together, each on `batch` samples of a step's `world * batch`; the main one has the tensors.
    """
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    student.requires_grad_(True).train()
    blocks, followed = blocks_of(student, teacher.family), tuple(ends) if settings.state_weight else ()
    states = image_states(blocks, groups_of(student, teacher.family)) if followed else []
    trainer = Trainer(student, settings.finetune_steps, settings.finetune_learning_rate, settings, ranks, blocks, "fine-tune")
    streamed = isinstance(teacher, StreamedTeacher)
    shifted = samples.shifted(settings.timestep_shift)
    feed = Feed(
        draw=partial(_draw_with_target, shifted, settings.batch * ranks.world, Share(ranks.rank, ranks.world)),
        ready=partial(_lessons, teacher, ranks.device, followed, settings.data_weight < 1),
        accumulate=settings.accumulate,
        together=settings.together(settings.batch) if streamed else 1,
        ahead=not streamed and has_spare_core(ranks.device),
    )
    curve = partial(Curve, curves, curve_name) if curves and settings.finetune_steps and ranks.is_main else None
    train(trainer, feed, partial(joint_terms, settings, states), settings.seed + 1, settings.checkpoint_every, work, progress, curve)
    return Distilled(edit="finetune", steps=settings.finetune_steps, losses=trainer.window_losses(), tensors=trainer.trained())


def joint_terms(settings: DistillSettings, states: list[torch.Tensor], student: nn.Module, lesson: Lesson) -> Terms:
    """Mean squared distance from the teacher's velocity and from the data's, and the loss of image states, weighted.

    `states` is filled by the forward: see `image_states`.
    """
    states.clear()
    velocity = flow.predict(student, *lesson.sample)
    share = settings.data_weight if lesson.data is not None else 0.0
    terms = {}
    if lesson.velocity is not None and share < 1:
        terms["velocity"] = (1 - share) * nn.functional.mse_loss(velocity, lesson.velocity)
    if lesson.data is not None and share > 0:
        terms["data"] = share * nn.functional.mse_loss(velocity, lesson.data)
    if lesson.states:
        pairs = zip(states[: len(lesson.states)], lesson.states, strict=True)
        each = settings.state_weight / len(lesson.states)
        losses = [state_loss(own[:, -wanted.shape[1] :], wanted, settings.magnitude, weight=each) for own, wanted in pairs]
        terms["states"] = torch.stack(losses).sum()
    states.clear()
    return terms


def image_states(blocks: Sequence[nn.Module], groups: Sequence[Group]) -> list[torch.Tensor]:
    """A list that every forward adds the image states after each block to; where streams are joined, text stands before them."""
    found: list[torch.Tensor] = []

    def keep(group: Group, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(output if group.joined else output[group.outputs.index("image")])

    for block, group in zip(blocks, groups, strict=True):
        block.register_forward_hook(partial(keep, group))
    return found


def _draw(samples: Samples, batch: int, device: str, generator: torch.Generator) -> Sample:
    return moved(samples.draw(batch, generator), device)


def _draw_with_target(samples: Samples, batch: int, share: Share, generator: torch.Generator) -> tuple[Sample, torch.Tensor | None]:
    return samples.draw_with_target(batch, generator, share)


@torch.no_grad()
def _lessons(
    teacher: Teacher, device: str, ends: Sequence[int], velocity_counts: bool, drawn: Sequence[tuple[Sample, torch.Tensor | None]]
) -> list[Lesson]:
    """What each batch teaches; the teacher is not asked where data alone count."""
    samples = [moved(sample, device) for sample, _ in drawn]
    targets = [data.to(device) if data is not None else None for _, data in drawn]
    if not (velocity_counts or ends) and all(data is not None for data in targets):
        return [Lesson(sample, None, data, []) for sample, data in zip(samples, targets, strict=True)]
    outputs = teacher.outputs(samples, set(ends))
    return [
        Lesson(sample, velocity, data, [states[end]["image"] for end in ends])
        for sample, data, (velocity, states) in zip(samples, targets, outputs, strict=True)
    ]
