"""References that the package is held against: a whole forward with every state kept, and blocks exchanged within a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ppclc.families import STREAMS, Family, Group, States
from ppclc.models import _Passed, blocks_of, groups_of


@dataclass
class Trace:
    """What one forward of a model passed through.

    `states[s][i]` is stream s at the input of block i, `states[s][-1]` at the last block's output, each
    (B, tokens, D); `temb` is the time embedding, where all modulation comes from one; `shared[i]` are the keyword
    arguments that block i gets besides. `mids[s][i]`, where asked for, is stream s in block i after the attention
    residual, (B, tokens, D), None where the block has no network of that stream that could be made linear.
    """

    velocity: torch.Tensor
    states: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    temb: torch.Tensor | None = None
    shared: list[Mapping[str, Any]] = field(default_factory=list)
    mids: dict[str, list[torch.Tensor | None]] = field(default_factory=dict)


class _EnoughError(Exception):
    """Raised inside a forward that has gone far enough."""


def trace(model: Any, family: Family, inputs: Mapping[str, Any], last: int | None = None, mids: bool = False) -> Trace:
    """Run a stock model once and keep every block's states; with `last`, no further than that block.

    With `mids`, the states between attention and feed-forward networks as well.
    """
    config, end = model.config, None if last is None else last + 1
    blocks, groups = blocks_of(model, family)[:end], groups_of(model, family)[:end]
    seen = Trace(velocity=torch.empty(0), states={s: [] for s in STREAMS}, mids={s: [] for s in _ffn_streams(family)} if mids else {})

    def before(number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = seen.states["text"][-1].shape[1] if number else None
        states, shared = groups[number].given(args, kwargs, tokens)
        for stream in STREAMS:
            seen.states[stream].append(states[stream].detach())
        seen.shared.append(shared)
        for stream, kept in seen.mids.items():
            if stream not in family.ffn_streams(config, number):
                kept.append(None)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for stream, value in groups[-1].states_of(output, {s: v[-1] for s, v in seen.states.items()}).items():
            seen.states[stream].append(value.detach())
        if last is not None:
            raise _EnoughError

    def embedded(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        seen.temb = output.detach()

    hooks = [b.register_forward_pre_hook(partial(before, n), with_kwargs=True) for n, b in enumerate(blocks)]
    for stream, states in seen.mids.items():
        for number, (group, block) in enumerate(zip(groups, blocks, strict=True)):
            if stream in family.ffn_streams(config, number):
                hooks.append(block.get_submodule(group.ffn_inputs[stream]).register_forward_pre_hook(_keeper(states)))
    hooks.append(blocks[-1].register_forward_hook(after))
    if family.time_embedding:
        hooks.append(model.get_submodule(family.time_embedding).register_forward_hook(embedded))
    try:
        with torch.no_grad():
            seen.velocity = model(**inputs, return_dict=False)[0]
    except _EnoughError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _ffn_streams(family: Family) -> list[str]:
    return [s for s in STREAMS if any(s in g.ffn_inputs for g in family.groups)]


def _keeper(kept: list[Any]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that adds a module's first argument to a list."""

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        kept.append(args[0].detach())

    return keep


class StandIn(nn.Module):
    """A function of (states by stream) that stands where a block stood. `text_tokens` is set where streams are joined."""

    text_tokens: int | None = None

    def __init__(self, group: Group, function: Callable[[States], Mapping[str, torch.Tensor]]) -> None:
        super().__init__()
        self.group, self.function = group, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.group.output(self.function(self.group.given(args, kwargs, self.text_tokens)[0]))


@contextmanager
def replaced(model: Any, family: Family, stand_ins: Mapping[int, nn.Module | None]) -> Iterator[None]:
    """The model with blocks exchanged for stand-ins, or passed by (None); put back afterwards. Others keep their numbers."""
    lists = {g.path: model.get_submodule(g.path) for g in family.groups}
    groups = groups_of(model, family)
    placed = {n: _Passed(groups[n]) if m is None else m for n, m in stand_ins.items()}
    first, hooks = 0, []
    for path, original in lists.items():
        model.set_submodule(path, nn.ModuleList(placed.get(first + n, block) for n, block in enumerate(original)))
        first += len(original)
    joined = [m for m in placed.values() if isinstance(m, StandIn) and m.group.joined]
    if joined:
        hooks.append(model.register_forward_pre_hook(partial(_tell_text_tokens, family, joined), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for path, original in lists.items():
            model.set_submodule(path, original)


def _tell_text_tokens(family: Family, stand_ins: Sequence[StandIn], _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    for stand_in in stand_ins:
        stand_in.text_tokens = family.text_tokens(kwargs)


@contextmanager
def linear_ffns(model: Any, family: Family, maps: Mapping[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """The stock model with `h + (W h + b)` in place of feed-forward networks; undone afterwards.

    `maps` gives W (D, D) and b (D,) by block and stream. Nothing is saved: the networks still run, and
    their result is not used. May stand around `replaced`, whose stand-ins are left alone, not inside it.
    """
    blocks, groups, hooks = blocks_of(model, family), groups_of(model, family), []
    for (block, stream), (weight, bias) in maps.items():
        mids: list[torch.Tensor] = []
        after = _linear_output(mids, groups[block].outputs.index(stream), weight, bias)
        hooks.append(blocks[block].get_submodule(groups[block].ffn_inputs[stream]).register_forward_pre_hook(_keeper(mids)))
        hooks.append(blocks[block].register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _linear_output(
    mids: list[torch.Tensor], place: int, weight: torch.Tensor, bias: torch.Tensor
) -> Callable[[nn.Module, tuple[Any, ...], tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    """A hook that puts the linear network's result at one place of a block's output, from the state kept in `mids`."""

    def after(_: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        mid = mids.pop()
        mids.clear()
        result = mid + nn.functional.linear(mid, weight.to(mid), bias.to(mid))
        return (*output[:place], result, *output[place + 1 :])

    return after
