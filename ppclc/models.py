"""Models: open, check, run block by block, edit, save. The one place that edits a module tree.

`apply_plan(model, plan)` is the only way from a teacher to a student; slicing, loading and every back
end meet the same one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ppclc import families, plugins
from ppclc.devices import cores
from ppclc.errors import ModelError, PlanError, UnavailableError
from ppclc.families import STREAMS, Bank, Family, Group, Layout, States
from ppclc.plan import CompressionPlan
from ppclc.records import disk_errors, file_digest, write_text
from ppclc.student_tensors import student_config as edited_config
from ppclc.student_tensors import student_tensor

BUILTIN = "builtin:"
WEIGHTS = "diffusion_pytorch_model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PART_LIBRARIES = {"diffusers": "torch_dtype", "transformers": "dtype"}
"""Libraries that parts of a pipeline are loaded from, and what each calls the dtype."""
SHARD_SIZE = "5GB"
PARTS = "ppclc.students.parts"
"""What the travelling classes of all families share."""
NARROW = 256
"""Widths up to which operators run on one thread."""


@dataclass(frozen=True)
class Source:
    """Where a model lies: the folder that holds its `config.json`, what the configuration says, its family."""

    path: str
    folder: Path
    config: dict[str, Any]
    family: Family
    layout: Layout | None = None
    stored: Mapping[str, Any] = field(default_factory=dict)
    """The configuration as it lies there, where that is of another layout than ours."""

    @property
    def task(self) -> Any | None:
        """The task plug-in of a builtin model, None otherwise."""
        return plugins.load("tasks", self.path.removeprefix(BUILTIN)) if self.path.startswith(BUILTIN) else None

    def weight_files(self) -> list[Path]:
        """The safetensors files, by the index where there is one.

        Raises:
            ModelError: none there, only pickles there, or an index that names files that are not there.
        """
        index = self.folder / f"{WEIGHTS}.index.json"
        if index.exists():
            places = _json_object(index).get("weight_map", {})
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

    @property
    def has_weights(self) -> bool:
        """Whether weights lie beside the configuration, whole or not."""
        return any(self.folder.glob("*.safetensors*"))

    def digest(self) -> str:
        """SHA-256 over configuration and weight files."""
        return _files_digest(
            tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in [self.folder / "config.json", *self.weight_files()])
        )


@cache
def _files_digest(files: tuple[tuple[str, int, int], ...]) -> str:
    from ppclc.records import digest_of

    return digest_of([file_digest(Path(path)) for path, _, _ in files])


def open_source(path: str, revision: str | None = None) -> Source:
    """Find a model: a folder (pipeline or bare transformer), a hub id, or `builtin:NAME`.

    Raises:
        ModelError: there is no such folder, it holds no transformer, or no family knows its class.
    """
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
    config = _json_object(folder / "config.json")
    family = families.of_config(config, str(folder / "config.json"))
    layout = next((found for found in family.layouts if found.applies(config)), None)
    stored, config = config, layout.config(config) if layout else config
    known = stock_config(family)
    for key in [g.count_key for g in family.groups]:
        value = config.setdefault(key, known.get(key))
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{folder / 'config.json'}: {key} = {value!r}: wanted a whole number above 0")
    return Source(path, folder, known | config, family, layout, stored if layout else {})


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
    listed = _json_object(index)
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
    library, name = _json_object(root / "model_index.json")[part][:2]
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
    return str(_json_object(root / "model_index.json").get("_class_name"))


def part_config(root: Path, part: str) -> dict[str, Any]:
    """Configuration of a part of a pipeline. Raises ModelError when it cannot be read."""
    return _json_object(root / part / "config.json")


def _local_or_hub(path: str, revision: str | None, more: list[str] | None = None) -> Path:
    root = Path(path).expanduser()
    if root.is_dir():
        return root
    if root.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise ModelError(f"{path}: no such model folder; wanted a folder, a hub id such as 'Qwen/Qwen-Image', or builtin:two-digits")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "transformer/*.json", "transformer/*.safetensors", "transformer/*.py", "*.safetensors"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=[*wanted, *(more or [])]))
    except Exception as error:  # the hub's client raises many kinds; all mean that the model cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{path}: no such folder, and not to be had from the hub ({reason}); give a local folder, or check the id, HF_TOKEN and HF_HUB_OFFLINE"
        ) from None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
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

    try:
        with init_empty_weights(include_buffers=False):
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
    empty = empty_model(source.family, source.config, str(source.folder / "config.json"))
    found: dict[str, tuple[int, ...]] = {}
    for file in source.weight_files():
        found |= stored_shapes(file)
    compare_tensors(source.folder, {k: tuple(v.shape) for k, v in empty.state_dict().items()}, found)
    model, info = model_class(source.family, source.config).from_pretrained(
        source.folder, torch_dtype=DTYPES[dtype], output_loading_info=True, use_safetensors=True, local_files_only=True
    )
    left = {k: v for k, v in info.items() if v}
    if left:
        raise ModelError(f"{source.folder}: diffusers could not place all tensors: {left}")
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{source.folder}: tensor {name} holds NaN or infinite values, wanted finite ones; fetch the model again")
    return model.eval().requires_grad_(False)


def _from_layout(source: Source, layout: Layout, dtype: str) -> Any:
    """The model of a folder in another layout, its tensors turned into ours.

    Raises:
        ModelError: a tensor missing, of a wrong shape, not finite, or there for nothing.
    """
    files: dict[str, torch.Tensor] = {}
    for file in source.weight_files():
        stored_shapes(file)  # a file that is not whole is refused with its name
        files |= load_file(file)
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
    return model.eval().requires_grad_(False)


class _Accessed(Mapping[str, torch.Tensor]):
    """Tensors, and the names of those that were asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors, self.names = tensors, set[str]()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.names.add(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name of a safetensors file, from its header. Raises ModelError when the file is not whole."""
    try:
        with safe_open(file, "pt") as handle:
            return {k: tuple(handle.get_slice(k).get_shape()) for k in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a whole safetensors file ({error}); fetch it again") from None


def compare_tensors(folder: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Nothing when names and shapes are those that the class wants. Raises ModelError naming the first that is not."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise ModelError(f"{folder}: {len(missing)} tensors are missing, {missing[0]} first; wanted all that config.json calls for")
    if extra:
        raise ModelError(f"{folder}: {len(extra)} tensors are not in the class, {extra[0]} first; does num_layers in config.json fit?")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ModelError(f"{folder}: tensor {name} has shape {list(found[name])}, wanted {list(shape)} by config.json")


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
    return count_parameters(empty_model(family, student_config(family, config, plan)))


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


def rebuild_student(model: Any, plan: CompressionPlan, state: Mapping[str, torch.Tensor]) -> Any:
    """The student of a teacher with all of its tensors given. Raises PlanError when they are not the plan's."""
    config = {"_class_name": type(model).__name__, **model.config}
    family = families.of_config(config, "model")
    student = empty_model(family, student_config(family, config, plan))
    if student.state_dict().keys() != state.keys():
        raise PlanError("plan: the trained tensors are those of another plan")
    return _fill(student, state, next(model.parameters()))


def _fill(student: Any, state: Mapping[str, torch.Tensor], like: torch.Tensor) -> Any:
    copies = {n: t.detach().to(like.device, like.dtype, copy=True).contiguous() for n, t in state.items()}
    student.load_state_dict(copies, strict=True, assign=True)
    return student.eval().requires_grad_(False)


def save_model(model: Any, plan: CompressionPlan, folder: Path) -> dict[str, str]:
    """Write a student as a diffusers folder (`folder/transformer`) and give the SHA-256 of each file.

    A width-edited student's class travels with it, under a name made from its content.
    """
    config = {"_class_name": type(model).__name__, **model.config}
    family = families.of_config(config, "model")
    home = folder / "transformer"
    with disk_errors(folder):
        model.save_pretrained(home, safe_serialization=True, max_shard_size=SHARD_SIZE)
        if family.class_of(plan) != family.class_name:
            _bring_class(family, family.class_of(plan), home)
        write_text(home / "plan.json", plan.to_json())
        return {str(p.relative_to(folder)): file_digest(p) for p in sorted(home.rglob("*")) if p.is_file()}


def _bring_class(family: Family, class_name: str, home: Path) -> None:
    """Put the student's class beside its weights and name it in `auto_map`."""
    text = travelling_class(family.class_names[class_name])
    name = f"ppclc_{family.name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    write_text(home / f"{name}.py", text)
    config = _json_object(home / "config.json")
    config["auto_map"] = {"AutoModel": f"{name}.{class_name}"}
    write_text(home / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def travelling_class(where: str) -> str:
    """The text of a student's class, `module:Class`, as it travels: one module, with the parts that it shares with others in front."""
    sources = [Path(str(import_module(m).__file__)).read_text("utf-8") for m in (PARTS, where.partition(":")[0])]
    if f"from {PARTS} import" not in sources[1]:
        return sources[1]
    future = "from __future__ import annotations\n"
    parts, own = (text.split(future, 1) for text in sources)
    imports = re.compile(rf"^from {re.escape(PARTS)} import (\([^)]*\)|.*)\n", re.MULTILINE)
    return own[0] + future + parts[1].rstrip() + "\n\n\n" + imports.sub("", own[1]).lstrip()


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


@dataclass
class Trace:
    """What one forward of a model passed through.

    `states[s][i]` is stream s at the input of block i, `states[s][-1]` at the last block's output, each
    (B, tokens, D); `temb` is the time embedding, where all modulation comes from one; `shared[i]` are the keyword
    arguments that block i gets besides. `mids[s][i]`, where asked for, is stream s in block i after the attention
    residual, (B, tokens, D), None where the block has no network of that stream that could be made linear.
    """

    velocity: torch.Tensor
    states: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    temb: torch.Tensor | None = None
    shared: list[Mapping[str, Any]] = field(default_factory=list)
    mids: dict[str, list[torch.Tensor | None]] = field(default_factory=dict)


class _EnoughError(Exception):
    """Raised inside a forward that has gone far enough."""


def trace(model: Any, family: Family, inputs: Mapping[str, Any], last: int | None = None, mids: bool = False) -> Trace:
    """Run a stock model once and keep every block's states; with `last`, no further than that block.

    With `mids`, the states between attention and feed-forward networks as well.
    """
    config, end = model.config, None if last is None else last + 1
    blocks, groups = blocks_of(model, family)[:end], groups_of(model, family)[:end]
    seen = Trace(velocity=torch.empty(0), states={s: [] for s in STREAMS}, mids={s: [] for s in _ffn_streams(family)} if mids else {})

    def before(number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = seen.states["text"][-1].shape[1] if number else None
        states, shared = groups[number].given(args, kwargs, tokens)
        for stream in STREAMS:
            seen.states[stream].append(states[stream].detach())
        seen.shared.append(shared)
        for stream, kept in seen.mids.items():
            if stream not in family.ffn_streams(config, number):
                kept.append(None)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for stream, value in groups[-1].states_of(output, {s: v[-1] for s, v in seen.states.items()}).items():
            seen.states[stream].append(value.detach())
        if last is not None:
            raise _EnoughError

    def embedded(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        seen.temb = output.detach()

    hooks = [b.register_forward_pre_hook(partial(before, n), with_kwargs=True) for n, b in enumerate(blocks)]
    for stream, states in seen.mids.items():
        for number, (group, block) in enumerate(zip(groups, blocks, strict=True)):
            if stream in family.ffn_streams(config, number):
                hooks.append(block.get_submodule(group.ffn_inputs[stream]).register_forward_pre_hook(_keeper(states)))
    hooks.append(blocks[-1].register_forward_hook(after))
    if family.time_embedding:
        hooks.append(model.get_submodule(family.time_embedding).register_forward_hook(embedded))
    try:
        with torch.no_grad():
            seen.velocity = model(**inputs, return_dict=False)[0]
    except _EnoughError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _ffn_streams(family: Family) -> list[str]:
    return [s for s in STREAMS if any(s in g.ffn_inputs for g in family.groups)]


def _keeper(kept: list[Any]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that adds a module's first argument to a list."""

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        kept.append(args[0].detach())

    return keep


class StandIn(nn.Module):
    """A function of (states by stream) that stands where a block stood. `text_tokens` is set where streams are joined."""

    text_tokens: int | None = None

    def __init__(self, group: Group, function: Callable[[States], Mapping[str, torch.Tensor]]) -> None:
        super().__init__()
        self.group, self.function = group, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.group.output(self.function(self.group.given(args, kwargs, self.text_tokens)[0]))


class _Passed(nn.Module):
    """Stands where a block was left out: what came in goes out."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.group.positional, args, strict=False)) | kwargs
        return given[self.group.joined] if self.group.joined else tuple(given[self.group.streams[s]] for s in self.group.outputs)


@contextmanager
def replaced(model: Any, family: Family, stand_ins: Mapping[int, nn.Module | None]) -> Iterator[None]:
    """The model with blocks exchanged for stand-ins, or passed by (None); put back afterwards. Others keep their numbers."""
    lists = {g.path: model.get_submodule(g.path) for g in family.groups}
    groups = groups_of(model, family)
    placed = {n: _Passed(groups[n]) if m is None else m for n, m in stand_ins.items()}
    first, hooks = 0, []
    for path, original in lists.items():
        model.set_submodule(path, nn.ModuleList(placed.get(first + n, block) for n, block in enumerate(original)))
        first += len(original)
    joined = [m for m in placed.values() if isinstance(m, StandIn) and m.group.joined]
    if joined:
        hooks.append(model.register_forward_pre_hook(partial(_tell_text_tokens, family, joined), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for path, original in lists.items():
            model.set_submodule(path, original)


def _tell_text_tokens(family: Family, stand_ins: Sequence[StandIn], _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    for stand_in in stand_ins:
        stand_in.text_tokens = family.text_tokens(kwargs)


@contextmanager
def linear_ffns(model: Any, family: Family, maps: Mapping[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """The stock model with `h + (W h + b)` in place of feed-forward networks; undone afterwards.

    `maps` gives W (D, D) and b (D,) by block and stream. Nothing is saved: the networks still run, and
    their result is not used. May stand around `replaced`, whose stand-ins are left alone, not inside it.

    Raises:
        PlanError: a block or a stream that has no such network.
    """
    blocks, groups, hooks = blocks_of(model, family), groups_of(model, family), []
    for block, stream in maps:
        if not 0 <= block < len(blocks) or stream not in family.ffn_streams(model.config, block):
            raise PlanError(f"ffn: block {block}, {stream}: wanted a block of 0..{len(blocks) - 1} that has a network of that stream")
    for (block, stream), (weight, bias) in maps.items():
        mids: list[torch.Tensor] = []
        after = _linear_output(mids, groups[block].outputs.index(stream), weight, bias)
        hooks.append(blocks[block].get_submodule(groups[block].ffn_inputs[stream]).register_forward_pre_hook(_keeper(mids)))
        hooks.append(blocks[block].register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _linear_output(
    mids: list[torch.Tensor], place: int, weight: torch.Tensor, bias: torch.Tensor
) -> Callable[[nn.Module, tuple[Any, ...], tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    """A hook that puts the linear network's result at one place of a block's output, from the state kept in `mids`."""

    def after(_: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        mid = mids.pop()
        mids.clear()
        result = mid + nn.functional.linear(mid, weight.to(mid), bias.to(mid))
        return (*output[:place], result, *output[place + 1 :])

    return after


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
