"""What a result depends on beside its recipe: the machine, and the versions of libraries."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ppclc.loading.sources import Source
from ppclc.lowering import gpu
from ppclc.machine.gpu_state import gpu_state
from ppclc.models import set_threads

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "onnx", "onnxscript", "onnxruntime", "numpy", "scikit-learn")


def machine(source: Source) -> dict[str, Any]:
    """What latencies depend on: processor, cores, and the threads of an operator."""
    return {"machine": platform.machine(), "processor": platform.processor(), "cores": os.cpu_count(), "threads": set_threads(source)}


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python and of every library that has a say in the result, and of others by their names on the index."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for library in (*LIBRARIES, *more):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def accelerator() -> dict[str, str]:
    """The GPU, its driver, and what `nvidia-smi` tells of clocks and temperature now; nothing where there is none."""
    device = gpu()
    return {} if device is None else {"gpu": device, "clocks_and_temperature": gpu_state("cuda")}
