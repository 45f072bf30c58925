"""Back ends: how a model leaves PyTorch, and how what was written is run again.

A back end is one file here with a `PLUGIN`; its being there registers it. It may import `ppclc.backends`,
`ppclc.lowering`, `ppclc.records` and `ppclc.errors`, and imports its own library inside its functions, so
that a missing one is told before any work is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

DTYPES = ("float32", "bfloat16", "float16")
Tensors = dict[str, torch.Tensor]


class Subject(Protocol):
    """A model that is exported or run: itself, as a function of the exported module's inputs, and that module."""

    @property
    def reference(self) -> Callable[[Tensors], torch.Tensor]: ...

    @property
    def module(self) -> torch.nn.Module: ...


Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""By input its least, usual and greatest shape."""


@dataclass(frozen=True)
class ExportRequest:
    """A module to write below `out`, all options filled in.

    inputs: an example by forward's argument names, no dynamic axis of size 1. dynamic: axis names by
    input and axis. ranges: least and greatest size by axis name. dtype: name of the parameters' dtype.
    profiles: least, usual and greatest shape of every input, for back ends that build for a range of them.
    taps: names of the outputs that the module gives beside its own. model_digest: of the model's configuration and weights.
    store: where the parameters are mapped from files and must not be read: writes them all to a file, and says by the module's names at which
    byte each starts and how many it has. label: the export's own dtype, where that is not the parameters': `float8`.
    """

    module: torch.nn.Module
    inputs: Tensors
    dynamic: Mapping[str, Mapping[int, str]]
    ranges: Mapping[str, tuple[int, int]]
    dtype: str
    out: Path
    options: Mapping[str, Any]
    profiles: Sequence[Profile] = ()
    taps: Sequence[str] = ()
    model_digest: str = ""
    store: Callable[[Path], Mapping[str, tuple[int, int]]] | None = None
    label: str = ""


@dataclass(frozen=True)
class Written:
    """What an export chose (JSON values) and how long its phases took, in seconds. The files are those below `out`."""

    options: dict[str, Any]
    seconds: dict[str, float]


class Session(Protocol):
    """A model that is ready to run. `options` says how, in JSON values; `device` among them is where, for one that does not run where its inputs lie."""

    @property
    def options(self) -> dict[str, Any]: ...

    def run(self, inputs: Tensors) -> torch.Tensor:
        """The output for inputs by name. A device is not waited for: reading the output does that, and who takes time has to."""
        ...

    def outputs(self, inputs: Tensors) -> list[torch.Tensor]:
        """All outputs, the model's own and then those of `ExportRequest.taps`."""
        ...

    def bound(self, inputs: Tensors) -> Callable[[], torch.Tensor]:
        """`run` on these inputs, with all that need not be done again done: what bench times. The next call may overwrite the result."""
        ...


@dataclass(frozen=True)
class Backend:
    """All that ppclc knows of one back end.

    load: a session from the folder of an artefact; one that writes nothing runs the model itself instead.
    export: writes the artefact; None where there is none to write. artefact: name of the back end that
    writes what this one runs, where that is another. requires: modules, each with the extra of ppclc
    that brings it; `a|b` is satisfied by either. options: what a caller may set, with the defaults. check: raises RecipeError for values of
    them that it cannot take, and UnavailableError for ones that this machine cannot.
    lacks: what this machine lacks to export beside libraries, with how to get it; empty where nothing. from_files: whether
    `export` heeds `ExportRequest.store`. cannot_run: why this machine cannot run what it writes; empty where it can.
    run_options: what `load` takes by keyword besides, with the defaults. graphs: whether calls can be captured as CUDA graphs from outside, or the
    back end does so itself where `load` is given `cuda_graph=True`; empty where there are none.
    """

    name: str
    load: Callable[..., Session]
    export: Callable[[ExportRequest], Written] | None = None
    artefact: str = ""
    requires: tuple[tuple[str, str], ...] = ()
    dtypes: tuple[str, ...] = ("float32",)
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] = lambda _: None
    lacks: Callable[[], str] = lambda: ""
    from_files: bool = False
    cannot_run: Callable[[], str] = lambda: ""
    run_options: Mapping[str, Any] = field(default_factory=dict)
    graphs: Literal["", "captured", "own"] = ""
