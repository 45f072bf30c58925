"""Whole pipelines around students: what stays as it was is linked, not copied; the transformer is ours.

A student of a pipeline's folder is a pipeline's folder: `model_index.json`, every other component, the licence. Files are hard
links to the teacher's, so that they take no room; where the file system refuses, they are copies.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppclc.errors import ModelError
from ppclc.loading.sources import BUILTIN, Source, json_object
from ppclc.records import whole_folder, write_text

INDEX = "model_index.json"
OURS = "transformer"
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def pipeline_of(source: Source) -> Path | None:
    """The folder of the pipeline that a teacher is the transformer of; None for a bare one, a single file and a builtin."""
    root = source.folder.parent
    whole = source.folder.name == OURS and (root / INDEX).is_file() and not source.path.startswith(BUILTIN)
    return root if whole else None


def components(root: Path) -> dict[str, list[Any]]:
    """Library and class of each component of a pipeline's folder that it uses, by name, the transformer left out.

    Raises:
        ModelError: no JSON, or a name that is not that of a folder in it.
    """
    listed = {n: v for n, v in json_object(root / INDEX).items() if isinstance(v, list) and not n.startswith("_")}
    for name in listed:
        if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
            raise ModelError(f"{root / INDEX}: component {name!r}: wanted the name of a folder beside it; fetch the model again")
    return {name: value for name, value in listed.items() if name != OURS and None not in value}


def surround(source: Source, folder: Path) -> list[str]:
    """Make a student's folder the whole pipeline that its teacher is of; what is to be told. What is there already stays.

    `folder` holds `transformer` with its configuration. The index comes last: with it the folder is a pipeline.

    Raises:
        ModelError: as `components`.
    """
    root = pipeline_of(source)
    if root is None:
        return []
    lacking = []
    for name in components(root):
        found = files_below(root / name)
        if _is_whole(root / name, found):
            _place(found, folder / name)
        else:
            lacking.append(name)
    for licence in licences(root):
        if not _same(licence, folder / licence.name):
            (folder / licence.name).unlink(missing_ok=True)
            _link(licence.resolve(), folder / licence.name)
    text = json.dumps(_index(root, folder), indent=2) + "\n"
    if not (folder / INDEX).is_file() or (folder / INDEX).read_text("utf-8") != text:
        write_text(folder / INDEX, text)
    if not lacking:
        return []
    way_out = "fetch them" if Path(source.path).expanduser().exists() else f"fetch them with: hf download {source.path}"
    told = f"{', '.join(lacking)}: not there, or not whole, in the teacher's folder; the student's pipeline lacks them"
    return [f"warning: {told}; {way_out}, then run the same command again"]


def names_in(folder: Path) -> set[str]:
    """Names at the top of a pipeline's folder that `surround` puts there."""
    if not (folder / INDEX).is_file():
        return set()
    return {INDEX, *components(folder), *(file.name for file in licences(folder))}


def licences(root: Path) -> list[Path]:
    """The licence files in a folder."""
    return sorted({file for pattern in LICENCES for file in root.glob(pattern) if file.is_file()})


def _index(root: Path, folder: Path) -> dict[str, Any]:
    """The teacher's `model_index.json` with the student's class; one that travels is named by its module in `transformer/`."""
    config = json_object(folder / OURS / "config.json")
    module, _, name = str(config.get("auto_map", {}).get("AutoModel", "")).rpartition(".")
    ours = [module, name] if module else ["diffusers", config["_class_name"]]
    return {k: v for k, v in json_object(root / INDEX).items() if k != "_name_or_path"} | {OURS: ours}


def files_below(folder: Path) -> dict[str, Path]:
    """Regular files below a folder, by name relative to it, each as what it is after all links; none that lead in a circle or nowhere.

    Hidden files are left out, and pickles where the same folder holds safetensors.
    """
    found = dict(_walk(folder, "", (folder.parent.resolve(),)))
    safe = {name.rpartition("/")[0] for name in found if name.endswith(".safetensors")}
    return {n: p for n, p in found.items() if not (n.endswith(PICKLES) and n.rpartition("/")[0] in safe)}


def _walk(folder: Path, prefix: str, above: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    try:
        real = folder.resolve(strict=True)
    except (OSError, RuntimeError):
        return
    if not real.is_dir() or any(folder.is_relative_to(real) for folder in above):
        return
    for entry in sorted(real.iterdir()):
        if entry.name.startswith("."):
            continue
        try:
            target = entry.resolve(strict=True)
        except (OSError, RuntimeError):  # a link to itself, or to a file that was never fetched
            continue
        if target.is_file():
            yield prefix + entry.name, target
        elif target.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/", (*above, real))


def _is_whole(folder: Path, found: dict[str, Path]) -> bool:
    """Whether a component is there: some file, weights where it has a model's configuration, and every shard that an index names."""
    if not found or ("config.json" in found and not any(n.endswith((".safetensors", *PICKLES)) for n in found)):
        return False
    for name in found:
        if name.endswith(".safetensors.index.json"):
            shards = json_object(folder / name).get("weight_map")
            above = name.removesuffix(name.rpartition("/")[2])
            if not isinstance(shards, dict) or any(f"{above}{shard}" not in found for shard in shards.values()):
                return False
    return True


def _place(files: dict[str, Path], folder: Path) -> None:
    """Put files into a folder of their own, unless they are there."""
    if all(_same(path, folder / name) for name, path in files.items()):
        return
    with whole_folder(folder) as draft:
        for name, path in files.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            _link(path, draft / name)


def _same(path: Path, there: Path) -> bool:
    if not there.is_file():
        return False
    a, b = path.stat(), there.stat()
    return os.path.samestat(a, b) or (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns)


def _link(path: Path, there: Path) -> None:
    """A hard link, else a copy: over file systems, on one without links, or where the owner of a file forbids it."""
    try:
        os.link(path, there)
    except OSError:
        shutil.copy2(path, there)
