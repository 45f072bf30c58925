"""Linear feed-forward networks of distilled blocks, in closed form: fitted to what the teacher's interval gives, once the block is trained.

Before it, a map can only start from the interval's first block, whose network the student block no longer has:
see docs/decisions/006-linear-ffn.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ppclc.families import Bank
from ppclc.ffn_maps import FfnMoments, ffn_map
from ppclc.local_edits import Teaching
from ppclc.models import run_block
from ppclc.plan import CompressionPlan, FfnEdit
from ppclc.samples import Sample
from ppclc.teachers import Teacher


def refitted_ffns(
    teacher: Teacher, teaching: Teaching, plan: CompressionPlan, bank: Bank, samples: Sequence[Sample], ridge: float
) -> dict[str, dict[str, torch.Tensor]]:
    """By key, `weight` and `bias` of every linear network on an interval's student block, by ridge least squares over the samples.

    `mid` is the student block's state after its attention residual, and what is to be added is what then is
    missing to the teacher's output of the interval.
    """
    edits = [(e, i) for e in plan.ffn if (i := plan.interval_at(e.block))]
    if not edits:
        return {}
    blocks = {i: teaching.block(teaching.plan(plan, [i]), i.first, bank).to(teacher.device) for _, i in edits}
    moments = {(i, e.stream): FfnMoments() for e, i in edits}
    stops = {s for _, i in edits for s in (i.first, i.last + 1)}
    masks = [sample[2].get("encoder_hidden_states_mask") for sample in samples]
    for stop, sweep in teacher.sweep(samples, stops):
        for edit, interval in edits:
            if interval.last + 1 != stop:
                continue
            for n, mask in enumerate(masks):
                mid = _mid(blocks[interval], teaching, edit, sweep.states[interval.first][n], sweep.shared[n])
                target = sweep.states[stop][n][edit.stream]
                moments[interval, edit.stream].add(edit.stream, [mid], [target], mask if edit.stream == "text" else None)
    return {plan.ffn_key(e.block, e.stream): _solved(moments[i, e.stream], e.stream, ridge) for e, i in edits}


def _solved(moments: FfnMoments, stream: str, ridge: float) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in ffn_map(moments.tensors, moments.rows, 0, stream, ridge).items()}


@torch.no_grad()
def _mid(block: nn.Module, teaching: Teaching, edit: FfnEdit, states: dict[str, torch.Tensor], shared: dict[str, Any]) -> torch.Tensor:
    """A block's state of one stream after the attention residual, (B, tokens, D)."""
    seen: list[torch.Tensor] = []
    hook = block.get_submodule(teaching.family.ffn_inputs[edit.stream]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        run_block(block, teaching.family, states, shared)
    finally:
        hook.remove()
    return seen[0]
