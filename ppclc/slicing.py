"""The tensors of a plan's student as pieces to be written: bytes that stay are moved as they lie, edits are made one at a time.

Nothing of the teacher is in memory but the tensor that is being made, however large the model is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ppclc.errors import ModelError, PlanError
from ppclc.families import Bank
from ppclc.loading.checkpoints import Made, Piece
from ppclc.loading.classes import model_outline, student_config
from ppclc.loading.sources import Source, check_tensors, json_object
from ppclc.loading.weight_files import WeightFiles, is_finite
from ppclc.models import load_source
from ppclc.plan import CompressionPlan
from ppclc.records import file_digest
from ppclc.student_tensors import student_tensor


class _Outlines(Mapping[str, torch.Tensor]):
    """Tensors by name without their memory; of each name always the same one."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors, self.made, self.names = tensors, dict[str, torch.Tensor](), dict[int, str]()

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.made:
            like = self.tensors[name]  # where a tensor lies, or a tensor
            self.made[name] = torch.empty(like.shape, dtype=like.dtype, device="meta")
            self.names[id(self.made[name])] = name
        return self.made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def empty_student(source: Source, plan: CompressionPlan) -> Any:
    """The student of a plan without memory. Raises PlanError when the plan is of another model."""
    return model_outline(source.family, student_config(source.family, source.config, plan))


def student_pieces(source: Source, files: WeightFiles, plan: CompressionPlan, bank: Bank) -> dict[str, Piece]:
    """Every tensor of a plan's student by name, in the dtype of `files`: moved where it is a teacher's own, else made from it and the bank.

    The same bits as `apply_plan` gives.

    Raises:
        PlanError: a plan of another model, or one that needs what the bank lacks.
        ModelError: the teacher's files are not those that its configuration calls for.
    """
    teacher = model_outline(source.family, source.config, str(source.folder / "config.json"))
    check_tensors(source, {n: tuple(t.shape) for n, t in teacher.state_dict().items()}, files.places)
    outlines, bank_outlines = _Outlines(files.places), {key: _Outlines(tensors) for key, tensors in bank.items()}
    pieces: dict[str, Piece] = {}
    for name, wanted in empty_student(source, plan).state_dict().items():
        outline = student_tensor(source.family, source.config, plan, name, outlines, bank_outlines)
        if outline.shape != wanted.shape:
            raise PlanError(f"plan: {name} comes out as {list(outline.shape)}, wanted {list(wanted.shape)} by the student's configuration")
        own = outlines.names.get(id(outline))  # the very tensor: nothing was made of it
        if own is not None and files.places[own].dtype == files.dtype and not files.places[own].swapped:
            pieces[name] = files.places[own]
        else:
            pieces[name] = Made(files.dtype, tuple(wanted.shape), partial(_tensor, source, files, plan, bank, name))
    return pieces


def _tensor(source: Source, files: WeightFiles, plan: CompressionPlan, bank: Bank, name: str) -> torch.Tensor:
    tensor = student_tensor(source.family, source.config, plan, name, files, bank).to(files.dtype).contiguous()
    if not is_finite(tensor):
        raise ModelError(f"{source.folder}: the student's {name} comes out with NaN or infinite values; is the edit's training sound?")
    return tensor


def check_weights(source: Source) -> None:
    """Nothing when every tensor that a configuration calls for is there and finite, and every file as `plan.json` tells, a tensor in memory at a time.

    Raises:
        ModelError: a tensor missing, extra, of a wrong shape or not finite; a file that is not as it was written.
    """
    if source.layout is not None and not source.layout.cuts:
        load_source(source)  # checked as a whole: its tensors are put together from several
    else:
        empty = model_outline(source.family, source.config, str(source.folder / "config.json"))
        files = WeightFiles(source, torch.float32, torch.device("cpu"))
        files.check({n: tuple(t.shape) for n, t in empty.state_dict().items()})
        files.dtype = next(iter(files.places.values())).dtype
        for name in files:
            files[name]
    for name, digest in recorded_digests(source.folder).items() if source.folder.is_dir() else ():
        file = source.folder / name
        if not file.is_file() or file_digest(file) != digest:
            raise ModelError(f"{file}: not as it was written, by the SHA-256 in {source.folder / 'plan.json'}; slice it again")


def recorded_digests(folder: Path) -> dict[str, str]:
    """SHA-256 by name of the files beside a student's `plan.json`; none where there is no such file.

    Raises:
        ModelError: a file that lies elsewhere, or what is no digest.
    """
    path = folder / "plan.json"
    files = json_object(path).get("files", {}) if path.is_file() else {}
    if not isinstance(files, dict) or any(Path(n).name != n or not re.fullmatch(r"[0-9a-f]{64}", str(d)) for n, d in files.items()):
        raise ModelError(f"{path}: files = {files!r:.80}: wanted the SHA-256 of files beside it by name; slice the model again")
    return files


def trained_pieces(student: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, Piece]:
    """The pieces of an empty student whose tensors are all given. Raises PlanError when they are not the plan's."""
    state = student.state_dict()
    if state.keys() != tensors.keys():
        raise PlanError("plan: the trained tensors are those of another plan")
    return {n: Made(dtype, tuple(t.shape), partial(_given, tensors, n, dtype)) for n, t in state.items()}


def _given(tensors: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    return tensors[name].to(dtype)
