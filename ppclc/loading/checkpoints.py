"""Safetensors files as they lie: where each tensor is, whether the files are whole, and new ones out of their bytes.

Files are read, not mapped. Pages of a mapped file count as the process's own memory for as long as the
mapping lives, so that a model larger than memory would seem, and under a limit be, as large as it is.

Source of the format: https://github.com/huggingface/safetensors#format: eight bytes that tell the header's length, the
header, and the data, in which offsets count from its own start.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ppclc.errors import ModelError
from ppclc.records import STORED_AS, disk_errors, file_order, safetensors_header, write_text

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARD_SIZE = "5GB"
METADATA = {"format": "pt"}
STATES = {name: getattr(torch, dtype) for dtype, name in STORED_AS.items()}
"""Dtypes of the safetensors format, all of which the state of a training may have."""
STORED = {name: dtype for name, dtype in STATES.items() if dtype.is_floating_point}
"""Those that weights may have."""
CHUNK_BYTES, COPY_BYTES = 1 << 20, 8 << 20
"""Bytes that are read in one go, and that the system is asked to copy in one go."""


# --------------------------------------------------------------------------------------------------------- reading


class Place(NamedTuple):
    """Where a tensor lies: its file, the byte at which it starts, and what it is; `swapped`: its halves of rows stand in the other order."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    swapped: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name of a safetensors file, from its header. Raises ModelError when the file is not whole."""
    try:
        # Not "pt": that maps a file as memory of its own, which the system refuses of one larger than it has.
        with safe_open(file, "np") as handle:
            return {k: tuple(handle.get_slice(k).get_shape()) for k in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a whole safetensors file ({error}); fetch it again") from None


def places_in(file: Path, kinds: Mapping[str, torch.dtype] = STORED) -> dict[str, Place]:
    """Place of every tensor of a file. Raises ModelError when it is not whole, or holds another dtype than `kinds`."""
    shapes = stored_shapes(file)  # the library's own checks: a sound header of bounded size, and offsets that fill the file
    with file.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    places = {}
    for name, shape in shapes.items():
        kind, (first, last) = header[name]["dtype"], header[name]["data_offsets"]
        if kind not in kinds:
            raise ModelError(f"{file}: tensor {name} is stored as {kind}, wanted one of {', '.join(kinds)}")
        places[name] = Place(file, 8 + length + first, kinds[kind], shape)
        assert last - first == places[name].bytes
    return places


def places_of(files: Sequence[Path], index: Path | None = None) -> dict[str, Place]:
    """Place of every tensor of a model's files, all of one dtype.

    Raises:
        ModelError: a file that is not whole; a tensor that two files hold; an index that names a tensor where it is not;
            more than one dtype.
    """
    places: dict[str, Place] = {}
    for file in files:
        found = places_in(file)
        if twice := sorted(found.keys() & places.keys()):
            raise ModelError(
                f"{file}: tensor {twice[0]} is in {places[twice[0]].file.name} too; wanted each tensor once; fetch the model again"
            )
        places |= found
    if index is not None and index.is_file():
        _check_index(index, places)
    kinds = {p.dtype: name for name, p in reversed(places.items())}
    if len(kinds) > 1:
        told = " and ".join(f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in kinds.items())
        raise ModelError(f"{files[0].parent}: the tensors are of several dtypes, {told}: wanted one; save the model anew in one of them")
    return places


def _check_index(index: Path, places: Mapping[str, Place]) -> None:
    """Raise ModelError for an index that names a tensor where it is not."""
    listed = json.loads(index.read_text("utf-8"))["weight_map"]
    for name, shard in listed.items():
        if name not in places or places[name].file.name != shard:
            raise ModelError(f"{index}: names {name} in {shard}, which does not hold it; fetch the model again")


def read_at(place: Place) -> torch.Tensor:
    """A tensor as it lies in its file, read and not mapped; nothing is swapped."""
    tensor = torch.empty(place.shape, dtype=place.dtype)
    fill(tensor, place)
    return tensor


def fill(tensor: torch.Tensor, place: Place) -> None:
    """Read a tensor's bytes into the memory of one of its dtype and shape. Raises ModelError for a file that became shorter."""
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


# --------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Made:
    """A tensor that is made when its turn comes to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


Piece = Place | Made
"""A tensor of a file to be written: bytes that are moved as they lie, or a tensor that is made."""


def held(tensor: torch.Tensor) -> Made:
    """A piece that is in memory."""
    return Made(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_checkpoint(home: Path, pieces: Mapping[str, Piece]) -> dict[str, str]:
    """Write a model's safetensors files, split as diffusers splits them, and their index; SHA-256 by name of each file.

    One made tensor and a few megabytes are in memory at a time; the bytes are those that `save_pretrained` would write.

    Raises:
        ModelError: a file that pieces are moved from cannot be read.
        UnavailableError: the disk is full.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    empty = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in pieces.items()}
    stem, end = WEIGHTS.rsplit(".", 1)
    split = split_torch_state_dict_into_shards(empty, filename_pattern=f"{stem}{{suffix}}.{end}", max_shard_size=SHARD_SIZE)
    digests = {}
    with disk_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        for name, held_there in split.filename_to_tensors.items():
            digests[name] = write_file(home / name, {n: pieces[n] for n in held_there})
        if split.is_sharded:
            index = json.dumps({"metadata": split.metadata, "weight_map": split.tensor_to_filename}, indent=2, sort_keys=True) + "\n"
            write_text(home / f"{WEIGHTS}.index.json", index)
            digests[f"{WEIGHTS}.index.json"] = hashlib.sha256(index.encode()).hexdigest()
    return digests


def write_file(path: Path, pieces: Mapping[str, Piece]) -> str:
    """Write one safetensors file, and give its SHA-256. Raises ModelError when a file that pieces are moved from cannot be read."""
    with path.open("wb", buffering=0) as out, ThreadPoolExecutor(1) as hasher:
        writer = _Writer(out, hasher)
        writer.write(safetensors_header(pieces, METADATA))
        for run in _runs([pieces[n] for n in file_order(pieces)]):
            if isinstance(run, Made):
                tensor = run.make().detach().cpu().contiguous()
                assert tensor.dtype == run.dtype, f"{tensor.dtype}, wanted {run.dtype}"
                assert tensor.shape == run.shape, f"{tuple(tensor.shape)}, wanted {run.shape}"
                writer.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            else:
                writer.move(*run)
        digest = writer.digest()
        os.fsync(out.fileno())
    return digest


def _runs(pieces: Sequence[Piece]) -> Iterator[Made | tuple[Path, int, int]]:
    """The pieces in their order, those that lie one behind the other in a file as one (file, start, count)."""
    file, start, end = Path(), 0, 0
    for piece in pieces:
        if isinstance(piece, Place) and (piece.file, piece.start) == (file, end):
            end += piece.bytes
            continue
        if end > start:
            yield file, start, end - start
        start = end = 0
        if isinstance(piece, Made):
            yield piece
        else:
            file, start, end = piece.file, piece.start, piece.start + piece.bytes
    if end > start:
        yield file, start, end - start


class _Writer:
    """A file that grows, and its SHA-256, for which a thread reads the same bytes once more.

    The system copies from file to file where it can, several times as fast as through this process's memory.
    """

    def __init__(self, out: BinaryIO, hasher: ThreadPoolExecutor) -> None:
        self.out, self.hasher, self.sum = out, hasher, hashlib.sha256()
        self.buffers = [memoryview(bytearray(CHUNK_BYTES)) for _ in range(2)]

    def write(self, data: Any) -> None:
        """Add bytes."""
        done = self.hasher.submit(self.sum.update, data)
        self._out(memoryview(data).cast("B"))
        done.result()  # the caller may let go of them

    def move(self, file: Path, start: int, count: int) -> None:
        """Add bytes of another file. Raises ModelError when it cannot be read that far."""
        with _opened(file) as source:
            for first in range(start, start + count, COPY_BYTES):
                size = min(COPY_BYTES, start + count - first)
                hashed = self.hasher.submit(self._hash, file, source, first, size)
                self._copy(file, source, first, size)
                hashed.result()
                _forget(source, first, size)

    def _copy(self, file: Path, source: int, start: int, count: int) -> None:
        while count:
            moved = _copied(source, self.out.fileno(), start, count)
            if moved is None:
                data = _read(file, source, self.buffers[0][:count], start)
                self._out(data)
                moved = len(data)
            if not moved:
                raise ModelError(f"{file}: ends too early; fetch it again")
            start, count = start + moved, count - moved

    def _hash(self, file: Path, source: int, start: int, count: int) -> None:
        while count:
            data = _read(file, source, self.buffers[1][:count], start)
            self.sum.update(data)
            start, count = start + len(data), count - len(data)

    def _out(self, data: memoryview) -> None:
        while data:
            data = data[self.out.write(data) :]

    def digest(self) -> str:
        """The SHA-256 of all that was added."""
        return self.sum.hexdigest()


def _copied(source: int, out: int, start: int, count: int) -> int | None:
    """Bytes that the system copied to the end of a file, None where it does not do that between these two."""
    try:
        return os.copy_file_range(source, out, count, start)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        return None


def _forget(source: int, start: int, count: int) -> None:
    """Let the system use the memory in which it kept these bytes for the next ones, which is faster than new memory."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(source, start, count, os.POSIX_FADV_DONTNEED)


def _read(file: Path, source: int, buffer: memoryview, start: int) -> memoryview:
    """Some bytes of a file, at least one. Raises ModelError when there are none left."""
    try:
        count = os.preadv(source, [buffer], start)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error}); fetch it again") from None
    if not count:
        raise ModelError(f"{file}: ends too early; fetch it again")
    return buffer[:count]


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    """A descriptor of a file that is read from front to end."""
    try:
        source = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error}); fetch it again") from None
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(source, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        yield source
    finally:
        os.close(source)
