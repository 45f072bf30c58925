"""Where a model lies: folders, single files and ids of the hub; what configuration, weights and parts are there, and whether they agree."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ppclc import families, plugins
from ppclc.errors import ModelError
from ppclc.families import Cut, Family, Layout
from ppclc.loading import hub
from ppclc.loading.checkpoints import STATES, STORED, WEIGHTS, Place, places_in, places_of, stored_shapes
from ppclc.loading.classes import (
    model_outline,
    stock_config,
)
from ppclc.loading.single_files import cuts_of, layout_of, recognise, stacked_shapes
from ppclc.records import file_digest

BUILTIN, STUDENT = "builtin:", "model"


@dataclass(frozen=True)
class Source:
    """Where a model lies: the folder that holds its `config.json` or the one file that it is, what the configuration says, its family."""

    path: str
    folder: Path
    config: dict[str, Any]
    family: Family
    layout: Layout | None = None
    stored: Mapping[str, Any] = field(default_factory=dict)
    """The configuration as it lies there, where that is of another layout than ours."""
    notes: tuple[str, ...] = ()
    """What is to be told of it."""
    revision: str | None = None
    """Of a hub's model: branch, tag or commit."""
    variant: str | None = None
    """Which weights, where several lie beside each other: `fp16` for `diffusion_pytorch_model.fp16.safetensors`."""

    @property
    def task(self) -> Any | None:
        """The task plug-in of a builtin model, None otherwise."""
        return plugins.load("tasks", self.path.removeprefix(BUILTIN)) if self.path.startswith(BUILTIN) else None

    def weight_files(self) -> list[Path]:
        """The safetensors files, by the index where there is one.

        Raises:
            ModelError: none there, only pickles there, or an index that names files that are not there.
        """
        if self.folder.is_file():
            return [self.folder]
        index, whole = self._index, self.folder / _with_variant(WEIGHTS, self.variant)
        if index.exists():
            places = json_object(index).get("weight_map", {})
            names = sorted({str(n) for n in places.values()} if isinstance(places, dict) else ["no weight_map"])
            bad = [n for n in names if Path(n).name != n or not (self.folder / n).is_file()]
            if bad or not names:
                raise ModelError(f"{index}: names {', '.join(bad) or 'no shards'}, wanted shards that lie beside it; fetch the model again")
            return [self.folder / n for n in names]
        if whole.is_file():
            return [whole]
        others = sorted({str(hub.variant_of(p.name)) for p in self.folder.glob("*.safetensors")} - {str(self.variant)})
        if others:
            raise ModelError(
                f"{self.folder}: no {whole.name}, nor its index; there is variant {', '.join(others)}: name it, e.g. --variant {others[0]}"
                if self.variant is None
                else f"{self.folder}: no variant {self.variant!r}: wanted {whole.name} or its index"
            )
        pickles = [p.name for p in self.folder.glob("*.bin")] + [p.name for p in self.folder.glob("*.pt")]
        also = f"; {pickles[0]} is a pickle, which is never loaded: convert it to safetensors" if pickles else ""
        raise ModelError(f"{self.folder}: no weights, wanted {whole.name} or its index{also}")

    @property
    def _index(self) -> Path:
        return self.folder / _with_variant(f"{WEIGHTS}.index.json", self.variant)

    def places(self) -> dict[str, Place]:
        """Where every tensor lies, from the files' headers. Raises ModelError for files that are not whole or do not agree."""
        if self.layout is None or not self.layout.cuts:
            return places_of(self.weight_files(), self._index)
        there = {name: place for file in self.weight_files() for name, place in places_in(file, STATES).items()}
        return {name: _place_of(cut, there[cut.name]) for name, cut in self.layout.cuts.items()}

    @property
    def has_weights(self) -> bool:
        """Whether weights lie beside the configuration, whole or not."""
        return self.folder.is_file() or any(self.folder.glob("*.safetensors*"))

    def digest(self) -> str:
        """SHA-256 over configuration and weight files."""
        described = [] if self.folder.is_file() else [self.folder / "config.json"]
        return _files_digest(tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in [*described, *self.weight_files()]))


def _with_variant(name: str, variant: str | None) -> str:
    """A file's name with the variant in it, as diffusers has it: before the ending."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _place_of(cut: Cut, whole: Place) -> Place:
    """The place of a tensor of ours within one of another layout. Raises ModelError for a dtype that weights have not."""
    if whole.dtype not in STORED.values():
        raise ModelError(f"{whole.file}: tensor {cut.name} is stored as {whole.dtype}, wanted one of {', '.join(STORED)}")
    row = math.prod(whole.shape[1:]) * whole.dtype.itemsize
    return Place(whole.file, whole.start + cut.first * row, whole.dtype, (cut.last - cut.first, *whole.shape[1:]), cut.swapped)


@cache
def _files_digest(files: tuple[tuple[str, int, int], ...]) -> str:
    from ppclc.records import digest_of

    return digest_of([file_digest(Path(path)) for path, _, _ in files])


def open_source(path: str, revision: str | None = None, variant: str | None = None) -> Source:
    """Find a model: a folder (pipeline or bare transformer), a safetensors file as ComfyUI loads it, a hub id, or `builtin:NAME`.

    The folder of a run stands for its student.

    Raises:
        ModelError: there is no such folder or file, it holds no transformer, or no family knows it; a revision of what is no hub's model;
            a variant of a single file.
    """
    elsewhere = path.startswith(BUILTIN) or path.endswith(".safetensors")
    if elsewhere and (revision is not None or variant is not None):
        raise ModelError(f"{path}: has no revisions and no variants; wanted a hub id, or a folder for a variant")
    if (file := Path(path).expanduser()).suffix == ".safetensors" and file.is_file():
        return _open_file(path, file)
    if path.startswith(BUILTIN):
        name = path.removeprefix(BUILTIN)
        if name not in plugins.names("tasks"):
            raise ModelError(f"{path}: no such model; there is {', '.join(BUILTIN + n for n in plugins.names('tasks'))}")
        root = Path(plugins.load("tasks", name).model_folder)
    else:
        root = _local_or_hub(path, revision, variant)
        if run_at(path):
            path, root = str(Path(path) / STUDENT), root / STUDENT
    folder = root / "transformer" if (root / "transformer" / "config.json").is_file() else root
    if not (folder / "config.json").is_file():
        raise ModelError(f"{path}: holds no transformer: wanted transformer/config.json or config.json")
    config = json_object(folder / "config.json")
    family = families.of_config(config, str(folder / "config.json"))
    layout = next((found for found in family.layouts if found.applies(config)), None)
    stored, config = config, layout.config(config) if layout else config
    known = stock_config(family)
    for key in [g.count_key for g in family.groups]:
        value = config.setdefault(key, known.get(key))
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{folder / 'config.json'}: {key} = {value!r}: wanted a whole number above 0")
    return Source(path, folder, known | config, family, layout, stored if layout else {}, (), revision, variant)


def run_at(path: str) -> Path | None:
    """The folder that `ppclc compress` has written a student to, where that is what lies there."""
    folder = Path(path).expanduser()
    return folder if (folder / "recipe.yaml").is_file() and (folder / STUDENT / "transformer" / "config.json").is_file() else None


def _open_file(path: str, file: Path) -> Source:
    """A transformer in a single file. Raises ModelError as `single_files.recognise` does, and for a tensor missing, extra or of a wrong shape."""
    shapes = stored_shapes(file)
    found = recognise(shapes, str(file))
    config, layout = stock_config(found.family) | found.config, found.family.single_file
    assert layout is not None
    ours = {name: tuple(tensor.shape) for name, tensor in model_outline(found.family, config, str(file)).state_dict().items()}
    cuts = cuts_of(layout, ours)
    wanted = {found.prefix + name: shape for name, shape in stacked_shapes(cuts, ours).items()}
    aside = {*found.others, *(found.prefix + name for name in layout.markers(config))}
    compare_tensors(file, wanted, {name: shape for name, shape in shapes.items() if name not in aside}, "its own blocks and widths")
    notes = [f"{path}: {len(found.others)} tensors beside the transformer's are not read, {found.others[0]} first"] if found.others else []
    return Source(path, file, config, found.family, layout_of(found, cuts), found.config, tuple(notes))


def open_configuration(path: str) -> Source:
    """A model known by its configuration alone: a folder with `config.json`, or the file itself. Raises ModelError as `open_source`."""
    file = Path(path).expanduser()
    return replace(open_source(str(file.parent if file.name == "config.json" and file.is_file() else path)), path=path)


def open_parts(source: Source, parts: tuple[str, ...]) -> Path:
    """The folder of the pipeline that a transformer is of, with these parts in it; a hub's are fetched.

    Raises:
        ModelError: a bare transformer, or a pipeline without such a part.
    """
    root = source.folder.parent if source.folder.name == "transformer" else source.folder
    index = root / "model_index.json"
    if not index.is_file():
        raise ModelError(f"{source.path}: is a bare transformer: there is no {index}, wanted a pipeline's folder with {', '.join(parts)}")
    listed = json_object(index)
    for part in parts:
        if not isinstance(listed.get(part), list) or None in listed[part]:
            raise ModelError(f"{index}: {part} = {listed.get(part)!r}: wanted the part's library and class")
    if not Path(source.path).expanduser().is_dir() and not source.path.startswith(BUILTIN):
        root = hub.fetch(source.path, source.revision, source.variant, parts)
    for part in parts:
        if not (root / part).is_dir():
            raise ModelError(f"{root / part}: no such folder, but {index} lists it; fetch the model again")
    return root


def digest_parts(root: Path, parts: tuple[str, ...]) -> str:
    """SHA-256 over all files of some parts of a pipeline."""
    files = [f for part in parts for f in sorted((root / part).rglob("*")) if f.is_file()]
    return _files_digest(tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files))


def pipeline_class(root: Path) -> str:
    """Name of the class that a pipeline's folder is of."""
    return str(json_object(root / "model_index.json").get("_class_name"))


def part_config(root: Path, part: str) -> dict[str, Any]:
    """Configuration of a part of a pipeline. Raises ModelError when it cannot be read."""
    return json_object(root / part / "config.json")


def _local_or_hub(path: str, revision: str | None, variant: str | None) -> Path:
    root = Path(path).expanduser()
    if root.is_dir():
        if revision is not None:
            raise ModelError(f"{path}: is a folder, which has no revision {revision!r}; wanted a hub id, or no revision")
        return root
    if root.exists() or not hub.ID.fullmatch(path) or path.startswith("."):
        below = "" if root.is_absolute() else f" below {Path.cwd()}"
        raise ModelError(
            f"{path}: no such model folder{below}; wanted a folder, a hub id such as 'Qwen/Qwen-Image', a .safetensors file, or builtin:two-digits"
        )
    return hub.fetch(path, revision, variant)


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds. Raises ModelError when that is no object."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); fetch the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: got a {type(value).__name__}, wanted a JSON object")
    return value


def check_tensors(source: Source, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Place]) -> None:
    """Nothing when names and shapes are those that the class wants. Raises ModelError naming the first that is not."""
    _check_blocks(source, found)
    compare_tensors(source.folder, expected, {name: place.shape for name, place in found.items()})


def compare_tensors(
    folder: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], by: str = "config.json"
) -> None:
    """As `check_tensors`, of names and shapes alone; `by`: what tells what is wanted."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} tensors are missing, {missing[0]} first; wanted all that {by} call{'s' if by == 'config.json' else ''} for"
        )
    if extra:
        asked = f"does {by} fit?" if by == "config.json" else "wanted the transformer's alone"
        raise ModelError(f"{folder}: {len(extra)} tensors are not in the class, {extra[0]} first; {asked}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ModelError(f"{folder}: tensor {name} has shape {list(found[name])}, wanted {list(shape)} by {by}")


def _check_blocks(source: Source, names: Iterable[str]) -> None:
    """Raise ModelError for gaps in the numbers of blocks, and for another number of them than the configuration tells."""
    for group in source.family.groups:
        starts = re.compile(rf"{re.escape(group.path)}\.(\d+)\.")
        numbers = {int(m[1]) for m in map(starts.match, names) if m}
        if not numbers:
            continue
        if gaps := sorted(set(range(max(numbers))) - numbers):
            raise ModelError(
                f"{source.folder}: {group.path} has blocks up to {max(numbers)} but no {', '.join(map(str, gaps[:5]))}: wanted numbers from 0 "
                "without gaps; fetch the model again"
            )
        if len(numbers) != source.config[group.count_key]:
            raise ModelError(
                f"{source.folder / 'config.json'}: {group.count_key} = {source.config[group.count_key]}, but the weights hold {len(numbers)} blocks "
                f"in {group.path}; wanted both to agree: fetch the model again, or set it to {len(numbers)}"
            )


def check_teacher(source: Source) -> None:
    """Raise ModelError for a model that no plan can be made for: a width-edited student."""
    if source.family.is_edited(source.config):
        raise ModelError(f"{source.path}: is an edited student already; plans are made for its teacher: give the teacher's folder")
