"""The local phase: edits learn beside each other from one teacher, whose states serve all of them.

Resident, a chunk of batches runs through the teacher while the edits learn from the chunk before. Streamed,
blocks come and go, and so do edits: one is read from its checkpoint when the states that it learns from are
there, and written back; in memory are one block, one edit, and the states of a chunk.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppclc.data.batches import Drawn, Feed
from ppclc.data.samples import Sample
from ppclc.families import Family
from ppclc.machine.devices import Ranks, cores, has_spare_core, local_world
from ppclc.machine.interrupts import Interrupt, noted_interrupts
from ppclc.records import Distilled
from ppclc.teachers import StreamedTeacher, Sweep, Teacher
from ppclc.training.curves import Curve
from ppclc.training.local_edits import BatchStates, LocalEdit
from ppclc.training.trainer import CHECKPOINT, Progress, Saving, Terms, Trainer, TrainingSettings, generator_state, steps_done

M_MMAP_THRESHOLD, LARGE_BYTES = -3, 2**20
"""glibc's name of the option, and the size from which memory is the system's own."""


@dataclass(frozen=True)
class LocalSettings:
    """steps: of every edit. batch: samples a batch. together: steps whose batches go through a streamed teacher in one sweep."""

    steps: int
    batch: int
    learning_rate: float
    every: int
    seed: int
    together: int
    training: TrainingSettings


@dataclass
class LocalPhase:
    """Edits that learn, each with a folder of its own for its checkpoints. text_blocks: as `Teacher.sweep` takes it."""

    teacher: Teacher
    draw: Callable[[torch.Generator], Sample]
    edits: Sequence[LocalEdit]
    works: Sequence[Path]
    settings: LocalSettings
    progress: Progress
    curves: Path | None = None
    device: str = "cpu"
    text_blocks: Callable[[int], nn.Module | None] = lambda _: None
    trainers: dict[str, Trainer] = field(default_factory=dict)
    drawn_curves: dict[str, Curve] = field(default_factory=dict)

    @property
    def streamed(self) -> bool:
        """Whether blocks and edits are in memory one at a time."""
        return isinstance(self.teacher, StreamedTeacher)

    def run(self) -> Iterator[Distilled]:
        """Every edit's record, from where its checkpoint left it, one after the other once all have learned.

        Raises:
            KeyboardInterrupt: a stop was asked for.
        """
        if self.streamed:  # what is there by now is not looked at again each time that an edit goes
            gc.collect()
            gc.freeze()
        try:
            self._train()
            for edit in self.edits:
                yield self._finished(edit)
        finally:
            for curve in self.drawn_curves.values():
                curve.close()
            if self.streamed:
                gc.unfreeze()

    def _train(self) -> None:
        paths = {e.key: w / CHECKPOINT for e, w in zip(self.edits, self.works, strict=True)}
        self.done = {e.key: steps_done(paths[e.key]) for e in self.edits}
        self.paths = paths
        steps, first = self.settings.steps, min(self.done.values(), default=0)
        generator = torch.Generator().manual_seed(self.settings.seed)
        if first:
            generator.set_state(generator_state(next(paths[k] for k, n in self.done.items() if n == first)))
        if self.streamed:
            keep_no_large_memory()
        else:  # before any thread starts: modules are made under a patch that all threads would meet
            for edit in self.edits:
                self._trainer(edit)
            self.text_blocks = {number: self.text_blocks(number) for number in self._wanted[1]}.get
        saving = Saving(self.settings.every)
        with noted_interrupts() as interrupt:
            at = first
            for chunk in self._feed().chunks(generator, steps - first):
                self._learn(chunk, at, interrupt)
                at += len(chunk)
                if not self.streamed and (interrupt.asked or (at < steps and saving.due(at))):
                    saving.timed(partial(self._save, chunk[-1].state, at))
                if interrupt.asked:
                    raise KeyboardInterrupt
                self.progress(at / steps, self._note())

    def _feed(self) -> Feed:
        together, count = (self.settings.together if self.streamed else 1), self.settings.training.accumulate
        ready = list if self.streamed else self._sweep_whole
        return Feed(self.draw, ready, count, together, ahead=not self.streamed and has_spare_core(self.device))

    @property
    def _wanted(self) -> tuple[set[int], set[int]]:
        return {s for e in self.edits for s in e.stops}, {b for e in self.edits for b in e.text_inputs}

    def _sweep_whole(self, samples: Sequence[Sample]) -> list[BatchStates]:
        """The states that any edit reads, of every batch."""
        _, sweep = list(self.teacher.sweep(samples, *self._wanted, self.text_blocks))[-1]
        return [batch_states(self.teacher.family, sweep, samples, n) for n in range(len(samples))]

    def _learn(self, chunk: Sequence[Drawn], at: int, interrupt: Interrupt) -> None:
        """The steps of a chunk by all edits; streamed, those that a stop leaves out catch up when the run goes on."""
        if not self.streamed:
            lanes = max(1, cores() // local_world() // torch.get_num_threads()) if _on_cpu(chunk) else 1
            lanes = min(lanes, len(self.edits))
            if lanes == 1:  # in this thread: attention on a GPU plans anew in every other
                for edit in self.edits:
                    self._teach(edit, chunk, at)
                return
            with ThreadPoolExecutor(lanes) as pool:
                for job in [pool.submit(self._teach, e, chunk, at) for e in self.edits]:
                    job.result()
            return
        samples = [b for step in chunk for b in step.batches]
        left = {e.key: e for e in self.edits}
        for stop, sweep in self.teacher.sweep(samples, *self._wanted, self.text_blocks):
            for edit in [e for e in left.values() if e.stops[-1] == stop]:
                n = self.settings.training.accumulate
                states = [batch_states(self.teacher.family, sweep, samples, i) for i in range(len(samples))]
                give_back_memory()  # of blocks and states that are gone
                self._teach(edit, [Drawn(states[i * n : (i + 1) * n], step.state) for i, step in enumerate(chunk)], at)
                del left[edit.key], states
                self._put_away(edit, chunk[-1].state)
                if interrupt.asked:
                    raise KeyboardInterrupt
            for old in sweep.states.keys() - {s for e in left.values() for s in e.stops}:
                del sweep.states[old]

    def _teach(self, edit: LocalEdit, chunk: Sequence[Drawn], at: int) -> None:
        """The steps of a chunk that the edit does not have behind it."""
        if self.done[edit.key] >= at + len(chunk):
            return
        trainer = self._trainer(edit)
        for step in chunk[max(0, len(trainer.losses) - at) :]:
            rate = trainer.rate
            terms = trainer.step([_loss_on(edit, batch, trainer.precision) for batch in step.batches])
            if edit.key in self.drawn_curves:
                self.drawn_curves[edit.key].add(len(trainer.losses), terms, rate)
        self.done[edit.key] = len(trainer.losses)

    def _trainer(self, edit: LocalEdit) -> Trainer:
        if edit.key not in self.trainers:
            settings = self.settings
            trainer = Trainer(
                edit.build().train(), settings.steps, settings.learning_rate, settings.training, Ranks(device=self.device), name=edit.key
            )
            if self.streamed:
                give_back_memory()  # of the copies that the module was made from
            trainer.load(self.paths[edit.key])
            if self.curves is not None and len(trainer.losses) < settings.steps:
                self.drawn_curves[edit.key] = Curve(self.curves, edit.key, len(trainer.losses))
            self.trainers[edit.key] = trainer
        return self.trainers[edit.key]

    def _put_away(self, edit: LocalEdit, state: torch.Tensor) -> None:
        """Write an edit's checkpoint and let it go."""
        trainer = self.trainers.pop(edit.key, None)
        if trainer is not None:
            trainer.save(self.paths[edit.key], state)
            del trainer
            give_back_memory()
        if edit.key in self.drawn_curves:
            self.drawn_curves.pop(edit.key).close()

    def _save(self, state: torch.Tensor, at: int) -> None:
        for key, trainer in self.trainers.items():
            if len(trainer.losses) == at:  # one that is further on has a checkpoint of its own
                trainer.save(self.paths[key], state)

    def _note(self) -> str:
        losses = [t.losses[-1] for t in self.trainers.values() if t.losses]
        edits = f"{len(self.edits)} edit{'s' * (len(self.edits) > 1)}"
        return f"{edits}, mean loss {sum(losses) / len(losses):.4g}" if losses else edits

    def _finished(self, edit: LocalEdit) -> Distilled:
        trainer = self._trainer(edit)
        record = Distilled(
            edit=edit.key, steps=self.settings.steps, losses=trainer.window_losses(), tensors=edit.tensors(trainer.trained())
        )
        del self.trainers[edit.key], trainer
        if self.streamed:
            give_back_memory()
        return record


def keep_no_large_memory() -> None:
    """From now on, have large pieces of memory go back to the system as they are let go (glibc alone).

    Its allocator otherwise learns from pieces that are let go to keep larger ones, up to 32 MiB, and a block's come and go.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if option is not None:
        option(M_MMAP_THRESHOLD, LARGE_BYTES)


def give_back_memory() -> None:
    """Return memory that was let go to the system, as far as its allocator knows how: small pieces would keep large ones."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def batch_states(family: Family, sweep: Sweep, samples: Sequence[Sample], n: int) -> BatchStates:
    """What a sweep holds of batch n."""
    states = {stop: found[n] for stop, found in sweep.states.items()}
    return BatchStates(states, sweep.shared[n], family.mask_of(samples[n][2]))


def _loss_on(edit: LocalEdit, batch: BatchStates, precision: torch.dtype) -> Callable[[nn.Module], Terms]:
    """A batch's loss; what a teacher in half precision gives is raised for a module whose products are not."""
    return lambda module: edit.loss(module, raised(batch) if precision == torch.float32 else batch)


def raised(batch: BatchStates) -> BatchStates:
    """A batch with its half-precision tensors in float32."""

    known: dict[int, torch.Tensor] = {}  # most of what blocks get is the same for all of them

    def single(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            half = value.dtype in (torch.float16, torch.bfloat16)
            if half and id(value) not in known:
                known[id(value)] = value.float()
            return known[id(value)] if half else value
        if isinstance(value, Mapping):
            return {k: single(v) for k, v in value.items()}
        return type(value)(map(single, value)) if isinstance(value, list | tuple) else value

    return BatchStates(single(batch.states), single(batch.shared), batch.mask)


def _on_cpu(chunk: Sequence[Drawn]) -> bool:
    states: Mapping[int, Mapping[str, torch.Tensor]] = chunk[0].batches[0].states
    return all(t.device.type == "cpu" for s in states.values() for t in s.values())
