"""Weights where they lie: the tensors of a model's safetensors files, each read when it is asked for.

Files are read, not mapped. Pages of a mapped file count as the process's own memory for as long as the
mapping lives, so that a model larger than memory would seem, and under a limit be, as large as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ppclc.errors import ModelError
from ppclc.families import Cut
from ppclc.models import Source, compare_tensors, stored_shapes
from ppclc.records import STORED_AS
from ppclc.single_files import halves_swapped

STATES = {name: getattr(torch, dtype) for dtype, name in STORED_AS.items()}
"""Dtypes of the safetensors format, all of which the state of a training may have."""
STORED = {name: dtype for name, dtype in STATES.items() if dtype.is_floating_point}
"""Those that weights may have."""


class Place(NamedTuple):
    """Where a tensor lies: its file, the byte at which it starts, and what it is; `swapped`: its halves of rows stand in the other order."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    swapped: bool = False


class WeightFiles(Mapping[str, torch.Tensor]):
    """Every tensor of a model by its full name, in one dtype, on one device; each access reads a new copy.

    Raises:
        ModelError: a file is not whole, or holds another dtype than weights have. On access: values that
        are not finite in the wanted dtype, or a file that became shorter.
    """

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.dtype, self.device = source.folder, dtype, device
        self.places: dict[str, Place] = {}
        cuts = source.layout.cuts if source.layout else {}
        for file in source.weight_files():
            self.places |= places_in(file, STATES if cuts else STORED)
        if cuts:
            self.places = {name: _place_of(cut, self.places[cut.name]) for name, cut in cuts.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name, torch.empty(self.places[name].shape, dtype=self.dtype, device=self.device))

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Nothing when the headers hold just these names and shapes. Raises ModelError naming the first that is not so."""
        compare_tensors(self.folder, expected, {name: place.shape for name, place in self.places.items()})

    def read(self, name: str, out: torch.Tensor) -> torch.Tensor:
        """`out`, contiguous and of the tensor's shape, with its values.

        No other memory is taken where dtype and device are those of the file, else that of this one tensor.
        """
        place = self.places[name]
        direct = out.dtype == place.dtype and out.device.type == "cpu"
        stored = out if direct else torch.empty(place.shape, dtype=place.dtype)
        _fill(stored, place)
        if not direct or place.swapped:
            out.copy_(halves_swapped(stored, place.swapped))
        # The extremes tell NaN and infinity alike, and take no memory of the tensor's size.
        if out.numel() and not all(bool(torch.isfinite(v)) for v in torch.aminmax(out)):
            raise ModelError(f"{place.file}: tensor {name} holds NaN or infinite values, wanted finite ones; fetch the model again")
        return out


def _fill(tensor: torch.Tensor, place: Place) -> None:
    """Read a tensor's bytes into its memory."""
    left: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    try:
        with place.file.open("rb", buffering=0) as file:
            file.seek(place.start)
            while left:
                count = file.readinto(left)  # the system reads 2 GiB at most in one go
                if not count:
                    raise ModelError(f"{place.file}: ends too early; fetch it again")
                left = left[count:]
    except OSError as error:
        raise ModelError(f"{place.file}: cannot be read ({error}); fetch it again") from None


def read_at(place: Place) -> torch.Tensor:
    """A tensor as it lies in its file, read and not mapped; its halves in our order."""
    tensor = torch.empty(place.shape, dtype=place.dtype)
    _fill(tensor, place)
    return halves_swapped(tensor, place.swapped)


def _place_of(cut: Cut, whole: Place) -> Place:
    """The place of a tensor of ours within one of another layout. Raises ModelError for a dtype that weights have not."""
    if whole.dtype not in STORED.values():
        raise ModelError(f"{whole.file}: tensor {cut.name} is stored as {whole.dtype}, wanted one of {', '.join(STORED)}")
    row = math.prod(whole.shape[1:]) * whole.dtype.itemsize
    shape = (cut.last - cut.first, *whole.shape[1:])
    return Place(whole.file, whole.start + cut.first * row, whole.dtype, shape, cut.swapped)


def places_in(file: Path, kinds: Mapping[str, torch.dtype] = STORED) -> dict[str, Place]:
    """Place of every tensor of a file.

    Source: the format of safetensors, https://github.com/huggingface/safetensors#format: eight bytes that tell
    the header's length, the header, and the data, in which offsets count from its own start.
    """
    shapes = stored_shapes(file)  # the library's own checks: a sound header, and offsets that fill the file
    with file.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    places = {}
    for name, shape in shapes.items():
        kind, (first, last) = header[name]["dtype"], header[name]["data_offsets"]
        if kind not in kinds:
            raise ModelError(f"{file}: tensor {name} is stored as {kind}, wanted one of {', '.join(kinds)}")
        assert last - first == math.prod(shape) * kinds[kind].itemsize
        places[name] = Place(file, 8 + length + first, kinds[kind], shape)
    return places
