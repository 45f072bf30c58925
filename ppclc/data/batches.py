"""What trainings are fed with: batches drawn from one generator, made ready some steps at a time, ahead of their use.

The generator's state after a step's last draw travels with the step, so that a training that was stopped
draws on as if it had not been, whatever had been made ready by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

Draw = Callable[[torch.Generator], Any]
Ready = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Share:
    """The rows of a batch that one rank of `world` takes. All rows are drawn, so that generators stay alike on all ranks."""

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> range:
        """This rank's rows of a batch of `count`, which `world` has to divide."""
        if count % self.world:
            raise ValueError(f"a batch of {count} for {self.world} ranks: wanted a multiple")
        each = count // self.world
        return range(self.rank * each, (self.rank + 1) * each)


WHOLE = Share()


@dataclass(frozen=True)
class Drawn:
    """The batches of one step, and the generator's state once they were drawn."""

    batches: Sequence[Any]
    state: torch.Tensor


@dataclass(frozen=True)
class Feed:
    """draw: one batch. ready: batches to what the loss takes, in order. accumulate: batches a step.

    together: steps whose batches are made ready in one go. ahead: whether that happens in a thread of its
    own while the steps before are taken.
    """

    draw: Draw
    ready: Ready
    accumulate: int = 1
    together: int = 1
    ahead: bool = True

    def chunks(self, generator: torch.Generator, steps: int) -> Iterator[list[Drawn]]:
        """All steps, `together` at a time."""
        sizes = [min(self.together, steps - i) for i in range(0, steps, self.together)]
        if not self.ahead:
            yield from (self._chunk(generator, size) for size in sizes)
            return
        with ThreadPoolExecutor(1) as pool:
            upcoming = pool.submit(self._chunk, generator, sizes[0]) if sizes else None
            for following in [*sizes[1:], 0] if sizes else []:
                assert upcoming is not None
                made = upcoming.result()
                upcoming = pool.submit(self._chunk, generator, following) if following else None
                yield made

    def _chunk(self, generator: torch.Generator, size: int) -> list[Drawn]:
        drawn = drawn_steps(self.draw, generator, size, self.accumulate)
        ready = list(self.ready([b for step in drawn for b in step.batches]))
        n = self.accumulate
        return [Drawn(ready[i * n : (i + 1) * n], step.state) for i, step in enumerate(drawn)]


def drawn_steps(draw: Draw, generator: torch.Generator, steps: int, accumulate: int) -> list[Drawn]:
    """The next steps' batches as they are drawn."""
    return [Drawn([draw(generator) for _ in range(accumulate)], generator.get_state()) for _ in range(steps)]
