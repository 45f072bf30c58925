"""One network for all depths: trained with other blocks left out at every step, so that any set can be judged without training of its own.

What a set of blocks is worth shows only once the others have adapted to its absence, and to train a student
for every set is out of reach. Here all of them share the teacher's weights. Sources: LayerDrop (arXiv
1909.11556) for leaving whole blocks out in training, one-shot search (arXiv 1904.00420) for judging
subnetworks by shared weights; the surrogate between scores and sets is ours.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ppclc.analysis import selection
from ppclc.analysis.detection import Span, group_ranges, spans_of_dropped
from ppclc.analysis.selection import Removed
from ppclc.analysis.trials import WARMUP, Lesson
from ppclc.data import flow
from ppclc.families import Family
from ppclc.machine.devices import cores
from ppclc.models import left_out
from ppclc.quality import SampledDistance
from ppclc.training.trainer import autocast

Dropped = tuple[int, ...]
"""Blocks that are left out, in rising order."""
Score = Callable[[Iterable[Dropped]], Iterable[torch.Tensor]]
"""Of every set the distances (n,) of samples; a set is as good as their median is low."""
FIT_RIDGE = 0.3
"""Penalty of the surrogate's coefficients, which are of the size of a logarithm's change."""
ROUNDS = 4
"""Times that the surrogate is fitted anew and asked for the next sets."""
DRAWS = 4
"""Random sets that are drawn for one that is judged: some are not made of allowed intervals, or come again."""


class Supernet:
    """A copy of the teacher that learns its velocity with blocks left out."""

    def __init__(self, teacher: Any, family: Family, learning_rate: float) -> None:
        self.family, self.learning_rate, self.dtype = family, learning_rate, teacher.dtype
        # In float32: small steps are lost on weights in half precision.
        self.model = copy.deepcopy(teacher).float().requires_grad_(True).train()

    def train(self, taught: Sequence[Lesson], pick: Callable[[], Dropped], progress: Callable[[float, str], None]) -> None:
        """One step a lesson, each with the blocks left out that `pick` names."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.02, fused=True)
        for step, (sample, wanted) in enumerate(taught):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * min(1.0, (step + 1) / WARMUP)
            optimizer.zero_grad()
            with left_out(self.model, self.family, set(pick())):
                with autocast(self.model, self.dtype):
                    loss = nn.functional.mse_loss(flow.predict(self.model, *sample), wanted)
                loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            progress((step + 1) / len(taught), "shared weights")
        optimizer.zero_grad()
        self.model.requires_grad_(False).eval()

    @contextmanager
    def judges(self, distance: SampledDistance) -> Iterator[Score]:
        """A function that scores sets by every sample's distance, side by side where cores are left to other threads."""
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        lanes = max(1, cores() // torch.get_num_threads()) if on_cpu else 1
        models = [self.model, *(copy.deepcopy(self.model) for _ in range(lanes - 1))]

        def one(dropped: Dropped) -> torch.Tensor:
            model = models.pop()
            try:
                with left_out(model, self.family, dropped), autocast(model, self.dtype):
                    return distance.each(model)
            finally:
                models.append(model)

        with ThreadPoolExecutor(lanes) as pool:
            yield lambda sets: pool.map(one, sets)


def picker(
    errors: Sequence[float], allowed: Collection[int], groups: Sequence[int], depths: Sequence[Removed], seed: int = 0
) -> Callable[[], Dropped]:
    """Sets to train on: as many blocks of each group as one of `depths` says, those rarer whose loss costs more in the teacher as it is.

    `errors` are those of every block left out on its own; a block is drawn with weight error^-1/2.
    """
    generator = torch.Generator().manual_seed(seed)
    floor = max(max(errors) * 1e-6, 1e-30)
    weights = torch.tensor([max(e, floor) ** -0.5 if b in allowed else 0.0 for b, e in enumerate(errors)], dtype=torch.float64)

    def pick() -> Dropped:
        count = depths[int(torch.randint(len(depths), (1,), generator=generator))]
        picked: list[int] = []
        for (first, end), own in zip(group_ranges(groups), count, strict=True):
            picked += [first + b for b in torch.multinomial(weights[first:end], own, generator=generator).tolist()] if own else []
        return tuple(sorted(picked))

    return pick


def search(
    score: Score,
    count: Removed,
    first: Iterable[Dropped],
    draw: Callable[[], Dropped],
    spans: Collection[Span],
    groups: Sequence[int],
    evaluations: int,
    progress: Callable[[float, str], None],
) -> list[tuple[Dropped, torch.Tensor]]:
    """Sets of `count` blocks of each group with their distances, best first, after at most `evaluations` scores.

    Half of the scores go to `first` and to sets drawn at random; the rest, in rounds, to those that come out best
    of a surrogate by dynamic programming. `spans` are the intervals that a set may be made of.
    """
    known: dict[Dropped, torch.Tensor] = {}

    def judge(sets: Iterable[Dropped]) -> None:
        new = list(itertools.islice(dict.fromkeys(s for s in sets if s not in known), evaluations - len(known)))
        known.update(zip(new, score(new), strict=True))
        progress(len(known) / evaluations, f"sets of {sum(count)} blocks")

    judge(first)
    drawn = dict.fromkeys(d for d in (draw() for _ in range(DRAWS * evaluations)) if d not in known and fits(d, spans, groups))
    judge(itertools.islice(drawn, max(0, evaluations // 2 - len(known))))
    for left in range(ROUNDS, 0, -1):
        share = -(-(evaluations - len(known)) // left)
        costs = surrogate({d: e.median().item() for d, e in known.items()}, spans, sum(groups))
        chains = selection.best_chains(groups, costs, len(known) + share).get(count, [])
        sets = (dropped_by({s: s[0] for s in chain}) for _, chain in chains)
        judge(itertools.islice((d for d in sets if d not in known), share))
    return sorted(known.items(), key=lambda k: (k[1].median().item(), k[0]))


def surrogate(scores: Mapping[Dropped, float], spans: Collection[Span], length: int) -> dict[Span, float]:
    """The cost of every interval in a sum that comes near the logarithm of the scores: one term a block that goes, one a pair of neighbours.

    An interval keeps its first block. Ridge least squares.
    """
    rows = torch.zeros(len(scores), 2 * length, dtype=torch.float64)
    for row, dropped in zip(rows, scores, strict=True):
        _mark(row, dropped, length)
    wanted = torch.tensor([math.log(max(s, 1e-12)) if math.isfinite(s) else 0.0 for s in scores.values()], dtype=torch.float64)
    wanted = wanted - wanted.mean()
    centred = rows - rows.mean(0)
    eye = torch.eye(2 * length, dtype=torch.float64)
    terms = torch.linalg.solve(centred.T @ centred + FIT_RIDGE * eye, centred.T @ wanted)
    costs = {}
    for u, v in spans:
        row = torch.zeros(2 * length, dtype=torch.float64)
        _mark(row, tuple(range(u + 1, v + 1)), length)
        costs[u, v] = (row @ terms).item()
    return costs


def dropped_by(stays: Mapping[Span, int]) -> Dropped:
    """The blocks that go with these intervals, each of which keeps one."""
    return tuple(sorted(b for (u, v), kept in stays.items() for b in range(u, v + 1) if b != kept))


def _mark(row: torch.Tensor, dropped: Dropped, length: int) -> None:
    for b in dropped:
        row[b] = 1
        if b + 1 in dropped:
            row[length + b] = 1


def fits(dropped: Dropped, spans: Collection[Span], groups: Sequence[int]) -> bool:
    """Whether a set is made of intervals that may be chosen, each with its first block kept."""
    made = spans_of_dropped(dropped, groups)
    return made is not None and all(s in spans and stays == s[0] for s, stays in made.items())


def counts(dropped: Dropped, groups: Sequence[int]) -> Removed:
    """How many blocks of each group a set takes."""
    return tuple(sum(first <= b < end for b in dropped) for first, end in group_ranges(groups))
