"""slice: the student as a diffusers folder, written a tensor at a time, so that neither model need fit in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ppclc.families import Bank
from ppclc.loading.classes import DTYPES, count_parameters
from ppclc.loading.sources import Source
from ppclc.loading.weight_files import WeightFiles
from ppclc.models import save_model
from ppclc.plan import CompressionPlan
from ppclc.records import Student, file_digest, whole_folder
from ppclc.slicing import empty_student, student_pieces, trained_pieces

VERSION = 2


def slice_student(
    source: Source, dtype: str, plan: CompressionPlan, bank: Bank, trained: Mapping[str, torch.Tensor], folder: Path
) -> Student:
    """The student of a plan in `folder`, whole or not at all: of all its tensors where they were `trained`, else of the teacher's and the bank's.

    Raises:
        PlanError: a plan of another model, or one that needs what the bank lacks.
        ModelError: the teacher's files are not whole.
    """
    with whole_folder(folder) as draft:
        return write_student(source, dtype, plan, bank, trained, draft)


def write_student(
    source: Source, dtype: str, plan: CompressionPlan, bank: Bank, trained: Mapping[str, torch.Tensor], folder: Path
) -> Student:
    """As `slice_student`, into a folder that is somebody else's draft."""
    student = empty_student(source, plan)
    files = WeightFiles(source, DTYPES[dtype], torch.device("cpu"))
    pieces = trained_pieces(student, trained, files.dtype) if trained else student_pieces(source, files, plan, bank)
    written = save_model(student, plan, folder, pieces)
    weights = sum((folder / f).stat().st_size for f in written if f.endswith(".safetensors"))
    return Student(plan=plan, parameters=count_parameters(student), bytes=weights, blocks=len(plan.kept), files=written)


def is_intact(student: Student, folder: Path) -> bool:
    """Whether every file of a student lies in `folder` as it was written."""
    return all((folder / f).is_file() and file_digest(folder / f) == digest for f, digest in student.files.items())
