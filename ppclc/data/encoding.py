"""From a user's prompts and images to cached samples: found and checked first, encoded once, before the teacher is loaded.

The text encoder is in memory only while prompts are encoded, the VAE only while images are.

Shape suffixes: B batch, S image token, T text token, C channel.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ppclc.data.cache import LATENTS, MASK, TEXT, Cache, open_cache
from ppclc.data.datasets import Picture, is_image, pixels, read_pictures, read_prompts, shards_at
from ppclc.errors import ModelError, RecipeError, first_line, memory_lacks
from ppclc.families import Encoders
from ppclc.loading.sources import Source, digest_parts, open_parts, part_config, pipeline_class
from ppclc.machine.devices import free_bytes, give_back
from ppclc.models import load_part
from ppclc.publishing.pipelines import pipeline_of
from ppclc.records import digest_of, disk_errors, replace_folder, write_tensors

VERSION = 1
SHARD_ROWS = 128
PROMPTS_AT_ONCE = 8
IMAGES_AT_ONCE = 4
DEVICE_SHARE = 0.6
"""Encoders whose weights take more than so much of the memory that is free on a GPU stay on the CPU."""
SAY_EVERY_S = 10.0
WANTED = {
    "prompts": "a text file with one prompt a line",
    "images": "a folder of images with captions, or webdataset shards (*.tar)",
    "cached": "cached samples in safetensors, as docs/decisions/005-cached-samples.md says",
}


@dataclass(frozen=True)
class Unencoded:
    """A user's prompts, or images with their captions, checked as far as they can be without encoding them.

    `root` is the pipeline's folder, `size` height and width in pixels, `grid` the same in tokens.
    """

    kind: str
    path: str
    source: Source
    root: Path
    prompts: tuple[str, ...]
    pictures: tuple[Picture, ...]
    size: tuple[int, int]
    grid: tuple[int, int]

    @property
    def encoders(self) -> Encoders:
        """The family's way to encode."""
        found = self.source.family.encoders
        assert found is not None  # `find_data` has seen to it
        return found

    def digest(self, dtype: str) -> str:
        """Digest of what the encodings depend on: VERSION, the encoders' weights, the data's content, size and dtype."""
        parts = self.encoders.text_parts + (self.encoders.image_parts if self.pictures else ())
        images = [p.digest for p in self.pictures]
        return digest_of([VERSION, self.source.family.name, digest_parts(self.root, parts), dtype, self.size, self.prompts, images])

    def folder(self, records: Path, dtype: str) -> Path:
        """Where the encodings lie once they are whole."""
        return records / f"samples-{self.digest(dtype)}"


def find_data(kind: str, path: str | None, resolution: int | list[int], source: Source) -> Cache | Unencoded | None:
    """What a recipe's `calibrate.source` and `calibrate.path` name, checked; None for a task's own data and for noise.

    Raises:
        RecipeError: no path, nothing usable there, or a resolution that the model cannot take.
        ModelError: the model's folder brings no encoders.
    """
    _check_noise(kind, path)
    if kind == "noise" or (source.task is not None and path is None and kind != "cached"):
        return None
    if source.task is not None and kind != "cached":
        raise RecipeError(f"calibrate.path = {path!r}: {source.path} brings data of its own; leave path out, or give source: cached")
    if kind == "auto":
        if path is None:
            return None
        kind = kind_at(path)
    encoders = source.family.encoders
    if kind != "cached":
        root = _pipeline_of(kind, source, encoders)
    if path is None:
        raise RecipeError(f"calibrate.path: missing; source {kind!r} wants {WANTED[kind]}")
    if kind == "cached":
        return open_cache(path, source)
    assert encoders is not None  # `_pipeline_of` has seen to it
    size, grid = _size(resolution, encoders, root)
    pictures = tuple(read_pictures(path)) if kind == "images" else ()
    prompts = tuple(p.caption for p in pictures) or tuple(read_prompts(path))
    return Unencoded(kind, path, source, root, prompts, pictures, size, grid)


def kind_at(path: str) -> str:
    """The source that fits what lies at a path. Raises RecipeError when none does."""
    place = Path(path).expanduser()
    if shards_at(path):
        return "images"
    if place.is_dir():
        if any(place.glob("*.safetensors")):
            return "cached"
        if (place / "metadata.jsonl").is_file() or any(is_image(f.name) for f in place.rglob("*")):
            return "images"
    elif place.is_file():
        return {".safetensors": "cached", ".txt": "prompts"}.get(place.suffix) or _unfit(
            path, "of no kind that calibrate.source = 'auto' knows"
        )
    return _unfit(path, "holds nothing to calibrate on" if place.is_dir() else "no such file or folder")


def check_data(kind: str, path: str | None, resolution: int | list[int], source: Source) -> None:
    """What of a recipe's data would stop a run at once, as far as a configuration tells: nothing of a pipeline need be here.

    Raises:
        RecipeError: nothing usable at the path, or a resolution that the pipeline's VAE cannot take.
    """
    _check_noise(kind, path)
    if source.task is not None or kind == "noise" or (kind == "auto" and path is None):
        return
    if path is not None:
        there = Path(path).expanduser().exists() or bool(shards_at(path))
        kind = kind_at(path) if kind == "auto" or not there else kind
    root = pipeline_of(source)
    if kind != "cached" and root is not None and source.family.encoders is not None:
        with suppress(ModelError):  # no VAE here
            _size(resolution, source.family.encoders, root)


def _check_noise(kind: str, path: str | None) -> None:
    if kind == "noise" and path is not None:
        raise RecipeError(f"calibrate.path = {path!r}: source 'noise' reads nothing; wanted source: auto, or no path")


def _unfit(path: str, what: str) -> str:
    raise RecipeError(f"calibrate.path = {path!r}: {what}; wanted {'; or '.join(WANTED.values())}")


def _pipeline_of(kind: str, source: Source, encoders: Encoders | None) -> Path:
    """The pipeline's folder, with all parts that encoding needs."""
    way_out = "give calibrate.source: cached with ready-made embeddings, or noise"
    if encoders is None:
        raise ModelError(f"calibrate.source = {kind!r}: prompts of {source.family.name} cannot be encoded by this version; {way_out}")
    try:
        # The VAE's configuration tells how many tokens an image has, for prompts too.
        root = open_parts(source, encoders.text_parts + encoders.image_parts)
    except ModelError as error:
        raise ModelError(f"calibrate.source = {kind!r}: {error}; {way_out}") from None
    name = pipeline_class(root)
    if name not in encoders.pipeline_classes:
        raise ModelError(f"{root / 'model_index.json'}: _class_name = {name!r}: wanted {' or '.join(encoders.pipeline_classes)}; {way_out}")
    return root


def _size(resolution: int | list[int], encoders: Encoders, root: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width in pixels and in tokens."""
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    side = encoders.pixels_per_token(part_config(root, encoders.image_parts[0]))
    if height % side or width % side:
        near = [max(side, round(n / side) * side) for n in (height, width)]
        raise RecipeError(
            f"calibrate.resolution = {resolution!r}: wanted multiples of {side}, which is what one token of {root} stands for, e.g. {near}"
        )
    return (height, width), (height // side, width // side)


def cached(found: Cache | Unencoded | None, records: Path, dtype: str, say: Callable[[str], None], device: str = "cpu") -> Cache | None:
    """The samples of what was found, encoded into `records`, on a device that has room for the encoders, where they are not there yet.

    A shard at a time: a stopped run goes on where it was, and what is not whole is never read.

    Raises:
        RecipeError: an image that cannot be decoded.
        ModelError: an encoder that is not whole, or that does not fit the transformer.
    """
    if not isinstance(found, Unencoded):
        return found
    folder = found.folder(records, dtype)
    if not folder.is_dir():
        work = records / f".{folder.name}.work"
        with disk_errors(work):
            work.mkdir(parents=True, exist_ok=True)
        for old in work.glob(".*.draft"):
            old.unlink()
        _encode_images(found, work, dtype, say, device)
        _encode_prompts(found, work, dtype, say, device)
        with disk_errors(folder):
            replace_folder(work, folder)
    return open_cache(str(folder), found.source, found.kind, found.digest(dtype))


def _shard(work: Path, name: str, start: int) -> Path:
    return work / f"{name}-{start // SHARD_ROWS:05d}.safetensors"


def _starts(count: int, work: Path, *names: str) -> list[int]:
    """First rows of the shards of which no file of these names is there yet."""
    return [s for s in range(0, count, SHARD_ROWS) if not any(_shard(work, n, s).is_file() for n in names)]


def _encode_images(data: Unencoded, work: Path, dtype: str, say: Callable[[str], None], device: str) -> None:
    """Latents of every shard, before any text: a damaged image shows before the long part begins."""
    todo = _starts(len(data.pictures), work, "images", "samples")
    if not todo:
        return
    with pipeline_with(data.root, data.encoders, data.encoders.image_parts, dtype, device) as (pipeline, place):
        progress = _Progress(f"encoding images with {data.root / 'vae'}", len(data.pictures), say)
        for start in todo:
            parts = []
            for some in _blocks(list(data.pictures[start : start + SHARD_ROWS]), IMAGES_AT_ONCE):
                images = torch.stack([pixels(p, *data.size, data.path) for p in some])
                with _running(data, data.encoders.image_parts, some[0].name):
                    latents = _latents(data, pipeline, images, place)
                _check(data, LATENTS, latents, some[0].name)
                parts.append(latents)
                progress.add(start + sum(map(len, parts)))
            write_tensors(_shard(work, "images", start), {LATENTS: torch.cat(parts)})


def _latents(data: Unencoded, pipeline: Any, images: torch.Tensor, place: str) -> torch.Tensor:
    """Latents of some images, on the CPU; one after the other where a GPU has no room for them together."""
    encode: Callable[[Any, torch.Tensor], torch.Tensor] = data.encoders.encode_images
    try:
        return encode(pipeline, images.to(place)).cpu()
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise
    give_back()
    return torch.cat([encode(pipeline, image.to(place)).cpu() for image in images.split(1)])


def _encode_prompts(data: Unencoded, work: Path, dtype: str, say: Callable[[str], None], device: str) -> None:
    """Text of every shard, beside its latents; the order of prompts and what is encoded together never changes."""
    todo = _starts(len(data.prompts), work, "samples")
    metadata = {"format": "ppclc samples 1", "height": str(data.grid[0]), "width": str(data.grid[1])}
    if todo:
        with pipeline_with(data.root, data.encoders, data.encoders.text_parts, dtype, device) as (pipeline, _):
            progress = _Progress(f"encoding prompts with {data.root / data.encoders.text_parts[0]}", len(data.prompts), say)
            for start in todo:
                parts = []
                for some in _blocks(list(data.prompts[start : start + SHARD_ROWS]), PROMPTS_AT_ONCE):
                    with _running(data, data.encoders.text_parts, repr(some[0])):
                        parts.append({n: t.cpu() for n, t in data.encoders.encode_prompts(pipeline, some).items()})
                    for name in data.source.family.text_tensors:
                        _check(data, name, parts[-1][name], repr(some[0]))
                    progress.add(start + sum(len(p[TEXT]) for p in parts))
                tensors, images = joined(parts), _shard(work, "images", start)
                if data.pictures:
                    tensors |= load_file(images)
                words = json.dumps(list(data.prompts[start : start + SHARD_ROWS]))
                write_tensors(_shard(work, "samples", start), tensors, metadata | {"prompts": words})
    for images in work.glob("images-*.safetensors"):
        images.unlink()


def joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Encodings of several batches as one: text padded with zeros to the longest, and masked where it is."""
    length = max(p[TEXT].shape[1] for p in parts)
    masks = [p.get(MASK, torch.ones(p[TEXT].shape[:2], dtype=torch.int64)) for p in parts]
    tensors = {name: torch.cat([p[name] for p in parts]) for name in parts[0] if name not in (TEXT, MASK)}
    tensors[TEXT] = torch.cat([torch.nn.functional.pad(p[TEXT], (0, 0, 0, length - p[TEXT].shape[1])) for p in parts])
    mask = torch.cat([torch.nn.functional.pad(m, (0, length - m.shape[1])) for m in masks])
    return tensors if bool(mask.all()) else tensors | {MASK: mask.to(torch.uint8)}


def _check(data: Unencoded, name: str, value: torch.Tensor, first: str) -> None:
    """Raise ModelError for encodings that the transformer cannot take."""
    family, config = data.source.family, data.source.config
    part = data.root / (data.encoders.image_parts if name == LATENTS else data.encoders.text_parts)[0]
    if name == LATENTS:
        wanted = family.latents(config, *data.grid)
        if value.dim() == 3 and value.shape[1] != wanted[0] and value.shape[2] == wanted[1]:
            raise ModelError(
                f"{part}: gives {value.shape[1]} tokens an image, wanted {data.grid[0]} x {data.grid[1]}; does its config.json fit?"
            )
        if tuple(value.shape[1:]) != wanted:
            raise ModelError(
                f"{part}: gives {name} of width {value.shape[-1]}, wanted {wanted[-1]} by the transformer's config.json"
                if value.dim() == 3
                else f"{part}: gives {name} of shape {list(value.shape[1:])}, wanted {list(wanted)} by the transformer's config.json"
            )
    elif value.shape[-1] != (width := family.example_inputs(config, batch=1)[name].shape[-1]):
        raise ModelError(f"{part}: gives {name} of width {value.shape[-1]}, wanted {width} by the transformer's config.json")
    if not bool(torch.isfinite(value).all()):
        raise ModelError(f"{part}: gives NaN or infinite values from {first} on; check the weights, or give model.dtype: float32")


@contextmanager
def decoder(
    source: Source, grid: tuple[int, int], dtype: str, device: str = "cpu"
) -> Iterator[Callable[[torch.Tensor], torch.Tensor] | None]:
    """A function from latents to images (B, 3, H, W) in 0..1 by the pipeline's own VAE; None where there is no such pipeline."""
    encoders = source.family.encoders
    try:
        root = open_parts(source, encoders.image_parts) if encoders and source.task is None else None
    except ModelError:  # a bare transformer, or a pipeline without a VAE
        root = None
    if encoders is None or root is None:
        yield None
        return
    with pipeline_with(root, encoders, encoders.image_parts, dtype, device) as (pipeline, place):
        yield lambda latents: encoders.decode(pipeline, latents.to(place), grid).cpu()


@contextmanager
def pipeline_with(root: Path, encoders: Encoders, parts: tuple[str, ...], dtype: str, device: str = "cpu") -> Iterator[tuple[Any, str]]:
    """A pipeline with these parts alone, which are gone from memory afterwards, and where it is: the device, or the CPU where that has no room for them."""
    name = pipeline_class(root)
    kind = getattr(import_module("diffusers"), name if name in encoders.pipeline_classes else encoders.pipeline_classes[0])
    loaded: dict[str, Any] = {part: load_part(root, part, dtype) for part in parts}
    modules = [part for part in loaded.values() if isinstance(part, torch.nn.Module)]
    weights = sum(p.nbytes for module in modules for p in module.parameters())
    place = device if device == "cpu" or weights < DEVICE_SHARE * free_bytes(device) else "cpu"
    for module in modules:
        module.to(place)
    needed = [n for n, p in inspect.signature(kind.__init__).parameters.items() if n != "self" and p.default is p.empty]
    pipeline = kind(**{**dict.fromkeys(needed), **loaded})
    try:
        with torch.no_grad():
            yield pipeline, place
    finally:
        del pipeline, loaded, modules
        give_back()


@contextmanager
def _running(data: Unencoded, parts: tuple[str, ...], first: str) -> Iterator[None]:
    """Turn what an encoder raises into a ModelError that says which, and where in the data it was."""
    try:
        yield
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
        if memory_lacks(error):
            raise
        raise ModelError(
            f"{data.root / parts[0]}: fails from {first} on ({first_line(error)}); does it fit {', '.join(parts[1:]) or 'its config.json'}?"
        ) from error


class _Progress:
    """Says at the start what is being done, then how far it is every few seconds."""

    def __init__(self, what: str, total: int, say: Callable[[str], None]) -> None:
        self.what, self.total, self.say, self.last = what, total, say, time.perf_counter()
        say(f"{what}: {total}")

    def add(self, done: int) -> None:
        """`done` rows of the total are encoded."""
        if time.perf_counter() - self.last >= SAY_EVERY_S:
            self.last = time.perf_counter()
            self.say(f"{self.what}: {done} of {self.total}")


def _blocks(rows: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
