"""Transformers in one safetensors file, as ComfyUI has them: told by their tensors, never by the file's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ppclc import families
from ppclc.errors import ModelError
from ppclc.families import Cut, Family, Layout, Shapes, SingleFile, Tensors

FOREIGN = ("first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "conditioner.")
"""What names of other parts begin with in a checkpoint that holds a whole pipeline."""
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""What names begin with: in whole checkpoints, in some exports, and where there is nothing but the transformer."""
QUANTIZED = ("scaled_fp8", ".scale_weight", ".scale_input", ".weight_scale", ".input_scale", ".weight_scale_2", ".comfy_quant", ".absmax")
"""Ends of names of what belongs to weights that are not stored as they are."""


@dataclass(frozen=True)
class Found:
    """What a file is: its family, what its names begin with, our configuration, and names that are of no concern here."""

    family: Family
    prefix: str
    config: dict[str, Any]
    others: tuple[str, ...]


def recognise(shapes: Shapes, where: str) -> Found:
    """What a file with these tensors is.

    Raises:
        ModelError: of no layout that a family knows, quantized, or without the tensors that tell its sizes.
    """
    known = families.with_single_file()
    for prefix in PREFIXES:
        there = {name: shape for name, shape in shapes.items() if name.startswith(prefix) and not name.startswith(FOREIGN)}
        own = {name.removeprefix(prefix): shape for name, shape in there.items()}
        family = next((f for f in known if f.single_file and f.single_file.applies(own)), None)
        if family is None or family.single_file is None:
            continue
        if scaled := sorted(name for name in own if name.endswith(QUANTIZED)):
            raise ModelError(
                f"{where}: is quantized, {scaled[0]} is a scale of its weights; wanted the weights themselves, bfloat16 or float16"
            )
        try:
            config = family.single_file.config(own)
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            raise ModelError(f"{where}: looks like {family.name}, but {error} is missing or of no such shape; fetch it again") from None
        return Found(family, prefix, {"_class_name": family.class_name, **config}, tuple(sorted(shapes.keys() - there.keys())))
    raise ModelError(
        f"{where}: its tensors are of no single file that ppclc reads: wanted {' or '.join(sorted(f.name for f in known))} under the names "
        "that ComfyUI loads; a model in diffusers' layout is given by its folder, with config.json"
    )


def cuts_of(layout: SingleFile, ours: Shapes) -> dict[str, Cut]:
    """Where each tensor of ours lies in a single file."""
    stacks: dict[str, list[tuple[int, str]]] = {}
    for name in ours:
        theirs, number = layout.place(name)
        stacks.setdefault(theirs, []).append((number, name))
    cuts = {}
    for theirs, stack in stacks.items():
        first = 0
        for _, name in sorted(stack):
            last = first + (ours[name][0] if ours[name] else 0)
            cuts[name] = Cut(theirs, first, last, theirs in layout.swapped)
            first = last
    return cuts


def stacked(cuts: Mapping[str, Cut]) -> dict[str, list[str]]:
    """Names of ours by their names there, in the order of rows."""
    stacks: dict[str, list[str]] = {}
    for name in sorted(cuts, key=lambda n: cuts[n].first):
        stacks.setdefault(cuts[name].name, []).append(name)
    return stacks


def stacked_shapes(cuts: Mapping[str, Cut], ours: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes by their names there."""
    return {theirs: (cuts[names[-1]].last, *ours[names[0]][1:]) for theirs, names in stacked(cuts).items()}


def layout_of(found: Found, cuts: Mapping[str, Cut]) -> Layout:
    """How a file of that kind is read."""
    there = {name: Cut(found.prefix + cut.name, cut.first, cut.last, cut.swapped) for name, cut in cuts.items()}

    def tensor(name: str, _: Mapping[str, Any], tensors: Tensors) -> torch.Tensor:
        cut = there[name]
        return halves_swapped(tensors[cut.name][cut.first : cut.last], cut.swapped).clone()

    return Layout(lambda _: False, lambda config: dict(config), tensor, lambda name, _: True, there)


def halves_swapped(tensor: torch.Tensor, swapped: bool = True) -> torch.Tensor:
    """A tensor with its two halves of rows in the other order, where asked for."""
    return torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor
