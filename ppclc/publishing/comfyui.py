"""Students in one file that ComfyUI loads, beside the folder that diffusers loads.

Their names have no prefix: ComfyUI's loader of diffusion models takes them as they are, and finds family and number of blocks
by them. Source: `comfy/model_detection.py` and `load_diffusion_model_state_dict` in `comfy/sd.py` of github.com/comfyanonymous/ComfyUI.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ppclc.errors import ModelError, PlanError
from ppclc.families import Family, SingleFile, with_single_file
from ppclc.loading.checkpoints import Made, Piece, Place, held, read_at, write_file
from ppclc.loading.single_files import cuts_of, halves_swapped, stacked, stacked_shapes
from ppclc.loading.sources import Source, open_source
from ppclc.loading.weight_files import WeightFiles
from ppclc.plan import CompressionPlan
from ppclc.records import disk_errors

FOLDER = "comfyui"


def check_layout(family: Family, plan: CompressionPlan) -> SingleFile:
    """The family's single file. Raises PlanError where ppclc knows none, and for a student of a class that ComfyUI has not."""
    if family.single_file is None:
        known = ", ".join(sorted(f.name for f in with_single_file()))
        raise PlanError(f"--comfyui: no file for ComfyUI is known of {family.name}, wanted one of {known}; slice without it")
    if family.class_of(plan) != family.class_name:
        raise PlanError(
            "--comfyui: the plan has edits that change the class, which ComfyUI has not: wanted intervals alone, without adapters; "
            "slice without it, or with a plan whose text_stream, ffn and adapters are empty, modulation_rank null and dead_code false"
        )
    return family.single_file


def write_single_file(folder: Path, path: Path) -> Path:
    """The file at `path` with the transformer in a folder, written whole or not at all, a tensor at a time.

    Bits are those of the folder's files; tensors that are one there are stacked.

    Raises:
        ModelError: a folder of no family that has such a file, of an edited student, or with dtypes mixed within one stack.
    """
    source = open_source(str(folder))
    layout = source.family.single_file
    if layout is None or source.family.is_edited(source.config) or source.folder.is_file():
        raise ModelError(f"{folder}: wanted the folder of a stock model of {', '.join(f.name for f in with_single_file())}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.parent / f".{path.name}.draft"
        try:
            write_file(draft, _pieces(source, layout))
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    return path


def _pieces(source: Source, layout: SingleFile) -> dict[str, Piece]:
    """Tensors of the file: bytes that are moved as they lie, and those that are put together when their turn comes."""
    places = WeightFiles(source, torch.float32, torch.device("cpu")).places
    ours = {name: place.shape for name, place in places.items()}
    cuts = cuts_of(layout, ours)
    shapes, pieces = stacked_shapes(cuts, ours), dict[str, Piece]()
    for theirs, names in stacked(cuts).items():
        parts = [(places[name], cuts[name].swapped) for name in names]
        if len(parts) == 1 and not parts[0][1]:
            pieces[theirs] = parts[0][0]
        else:
            kind, shape = _dtype(theirs, [place for place, _ in parts]), tuple(shapes[theirs])
            pieces[theirs] = Made(kind, shape, partial(_joined, parts, kind, shape))
    return pieces | {name: held(torch.empty(0)) for name in layout.markers(source.config)}


def _joined(parts: Sequence[tuple[Place, bool]], kind: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """One tensor of several; a part at a time is read."""
    whole, first = torch.empty(shape, dtype=kind), 0
    for place, swapped in parts:
        rows = whole[first : first + place.shape[0]]
        rows.copy_(halves_swapped(read_at(place), swapped))
        first += len(rows)
    return whole


def _dtype(theirs: str, places: list[Place]) -> torch.dtype:
    found = {place.dtype for place in places}
    if len(found) > 1:
        raise ModelError(
            f"{places[0].file}: tensors that are one in {theirs} are of {', '.join(sorted(map(str, found)))}, wanted one dtype"
        )
    return found.pop()
