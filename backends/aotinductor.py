"""AOTInductor: `transformer/model.pt2`, compiled ahead of time for this machine's processor or GPU; runs in Python or C++ without the model."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
    """A compiled package; inputs are brought to the device that it was compiled for."""

    package: Any
    options: dict[str, Any]

    def run(self, inputs: Tensors) -> torch.Tensor:
        """The first output, on the package's device."""
        return self.outputs(inputs)[0]

    def outputs(self, inputs: Tensors) -> list[torch.Tensor]:
        """All outputs."""
        with torch.no_grad():
            given = self.package(**self._placed(inputs))
        return [given] if isinstance(given, torch.Tensor) else list(given)

    def bound(self, inputs: Tensors) -> Callable[[], torch.Tensor]:
        """The package on these inputs, brought to its device once."""
        return partial(self.run, self._placed(inputs))

    def _placed(self, inputs: Tensors) -> Tensors:
        return {name: tensor.to(self.options["device"]) for name, tensor in inputs.items()}


def export(request: ExportRequest) -> Written:
    """Compile the module and package it, for a GPU where there is one and `device` does not say otherwise.

    Raises:
        RecipeError: a model of another dtype, or an option that cannot be used.
        UnavailableError: a GPU that is asked for and not there.
        VerificationError: it does not compile.
    """
    if request.dtype != dtype_name(request.module):
        raise RecipeError(f"export.dtype = {request.dtype!r}, of a model in {dtype_name(request.module)}: wanted the same for both")
    check_options(request.options)
    device = device_of(request.options["device"])
    path = request.out / PACKAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with quiet(), placed(request.module, device), headers(device):
        inputs = {name: tensor.to(device) for name, tensor in request.inputs.items()}
        captured = exported_program(request.module, inputs, request.dynamic, request.ranges)
        lowered = time.perf_counter()
        try:
            torch._inductor.aoti_compile_and_package(
                captured, package_path=str(path), inductor_configs={"max_autotune": request.options["max_autotune"]}
            )
        except Exception as error:
            raise VerificationError(f"aotinductor: the model does not compile: {error}") from error
    (request.out / RECEIPT).write_text(json.dumps(_here(device), indent=1) + "\n", "utf-8")
    return Written(dict(request.options) | {"device": device}, {"lower": lowered - start, "compile": time.perf_counter() - lowered})


def check_options(options: Mapping[str, Any]) -> None:
    """Raise RecipeError for values that an export cannot take, UnavailableError for a GPU that is not there."""
    if not isinstance(options["max_autotune"], bool):
        raise RecipeError(f"export.max_autotune = {options['max_autotune']!r}: wanted true or false")
    device_of(options["device"])


def device_of(wanted: str | None) -> str:
    """`cpu` or `cuda`: what is wanted, else a GPU where there is one. Raises RecipeError or UnavailableError for what cannot be."""
    if wanted not in (None, "cpu", "cuda"):
        raise RecipeError(f"export.device = {wanted!r}: wanted cpu, cuda or null")
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UnavailableError("export.device = 'cuda': there is no CUDA device here; wanted cpu, or null")
    return wanted or ("cuda" if there else "cpu")


@contextmanager
def placed(module: torch.nn.Module, device: str) -> Iterator[None]:
    """A block in which a module's tensors lie on a device; behind it they are, bit for bit and byte for byte, what they were.

    In place: whoever shares the tensors finds them there too, and what was recorded around the module goes on with them.
    """
    kept = [(tensor, tensor.data) for tensor in {id(t): t for t in [*module.parameters(), *module.buffers()]}.values()]
    try:
        for tensor, data in kept:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


@contextmanager
def headers(device: str) -> Iterator[None]:
    """A block in which the compiler finds CUDA's headers among Python's packages, where no toolkit is installed."""
    from torch.utils.cpp_extension import CUDA_HOME

    packages = Path(torch.__file__).parents[1]
    found = [p.parent for name in ("nvidia/*/include/cuda*.h", "triton/backends/nvidia/include/cuda.h") for p in packages.glob(name)]
    before = os.environ.get("CPLUS_INCLUDE_PATH")
    if device != "cpu" and CUDA_HOME is None and found:
        os.environ["CPLUS_INCLUDE_PATH"] = os.pathsep.join([*([before] if before else []), *dict.fromkeys(map(str, found))])
    try:
        yield
    finally:
        os.environ.pop("CPLUS_INCLUDE_PATH", None)
        if before is not None:
            os.environ["CPLUS_INCLUDE_PATH"] = before


def _here(device: str) -> dict[str, Any]:
    """What a package depends on."""
    gpu_here = gpu() if device == "cuda" else None
    return {"torch": str(torch.__version__), "machine": platform.machine(), "device": device, "gpu": gpu_here}


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
    receipt = {"device": "cpu"} | json.loads((folder / RECEIPT).read_text("utf-8"))
    here = _here(receipt["device"])
    if receipt != here:
        raise UnavailableError(
            f"{folder / PACKAGE}: compiled for {_told(receipt)}, here is {_told(here)}; "
            f"compile it again: ppclc export MODEL --backend aotinductor -o {folder}"
        )
    return PackageSession(torch._inductor.aoti_load_package(str(folder / PACKAGE)), here)


def _told(machine: dict[str, Any]) -> str:
    return f"PyTorch {machine['torch']} on {machine['gpu'] or machine['machine']}"


PLUGIN = Backend(
    name="aotinductor",
    load=load,
    export=export,
    dtypes=DTYPES,
    options={"max_autotune": False, "device": None},
    check=check_options,
    lacks=lacks,
)
