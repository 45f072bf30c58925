"""Models: load, run block by block, edit, save. The one place that edits a module tree.

`apply_plan(model, plan)` is the only way from a teacher to a student; slicing, loading and every back
end meet the same one.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppclc import families
from ppclc.errors import ModelError, UnavailableError, first_line
from ppclc.families import Bank, Family, Group, Layout
from ppclc.kernels.fused import fuse
from ppclc.loading.checkpoints import STATES, Piece, held, places_in, write_checkpoint
from ppclc.loading.classes import (
    DTYPES,
    empty_model,
    model_class,
    model_outline,
    student_config,
)
from ppclc.loading.sources import (
    Source,
    check_tensors,
    json_object,
    open_source,
)
from ppclc.machine.devices import cores
from ppclc.plan import CompressionPlan
from ppclc.records import StoredTensors, disk_errors, file_digest, write_text
from ppclc.student_tensors import student_tensor
from ppclc.students.parts import Travelling, bring_class

PART_LIBRARIES = {"diffusers": "torch_dtype", "transformers": "dtype"}
"""Libraries that parts of a pipeline are loaded from, and what each calls the dtype."""
ALIGNMENT = 64
"""Bytes between the starts of tensors that share one allocation; PyTorch aligns its own alike."""
NARROW = 256
"""Widths up to which operators run on one thread."""


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
        raise ModelError(
            f"{root / part}: cannot be loaded as {name} ({first_line(error)}); fetch it again, safetensors included"
        ) from error
    lacking = sorted({str(k) for key in ("missing_keys", "mismatched_keys") for k in info.get(key, ())})
    if lacking:
        raise ModelError(
            f"{root / part}: {len(lacking)} tensors of {name} are missing or of a wrong shape, {lacking[0]} first; fetch it again"
        )
    return model.eval().requires_grad_(False)


def check_headers(source: Source) -> None:
    """Raise ModelError for weights that are truncated, or lack a tensor, or have one too many or of a wrong shape, by their files' headers alone."""
    if source.layout is None:
        empty = model_outline(source.family, source.config, str(source.folder / "config.json"))
        check_tensors(source, {k: tuple(v.shape) for k, v in empty.state_dict().items()}, source.places())


def load_source(source: Source, dtype: str = "float32") -> Any:
    """The model, in evaluation mode, every tensor accounted for and finite.

    Raises:
        ModelError: weights truncated or corrupt; a tensor missing, extra, of a wrong shape, or not finite.
    """
    if source.layout is not None:
        return _from_layout(source, source.layout, dtype)
    check_headers(source)
    model, info = model_class(source.family, source.config).from_pretrained(
        source.folder,
        torch_dtype=DTYPES[dtype],
        output_loading_info=True,
        use_safetensors=True,
        local_files_only=True,
        variant=source.variant,
    )
    left = {k: v for k, v in info.items() if v}
    if left:
        raise ModelError(f"{source.folder}: diffusers could not place all tensors: {left}")
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{source.folder}: tensor {name} holds NaN or infinite values, wanted finite ones; fetch the model again")
    return fuse(aligned(model), source.family.fused()).eval().requires_grad_(False)


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


def load_model(path: str | Path, dtype: str = "float32", revision: str | None = None) -> Any:
    """Any teacher or student, stock or width-edited, ready to run. Raises ModelError as `load_source` does."""
    return load_source(open_source(str(path), revision), dtype)


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


def require_library(modules: str, extra: str) -> Any:
    """Import a library that an extra brings, of `a|b` the first that is there. Raises UnavailableError saying how to install it."""
    for module in modules.split("|"):
        try:
            return import_module(module)
        except ImportError:
            continue
    raise UnavailableError(f"{modules.replace('|', ' or ')} is not installed here: pip install 'ppclc[{extra}]'")
