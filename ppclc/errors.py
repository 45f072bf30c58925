"""What can go wrong, as one tree:

PpclcError                 anything that ppclc itself reports
|- RecipeError             the recipe, or a flag that stands for one of its keys (exit code 2)
|- PlanError               a plan that is malformed or that this model cannot take (2)
|- ModelError              a model folder that cannot be read as what it claims to be (2)
|- OutputError             a folder that cannot be written or holds another teacher's work (2)
|- UnavailableError        a library, device or disk space that is missing here (3)
`- VerificationError       a result that is not what it must be, e.g. a gate that failed (1)

A message says where, what was got, what was wanted, and the way out.
"""

from __future__ import annotations


class PpclcError(Exception):
    """Base of every error that is told in one message, without a traceback."""

    exit_code = 2


class RecipeError(PpclcError):
    """A recipe, or a value set on the command line, that cannot be used."""


class PlanError(PpclcError):
    """A plan that is malformed, or that this model cannot take."""


class ModelError(PpclcError):
    """A model folder that is missing, damaged, or of a class that no family knows."""


class OutputError(PpclcError):
    """An output folder that cannot be written, or that holds another teacher's work."""


class UnavailableError(PpclcError):
    """Something this machine lacks: a library, a device, room on the disk."""

    exit_code = 3


class VerificationError(PpclcError):
    """A gate that failed, or a copy that does not equal its original."""

    exit_code = 1


def memory_lacks(error: BaseException) -> str:
    """What an error says of memory that could not be had, on a GPU or the host; empty where it is about something else."""
    told = first_line(error)
    on_gpu = (
        type(error).__name__ == "OutOfMemoryError" or ("CUDA" in told.upper() and "out of memory" in told) or "_STATUS_ALLOC_FAILED" in told
    )
    if on_gpu or isinstance(error, MemoryError) or "can't allocate memory" in told or "not enough memory" in told:
        return f"{'the GPU' if on_gpu else 'this machine'} has no memory left ({told})"
    return ""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
