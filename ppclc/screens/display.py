"""What the screen shows while passes run: a live bar on a terminal, plain lines elsewhere. Always on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0


class Display:
    """Shows stage k of n, a bar, the time left and a note such as the current loss.

    `verbosity` below 0 shows nothing but errors.
    """

    def __init__(self, stages: int, verbosity: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.stages, self.verbosity = stages, verbosity
        self.current = 0

    def say(self, text: str) -> None:
        """One line."""
        if self.verbosity >= 0:
            self.console.print(escape(text), soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[float, str], None]]:
        """The next stage; yields what its pass calls with the share done (0..1) and a note."""
        self.current += 1
        label = f"[{self.current}/{self.stages}] {name}"
        start = time.perf_counter()
        if self.verbosity < 0:
            yield lambda done, note: None
        elif self.console.is_terminal:
            yield from self._bar(label)
        else:
            yield from self._lines(label)
        self.say(f"{label}: {time.perf_counter() - start:.1f} s")

    def _bar(self, label: str) -> Iterator[Callable[[float, str], None]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task, before = bar.add_task(escape(label), total=1.0, note=""), 0.0

            def progress(done: float, note: str) -> None:
                nonlocal before
                if done < before:  # another part of the stage, whose pace is its own
                    bar.reset(task)
                before = done
                bar.update(task, completed=done, note=escape(note))

            yield progress

    def _lines(self, label: str) -> Iterator[Callable[[float, str], None]]:
        start = last = time.perf_counter()
        first = before = 0.0

        def progress(done: float, note: str) -> None:
            nonlocal start, last, first, before
            now = time.perf_counter()
            if done < before:  # another part of the stage, whose pace is its own
                start, first = now, done
            before = done
            if now - last >= PLAIN_EVERY_S and first < done < 1:
                last = now
                left = (now - start) * (1 - done) / (done - first)
                self.say(f"{label}: {100 * done:.0f} %, {left:.0f} s left{', ' + note if note else ''}")

        yield progress
