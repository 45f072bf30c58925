"""Models whose weights stay in their files: mapped into memory, read where something looks at them, and moved as bytes into an artefact."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppclc.loading.checkpoints import Made, Piece, Place, places_in, write_file
from ppclc.loading.classes import DTYPES, empty_model
from ppclc.loading.sources import Source
from ppclc.loading.weight_files import WeightFiles


def can_be_mapped(source: Source) -> bool:
    """Whether every tensor of a model lies in its files as it is, whatever its dtype: not those of a layout that is computed."""
    return source.layout is None or bool(source.layout.cuts)


def mapped_model(source: Source, dtype: str, scratch: Path) -> tuple[Any, dict[str, Place]]:
    """The model in evaluation mode, its parameters mapped from files, and where each of them lies.

    Tensors that are stored in another dtype, or in another order, are written to `scratch` first, one in memory at a time, and
    mapped from there; it must stay as long as the model is used. Values are checked to be finite, which reads them once.

    Raises:
        ModelError: a file that is not whole, a tensor missing, extra, of a wrong shape, or not finite.
        UnavailableError: the disk is full.
    """
    model = empty_model(source.family, source.config, str(source.folder / "config.json"))
    files = WeightFiles(source, DTYPES[dtype], torch.device("cpu"))
    files.check({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    pieces = {name: _as_wanted(files, name) for name in files}
    places = {name: piece for name, piece in pieces.items() if isinstance(piece, Place)}
    for name in places:
        files[name]  # finite, or told here
    if made := {name: piece for name, piece in pieces.items() if not isinstance(piece, Place)}:
        write_file(scratch, made)
        places |= places_in(scratch)
    files_mapped = {file: np.memmap(file, np.uint8, "r") for file in {place.file for place in places.values()}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # nor is it to be
        model.load_state_dict({name: _view(files_mapped[place.file], place) for name, place in places.items()}, strict=True, assign=True)
    return model.eval().requires_grad_(False), places


def _as_wanted(files: WeightFiles, name: str) -> Piece:
    """A tensor's place in its file where it can be mapped from there, else how to make it."""
    place = files.places[name]
    if place.dtype == files.dtype and not place.swapped and place.start % place.dtype.itemsize == 0:
        return place
    return Made(files.dtype, place.shape, lambda: files[name])


def _view(mapped: Any, place: Place) -> torch.Tensor:
    """A tensor on mapped bytes, which are read-only: to write to it ends the process."""
    return torch.frombuffer(mapped, dtype=place.dtype, count=math.prod(place.shape), offset=place.start).view(place.shape)


def store(places: Mapping[str, Place], path: Path) -> dict[str, tuple[int, int]]:
    """Write tensors to one safetensors file; by name the byte at which each starts and how many it has.

    Bytes never pass through this process where the system can move them.
    """
    write_file(path, places)
    return {name: (place.start, place.bytes) for name, place in places_in(path).items()}
