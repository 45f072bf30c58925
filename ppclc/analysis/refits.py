"""Maps of distilled blocks, in closed form: fitted to what the trained student block of an interval needs.

Before the interval is trained, a linear feed-forward network can only start from the interval's first block, whose network
the student block no longer has (docs/decisions/006-linear-ffn.md), and a text map from the modulation of that block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from ppclc.analysis.ffn_maps import FfnMoments, ffn_map
from ppclc.analysis.moments import ridge_solution, solving_device
from ppclc.data.samples import Sample
from ppclc.families import Bank
from ppclc.models import Shared
from ppclc.plan import CompressionPlan, FfnEdit, Interval, TextStreamEdit
from ppclc.teachers import ResidentTeacher, Sweep, Teacher, ffn_inputs_kept
from ppclc.training.local_edits import TEXT_INPUT, Teaching

Maps = dict[str, dict[str, torch.Tensor]]


def text_blocks(teaching: Teaching, plan: CompressionPlan, bank: Bank) -> Callable[[int], nn.Module | None]:
    """By number of a state, the student block that enters there for an interval, whose modulation text maps live with."""

    def block(number: int) -> nn.Module | None:
        interval = next((i for i in plan.intervals if i.first == number), None)
        return teaching.block(teaching.plan(plan, [interval]), number, bank) if interval else None

    return block


def refitted(
    teacher: Teacher, teaching: Teaching, plan: CompressionPlan, bank: Bank, samples: Sequence[Sample], ridge: float, together: int
) -> Maps:
    """By key, new tensors of every linear network and text map that stands on an interval's student block.

    Ridge least squares over the samples, of which `together` go through the teacher at a time. A network adds what is
    missing to the teacher's output of the interval after the block's attention residual. `text_in` maps between the modulated
    text states that the student's own blocks make of the teacher's states.
    """
    ffns = [(e, i) for e in plan.ffn if (i := plan.interval_at(e.block))]
    texts = [e for e in plan.text_stream if plan.interval_at(e.block) or plan.interval_at(e.reference)]
    moments = {plan.ffn_key(e.block, e.stream): FfnMoments() for e, _ in ffns}
    pairs = {plan.text_key(e.block): PairMoments() for e in texts}
    parts = [part for sample in samples for part in teacher.parts(sample)] if isinstance(teacher, ResidentTeacher) else samples
    for some in _chunks(parts, together) if ffns or texts else ():
        masks = [teaching.family.mask_of(sample[2]) for sample in some]
        ends = {e.reference: 0 for e in texts} | {e.block: 0 for e in texts}
        left: list[tuple[FfnEdit, Interval] | TextStreamEdit] = [*ffns, *texts]
        stops = {s for _, i in ffns for s in (i.first, i.last + 1)} | set(ends)
        for stop, sweep in teacher.sweep(some, stops, set(ends), text_blocks(teaching, plan, bank)):
            for edit, interval in [(e, i) for e, i in ffns if i.last + 1 == stop]:
                _add_ffn(moments[plan.ffn_key(edit.block, edit.stream)], teaching, plan, bank, edit, interval, sweep, masks)
                left.remove((edit, interval))
            for text in [e for e in texts if e.block == stop]:
                for n, mask in enumerate(masks):
                    own, target = (sweep.states[b][n][TEXT_INPUT] for b in (text.reference, text.block))
                    pairs[plan.text_key(text.block)].add(own, target, mask)
                left.remove(text)
            for old in sweep.states.keys() - {s for e in left for s in _reads(e)}:
                del sweep.states[old]
    found = {plan.ffn_key(e.block, e.stream): _solved(moments[plan.ffn_key(e.block, e.stream)], e.stream, ridge) for e, _ in ffns}
    return found | {key: {**bank[key], **pair.text_in(ridge)} for key, pair in pairs.items()}


def _chunks(samples: Sequence[Sample], together: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), together):
        yield samples[start : start + together]


def _reads(edit: tuple[FfnEdit, Interval] | TextStreamEdit) -> tuple[int, int]:
    """Numbers of the states that an edit's moments are made of."""
    return (edit[1].first, edit[1].last + 1) if isinstance(edit, tuple) else (edit.reference, edit.block)


class PairMoments:
    """Second moments of two text states (B, T, D), in float64, on a GPU if they lie there: all that a ridge regression of one on the other takes."""

    def __init__(self) -> None:
        self.rows, self.sums, self.own, self.cross = 0, [torch.zeros(())] * 2, torch.zeros(()), torch.zeros(())

    def add(self, own_BTD: torch.Tensor, target_BTD: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        """A batch; of its tokens those that the mask does not leave out."""
        kept = slice(None) if mask_BT is None else mask_BT.flatten().bool()
        place = solving_device(own_BTD.device)
        x, y = (t.flatten(0, 1)[kept].to(place, torch.float64) for t in (own_BTD, target_BTD))
        self.rows += len(x)
        self.sums = [s + t.sum(0) for s, t in zip(self.sums, (x, y), strict=True)]
        self.own, self.cross = self.own + x.T @ x, self.cross + x.T @ y

    def text_in(self, ridge: float) -> dict[str, torch.Tensor]:
        """Weight and bias of the map, pulled towards the identity as in `closed_forms.linear_map`."""
        x, y = (s / self.rows for s in self.sums)
        own, cross = self.own - self.rows * torch.outer(x, x), self.cross - self.rows * torch.outer(x, y)
        a = torch.eye(len(own), dtype=own.dtype, device=own.device) + ridge_solution(own, cross - own, ridge)
        return {"text_in.weight": a.T.float().contiguous().cpu(), "text_in.bias": (y - x @ a).float().cpu()}


def _add_ffn(
    moments: FfnMoments,
    teaching: Teaching,
    plan: CompressionPlan,
    bank: Bank,
    edit: FfnEdit,
    interval: Interval,
    sweep: Sweep,
    masks: Sequence[torch.Tensor | None],
) -> None:
    """What a linear network on an interval's block is fitted to, of a chunk: the block is there for as long as this takes."""
    block = teaching.block(teaching.plan(plan, [interval]), interval.first, bank).to(sweep.states[interval.first][0]["image"].device)
    for n, mask in enumerate(masks):
        mid = _mid(block, teaching, edit, sweep.states[interval.first][n], sweep.shared[n])
        target = sweep.states[interval.last + 1][n][edit.stream]
        moments.add(edit.stream, 0, mid, target, mask if edit.stream == "text" else None)


def _solved(moments: FfnMoments, stream: str, ridge: float) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in ffn_map(moments.tensors, moments.rows, 0, stream, ridge).items()}


@torch.no_grad()
def _mid(block: nn.Module, teaching: Teaching, edit: FfnEdit, states: dict[str, torch.Tensor], shared: Shared) -> torch.Tensor:
    """A block's state of one stream after the attention residual, (B, tokens, D)."""
    with ffn_inputs_kept(block, teaching.group(edit.block), [edit.stream]) as mids:
        teaching.call(block, edit.block, states, shared)
    return mids[edit.stream]
