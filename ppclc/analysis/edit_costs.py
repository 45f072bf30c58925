"""What each edit costs: the velocity error with a closed-form stand-in for it swapped in, nothing trained.

An edit is a *detour*: it leaves the teacher's states before its first block, and other blocks than the teacher's run from there
on, or none. Measured on a small probe set. Of a resident teacher the states before every block are kept, so that a detour runs only the
blocks after its edit. Of a streamed one as many detours as may be held go through its blocks side by side, each block read once
for all of them. Work is counted in teacher forwards of one sample, under a budget.

Shape suffixes: B batch, T token, S image token, C channel, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ppclc.analysis.closed_forms import closed_form_bank, far_of, linear_map
from ppclc.analysis.ffn_maps import ffn_map
from ppclc.analysis.journal import Journal, Key
from ppclc.analysis.moments import solving_device
from ppclc.data.samples import Sample
from ppclc.families import STREAMS, Bank, States
from ppclc.loading.classes import empty_model, student_config
from ppclc.machine.devices import free_bytes
from ppclc.models import student_block
from ppclc.plan import CompressionPlan
from ppclc.records import CalibrationStats
from ppclc.student_tensors import student_tensor
from ppclc.teachers import Embedded, ResidentTeacher, Skeleton, StreamedTeacher, Teacher, ffn_inputs_kept

Map = tuple[torch.Tensor, torch.Tensor]
Span = tuple[int, int]
Progress = Callable[[float], None]
TRIED_WHOLE = 3
"""Intervals up to this long are tried with each of their blocks as the one that stays, longer ones with first, middle and last."""
STATES_SHARE = 0.3
"""Of the free memory, what the probes' states before all blocks may take."""
KEPT_BYTES = 2**29
"""Most bytes of linear maps that are kept for further detours."""


Runs = Callable[[Callable[[], nn.Module], States, Mapping[str, Any]], States]
"""What runs in a block's place: given the teacher's block, when it is asked for, states by stream and what the block gets besides."""


@dataclass(frozen=True)
class Detour:
    """One edit: from which state on it runs, and by block what runs instead of the teacher's, None for nothing at all.

    name: which edit it is, among all of an analysis. skeleton: of the student, where what enters its blocks besides the states is its own.
    """

    name: Key
    leaves: int
    instead: Mapping[int, Runs | None] = field(default_factory=dict)
    skeleton: Skeleton | None = None

    def work(self, blocks: int) -> int:
        """Blocks that it runs."""
        return sum(self.instead.get(b, self) is not None for b in range(self.leaves, blocks))


class EditCosts:
    """Squared velocity errors (n,), one a probe sample, of edits swapped into a stock teacher one at a time.

    `energy` (n,) is that of the teacher's own velocity; `spent` counts forwards of one sample through all
    blocks, and `budget` is the most of them that intervals may take.
    """

    def __init__(
        self,
        teacher: Teacher,
        samples: Sequence[Sample],
        stats: CalibrationStats,
        ridge: float,
        budget: float = float("inf"),
        journal: Journal | None = None,
    ) -> None:
        self.journal = journal or Journal()
        self.teacher, self.family, self.stats, self.ridge, self.budget = teacher, teacher.family, stats, ridge, budget
        self.length, self.samples = teacher.num_blocks, [part for sample in samples for part in teacher.parts(sample)]
        self.embedded = [teacher.embed(sample) for sample in self.samples]
        self.count = sum(len(sample[0]) for sample in samples)
        self.timesteps = torch.cat([sample[1] for sample in samples])
        self.solving = solving_device(teacher.device)
        self.together = 1
        if isinstance(teacher, StreamedTeacher):
            held = sum(x.nbytes for e in self.embedded for x in e.states.values())
            self.together = max(1, teacher.held_bytes // held)
        self._maps: dict[tuple[str, int, int], Map] = {}
        self._block: tuple[int, dict[str, torch.Tensor]] = (-1, {})
        self._made: tuple[int, int, nn.Module] | None = None
        self._states = {0: [e.states for e in self.embedded]}
        self.velocities = self._teacher_velocities()
        self.energy = torch.cat([_energy(v) for v in self.velocities])
        self.spent = float(self.count)

    def share(self, errors: torch.Tensor) -> float:
        """Squared relative velocity error, all samples together."""
        return (errors.sum() / self.energy.sum()).item()

    def intervals(self, spans: Sequence[Span], progress: Progress = lambda _: None) -> dict[Span, tuple[torch.Tensor, int]]:
        """Of each interval u..v the errors with one block in its place, and the number of the block that stays: the one that does best."""
        tried = [(span, s) for span in spans for s in self.choices(*span)]
        return _best(tried, self.errors([self._between(*span, s) for span, s in tried], progress))

    def adapted(self, u: int, v: int) -> tuple[torch.Tensor, int]:
        """Errors with one block and its closed-form adapters in the place of u..v, and the block that the student block best starts from.

        The maps of `closed_forms.interval_adapters` stand in front, and nothing behind. Blocks that the moments do not
        reach from u are not tried.
        """
        tried = [((u, v), s) for s in self.choices(u, v) if s - u <= self.stats.longest]
        return _best(tried, self.errors([self._adapted_from(u, v, s) for _, s in tried]))[u, v]

    def adapted_from(self, u: int, v: int, start: int) -> torch.Tensor:
        """Errors with block `start` and its closed-form adapters in the place of u..v."""
        return self.errors([self._adapted_from(u, v, start)])[0]

    def choices(self, u: int, v: int) -> list[int]:
        """The blocks that may stay for interval u..v: the student's block is made like the first."""
        return [s for s in kept_choices(u, v) if self.family.may_start(self.teacher.config, u, v, s)]

    def interval_price(self, u: int, v: int) -> float:
        """Forwards that an interval takes in `intervals`."""
        return len(self.choices(u, v)) * self.count * (self.length - v) / self.length

    def dropped(self, blocks: Sequence[int]) -> list[torch.Tensor]:
        """Errors with each of these blocks left out and nothing in its place."""
        return self.errors([Detour(("without", b), b, {b: None}) for b in blocks])

    def ffns(self, networks: Sequence[tuple[int, str]], progress: Progress = lambda _: None) -> list[torch.Tensor]:
        """Errors with the feed-forward network of a block's stream made linear, of each of them."""
        return self.errors([Detour(("network", b, stream), b, {b: self._linear(b, stream)}) for b, stream in networks], progress)

    def cuts(self, cuts: Sequence[Mapping[Span, int]], linear: bool = True, progress: Progress = lambda _: None) -> list[torch.Tensor]:
        """Errors with several intervals replaced at once, each by the block that stays, with or without linear maps for the others; of each such cut."""
        detours = []
        for cut in cuts:
            instead: dict[int, Runs | None] = {}
            for (u, v), kept in cut.items():
                instead |= dict.fromkeys(range(u, v + 1)) | {kept: self._sandwich(u, v, kept) if linear else self._as_it_is(u)}
            detours.append(Detour(("cut", linear, sorted(cut.items())), min(instead), instead))
        return self.errors(detours, progress)

    def students(self, plans: Sequence[CompressionPlan], progress: Progress = lambda _: None) -> list[torch.Tensor]:
        """Errors of untrained students that keep every block, with each plan's closed-form width edits."""
        return self.errors([self._student(plan) for plan in plans], progress)

    def influences(self) -> list[float]:
        """Of every block the mean over image tokens of one minus the cosine of input and output. Source: arXiv 2403.03853, section 3."""
        found: list[float] = []
        before: list[torch.Tensor] = []
        for number, sweep in self.teacher.sweep(self.samples, range(self.length + 1)):
            images = [states["image"] for states in sweep.states.pop(number)]
            cosines = [nn.functional.cosine_similarity(a, b, dim=-1) for a, b in zip(before, images, strict=False)]
            found += [1 - torch.cat(cosines).double().mean().item()] if cosines else []
            before = images
        return found

    @torch.no_grad()
    def errors(self, detours: Sequence[Detour], progress: Progress = lambda _: None) -> list[torch.Tensor]:
        """Errors (n,) of every detour; those that the journal has are not measured again."""
        known = ((i, self.journal.tensor("errors", *d.name)) for i, d in enumerate(detours))
        found = {i: each.to(self.energy.device) for i, each in known if each is not None}
        order = sorted((i for i in range(len(detours)) if i not in found), key=lambda i: detours[i].leaves)
        groups = [order[i : i + self.together] for i in range(0, len(order), self.together)]
        for n, group in enumerate(groups):
            later = detours[groups[n + 1][0]].leaves if n + 1 < len(groups) else 0
            for i, each in zip(group, self._walk([detours[i] for i in group], later), strict=True):
                self.journal.put_tensor(each, "errors", *detours[i].name)
                found[i] = each
            progress(len(found) / len(detours))
        self.spent += sum(self.count * d.work(self.length) for d in detours) / self.length
        return [found[i] for i in range(len(detours))]

    def _walk(self, detours: Sequence[Detour], later: int) -> list[torch.Tensor]:
        """Errors of some detours, all of which pass a block before the next one; the states that others leave at `later` are kept for them."""
        first, last = detours[0].leaves, max(later, detours[-1].leaves)
        start = max(n for n in self._states if n <= first)
        teacher = list(self._states[start])
        entered = [self.embedded if d.skeleton is None else [self.teacher.embed(s, d.skeleton) for s in self.samples] for d in detours]
        under_way: dict[int, list[States]] = {}
        for block in range(start, self.length + 1):
            self._keep(block, later, teacher)
            under_way |= {n: list(teacher) for n, d in enumerate(detours) if d.leaves == block}
            if block == self.length:
                break
            for n, states in under_way.items():
                self._pass(block, states, detours[n].instead.get(block, self._as_it_is(block)), entered[n])
            if block < last:
                self._pass(block, teacher, self._as_it_is(block), self.embedded)
            else:
                teacher = []
        self.teacher.release()
        self._block, self._made = (-1, {}), None
        return [self._against(under_way[n], d.skeleton) for n, d in enumerate(detours)]

    def _keep(self, block: int, later: int, states: list[States]) -> None:
        """Keep the teacher's states for detours to come: where not those of all blocks are there, at one block beside the first."""
        if block == later and block not in self._states:
            self._states = {0: self._states[0], block: list(states)}

    def _pass(self, block: int, states: list[States], runs: Runs | None, entered: Sequence[Embedded]) -> None:
        """Put states through what runs at a block, each in the place of its input."""
        for n in range(len(states)) if runs is not None else ():
            assert runs is not None
            states[n] = runs(lambda: self.teacher.block(block), states[n], entered[n].shared[block])

    def _against(self, states: Sequence[States], skeleton: Skeleton | None) -> torch.Tensor:
        """Squared distances (n,) of the velocities that come of the last block's states from the teacher's."""
        velocities = [self.teacher.finish(sample, s, skeleton) for sample, s in zip(self.samples, states, strict=True)]
        return torch.cat([_energy(v - wanted) for v, wanted in zip(velocities, self.velocities, strict=True)])

    def _teacher_velocities(self) -> list[torch.Tensor]:
        """The teacher's own, and of a resident one the states before every block, where memory has room for them."""
        each = sum(x.nbytes for states in self._states[0] for x in states.values())
        room = STATES_SHARE * free_bytes(self.teacher.device)
        resident = isinstance(self.teacher, ResidentTeacher) and (self.length + 1) * each <= room
        for number, sweep in self.teacher.sweep(self.samples, range(self.length + 1)):
            states = sweep.states.pop(number)
            if resident:
                self._states[number] = states
        return [self.teacher.finish(sample, s) for sample, s in zip(self.samples, states, strict=True)]

    def _as_it_is(self, block: int) -> Runs:
        """The teacher's block, called as the group of a block is."""
        group = self.teacher.group(block)
        return lambda own, states, shared: group.call(own(), states, shared)

    def _between(self, u: int, v: int, kept: int) -> Detour:
        """One block in the place of u..v, with linear maps for the others."""
        return Detour(("interval", u, v, kept), u, dict.fromkeys(range(u, v + 1)) | {kept: self._sandwich(u, v, kept)})

    def _sandwich(self, u: int, v: int, kept: int) -> Runs:
        """A block, with linear maps by stream for those of its interval before it and for those after it."""
        group = self.teacher.group(u)

        def run(own: Callable[[], nn.Module], states: States, shared: Mapping[str, Any]) -> States:
            before = {s: self._map(s, u, kept) for s in STREAMS} if kept > u else {}
            after = {s: self._map(s, kept + 1, v + 1) for s in STREAMS} if kept < v else {}
            output = group.call(own(), {s: _mapped(x, before.get(s)) for s, x in states.items()}, shared)
            return {s: _mapped(x, after.get(s)) for s, x in output.items()}

        return run

    def _adapted_from(self, u: int, v: int, start: int) -> Detour:
        """One block with maps in front of it in the place of u..v."""
        return Detour(("adapted", u, v, start), u, dict.fromkeys(range(u, v + 1)) | {start: self._sandwich(u, start, start)})

    def _linear(self, block: int, stream: str) -> Runs:
        """A block whose network of a stream is linear. The network still runs, and its result is not used."""
        group = self.teacher.group(block)

        def fitted() -> Map:
            made = ffn_map(self.stats.tensors, self.stats.rows, block, stream, self.ridge, self.solving)
            return made["weight"], made["bias"]

        def run(own: Callable[[], nn.Module], states: States, shared: Mapping[str, Any]) -> States:
            module, (weight, bias) = own(), self._kept_map((f"{stream} network", block, block), fitted)
            with ffn_inputs_kept(module, group, [stream]) as mids:
                output = group.call(module, states, shared)
            mid = mids[stream]
            return output | {stream: mid + nn.functional.linear(mid, weight.to(mid), bias.to(mid))}

        return run

    def _student(self, plan: CompressionPlan) -> Detour:
        """The untrained student of a plan without intervals.

        It leaves before the first block that is not the teacher's own, or that hands text on to those whose text stream is gone.
        """
        assert not plan.intervals
        bank = closed_form_bank(self.stats, self.ridge, plan)
        leaves = 0 if plan.modulation_rank is not None else min([*(e.reference for e in plan.text_stream), *(e.block for e in plan.ffn)])
        skeleton = self._skeleton(plan, bank)
        runs = {b: partial(self._run_student, plan, bank, b) for b in range(leaves, self.length)}
        return Detour(("student", plan.to_json()), leaves, runs, skeleton)

    def _run_student(
        self, plan: CompressionPlan, bank: Bank, block: int, _: Callable[[], nn.Module], states: States, shared: Mapping[str, Any]
    ) -> States:
        """A student's block, made when its first samples come and let go when another is made."""
        if self._made is None or self._made[:2] != (id(bank), block):
            self._made = None
            made = student_block(self.family, self.teacher.config, plan, block, self._tensors(block), bank)
            self._made = (id(bank), block, made.to(self.teacher.device))
        return self.teacher.group(block).call(self._made[2], states, shared)

    def _tensors(self, block: int) -> dict[str, torch.Tensor]:
        """The teacher's tensors of a block by full name, read once for all students."""
        if self._block[0] != block:
            prefix = self.family.prefix(self.teacher.config, block)
            self._block = (block, {prefix + name: tensor for name, tensor in self.teacher.block_tensors(block).items()})
        return self._block[1]

    def _skeleton(self, plan: CompressionPlan, bank: Bank) -> Skeleton:
        """What stands outside the blocks of a plan's student."""
        config, teacher = self.teacher.config, self.teacher
        skeleton = Skeleton(empty_model(self.family, student_config(self.family, config, plan)).eval(), self.family)
        outside, theirs = skeleton.model, teacher.tensors()
        state = {n: student_tensor(self.family, config, plan, n, theirs, bank) for n in outside.state_dict()}
        outside.load_state_dict({n: t.to(teacher.device, teacher.dtype).contiguous() for n, t in state.items()}, strict=True, assign=True)
        outside._apply(lambda tensor: tensor.to(teacher.device))  # buffers that no file holds
        return skeleton

    def _map(self, stream: str, i: int, j: int) -> Map:
        """The linear map between two states of a stream."""

        def fitted() -> Map:
            a, b = linear_map(far_of(self.stats, stream, self.solving), i, j, self.ridge)
            return a.float(), b.float()

        return self._kept_map((stream, i, j), fitted)

    def _kept_map(self, key: tuple[str, int, int], fitted: Callable[[], Map]) -> Map:
        """A map that is kept from its last use, else fitted; those that were used least of late make room."""
        made = self._maps.pop(key, None) or fitted()
        self._maps[key] = made
        for oldest in list(self._maps)[: -max(1, KEPT_BYTES // made[0].nbytes)]:
            del self._maps[oldest]
        return made


def kept_choices(u: int, v: int) -> list[int]:
    """The blocks that are tried as the one that stays for interval u..v."""
    return list(range(u, v + 1)) if v - u < TRIED_WHOLE else [u, (u + v) // 2, v]


def _best(tried: Sequence[tuple[Span, int]], errors: Sequence[torch.Tensor]) -> dict[Span, tuple[torch.Tensor, int]]:
    """Of every interval the errors that are least in all, with the block that stays."""
    found: dict[Span, tuple[torch.Tensor, int]] = {}
    for (span, stays), each in zip(tried, errors, strict=True):
        if span not in found or each.sum() < found[span][0].sum():
            found[span] = (each, stays)
    return found


def _mapped(x: torch.Tensor, by: Map | None) -> torch.Tensor:
    return x if by is None else x @ by[0].to(x) + by[1].to(x)


def _energy(x_BSC: torch.Tensor) -> torch.Tensor:
    return x_BSC.double().square().flatten(1).sum(1)
