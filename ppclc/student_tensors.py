"""Where every tensor of a student comes from: the teacher, the bank, or both. One rule for all families, by their data.

Shape suffixes: D width, R modulation rank, K chunks of a modulation times D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ppclc.errors import PlanError
from ppclc.families import Bank, Family, Modulation, Part, Tensors
from ppclc.plan import CompressionPlan
from ppclc.students.parts import TextRole, text_roles

ROWS = 512
"""Rows of a modulation that are projected in one go."""
ADAPTERS = ("image_adapter", "text_adapter")
"""Modules in front of a block, named by their stream."""


def student_config(family: Family, config: Mapping[str, Any], plan: CompressionPlan) -> dict[str, Any]:
    """Constructor arguments of the student.

    Raises:
        PlanError: an edit that this family or this block cannot take; a modulation rank above the width.
    """
    check_edits(family, config, plan)
    kept = [family.place(config, block)[0] for block in plan.kept]
    edited = {k: v for k, v in config.items() if not k.startswith("_")}
    edited |= {g.count_key: sum(g is own for own in kept) for g in family.groups}
    edited |= family.renumbered(config, plan)
    if plan.has_width_edits:
        edited["modulation_rank"] = plan.modulation_rank
        edited["mapped_text_blocks"] = [plan.student_block(e.block) for e in plan.text_stream]
        if family.has_dead_code:
            edited["dead_code"] = plan.dead_code
    if plan.ffn:
        for stream in ("image", "text"):
            edited[f"linear_ffn_{stream}_blocks"] = [plan.student_block(e.block) for e in plan.ffn if e.stream == stream]
    if plan.adapters:
        edited["adapted_blocks"] = [plan.student_block(i.first) for i in plan.adapters]
    return edited


def check_edits(family: Family, config: Mapping[str, Any], plan: CompressionPlan) -> None:
    """Raise PlanError for an edit that this family or this block cannot take."""
    width = int(config["attention_head_dim"]) * int(config["num_attention_heads"])
    for interval in plan.intervals:
        groups = [family.place(config, block)[0] for block in (interval.first, interval.last)]
        if groups[0] is not groups[1]:
            raise PlanError(
                f"plan.intervals: got {[interval.first, interval.last]}, whose blocks are of {groups[0].name} and of {groups[1].name}: "
                "wanted blocks of one group"
            )
    for interval in plan.adapters:
        group, _ = family.place(config, interval.first)
        if not group.adapters:
            raise PlanError(
                f"plan.adapters: got {[interval.first, interval.last]}: blocks of {group.name} in {family.name} join their streams and take "
                "no adapters; wanted it left out"
            )
    if plan.dead_code and not family.has_dead_code:
        raise PlanError(f"plan.dead_code = true: wanted false: nothing in {family.name} goes unread")
    if plan.has_width_edits and not family.student_class:
        raise PlanError(f"plan: got edits that change the class, wanted intervals alone: {family.name} takes no others")
    if plan.modulation_rank is not None and not family.modulations:
        raise PlanError(
            f"plan.modulation_rank = {plan.modulation_rank}: wanted none: {family.name} has no modulation that it would make smaller"
        )
    if (plan.modulation_rank or 0) > width:
        raise PlanError(f"plan.modulation_rank = {plan.modulation_rank}: wanted at most the width, {width}")
    for text in plan.text_stream:
        if text.block not in (there := family.text_blocks(config)):
            wanted = f"a block of {there.start}..{there.stop - 1}" if len(there) else "none"
            raise PlanError(f"plan.text_stream: block {text.block} of {family.name} has no text stream of its own; wanted {wanted}")
    for edit in plan.ffn:
        if edit.stream not in family.ffn_streams(config, edit.block):
            raise PlanError(
                f"plan.ffn: block {edit.block}, {edit.stream}: {family.name} has no such network to replace there; wanted it left out"
            )
        if edit.stream == "text" and not role(family, config, plan, edit.block).emits_text:
            raise PlanError(
                f"plan.ffn: block {edit.block}, text: this is the last block that reads text, so dead_code removes its feed-forward "
                "network already; wanted this edit left out, or dead_code: false"
            )


def role(family: Family, config: Mapping[str, Any], plan: CompressionPlan, block: int) -> TextRole:
    """What a kept block of the group whose text streams may go does with text."""
    there = family.text_blocks(config)
    kept = [b for b in plan.kept if b in there]
    mapped = [kept.index(e.block) for e in plan.text_stream]
    return text_roles(len(kept), mapped, last_emits(family, plan))[kept.index(block)]


def last_emits(family: Family, plan: CompressionPlan) -> bool:
    """Whether the last block with a text stream computes a text state."""
    return {"read": True, "dead": not plan.dead_code, "none": False}[family.text_end]


def student_tensor(
    family: Family, config: Mapping[str, Any], plan: CompressionPlan, name: str, teacher: Tensors, bank: Bank
) -> torch.Tensor:
    """One tensor of the student by its full name, from the teacher's tensors and the bank. `config` is the teacher's.

    Raises:
        PlanError: the bank lacks the maps or the basis that the plan needs.

    A distilled block's tensors of a feed-forward network that is linear in the student are not read, nor a text
    adapter where text is mapped. Adapters that the bank lacks are the identity.
    """
    if family.basis_module and name.startswith(f"{family.basis_module}."):
        basis, mean = _basis(plan, bank)
        return basis.T.contiguous() if name.endswith("weight") else -(basis.T @ mean)
    place = family.block_of(student_sizes(family, config, plan), name)
    if place is None:
        linear, _, kind = name.rpartition(".")
        if family.modulated_outside and linear in family.modulations and plan.has_width_edits:
            return _modulation(kind, plan, teacher, linear, bank)
        return teacher[name]  # type: ignore[no-any-return]
    number, part = place
    block = plan.kept[number]
    group, _ = family.place(config, block)
    module = part.split(".")[0]
    if module in group.text_modules:
        return _from_bank(bank, plan.text_key(block))[part]  # type: ignore[no-any-return]
    for stream, name_of_map in group.ffn_modules.items():
        if module == name_of_map:
            return _from_bank(bank, plan.ffn_key(block, stream))[part.removeprefix(f"{module}.")]  # type: ignore[no-any-return]
    interval = plan.interval_at(block)
    source = bank.get(plan.interval_key(interval)) if interval else None
    if source is None:
        if module in ADAPTERS:
            width = int(config["attention_head_dim"]) * int(config["num_attention_heads"])
            return torch.eye(width) if part.endswith("weight") else torch.zeros(width)
        source = Part(teacher, family.prefix(config, block))
    linear, _, kind = part.rpartition(".")
    if not family.modulated_outside and linear in family.modulations:
        return _modulation(kind, plan, source, linear, bank, chunks_left(family, config, plan, block, family.modulations[linear]))
    return source[part]  # type: ignore[no-any-return]


def student_sizes(family: Family, config: Mapping[str, Any], plan: CompressionPlan) -> dict[str, int]:
    """Blocks of a student by group, as its configuration counts them."""
    kept = [family.place(config, block)[0] for block in plan.kept]
    return {g.count_key: sum(g is own for own in kept) for g in family.groups}


def chunks_left(
    family: Family, config: Mapping[str, Any], plan: CompressionPlan, block: int, modulation: Modulation
) -> Callable[[int], Iterable[int]]:
    """Of so many chunks of a modulation those that a student's block has, in its order."""
    if modulation.stream == "text" and block in family.text_blocks(config) and not role(family, config, plan, block).emits_text:
        return lambda count: modulation.input if count > len(modulation.input) else range(count)
    linear = any(e.block == block and e.stream == modulation.stream for e in plan.ffn)
    return lambda count: [n for n in range(count) if not (linear and n in modulation.ffn)]


def _modulation(
    kind: str, plan: CompressionPlan, source: Tensors, linear: str, bank: Bank, chunks: Callable[[int], Iterable[int]] = range
) -> torch.Tensor:
    """Weight (K, D or R) or bias (K,) of a modulation, of the chunks that are left and of the plan's rank."""
    weight: torch.Tensor = source[f"{linear}.weight"]
    bias: torch.Tensor | None = source.get(f"{linear}.bias")
    width = weight.shape[1]
    count = len(weight) // width
    left = list(chunks(count))

    def cut(x: torch.Tensor) -> torch.Tensor:
        return x if left == list(range(count)) else torch.cat([x[n * width : (n + 1) * width] for n in left])

    weight, bias = cut(weight), None if bias is None else cut(bias)
    if plan.modulation_rank is None:
        return weight if kind == "weight" or bias is None else bias
    basis, mean = (x.to(weight.device) for x in _basis(plan, bank))
    # Rows at a time: a weight may be large, and the basis' dtype wide.
    onto = basis if kind == "weight" else mean
    shift = torch.empty((len(weight), *onto.shape[1:]), dtype=onto.dtype, device=weight.device)
    for first in range(0, len(weight), ROWS):
        shift[first : first + ROWS] = weight[first : first + ROWS].to(basis.dtype) @ onto
    if kind == "weight":
        return shift
    return shift if bias is None else shift + bias.to(basis.dtype)


def _basis(plan: CompressionPlan, bank: Bank) -> tuple[torch.Tensor, torch.Tensor]:
    parts = _from_bank(bank, "modulation")
    if plan.modulation_rank is None or plan.modulation_rank > len(parts["mean"]):
        raise PlanError(f"plan.modulation_rank = {plan.modulation_rank}: wanted at most the width, {len(parts['mean'])}")
    return parts["basis"][:, : plan.modulation_rank], parts["mean"]


def _from_bank(bank: Bank, key: str) -> Tensors:
    if key not in bank:
        raise PlanError(f"the bank holds no {key!r}, which this plan needs; it has {', '.join(sorted(bank)) or 'nothing'}")
    return bank[key]
