"""slice: the student as a diffusers folder, smaller on disk and in memory, equal to the model in memory bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ppclc.errors import VerificationError
from ppclc.models import count_parameters, load_model, rebuild_student, save_model
from ppclc.plan import CompressionPlan
from ppclc.records import Distilled, Student, file_digest, whole_folder

VERSION = 1


def slice_student(model: Any, plan: CompressionPlan, trained: Distilled, folder: Path) -> Student:
    """Write the student to `folder` and read it back.

    Raises:
        VerificationError: what was read back is not what was written.
    """
    with whole_folder(folder) as draft:
        return write_student(rebuild_student(model, plan, trained.tensors), plan, draft)


def write_student(student: Any, plan: CompressionPlan, folder: Path) -> Student:
    """Write a student into a folder and read it back. Raises VerificationError as `slice_student` does."""
    files = save_model(student, plan, folder)
    again = load_model(folder, str(next(student.parameters()).dtype).removeprefix("torch.")).state_dict()
    for name, tensor in student.state_dict().items():
        if not torch.equal(tensor, again[name]):
            raise VerificationError(f"{folder}: tensor {name} came back changed from disk; is the disk sound?")
    weights = sum((folder / f).stat().st_size for f in files if f.endswith(".safetensors"))
    return Student(plan=plan, parameters=count_parameters(student), bytes=weights, blocks=len(plan.kept), files=files)


def is_intact(student: Student, folder: Path) -> bool:
    """Whether every file of a student lies in `folder` as it was written."""
    return all((folder / f).is_file() and file_digest(folder / f) == digest for f, digest in student.files.items())
