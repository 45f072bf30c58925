"""export: lower a model to a back end, run what was written beside eager, and publish it when both agree."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

import ppclc
from ppclc import plugins
from ppclc.backends import Backend, ExportRequest
from ppclc.errors import OutputError, PpclcError, RecipeError, VerificationError
from ppclc.families import Family, Lowered
from ppclc.lowering import parity, worst
from ppclc.models import require_library
from ppclc.records import Export, Parity, digest_of, file_digest, whole_folder, write_text

VERSION = 1
RECORD = "export.json"
MAX_ABS = {"float32": 1e-4}
Progress = Callable[[float, str], None]


def check_backend(name: str, dtype: str, options: Mapping[str, Any] | None = None) -> Backend:
    """The back end that writes what `name` runs, when it can do so here.

    Raises:
        RecipeError: no such back end, one that writes nothing, a dtype or an option that it has not.
        UnavailableError: a library that it needs is not installed.
    """
    if name not in plugins.names("backends"):
        raise RecipeError(f"export.backend = {name!r}: no such back end; there are {', '.join(plugins.names('backends'))}")
    writer = _writer(name)
    if writer.export is None:
        raise RecipeError(f"export.backend = {name!r}: writes no model, it runs the one in memory; wanted {', '.join(writers())}")
    if dtype not in writer.dtypes:
        raise RecipeError(f"export.dtype = {dtype!r}: wanted {' or '.join(writer.dtypes)}; {name} writes no other in this version")
    for option in options or {}:
        if option not in writer.options:
            raise RecipeError(f"export.{option}: {name} has no such option; it has {', '.join(writer.options) or 'none'}")
    for module, extra in {**dict(writer.requires), **dict(plugins.load("backends", name).requires)}.items():
        require_library(module, extra)
    return writer


def writers() -> list[str]:
    """Names of the back ends that a model can be exported to."""
    return [name for name in plugins.names("backends") if _writer(name).export]


def _writer(name: str) -> Backend:
    backend: Backend = plugins.load("backends", name)
    return _writer(backend.artefact) if backend.artefact else backend


def export_digest(model_digest: str, backend_name: str, dtype: str, options: Mapping[str, Any] | None = None) -> str:
    """Digest of the export that these would make; `read_export` gives the one that is there."""
    return digest_of(["export", VERSION, model_digest, backend_name, dtype, {**_writer(backend_name).options, **(options or {})}])


def export_model(
    model: Any,
    family: Family,
    backend_name: str,
    dtype: str,
    folder: Path,
    model_digest: str,
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
) -> Export:
    """Write the model to a folder for a back end and compare it with eager at the family's sizes.

    The model is left as it is. The folder appears whole or not at all; an earlier export there is replaced.

    Raises:
        RecipeError, UnavailableError: as `check_backend` does.
        OutputError: the folder holds something else, or cannot be written.
        VerificationError: what was written does not run, or differs from eager by more than 1e-4 in float32.
    """
    writer = check_backend(backend_name, dtype, options)
    _check_folder(folder)
    tell = progress or (lambda done, what: None)
    given, seconds = {**writer.options, **(options or {})}, Seconds()
    with whole_folder(folder) as draft:
        tell(0.0, "lower")
        with seconds.of("prepare"):
            lowered = family.lowered(model)
            write_text(draft / "transformer" / "config.json", config_json(model))
            example = lowered.inputs(**lowered.sizes[0])
        assert writer.export is not None
        written = writer.export(ExportRequest(lowered.module, example, lowered.dynamic, lowered.ranges, dtype, draft, given))
        tell(0.8, "compare")
        with seconds.of("compare"):
            distance, used = compare(plugins.load("backends", backend_name), draft, lowered, tell)
        check_parity(distance, f"{folder}: {backend_name}", dtype)
        files = {p.relative_to(draft).as_posix(): p for p in sorted(draft.rglob("*")) if p.is_file()}
        export = Export(
            digest=export_digest(model_digest, backend_name, dtype, options),
            backend=backend_name,
            folder=str(folder),
            files={name: file_digest(path) for name, path in files.items()},
            bytes=sum(path.stat().st_size for path in files.values()),
            dtype=dtype,
            shapes=[dict(size) for size in lowered.sizes],
            parity=distance,
            inputs=list(example),
            options=written.options | {"session": used},
            versions=versions(writer),
            seconds={**written.seconds, **seconds.by_phase},
        )
        write_text(draft / RECORD, export_json(export, model_digest))
    tell(1.0, "")
    return export


def _check_folder(folder: Path) -> None:
    """Raise OutputError for a folder whose content is not an export, so that none of it is replaced."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise OutputError(f"{folder}: holds files but no {RECORD}; wanted an empty folder or an earlier export, give another with -o")


class Seconds:
    """Wall time by phase."""

    def __init__(self) -> None:
        self.by_phase: dict[str, float] = {}

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        yield
        self.by_phase[phase] = time.perf_counter() - start


def config_json(model: Any) -> str:
    """The model's configuration as diffusers writes it, without what speaks of the folder it came from."""
    # Not by the model's own to_json_string, which adds keys to the live configuration.
    config = {k: v for k, v in model.config.items() if not k.startswith("_") and k != "auto_map"}
    config |= {"_class_name": type(model).__name__, "_diffusers_version": import_module("diffusers").__version__}
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def compare(backend: Backend, folder: Path, lowered: Lowered, progress: Progress) -> tuple[Parity, dict[str, Any]]:
    """The worst distance from eager over the family's sizes, and how the session ran.

    Raises:
        VerificationError: the artefact does not load or run.
    """
    distances: list[Parity] = []
    with torch.no_grad():
        with _failures(f"{backend.name}: cannot load what was written"):
            session = backend.load(folder, lowered.reference)
        for size in lowered.sizes:
            inputs = lowered.inputs(**size)
            with _failures(f"{backend.name}: does not run at {dict(size)}"):
                got = session.run(inputs)
            distances.append(parity(lowered.reference(inputs), got))
            progress(0.8 + 0.2 * len(distances) / len(lowered.sizes), "compare")
    return worst(distances), session.options


@contextmanager
def _failures(what: str) -> Iterator[None]:
    """Tell a runtime's own errors, of whatever class, as VerificationError."""
    try:
        yield
    except PpclcError:
        raise
    except Exception as error:
        raise VerificationError(f"{what}: {error}") from error


def check_parity(distance: Parity, where: str, dtype: str) -> None:
    """Raise VerificationError for a distance beyond the dtype's limit, or one that is not a number."""
    limit = MAX_ABS.get(dtype)
    if limit is not None and not distance.max_abs <= limit:
        figures = f"max_abs = {distance.max_abs:.3g} (rel_l2 {distance.rel_l2:.3g}, cosine {distance.cosine:.6f})"
        raise VerificationError(
            f"{where}: differs from eager by {figures}, wanted max_abs of at most {limit:g} in {dtype}; nothing was written"
        )


def versions(backend: Backend) -> dict[str, str]:
    """Versions of ppclc and of every library that had a part in it."""
    modules = ["torch", "diffusers", *(module for module, _ in backend.requires)]
    return {"ppclc": ppclc.__version__} | {m: str(import_module(m).__version__) for m in modules}


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


def is_intact(export: Export, folder: Path) -> bool:
    """Whether every file of an export lies in `folder` as it was written."""
    return all((folder / f).is_file() and file_digest(folder / f) == digest for f, digest in export.files.items())
