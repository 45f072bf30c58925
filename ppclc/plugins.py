"""Plug-ins by file name: `names(kind)` and `load(kind, name)`.

A family, a back end, a judge or a task is one module with a `PLUGIN`; the file's being there registers it.
Third parties use the entry-point groups `ppclc.families`, `ppclc.backends`, `ppclc.judges` and `ppclc.tasks`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

BUILTIN_TASKS = {"two-digits": "ppclc.scenes"}


def names(kind: str) -> list[str]:
    """Sorted names of all plug-ins of a kind: `families`, `backends`, `judges` or `tasks`."""
    found = {point.name for point in entry_points(group=f"ppclc.{kind}")}
    if kind == "tasks":
        return sorted(found | set(BUILTIN_TASKS))
    folder = Path(__file__).parent / kind
    return sorted(found | {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")})


def load(kind: str, name: str) -> Any:
    """The `PLUGIN` of that name. Raises KeyError, naming all there are, for one that is not there."""
    for point in entry_points(group=f"ppclc.{kind}"):
        if point.name == name:
            return point.load()
    if name not in names(kind):
        raise KeyError(f"no {kind} called {name!r}; there are {', '.join(names(kind))}")
    module = BUILTIN_TASKS[name] if kind == "tasks" else f"ppclc.{kind}.{name}"
    return import_module(module).PLUGIN
