"""Where an artefact leaves eager: the first block whose states differ, and the operator in it that is furthest off."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ppclc.families import Family, Lowered
from ppclc.lowering import REL_L2, parity
from ppclc.records import Parity

RELATIVE = {"float32": 1e-4, **REL_L2}
"""Largest relative distance of a state by dtype: states are large, so that float32 has no absolute limit within a model."""
Tensors = dict[str, torch.Tensor]
Runs = Callable[[nn.Module, Tensors, Sequence[str]], list[torch.Tensor]]
"""Lowers a module with taps of these names, runs what was written, and gives all of its outputs."""


@dataclass(frozen=True)
class Differing:
    """A module whose output differs: its path in the model, its class, and by how much."""

    path: str
    kind: str
    distance: Parity
    finite: bool

    def __str__(self) -> str:
        what = f"relative L2 {self.distance.rel_l2:.3g}" if self.finite else "not finite"
        return f"{self.path} ({self.kind}, {what})"


@dataclass(frozen=True)
class Divergence:
    """The first block that differs by more than its dtype may, by its number among all blocks, and the worst operator in it."""

    block: int
    place: Differing
    operator: Differing | None

    def __str__(self) -> str:
        within = f", there {self.operator}" if self.operator else ""
        return f"block {self.block} is the first that differs: {self.place}{within}"


class Tapped(nn.Module):
    """A module that gives, beside its own output, those of some of its parts, in the order in which they are made.

    names: of the taps, `path.n` where a part gives several tensors; known once an example was run. Its forward has the module's own arguments.
    """

    def __init__(self, module: nn.Module, paths: Sequence[str]) -> None:
        super().__init__()
        self.module, self.paths = module, tuple(paths)
        self.names: tuple[str, ...] = ()

        @functools.wraps(module.forward)
        def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            with _recorded(self.module, self.paths) as found:
                out = self.module(*args, **kwargs)
            self.names = tuple(found)
            return (out, *found.values())

        self.forward = forward


@contextmanager
def _recorded(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """What parts of a module give while the block runs, by path; a part that is called twice counts with its last call."""
    found: dict[str, torch.Tensor] = {}

    def note(path: str, output: Any) -> None:
        parts = output if isinstance(output, tuple | list) else [output]
        tensors = [p for p in parts if isinstance(p, torch.Tensor) and p.is_floating_point()]
        for number, tensor in enumerate(tensors):
            found[path if len(tensors) == 1 else f"{path}.{number}"] = tensor

    hooks = [module.get_submodule(path).register_forward_hook(lambda _m, _args, output, path=path: note(path, output)) for path in paths]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def block_paths(family: Family, config: Mapping[str, Any]) -> list[str]:
    """Paths of all blocks within a lowered module, in forward order."""
    places = [family.place(config, block) for block in range(family.num_blocks(config))]
    return [f"model.{group.path}.{number}" for group, number in places]


def first_divergence(lowered: Lowered, blocks: Sequence[str], inputs: Tensors, dtype: str, run: Runs) -> Divergence | None:
    """Where what a back end wrote leaves eager on these inputs, which it is found out by lowering twice with taps; None where no block does.

    blocks: as `block_paths` gives them.
    """
    for path, place in _differing(lowered.module, blocks, inputs, dtype, run):
        number = next(n for n, block in enumerate(blocks) if path == block or path.startswith(f"{block}."))
        block = lowered.module.get_submodule(blocks[number])
        parts = [f"{blocks[number]}.{name}" for name, part in block.named_modules() if name and not any(part.children())]
        operators = [found for _, found in _differing(lowered.module, parts, inputs, dtype, run)]
        lost = [p for p in operators if not p.finite]
        worst = lost[0] if lost else max(operators, key=lambda p: p.distance.rel_l2, default=None)
        return Divergence(number, place, worst)
    return None


def _differing(module: nn.Module, paths: Sequence[str], inputs: Tensors, dtype: str, run: Runs) -> Iterator[tuple[str, Differing]]:
    """Parts whose outputs differ by more than the dtype may, in their order."""
    tapped = Tapped(module, paths)
    with torch.no_grad():
        wanted = tapped(**inputs)[1:]
    got = run(tapped, inputs, tapped.names)[1:]
    for name, reference, output in zip(tapped.names, wanted, got, strict=True):
        distance = parity(reference.float(), output.float())
        if not distance.rel_l2 <= RELATIVE[dtype] or not bool(torch.isfinite(reference).all()):
            path = name if name in paths else name.rpartition(".")[0]
            kind = type(module.get_submodule(path)).__name__
            finite = bool(torch.isfinite(output).all() and torch.isfinite(reference).all())
            yield path, Differing(path.removeprefix("model."), kind, distance, finite)


def overflow(lowered: Lowered, inputs: Tensors) -> str | None:
    """The first part of the eager module whose output is not finite on these inputs, by path and class; None where all are."""
    found: list[str] = []

    def note(name: str, part: nn.Module, output: Any) -> None:
        tensors = output if isinstance(output, tuple | list) else [output]
        if not found and any(isinstance(t, torch.Tensor) and not bool(torch.isfinite(t).all()) for t in tensors):
            found.append(f"{name.removeprefix('model.') or 'the output'} ({type(part).__name__})")

    parts = list(lowered.module.named_modules())
    hooks = [part.register_forward_hook(lambda part, _args, output, name=name: note(name, part, output)) for name, part in parts]
    try:
        with torch.no_grad():
            lowered.module(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
