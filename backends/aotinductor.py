"""AOTInductor: `transformer/model.pt2`, compiled ahead of time for this machine's processor or GPU; runs in Python or C++ without the model."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ppclc.backends import DTYPES, Backend, ExportRequest, Subject, Tensors, Written
from ppclc.errors import RecipeError, UnavailableError, VerificationError
from ppclc.lowering import dtype_name, exported_program, gpu, quiet

PACKAGE = "transformer/model.pt2"
RECEIPT = "transformer/package.json"


@dataclass(frozen=True)
class PackageSession:
    """A compiled package."""

    package: Any
    options: dict[str, Any]

    def run(self, inputs: Tensors) -> torch.Tensor:
        """The first output; a device has finished when it is returned."""
        return self.outputs(inputs)[0]

    def outputs(self, inputs: Tensors) -> list[torch.Tensor]:
        """All outputs."""
        with torch.no_grad():
            given = self.package(**inputs)
        found = [given] if isinstance(given, torch.Tensor) else list(given)
        if found[0].is_cuda:
            torch.cuda.synchronize(found[0].device)
        return found


def export(request: ExportRequest) -> Written:
    """Compile the module and package it.

    Raises:
        RecipeError: a model of another dtype, or an option that cannot be used.
        VerificationError: it does not compile.
    """
    if request.dtype != dtype_name(request.module):
        raise RecipeError(f"export.dtype = {request.dtype!r}, of a model in {dtype_name(request.module)}: wanted the same for both")
    if request.options["max_autotune"] not in (True, False):
        raise RecipeError(f"export.options.max_autotune = {request.options['max_autotune']!r}: wanted true or false")
    path = request.out / PACKAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with quiet():
        captured = exported_program(request.module, request.inputs, request.dynamic, request.ranges)
        lowered = time.perf_counter()
        try:
            torch._inductor.aoti_compile_and_package(
                captured, package_path=str(path), inductor_configs={"max_autotune": request.options["max_autotune"]}
            )
        except Exception as error:
            raise VerificationError(f"aotinductor: the model does not compile: {error}") from error
    receipt = {"torch": str(torch.__version__), "machine": platform.machine(), "gpu": gpu()}
    (request.out / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", "utf-8")
    return Written(dict(request.options), {"lower": lowered - start, "compile": time.perf_counter() - lowered})


def lacks() -> str:
    """The C++ compiler that is not there; empty where one is."""
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    return (
        "" if any(map(shutil.which, compilers)) else "it compiles with a C++ compiler, and there is none: install g++, or name one in CXX"
    )


def load(folder: Path, subject: Subject) -> PackageSession:
    """The package below a folder, ready to run.

    Raises:
        UnavailableError: another version of PyTorch, another processor or GPU than it was compiled for.
    """
    receipt = json.loads((folder / RECEIPT).read_text("utf-8"))
    here = {"torch": str(torch.__version__), "machine": platform.machine(), "gpu": gpu()}
    if receipt != here:
        raise UnavailableError(
            f"{folder / PACKAGE}: compiled for {_told(receipt)}, here is {_told(here)}; "
            f"compile it again: ppclc export MODEL --backend aotinductor -o {folder}"
        )
    return PackageSession(torch._inductor.aoti_load_package(str(folder / PACKAGE)), here)


def _told(machine: dict[str, Any]) -> str:
    return f"PyTorch {machine['torch']} on {machine['gpu'] or machine['machine']}"


PLUGIN = Backend(name="aotinductor", load=load, export=export, dtypes=DTYPES, options={"max_autotune": False}, lacks=lacks)
