"""ONNX Runtime on the CPU: runs what the back end `onnx` writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ppclc.backends import Backend, Reference, Tensors

MODEL = "transformer/model.onnx"
PROVIDERS = ("CPUExecutionProvider",)
ERRORS_ONLY = 3


@dataclass(frozen=True)
class OnnxRuntimeSession:
    """An `onnxruntime.InferenceSession` that takes and gives tensors on the CPU."""

    session: Any
    options: dict[str, Any]

    def run(self, inputs: Tensors) -> torch.Tensor:
        """The first output, which is the only one."""
        given = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(self.session.run(None, given)[0])


def load(folder: Path, reference: Reference) -> OnnxRuntimeSession:
    """A session of `transformer/model.onnx` below the folder, with as many threads as PyTorch has."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = ERRORS_ONLY
    session = onnxruntime.InferenceSession(str(folder / MODEL), settings, providers=list(PROVIDERS))
    return OnnxRuntimeSession(session, {"providers": session.get_providers(), "intra_op_num_threads": settings.intra_op_num_threads})


PLUGIN = Backend(name="onnxruntime", load=load, artefact="onnx", requires=(("onnxruntime", "onnxruntime"),))
