"""Models: open, check, run block by block, edit, save. The one place that edits a module tree.

`apply_plan(model, plan)` is the only way from a teacher to a student; slicing, loading and every back
end meet the same one.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppclc import families, plugins
from ppclc.checkpoints import STATES, STORED, WEIGHTS, Piece, Place, held, places_in, places_of, stored_shapes, write_checkpoint
from ppclc.devices import cores
from ppclc.errors import ModelError, PlanError, UnavailableError
from ppclc.families import Bank, Cut, Family, Group, Layout
from ppclc.plan import CompressionPlan
from ppclc.records import StoredTensors, disk_errors, file_digest, write_text
from ppclc.single_files import cuts_of, layout_of, recognise, stacked_shapes
from ppclc.student_tensors import student_config as edited_config
from ppclc.student_tensors import student_tensor
from ppclc.students.parts import Travelling, bring_class, travelling_file

BUILTIN = "builtin:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PART_LIBRARIES = {"diffusers": "torch_dtype", "transformers": "dtype"}
"""Libraries that parts of a pipeline are loaded from, and what each calls the dtype."""
ALIGNMENT = 64
"""Bytes between the starts of tensors that share one allocation; PyTorch aligns its own alike."""
NARROW = 256
"""Widths up to which operators run on one thread."""


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
        index = self.folder / f"{WEIGHTS}.index.json"
        if index.exists():
            places = json_object(index).get("weight_map", {})
            names = sorted({str(n) for n in places.values()} if isinstance(places, dict) else ["no weight_map"])
            bad = [n for n in names if Path(n).name != n or not (self.folder / n).is_file()]
            if bad or not names:
                raise ModelError(f"{index}: names {', '.join(bad) or 'no shards'}, wanted shards that lie beside it; fetch the model again")
            return [self.folder / n for n in names]
        if (self.folder / WEIGHTS).is_file():
            return [self.folder / WEIGHTS]
        pickles = [p.name for p in self.folder.glob("*.bin")] + [p.name for p in self.folder.glob("*.pt")]
        also = f"; {pickles[0]} is a pickle, which is never loaded: convert it to safetensors" if pickles else ""
        raise ModelError(f"{self.folder}: no weights, wanted {WEIGHTS} or its index{also}")

    def places(self) -> dict[str, Place]:
        """Where every tensor lies, from the files' headers. Raises ModelError for files that are not whole or do not agree."""
        if self.layout is None or not self.layout.cuts:
            return places_of(self.weight_files(), self.folder / f"{WEIGHTS}.index.json")
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


def open_source(path: str, revision: str | None = None) -> Source:
    """Find a model: a folder (pipeline or bare transformer), a safetensors file as ComfyUI loads it, a hub id, or `builtin:NAME`.

    Raises:
        ModelError: there is no such folder or file, it holds no transformer, or no family knows it.
    """
    if (file := Path(path).expanduser()).suffix == ".safetensors" and file.is_file():
        return _open_file(path, file)
    if path.startswith(BUILTIN):
        name = path.removeprefix(BUILTIN)
        if name not in plugins.names("tasks"):
            raise ModelError(f"{path}: no such model; there is {', '.join(BUILTIN + n for n in plugins.names('tasks'))}")
        root = Path(plugins.load("tasks", name).model_folder)
    else:
        root = _local_or_hub(path, revision)
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
    return Source(path, folder, known | config, family, layout, stored if layout else {})


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


def open_parts(source: Source, parts: tuple[str, ...], revision: str | None = None) -> Path:
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
        root = _local_or_hub(source.path, revision, [f"{p}/*{end}" for p in parts for end in (".json", ".safetensors", ".txt", ".jinja")])
    for part in parts:
        if not (root / part).is_dir():
            raise ModelError(f"{root / part}: no such folder, but {index} lists it; fetch the model again")
    return root


def digest_parts(root: Path, parts: tuple[str, ...]) -> str:
    """SHA-256 over all files of some parts of a pipeline."""
    files = [f for part in parts for f in sorted((root / part).rglob("*")) if f.is_file()]
    return _files_digest(tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files))


def load_part(root: Path, part: str, dtype: str) -> Any:
    """One part of a pipeline by `model_index.json`: a network in evaluation mode with every tensor its own, or a tokenizer.

    Raises:
        ModelError: of a library that ppclc loads nothing from, or not whole.
    """
    library, name = json_object(root / "model_index.json")[part][:2]
    kind = getattr(import_module(library), name, None) if library in PART_LIBRARIES else None
    if kind is None:
        raise ModelError(f"{root / 'model_index.json'}: {part} = {[library, name]}: wanted a class of {' or '.join(PART_LIBRARIES)}")
    quiet_libraries()
    try:
        if not issubclass(kind, nn.Module):
            return kind.from_pretrained(root / part, local_files_only=True)
        model, info = kind.from_pretrained(
            root / part,
            **{PART_LIBRARIES[library]: DTYPES[dtype]},
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
        )
    except Exception as error:  # two libraries and their parsers raise many kinds; all mean that the part is not whole
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{root / part}: cannot be loaded as {name} ({reason}); fetch it again, safetensors included") from error
    lacking = sorted({str(k) for key in ("missing_keys", "mismatched_keys") for k in info.get(key, ())})
    if lacking:
        raise ModelError(
            f"{root / part}: {len(lacking)} tensors of {name} are missing or of a wrong shape, {lacking[0]} first; fetch it again"
        )
    return model.eval().requires_grad_(False)


def pipeline_class(root: Path) -> str:
    """Name of the class that a pipeline's folder is of."""
    return str(json_object(root / "model_index.json").get("_class_name"))


def part_config(root: Path, part: str) -> dict[str, Any]:
    """Configuration of a part of a pipeline. Raises ModelError when it cannot be read."""
    return json_object(root / part / "config.json")


def _local_or_hub(path: str, revision: str | None, more: list[str] | None = None) -> Path:
    root = Path(path).expanduser()
    if root.is_dir():
        return root
    if root.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise ModelError(
            f"{path}: no such model folder; wanted a folder, a hub id such as 'Qwen/Qwen-Image', a .safetensors file, or builtin:two-digits"
        )
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "transformer/*.json", "transformer/*.safetensors", "transformer/*.py", "*.safetensors", "README.md", "LICENSE*"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=[*wanted, *(more or [])]))
    except Exception as error:  # the hub's client raises many kinds; all mean that the model cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{path}: no such folder, and not to be had from the hub ({reason}); give a local folder, or check the id, HF_TOKEN and HF_HUB_OFFLINE"
        ) from None


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds. Raises ModelError when that is no object."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); fetch the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: got a {type(value).__name__}, wanted a JSON object")
    return value


def _class(name: str) -> Any:
    module, _, attribute = name.rpartition(":")
    return getattr(import_module(module), attribute)


def model_class(family: Family, config: Mapping[str, Any]) -> Any:
    """The class that a configuration asks for: diffusers' own, or the family's width-edited one."""
    return _class(family.class_names.get(str(config.get("_class_name")), f"diffusers:{family.class_name}"))


def stock_config(family: Family) -> dict[str, Any]:
    """The configuration that the family's stock class has where nobody says otherwise."""
    import inspect

    parameters = inspect.signature(_class(f"diffusers:{family.class_name}").__init__).parameters
    return {n: p.default for n, p in parameters.items() if p.default is not p.empty}


def empty_model(family: Family, config: Mapping[str, Any], where: str = "config.json") -> Any:
    """The model with parameters on the meta device: names, shapes and counts, no memory.

    Raises:
        ModelError: the configuration cannot be built.
    """
    from accelerate import init_empty_weights

    return _built(family, config, where, init_empty_weights(include_buffers=False))


def model_outline(family: Family, config: Mapping[str, Any], where: str = "config.json") -> Any:
    """As `empty_model`, with buffers on the meta device too: their values, which some classes take seconds for, are not computed."""
    return _built(family, config, where, torch.device("meta"))


def _built(family: Family, config: Mapping[str, Any], where: str, within: AbstractContextManager[Any]) -> Any:
    try:
        with within:
            return model_class(family, config).from_config({k: v for k, v in config.items() if k != "auto_map"})
    except (TypeError, ValueError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(f"{where}: cannot be built as a model of {family.name}: {error}") from None


def random_model(
    family: Family, config: Mapping[str, Any], dtype: str = "float32", pool: dict[tuple[str, tuple[int, ...]], torch.Tensor] | None = None
) -> Any:
    """A model of that configuration with random weights, in evaluation mode, fit for timing and for nothing else.

    Tensors that `pool` has by name and shape are shared with it, the others are put there: models that
    are timed side by side take the memory of one.

    Raises:
        ModelError: the configuration cannot be built.
    """
    model = empty_model(family, config)
    pool = {} if pool is None else pool
    noise = 0.02 * torch.randn(2**16, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    state = {}
    for name, tensor in model.state_dict().items():
        key = (name, tuple(tensor.shape))
        if key not in pool:
            # Repeated noise: to draw billions of numbers would take longer than what is timed.
            count = tensor.numel()
            pool[key] = noise.repeat(-(-count // len(noise)))[:count].reshape(tensor.shape).contiguous()
        state[name] = pool[key]
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def load_source(source: Source, dtype: str = "float32") -> Any:
    """The model, in evaluation mode, every tensor accounted for and finite.

    Raises:
        ModelError: weights truncated or corrupt; a tensor missing, extra, of a wrong shape, or not finite.
    """
    if source.layout is not None:
        return _from_layout(source, source.layout, dtype)
    empty = model_outline(source.family, source.config, str(source.folder / "config.json"))
    check_tensors(source, {k: tuple(v.shape) for k, v in empty.state_dict().items()}, source.places())
    model, info = model_class(source.family, source.config).from_pretrained(
        source.folder, torch_dtype=DTYPES[dtype], output_loading_info=True, use_safetensors=True, local_files_only=True
    )
    left = {k: v for k, v in info.items() if v}
    if left:
        raise ModelError(f"{source.folder}: diffusers could not place all tensors: {left}")
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{source.folder}: tensor {name} holds NaN or infinite values, wanted finite ones; fetch the model again")
    return aligned(model).eval().requires_grad_(False)


def aligned(model: Any) -> Any:
    """The model, its tensors moved to where PyTorch itself would have put them, those that lie elsewhere.

    Tensors of a mapped file start at any byte. Some products of a vector then differ in the last bit from those of the same tensor
    in memory (seen in MKL on AMD), and all are slower.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model


def _from_layout(source: Source, layout: Layout, dtype: str) -> Any:
    """The model of a folder in another layout, its tensors turned into ours.

    Raises:
        ModelError: a tensor missing, of a wrong shape, not finite, or there for nothing.
    """
    files: dict[str, StoredTensors] = {}
    for file in source.weight_files():
        files |= dict.fromkeys(places_in(file, STATES), StoredTensors(file))  # one that is not whole is refused with its name
    model = empty_model(source.family, source.config, str(source.folder / "config.json"))
    read = _Accessed(files)
    state = {}
    for name, tensor in model.state_dict().items():
        try:
            state[name] = layout.tensor(name, source.stored, read)
        except KeyError as error:
            raise ModelError(f"{source.folder}: tensor {error} is missing; wanted all that config.json calls for") from None
        state[name] = state[name].to(DTYPES[dtype])
        if not bool(torch.isfinite(state[name]).all()):
            raise ModelError(f"{source.folder}: {name} holds NaN or infinite values, wanted finite ones; fetch the model again")
        if state[name].shape != tensor.shape:
            raise ModelError(f"{source.folder}: {name} comes out as {list(state[name].shape)}, wanted {list(tensor.shape)} by config.json")
    extra = sorted(n for n in files if n not in read.names and not layout.unread(n, source.stored))
    if extra:
        raise ModelError(
            f"{source.folder}: {len(extra)} tensors are not of this layout, {extra[0]} first; do the lists in config.json fit?"
        )
    model.load_state_dict(state, strict=True, assign=True)
    return aligned(model).eval().requires_grad_(False)


class _Accessed(Mapping[str, torch.Tensor]):
    """Tensors by the files that hold them, and the names of those that were asked for."""

    def __init__(self, tensors: Mapping[str, StoredTensors]) -> None:
        self.tensors, self.names = tensors, set[str]()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.names.add(name)
        tensor: torch.Tensor = self.tensors[name][name]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


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


def load_model(path: str | Path, dtype: str = "float32", revision: str | None = None) -> Any:
    """Any teacher or student, stock or width-edited, ready to run. Raises ModelError as `load_source` does."""
    return load_source(open_source(str(path), revision), dtype)


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, each once."""
    return sum(p.numel() for p in model.parameters())


def student_config(family: Family, config: Mapping[str, Any], plan: CompressionPlan) -> dict[str, Any]:
    """Configuration of the student, `_class_name` included. Raises PlanError when the plan is of another model."""
    if plan.family != family.name:
        raise PlanError(f"plan: family = {plan.family!r}, but the model is of {family.name!r}")
    if plan.num_blocks != family.num_blocks(config):
        raise PlanError(f"plan: num_blocks = {plan.num_blocks}, but the model has {family.num_blocks(config)} blocks")
    if family.is_edited(config):
        raise PlanError("plan: the model is an edited student already; plans are made for its teacher")
    return edited_config(family, config, plan) | {"_class_name": family.class_of(plan)}


def predicted_parameters(family: Family, config: Mapping[str, Any], plan: CompressionPlan) -> int:
    """Exact parameter count of the student, from the configuration alone."""
    return count_parameters(model_outline(family, student_config(family, config, plan)))


def apply_plan(model: Any, plan: CompressionPlan, bank: Bank | None = None) -> Any:
    """The student of a teacher: a new model whose tensors are copies, the teacher untouched.

    `bank` gives distilled blocks with their adapters, text maps, ffn maps and the modulation basis; an interval
    that it lacks starts from its first block, with the identity for adapters. Dtype and device are the teacher's.

    Raises:
        PlanError: a plan of another model, or one that needs what the bank lacks.
    """
    config = {"_class_name": type(model).__name__, **model.config}
    return build_student(families.of_config(config, "model"), config, plan, model.state_dict(), bank or {})


def build_student(family: Family, config: Mapping[str, Any], plan: CompressionPlan, teacher: Mapping[str, torch.Tensor], bank: Bank) -> Any:
    """As `apply_plan`, from a teacher's configuration and its tensors by name, of which only those that stay are read."""
    student = empty_model(family, student_config(family, config, plan))
    state = {n: student_tensor(family, config, plan, n, teacher, bank) for n in student.state_dict()}
    return _fill(student, state, teacher[next(iter(teacher))])


def student_block(
    family: Family, config: Mapping[str, Any], plan: CompressionPlan, block: int, tensors: Mapping[str, torch.Tensor], bank: Bank
) -> nn.Module:
    """One kept block of a plan's student, alone, its tensors copies. `tensors`: the teacher's of that block, by full name.

    Raises:
        PlanError: a plan of another model, or one that needs what the bank lacks.
    """
    edited = student_config(family, config, plan)
    number = plan.student_block(block)
    module, prefix = blocks_of(empty_model(family, edited), family)[number], family.prefix(edited, number)
    state = {n: student_tensor(family, config, plan, prefix + n, tensors, bank) for n in module.state_dict()}
    like = next(iter(tensors.values() if tensors else state.values()))
    copies = {n: t.detach().to(like.device, like.dtype, copy=True).contiguous() for n, t in state.items()}
    module.load_state_dict(copies, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def _fill(student: Any, state: Mapping[str, torch.Tensor], like: torch.Tensor) -> Any:
    copies = {n: t.detach().to(like.device, like.dtype, copy=True).contiguous() for n, t in state.items()}
    student.load_state_dict(copies, strict=True, assign=True)
    return student.eval().requires_grad_(False)


def save_model(model: Any, plan: CompressionPlan, folder: Path, pieces: Mapping[str, Piece] | None = None) -> dict[str, str]:
    """Write a student as a diffusers folder (`folder/transformer`) and give the SHA-256 of each file.

    A width-edited student's class travels with it, under a name made from its content. With `pieces`, its tensors by
    name, the model itself may be empty. `plan.json` tells the SHA-256 of the files beside it.
    """
    home = folder / "transformer"
    with disk_errors(folder):
        digests = write_checkpoint(home, {n: held(t) for n, t in model.state_dict().items()} if pieces is None else pieces)
        model.save_config(home)
        if isinstance(model, Travelling):
            bring_class(type(model), home)
        digests |= {p.name: file_digest(p) for p in home.iterdir() if p.name not in digests}
        write_text(home / "plan.json", plan.to_json(digests))
        digests["plan.json"] = file_digest(home / "plan.json")
    return {f"{home.name}/{name}": digest for name, digest in sorted(digests.items())}


def travelling_class(where: str) -> str:
    """The text of a student's class, `module:Class`, as it travels: one module, with the parts that it shares with others in front."""
    return travelling_file(_class(where))[1]


def blocks_of(model: Any, family: Family) -> list[nn.Module]:
    """All blocks in forward order."""
    return [block for group in family.groups for block in model.get_submodule(group.path)]


def block_state(block: nn.Module) -> dict[str, torch.Tensor]:
    """A block's tensors by name, as the bank holds them."""
    return {k: v.detach() for k, v in block.state_dict().items()}


def groups_of(model: Any, family: Family) -> list[Group]:
    """The group of every block in forward order."""
    return [group for group in family.groups for _ in model.get_submodule(group.path)]


Shared = Sequence[Mapping[str, Any]]
"""What each block gets besides the streams, by its number."""


class _Passed(nn.Module):
    """Stands where a block was left out: what came in goes out."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.group.positional, args, strict=False)) | kwargs
        return given[self.group.joined] if self.group.joined else tuple(given[self.group.streams[s]] for s in self.group.outputs)


@contextmanager
def left_out(model: Any, family: Family, blocks: Collection[int]) -> Iterator[None]:
    """The model with blocks passed by; put back afterwards. Others keep their numbers."""
    lists, groups, first = {g.path: model.get_submodule(g.path) for g in family.groups}, groups_of(model, family), 0
    for path, original in lists.items():
        numbered = enumerate(original, first)
        model.set_submodule(path, nn.ModuleList(_Passed(groups[n]) if n in blocks else block for n, block in numbered))
        first += len(original)
    try:
        yield
    finally:
        for path, original in lists.items():
            model.set_submodule(path, original)


def set_threads(source: Source | None = None) -> int:
    """Threads that one operator now uses; OMP_NUM_THREADS goes first.

    A model as narrow as the embedded teacher gains nothing from a second thread in an operator (measured:
    0.39 s a training step either way), so that its cores are left to work that runs side by side.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        config = source.config if source else {}
        width = int(config.get("attention_head_dim", 0)) * int(config.get("num_attention_heads", 0))
        torch.set_num_threads(1 if 0 < width <= NARROW else cores())
    return torch.get_num_threads()


def quiet_libraries() -> None:
    """Keep the libraries' own chatter off the screen, `transformers`' bars too where it is loaded already."""
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*FluxPosEmbed", category=FutureWarning)  # its own Chroma imports that from the old place
    for name in ("transformers", "huggingface_hub", "torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def require_library(module: str, extra: str) -> Any:
    """Import a library that an extra brings. Raises UnavailableError saying how to install it."""
    try:
        return import_module(module)
    except ImportError:
        raise UnavailableError(f"{module} is not installed here: pip install 'ppclc[{extra}]'") from None


def check_teacher(source: Source) -> None:
    """Raise ModelError for a model that no plan can be made for: a width-edited student."""
    if source.family.is_edited(source.config):
        raise ModelError(f"{source.path}: is an edited student already; plans are made for its teacher: give the teacher's folder")
