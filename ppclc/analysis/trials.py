"""Short trainings that decide between plans whose untrained costs are close: what a cut costs shows once blocks have adapted.

Every plan's student learns the teacher's velocity on the same batches; half of them go on after every round.
They are told apart by how far what they sample lies from what the teacher does. Nothing of a trial is kept but that.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ppclc.analysis.journal import Journal
from ppclc.data import flow
from ppclc.data.samples import TRAJECTORY_STEPS, Sample, Samples
from ppclc.families import Bank
from ppclc.loading.classes import count_parameters
from ppclc.machine.devices import cores
from ppclc.models import apply_plan
from ppclc.plan import CompressionPlan
from ppclc.quality import SampledDistance
from ppclc.training.trainer import autocast

WARMUP = 10
ROUNDS = (0.4, 0.7, 1.0)
"""Share of the steps at which the worse half of the plans drops out, and the end."""
STATE_BYTES = 16
"""Weights, gradient and both moments of AdamW, a parameter."""
HELD_BYTES = 2 * 2**30
"""Students are kept between rounds while all of them take less than this; beyond it each round begins anew."""

Lesson = tuple[Sample, torch.Tensor]
"""A batch and the teacher's velocity on it."""


def lessons(teacher: Any, samples: Samples, steps: int, batch: int) -> list[Lesson]:
    """The batches that all trials train on."""
    generator = torch.Generator().manual_seed(31)
    made = []
    for _ in range(steps):
        sample = samples.draw(batch, generator)
        with torch.no_grad():
            made.append((sample, flow.predict(teacher, *sample)))
    return made


@dataclass(frozen=True)
class Teaching:
    """What all that is trained before the plan is taken learns from, and is judged by."""

    taught: Sequence[Lesson]
    distance: SampledDistance
    learning_rate: float

    @classmethod
    def of(cls, teacher: Any, samples: Samples, steps: int, batch: int, learning_rate: float, judged: int) -> Teaching:
        """`steps` lessons of `batch` samples; `judged` samples to be drawn by teacher and students from the same noise."""
        generator = torch.Generator().manual_seed(32)
        starts = [samples.starts(min(64, judged - i), generator) for i in range(0, judged, 64)]
        taught = lessons(teacher, samples, steps, batch)
        return cls(taught, SampledDistance.of_teacher(teacher, starts, TRAJECTORY_STEPS), learning_rate)


@dataclass
class Trial:
    """One plan's short training."""

    plan: CompressionPlan
    bank: Bank
    learning_rate: float
    error: float = math.inf
    done: int = 0
    student: Any = None
    optimizer: Any = None
    dtype: torch.dtype = torch.float32
    errors: list[tuple[int, float]] = field(default_factory=list)

    def prepare(self, teacher: Any) -> None:
        """Build the student, untrained, unless it is there. Not to be called from several threads at once."""
        if self.student is None:
            self.student = apply_plan(teacher, self.plan, self.bank).requires_grad_(True).train()
            self.dtype = self.student.dtype
            self.student = self.student.float()  # small steps are lost on weights in half precision
            self.optimizer = torch.optim.AdamW(
                self.student.parameters(), lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.02, fused=True
            )
            self.done = 0

    def advance(self, taught: Sequence[Lesson], to: int, judge: Callable[[Any], float], stopped: threading.Event) -> None:
        """Train up to a step, and judge there; before the first step too. The error is the least so far: a cut that costs nothing needs no training.

        Once it is `stopped` it ends after the step that is under way, and is not judged.
        """
        if not self.errors:
            self._judge(0, judge)
        for step in range(self.done, to):
            if stopped.is_set():
                return
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * min(1.0, (step + 1) / WARMUP)
            sample, wanted = taught[step]
            with autocast(self.student, self.dtype):
                loss = nn.functional.mse_loss(flow.predict(self.student, *sample), wanted)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
        self.done = to
        self._judge(to, judge)
        self.error = min(error for _, error in self.errors)

    def _judge(self, step: int, judge: Callable[[Any], float]) -> None:
        with autocast(self.student, self.dtype):
            self.errors.append((step, judge(self.student)))

    def recall(self, errors: Sequence[tuple[int, float]] | None) -> bool:
        """Take what an earlier run of this training came to, if that is told; another round begins from the start."""
        if errors is not None:
            self.errors = [(int(step), float(error)) for step, error in errors]
            self.error = min(error for _, error in self.errors)
            self.release()
        return errors is not None

    def release(self) -> None:
        """Let the student go; another round begins from the start."""
        self.student = self.optimizer = None


@contextmanager
def ended_with(pool: ThreadPoolExecutor, stopped: threading.Event) -> Iterator[None]:
    """A block whose threads are told to stop where it ends early: by an interrupt, or an error of one of them."""
    try:
        yield
    except BaseException:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def run_trials(
    teacher: Any,
    trials: Sequence[Trial],
    taught: Sequence[Lesson],
    judge: Callable[[Any], float],
    progress: Callable[[float, str], None],
    rounds: Sequence[float] = ROUNDS,
    journal: Journal | None = None,
    name: str = "trials",
) -> list[Trial]:
    """All trials, the best first: those that went further before those that dropped out. What the journal has under the name is not trained again."""
    journal, numbers, stopped = journal or Journal(), {id(t): n for n, t in enumerate(trials)}, threading.Event()
    ends = [max(1, round(share * len(taught))) for share in rounds]
    left, finished = list(trials), 0
    out: list[Trial] = []
    whole = STATE_BYTES * count_parameters(teacher) * len(left)
    total = sum(max(1, len(left) >> i) for i in range(len(ends)))
    workers = max(1, cores() // torch.get_num_threads()) if next(teacher.parameters()).device.type == "cpu" else 1
    keep = whole <= HELD_BYTES
    for end in ends:
        size = len(left) if keep else workers
        new = [trial for trial in left if not trial.recall(journal.get(name, numbers[id(trial)], end))]
        finished += len(left) - len(new)
        for some in [new[i : i + size] for i in range(0, len(new), size)]:
            for trial in some:
                trial.prepare(teacher)
            with ThreadPoolExecutor(workers) as pool, ended_with(pool, stopped):
                for trial, job in [(trial, pool.submit(trial.advance, taught, end, judge, stopped)) for trial in some]:
                    job.result()
                    journal.put(trial.errors, name, numbers[id(trial)], end)
                    finished += 1
                    progress(finished / total, "trials")
            for trial in some if not keep else ():
                trial.release()
        left.sort(key=lambda t: t.error)
        half = max(1, len(left) // 2)
        out = left[half:] + out
        left = left[:half]
        for trial in out:
            trial.release()
    return left + out
