"""What each edit costs: the velocity error with a closed-form stand-in for it swapped in, nothing trained.

Measured on a small probe set whose block inputs are kept from one traced forward, so that an edit of blocks
u..v runs only the blocks after v. Work is counted in teacher forwards of one sample, under a budget.

Shape suffixes: B batch, T token, S image token, C channel, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ppclc import flow
from ppclc.closed_forms import closed_form_bank, far_of, linear_map
from ppclc.families import STREAMS, Family, Group, States
from ppclc.ffn_maps import ffn_map
from ppclc.models import StandIn, Trace, apply_plan, blocks_of, groups_of, linear_ffns, replaced, trace
from ppclc.plan import CompressionPlan
from ppclc.records import CalibrationStats
from ppclc.samples import Sample

Map = tuple[torch.Tensor, torch.Tensor]
TRIED_WHOLE = 3
"""Intervals up to this long are tried with each of their blocks as the one that stays, longer ones with first, middle and last."""


@dataclass(frozen=True)
class Probe:
    """One batch of the probe set: what the teacher passed through on it."""

    sample: Sample
    seen: Trace

    def __len__(self) -> int:
        return len(self.sample[0])

    def states(self, block: int) -> States:
        """Every stream (B, T, D) at a block's input."""
        return {s: v[block] for s, v in self.seen.states.items()}


class Sandwich(StandIn):
    """Stands for an interval: one of its blocks, with linear maps by stream for those before and those after it."""

    def __init__(self, group: Group, block: nn.Module, before: Mapping[str, Map], after: Mapping[str, Map]) -> None:
        super().__init__(group, dict)
        self.block, self.before, self.after = block, before, after

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states, shared = self.group.given(args, kwargs, self.text_tokens)
        return self.group.output(self.states(states, shared))

    def states(self, states: States, shared: Mapping[str, Any]) -> States:
        """What comes out, by stream."""
        output = self.group.call(self.block, {s: _mapped(x, self.before.get(s)) for s, x in states.items()}, shared)
        return {s: _mapped(x, self.after.get(s)) for s, x in output.items()}


def _mapped(x: torch.Tensor, by: Map | None) -> torch.Tensor:
    return x if by is None else x @ by[0].to(x.dtype) + by[1].to(x.dtype)


class EditCosts:
    """Squared velocity errors (n,), one a probe sample, of edits swapped into a stock teacher one at a time.

    `energy` (n,) is that of the teacher's own velocity; `spent` counts forwards of one sample through all
    blocks, and `budget` is the most of them that intervals may take.
    """

    def __init__(
        self, model: Any, family: Family, samples: Sequence[Sample], stats: CalibrationStats, ridge: float, budget: float = float("inf")
    ) -> None:
        self.model, self.family, self.stats, self.ridge, self.budget = model, family, stats, ridge, budget
        self.blocks, self.groups = blocks_of(model, family), groups_of(model, family)
        self.length = len(self.blocks)
        self.probes = [Probe(s, trace(model, family, flow.inputs_for(model, *s))) for s in samples]
        self.count = sum(map(len, self.probes))
        self.energy = torch.cat([_energy(self._velocity(p)) for p in self.probes])
        self.timesteps = torch.cat([p.sample[1] for p in self.probes])
        self.spent = float(self.count)
        self._maps: dict[tuple[str, int, int], Map] = {}

    def share(self, errors: torch.Tensor) -> float:
        """Squared relative velocity error, all samples together."""
        return (errors.sum() / self.energy.sum()).item()

    def interval(self, u: int, v: int) -> tuple[torch.Tensor, int]:
        """Errors with one block in the place of u..v, and the number of the block that stays: the one that does best."""
        tried = [(self._after(v + 1, self._sandwich(u, v, s), u), s) for s in self.choices(u, v)]
        return min(tried, key=lambda t: t[0].sum().item())

    def adapted(self, u: int, v: int) -> tuple[torch.Tensor, int]:
        """Errors with one block and its closed-form adapters in the place of u..v, and the block that the student block best starts from.

        The maps of `closed_forms.interval_adapters` stand in front, and nothing behind. Blocks that the moments do not
        reach from u are not tried.
        """
        reach = [s for s in self.choices(u, v) if s - u <= self.stats.longest]
        tried = [(self.adapted_from(u, v, s), s) for s in reach]
        return min(tried, key=lambda t: t[0].sum().item())

    def adapted_from(self, u: int, v: int, start: int) -> torch.Tensor:
        """Errors with block `start` and its closed-form adapters in the place of u..v."""
        return self._after(v + 1, self._sandwich(u, start, start), u)

    def choices(self, u: int, v: int) -> list[int]:
        """The blocks that may stay for interval u..v: the student's block is made like the first."""
        return [s for s in kept_choices(u, v) if self.family.may_start(self.model.config, u, v, s)]

    def interval_price(self, u: int, v: int) -> float:
        """Forwards that `interval` takes."""
        return len(self.choices(u, v)) * self.count * (self.length - v) / self.length

    def dropped(self, block: int) -> torch.Tensor:
        """Errors with a block left out and nothing in its place."""
        return self._after(block + 1, None, block)

    def ffn(self, block: int, stream: str) -> torch.Tensor:
        """Errors with a block's feed-forward network of one stream made linear."""
        made = ffn_map(self.stats.tensors, self.stats.rows, block, stream, self.ridge)
        with linear_ffns(self.model, self.family, {(block, stream): (made["weight"], made["bias"])}):
            return self._after(block, None, block)

    def together(self, intervals: Mapping[tuple[int, int], int], linear: bool = True) -> torch.Tensor:
        """Errors with several intervals replaced at once, each by the block that stays, with or without linear maps for the others."""
        stand_ins: dict[int, nn.Module | None] = {}
        for (u, v), kept in intervals.items():
            stays = self._sandwich(u, v, kept) if linear else self.blocks[kept]
            stand_ins |= {u: stays, **dict.fromkeys(range(u + 1, v + 1))}
        removed = sum(v - u for u, v in intervals)
        return self.outputs_of(self.model, replaced(self.model, self.family, stand_ins), 1 - removed / self.length)

    def student(self, plan: CompressionPlan) -> torch.Tensor:
        """Errors of an untrained student with the plan's closed-form width edits."""
        bank = closed_form_bank(self.stats, self.ridge, plan)
        return self.outputs_of(apply_plan(self.model, plan, bank), None, len(plan.kept) / self.length)

    def outputs_of(self, model: Any, swap: AbstractContextManager[None] | None, work: float) -> torch.Tensor:
        """Errors of a model, within a context if one is given; `work` is its share of a teacher's forward."""
        self.spent += self.count * work

        with swap or nullcontext(), torch.no_grad():
            return torch.cat([_energy(flow.predict(model, *p.sample) - self._velocity(p)) for p in self.probes])

    def influence(self, block: int) -> float:
        """Mean over image tokens of one minus the cosine of a block's input and output. Source: arXiv 2403.03853, section 3."""
        cosines = [
            nn.functional.cosine_similarity(p.seen.states["image"][block], p.seen.states["image"][block + 1], dim=-1) for p in self.probes
        ]
        return 1 - torch.cat(cosines).double().mean().item()

    def _velocity(self, probe: Probe) -> torch.Tensor:
        return probe.seen.velocity[:, : probe.sample[0].shape[1]]

    def _sandwich(self, u: int, v: int, kept: int) -> Sandwich:
        before = {s: self._map(s, u, kept) for s in STREAMS} if kept > u else {}
        after = {s: self._map(s, kept + 1, v + 1) for s in STREAMS} if kept < v else {}
        return Sandwich(self.groups[u], self.blocks[kept], before, after)

    def _map(self, stream: str, i: int, j: int) -> Map:
        key = (stream, i, j)
        if key not in self._maps:
            a, b = linear_map(far_of(self.stats, stream), i, j, self.ridge)
            self._maps[key] = (a.float(), b.float())
        return self._maps[key]

    @torch.no_grad()
    def _after(self, start: int, stand_in: Sandwich | None, at: int) -> torch.Tensor:
        """Errors with the states at block `at` sent through the stand-in (or left as they are) and on to block `start`."""
        errors = []
        for probe in self.probes:
            states = probe.states(at)
            if stand_in is not None:
                states = stand_in.states(states, probe.seen.shared[at])
            passed: dict[int, nn.Module | None] = dict.fromkeys(range(start))
            if start:
                passed[start - 1] = StandIn(self.groups[start - 1], lambda _, states=states: states)  # type: ignore[misc]
            with replaced(self.model, self.family, passed):
                errors.append(_energy(flow.predict(self.model, *probe.sample) - self._velocity(probe)))
        self.spent += self.count * (self.length - start + (stand_in is not None)) / self.length
        return torch.cat(errors)


def kept_choices(u: int, v: int) -> list[int]:
    """The blocks that are tried as the one that stays for interval u..v."""
    return list(range(u, v + 1)) if v - u < TRIED_WHOLE else [u, (u + v) // 2, v]


def _energy(x_BSC: torch.Tensor) -> torch.Tensor:
    return x_BSC.double().square().flatten(1).sum(1)
