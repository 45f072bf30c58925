"""Weights where they lie: the tensors of a model's safetensors files, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ppclc.errors import ModelError
from ppclc.loading.checkpoints import fill
from ppclc.loading.single_files import halves_swapped
from ppclc.loading.sources import Source, check_tensors

PIECE = 2**22
"""Values that are looked at in one go."""


class WeightFiles(Mapping[str, torch.Tensor]):
    """Every tensor of a model by its full name, in one dtype, on one device; each access reads a new copy.

    Raises:
        ModelError: a file is not whole, or holds another dtype than weights have. On access: values that
        are not finite in the wanted dtype, or a file that became shorter.
    """

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        self.places = source.places()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name, torch.empty(self.places[name].shape, dtype=self.dtype, device=self.device))

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Nothing when the headers hold just these names and shapes. Raises ModelError naming the first that is not so."""
        check_tensors(self.source, expected, self.places)

    def read(self, name: str, out: torch.Tensor) -> torch.Tensor:
        """`out`, contiguous and of the tensor's shape, with its values.

        No other memory is taken where dtype and device are those of the file, else that of this one tensor.
        """
        place = self.places[name]
        direct = out.dtype == place.dtype and out.device.type == "cpu"
        stored = out if direct else torch.empty(place.shape, dtype=place.dtype)
        fill(stored, place)
        if not direct or place.swapped:
            out.copy_(halves_swapped(stored, place.swapped))
        if not is_finite(out):
            raise ModelError(f"{place.file}: tensor {name} holds NaN or infinite values, wanted finite ones; fetch the model again")
        return out


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value of a tensor is NaN or infinite; looked at in pieces, so that no memory of its size is taken where it is contiguous."""
    return all(bool(torch.isfinite(_told(piece)).all()) for piece in tensor.reshape(-1).split(PIECE))


def _told(piece: torch.Tensor) -> torch.Tensor:
    """Values in a dtype of which PyTorch tells whether they are finite: of floating-point numbers of 8 bits it does not."""
    return piece.float() if piece.is_floating_point() and piece.element_size() == 1 else piece
