"""The receipt beside every artefact, `export.json`: what it was made from, how, with what, and how far from eager it is."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from ppclc import plugins
from ppclc.errors import OutputError
from ppclc.records import Export, file_digest

RECORD = "export.json"


def export_json(export: Export, model_digest: str) -> str:
    """`export.json`: the record, and the digest of the model that it was made from."""
    return json.dumps({"model_digest": model_digest, **export.model_dump(mode="json", exclude={"folder"})}, indent=1) + "\n"


def read_export(folder: Path) -> Export:
    """The export that lies in a folder. Raises OutputError when there is none."""
    try:
        value = json.loads((folder / RECORD).read_text("utf-8"))
        value.pop("model_digest")
        return Export.model_validate({**value, "folder": str(folder)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise OutputError(f"{folder}: no readable {RECORD} ({error}); export the model again") from None


def model_digest_of(folder: Path) -> str:
    """The digest of the model that an export was made from. Raises OutputError when there is none."""
    try:
        return str(json.loads((folder / RECORD).read_text("utf-8"))["model_digest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{folder}: no readable {RECORD} ({error}); export the model again") from None


def is_intact(export: Export, folder: Path) -> bool:
    """Whether every file of an export lies in `folder` as it was written."""
    return all((folder / f).is_file() and file_digest(folder / f) == digest for f, digest in export.files.items())


def runner_of(export: Export) -> str:
    """The back end that runs an artefact."""
    return runner(export.backend)


def runner(backend: str) -> str:
    """The back end that runs what one writes: ONNX Runtime what `onnx` does, each other its own."""
    runners = (n for n in plugins.names("backends") if plugins.load("backends", n).artefact == backend)
    return next(runners, backend)
