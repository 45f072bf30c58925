"""Samples as they are kept: text embeddings and latents in safetensors files, read a row at a time.

The format is that of docs/decisions/005-cached-samples.md; a run's own encodings and a user's files are the same to it.

Shape suffixes: N row, S image token, T text token, C channel, E embedding.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ppclc.errors import RecipeError
from ppclc.loading.classes import model_class
from ppclc.loading.sources import Source
from ppclc.records import digest_of, file_digest

LATENTS = "latents"
TEXT = "encoder_hidden_states"
MASK = "encoder_hidden_states_mask"
SPLITS = ("train", "choose", "judge")
FEW = 30
"""Rows below which the splits share all of them."""
SCAN = 64
"""Rows that are looked through for NaN at a time."""


@dataclass(frozen=True)
class Shard:
    """One file: its rows, the shape of each tensor, the grid of image tokens it was made for, and its prompts where it tells them."""

    file: Path
    rows: int
    shapes: Mapping[str, tuple[int, ...]]
    grid: tuple[int, int]
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cache:
    """Rows of embeddings, and of latents where there are any, in the order of the files' names."""

    kind: str
    digest: str
    shards: tuple[Shard, ...]
    handles: dict[Path, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the image in tokens."""
        return self.shards[0].grid

    @property
    def has_latents(self) -> bool:
        """Whether rows hold clean latents."""
        return LATENTS in self.shards[0].shapes

    @property
    def rows(self) -> int:
        """Rows of all files together."""
        return sum(s.rows for s in self.shards)

    @property
    def shares_rows(self) -> bool:
        """Whether there are too few rows to keep the splits apart."""
        return self.rows < FEW

    def split(self, name: str) -> list[int]:
        """Rows of a split: of ten, six to train, two to choose, two to judge, by a fixed hash of the row's number."""
        return list(range(self.rows)) if self.shares_rows else [r for r in range(self.rows) if _split_of(r) == name]

    def prompts(self, rows: Sequence[int]) -> list[str]:
        """The prompts of these rows, or what stands for one that no file tells."""
        every = [p for s in self.shards for p in (s.prompts or [f"sample {i}" for i in range(s.rows)])]
        return [every[row] for row in rows]

    def read(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """These rows by tensor, text cut or padded with zeros to the longest of them; a mask only where one is shorter."""
        starts = [sum(s.rows for s in self.shards[:i]) for i in range(len(self.shards))]
        parts: dict[str, list[torch.Tensor]] = {}
        for row in rows:
            i = bisect_right(starts, row) - 1
            found = self._row(self.shards[i], row - starts[i])
            for name, value in found.items():
                parts.setdefault(name, []).append(value)
        masks = parts.pop(MASK)
        length = max(int(m.nonzero().max()) + 1 for m in masks)
        mask = torch.stack([_fitted(m, length) for m in masks])
        parts[TEXT] = [_fitted(x, length) for x in parts[TEXT]]
        batch = {name: torch.stack(values) for name, values in parts.items()}
        if not bool(mask.all()):
            batch[TEXT] = torch.where(mask[:, :, None], batch[TEXT], torch.zeros((), dtype=batch[TEXT].dtype))
            batch[MASK] = mask
        return batch

    def _row(self, shard: Shard, row: int) -> dict[str, torch.Tensor]:
        if shard.file not in self.handles:
            self.handles[shard.file] = safe_open(shard.file, "pt")
        handle = self.handles[shard.file]
        found = {name: handle.get_slice(name)[row : row + 1][0] for name in shard.shapes}
        return found | {MASK: found[MASK] != 0 if MASK in found else torch.ones(len(found[TEXT]), dtype=torch.bool)}


@cache
def _split_of(row: int) -> str:
    tenth = hashlib.sha256(f"split of row {row}".encode()).digest()[0] % 10
    return SPLITS[0] if tenth < 6 else SPLITS[1] if tenth < 8 else SPLITS[2]


def _fitted(x: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` entries along the first axis, zeros where there are fewer."""
    return x[:length] if len(x) >= length else torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])])


def cache_files(path: str) -> list[Path]:
    """The safetensors files that a path names, by name. Raises RecipeError when there are none."""
    place = Path(path).expanduser()
    files = sorted(f for f in place.glob("*.safetensors") if not f.name.startswith(".")) if place.is_dir() else [place]
    if not files or not all(f.is_file() and f.suffix == ".safetensors" for f in files):
        what = "holds no *.safetensors" if place.is_dir() else "no such file or folder" if not place.exists() else "is no *.safetensors"
        raise RecipeError(
            f"calibrate.path = {path!r}: {what}; wanted cached samples in safetensors, as docs/decisions/005-cached-samples.md says"
        )
    return files


def open_cache(path: str, source: Source, kind: str = "cached", digest: str | None = None) -> Cache:
    """Cached samples, checked against the model by name, shape and width; values too, where no digest vouches for them.

    Raises:
        RecipeError: a file that is not whole, or a tensor that is missing, unknown, of a wrong shape or width, or not finite.
    """
    files = cache_files(path)
    shards = tuple(_read_header(f, source, f"calibrate.path = {path!r}: {f}") for f in files)
    for shard in shards[1:]:
        where = f"calibrate.path = {path!r}: {shard.file}"
        names, first = (sorted(s.shapes.keys() - {MASK}) for s in (shard, shards[0]))
        if names != first:
            raise RecipeError(
                f"{where}: holds {', '.join(names)}, but {files[0].name} holds {', '.join(first)}; wanted the same in all files"
            )
        if shard.grid != shards[0].grid:
            raise RecipeError(
                f"{where}: height, width = {shard.grid}, but {files[0].name} has {shards[0].grid}; give one folder a resolution"
            )
        for name in names:
            tail, wanted = (s.shapes[name][2 if name == TEXT else 1 :] for s in (shard, shards[0]))
            if tail != wanted:
                raise RecipeError(
                    f"{where}: {name} has rows of {list(tail)}, but {files[0].name} of {list(wanted)}; wanted like rows in all files"
                )
    if digest is None:
        for shard in shards:
            _check_values(shard, path)
        digest = digest_of([file_digest(f) for f in files])
    return Cache(kind, digest, shards)


def _read_header(file: Path, source: Source, where: str) -> Shard:
    try:
        with safe_open(file, "pt") as handle:
            metadata = handle.metadata() or {}
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"{where}: not a whole safetensors file ({error}); write it again") from None
    grid = tuple(metadata.get(side, "missing") for side in ("height", "width"))
    if not all(g.isdecimal() and int(g) > 0 for g in grid):
        wanted = "the image's size in tokens, e.g. save_file(..., metadata={'height': '16', 'width': '16'})"
        raise RecipeError(f"{where}: metadata height = {grid[0]!r}, width = {grid[1]!r}: wanted {wanted}")
    height, width = (int(g) for g in grid)
    _check_shapes(shapes, dtypes, (height, width), source, where)
    rows = shapes[TEXT][0]
    return Shard(file, rows, shapes, (height, width), _prompts(metadata.get("prompts"), rows))


def _prompts(told: str | None, rows: int) -> tuple[str, ...]:
    """A file's prompts, none where it does not tell one for each of its rows."""
    try:
        words = json.loads(told or "[]")
    except ValueError:
        return ()
    fit = isinstance(words, list) and len(words) == rows and all(isinstance(w, str) for w in words)
    return tuple(words) if fit else ()


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], grid: tuple[int, int], source: Source, where: str
) -> None:
    """Every tensor is one that forward takes, with rows of the width that the configuration asks for."""
    family = source.family
    example = family.example_inputs(source.config, batch=1)
    known = {LATENTS, MASK, *family.text_tensors, *inspect.signature(model_class(family, source.config).forward).parameters}
    known -= {"self", "hidden_states", "timestep", *family.grid_inputs(source.config, 1, 1, 1, 1)}
    for name in family.text_tensors:
        if name not in shapes:
            raise RecipeError(f"{where}: {name} is missing; wanted {', '.join(family.text_tensors)}, and {LATENTS} where there are images")
    rows = shapes[TEXT][0] if shapes[TEXT] else 0
    if not rows:
        raise RecipeError(f"{where}: {TEXT} has shape {list(shapes[TEXT])}; wanted one row a sample, (N, T, E)")
    for name, shape in shapes.items():
        if name not in known:
            raise RecipeError(f"{where}: {name}: not an input of {source.config['_class_name']}; wanted some of {', '.join(sorted(known))}")
        wanted: list[int | str] = [rows, *shape[1:]]
        if name == MASK:
            wanted = [rows, shapes[TEXT][1] if len(shapes[TEXT]) > 1 else "T"]
        elif name == LATENTS:
            wanted = [rows, *family.latents(source.config, *grid)]
        elif name in family.text_tensors:
            like = example[name].shape
            wanted = [rows, *(["T"] if name == TEXT else like[1:-1]), like[-1]]
        fits = (
            len(shape) == len(wanted) and all(isinstance(w, str) or s == w for s, w in zip(shape, wanted, strict=True)) and 0 not in shape
        )
        if not fits:
            raise RecipeError(
                f"{where}: {name} has shape {list(shape)}, wanted [{', '.join(map(str, wanted))}] by config.json and the file's own grid and rows"
            )
        if name != MASK and dtypes[name] not in ("F32", "F16", "BF16"):
            raise RecipeError(f"{where}: {name} is {dtypes[name]}; wanted float32, bfloat16 or float16")


def _check_values(shard: Shard, path: str) -> None:
    """Raise RecipeError for a row that is not finite, or whose mask leaves no text."""
    with safe_open(shard.file, "pt") as handle:
        for name in shard.shapes:
            for start, rows in _row_blocks(handle.get_slice(name), shard.rows):
                flat = rows.reshape(len(rows), -1)
                good = (flat != 0).any(1) if name == MASK else torch.isfinite(flat).all(1)
                if not bool(good.all()):
                    row = start + int((~good).nonzero()[0])
                    fault, wanted = ("masks all text", "some text") if name == MASK else ("holds NaN or infinite values", "finite ones")
                    raise RecipeError(
                        f"calibrate.path = {path!r}: {shard.file}: {name}: row {row} {fault}, wanted {wanted}; mend it or leave it out"
                    )


def _row_blocks(part: Any, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
    for start in range(0, rows, SCAN):
        yield start, part[start : start + SCAN]
