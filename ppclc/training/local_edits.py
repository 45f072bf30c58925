"""What each edit of a plan learns on its own: which of the teacher's states it reads, its module, its loss.

Every edit takes the teacher's own states as input and as target, whatever other edits do: non-sequential, and
so pluggable. Source: arXiv 2511.16156, equations 6 and 7; its width pruning for text streams and feed-forward
networks. The magnitude term is ours, and so is the relative squared error where the paper has a plain one.

Shape suffixes: B batch, T token, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ppclc.families import Bank, Family, Group
from ppclc.kernels.distillation_loss import state_loss
from ppclc.models import Shared, student_block
from ppclc.plan import CompressionPlan, FfnEdit, Interval, TextStreamEdit
from ppclc.training.trainer import Terms

States = Mapping[str, torch.Tensor]
TEXT_INPUT = "text_input"


@dataclass(frozen=True)
class BatchStates:
    """A batch's states in the teacher by number (i: input of block i) and stream, each (B, T, D).

    shared: what each block gets besides. mask: (B, T) of text tokens that stand for something, None for all.
    """

    states: Mapping[int, States]
    shared: Shared
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Weights:
    """What terms of a local loss count: direction 1, magnitude beside it, both streams, and linear maps on their own.

    Maps start where their own error is least; what they still have to learn is what the block's output needs.
    """

    magnitude: float = 0.1
    image: float = 1.0
    text: float = 1.0
    maps: float = 0.01


@dataclass(frozen=True)
class LocalEdit:
    """key: name in the bank. stops: numbers of the states it reads; text_inputs: those whose modulated text it reads.

    build: its module, of which the parameters that learn require a gradient. tensors: the module's tensors
    that the bank keeps, by the names that it keeps them under. stands_on: keys of the edits whose result it takes over.
    """

    key: str
    stops: tuple[int, ...]
    text_inputs: tuple[int, ...]
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, BatchStates], Terms]
    tensors: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    stands_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class Teaching:
    """What building edits needs of a teacher: its family and configuration, and one block's tensors at a time."""

    family: Family
    config: Mapping[str, Any]
    block_tensors: Callable[[int], Mapping[str, torch.Tensor]]

    def block(self, plan: CompressionPlan, block: int, bank: Bank) -> nn.Module:
        """A plan's student block, alone; from the bank, else from the teacher's block, which is read only then."""
        interval = plan.interval_at(block)
        prefix = self.family.prefix(self.config, block)
        held = interval is not None and plan.interval_key(interval) in bank
        tensors = {} if held else {prefix + k: v for k, v in self.block_tensors(block).items()}
        return student_block(self.family, self.config, plan, block, tensors, bank)

    def group(self, block: int) -> Group:
        """The group that a block of the teacher is of."""
        return self.family.place(self.config, block)[0]

    def call(self, module: nn.Module, block: int, states: States, shared: Shared) -> dict[str, torch.Tensor]:
        """What a module gives in a block's place, from states by stream and what blocks get besides."""
        return self.group(block).call(module, states, shared[block])

    def plan(self, whole: CompressionPlan, intervals: Sequence[Interval], **edits: Any) -> CompressionPlan:
        """The plan of some intervals of another, with their adapters, and of these edits alone."""
        spans, adapted = ([(i.first, i.last) for i in some] for some in (intervals, [i for i in intervals if i in whole.adapters]))
        return CompressionPlan.of(self.family.name, whole.num_blocks, spans, adapters=adapted, **edits)


def relative_error(student_BTD: torch.Tensor, teacher_BTD: torch.Tensor, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Squared distance as a share of the teacher's energy, all tokens together, in float32 or better."""
    student_BTD, teacher_BTD = _at_least_single(student_BTD), _at_least_single(teacher_BTD)
    gap_BT, energy_BT = (student_BTD - teacher_BTD).square().sum(-1), teacher_BTD.square().sum(-1)
    if mask_BT is not None:
        gap_BT, energy_BT = gap_BT * mask_BT, energy_BT * mask_BT
    share: torch.Tensor = gap_BT.sum() / energy_BT.sum().clamp(min=1e-30)
    return share


def _at_least_single(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def interval_edit(
    teaching: Teaching, plan: CompressionPlan, interval: Interval, start: Callable[[], Mapping[str, torch.Tensor]], weights: Weights
) -> LocalEdit:
    """One block in the place of an interval, with the tensors that `start` gives.

    Text counts as the recipe says, but not after the last block, where nothing reads it.
    """
    own = teaching.plan(plan, [interval])
    key, last = own.interval_key(interval), interval.last == plan.num_blocks - 1

    def loss(module: nn.Module, batch: BatchStates) -> Terms:
        output = teaching.call(module, interval.first, batch.states[interval.first], batch.shared)
        target = batch.states[interval.last + 1]
        terms = {"image": state_loss(output["image"], target["image"], weights.magnitude, weight=weights.image)}
        if not last:
            terms["text"] = state_loss(output["text"], target["text"], weights.magnitude, batch.mask, weights.text)
        return terms

    return LocalEdit(
        key=key,
        stops=(interval.first, interval.last + 1),
        text_inputs=(),
        build=lambda: teaching.block(own, interval.first, {key: start()}).requires_grad_(True),
        loss=loss,
        tensors=dict,
    )


def ffn_edit(teaching: Teaching, plan: CompressionPlan, edit: FfnEdit, bank: Bank, weights: Weights) -> LocalEdit:
    """The linear map that stands where a feed-forward network stood; nothing else of its block learns.

    The block is the teacher's, or the distilled one of the interval that starts there. `bank` holds that one
    and the map's start.
    """
    own, end = _around(teaching, plan, [edit.block], ffn=[(edit.block, edit.stream)])
    name, stream = teaching.group(edit.block).ffn_modules[edit.stream], edit.stream

    def loss(module: nn.Module, batch: BatchStates) -> Terms:
        output = teaching.call(module, edit.block, batch.states[edit.block], batch.shared)[stream]
        target, mask = batch.states[end + 1][stream], batch.mask if stream == "text" else None
        return {
            "block": state_loss(output, target, weights.magnitude, mask),
            "map": weights.maps * relative_error(output, target, mask),
        }

    return LocalEdit(
        key=plan.ffn_key(edit.block, stream),
        stops=(edit.block, end + 1),
        text_inputs=(),
        build=lambda: _learning(teaching.block(own, edit.block, bank), (name,)),
        loss=loss,
        tensors=lambda state: {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")},
        stands_on=_below(plan, edit.block),
    )


def text_edit(teaching: Teaching, plan: CompressionPlan, edit: TextStreamEdit, bank: Bank, weights: Weights) -> LocalEdit:
    """The maps between a reference block's text states and those of a block whose text stream is gone.

    Both map the teacher's own states, as the student's own blocks modulate them; through the block, the map of keys
    and values also learns what the image stream needs of it.
    """
    between = [b for b in plan.kept if edit.reference < b <= edit.block]
    own, end = _around(teaching, plan, [edit.reference, edit.block], text_stream=between)
    reference_end = i.last if (i := plan.interval_at(edit.reference)) else edit.reference
    # Where the class computes no text after its last block, that block's map of the text output is not there.
    silent = teaching.family.text_end == "none" and end == plan.num_blocks - 1
    modules = teaching.group(edit.block).text_modules[: 1 if silent else None]

    def loss(module: nn.Module, batch: BatchStates) -> Terms:
        source, target = batch.states[edit.reference][TEXT_INPUT], batch.states[edit.block][TEXT_INPUT]
        carried = torch.cat([batch.states[reference_end + 1]["text"], source], dim=-1)
        output = teaching.call(module, edit.block, {"image": batch.states[edit.block]["image"], "text": carried}, batch.shared)
        after = batch.states[end + 1]
        terms = {"image": state_loss(output["image"], after["image"], weights.magnitude, weight=weights.image)}
        if not silent:
            terms["text"] = weights.text * relative_error(output["text"], after["text"], batch.mask)
        return terms | {
            "text_input": weights.maps * relative_error(module.get_submodule(modules[0])(source), target, batch.mask),
        }

    return LocalEdit(
        key=plan.text_key(edit.block),
        stops=tuple(sorted({edit.reference, reference_end + 1, edit.block, end + 1})),
        text_inputs=(edit.reference, edit.block),
        build=lambda: _learning(teaching.block(own, edit.block, bank), modules),
        loss=loss,
        tensors=lambda state: {k: v for k, v in state.items() if k.split(".")[0] in modules},
        stands_on=(*_below(plan, edit.reference), *_below(plan, edit.block)),
    )


def width_edits(teaching: Teaching, plan: CompressionPlan, bank: Bank, weights: Weights) -> list[LocalEdit]:
    """Every text-stream and feed-forward edit of a plan. `bank` holds their starts and the intervals' blocks."""
    text = [text_edit(teaching, plan, edit, bank, weights) for edit in plan.text_stream]
    return text + [ffn_edit(teaching, plan, edit, bank, weights) for edit in plan.ffn]


def _below(plan: CompressionPlan, block: int) -> tuple[str, ...]:
    """The key of the interval that starts at a block, if one does."""
    interval = plan.interval_at(block)
    return (plan.interval_key(interval),) if interval else ()


def _around(teaching: Teaching, plan: CompressionPlan, blocks: Sequence[int], **edits: Any) -> tuple[CompressionPlan, int]:
    """The plan of some edits with the intervals that start at these blocks or lie between, and the end of the last block's."""
    inside = [i for i in plan.intervals if min(blocks) <= i.first <= max(blocks)]
    last = max(blocks)
    return teaching.plan(plan, inside, **edits), (i.last if (i := plan.interval_at(last)) else last)


def _learning(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """The module with nothing but these parts of it learning."""
    module.requires_grad_(False)
    for name in names:
        module.get_submodule(name).requires_grad_(True)
    return module
