"""ONNX Runtime: runs what the back end `onnx` writes, on the providers that it has here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ppclc.backends import DTYPES, Backend, Subject, Tensors
from ppclc.errors import UnavailableError

MODEL = "transformer/model.onnx"
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
"""Those that are taken where they are there, the first first."""
ERRORS_ONLY = 3
FLOATS = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
LARGEST_MESSAGE = 1_900_000_000
"""Bytes of a model that is handed over in memory, which protobuf limits to 2 GiB."""


@dataclass(frozen=True)
class OnnxRuntimeSession:
    """An `onnxruntime.InferenceSession` that takes tensors and gives them on the CPU, floating-point inputs in whatever dtype."""

    session: Any
    options: dict[str, Any]

    def run(self, inputs: Tensors) -> torch.Tensor:
        """The first output."""
        return torch.from_numpy(self.session.run([self.session.get_outputs()[0].name], self._given(inputs))[0])

    def outputs(self, inputs: Tensors) -> list[torch.Tensor]:
        """All outputs."""
        return [torch.from_numpy(output) for output in self.session.run(None, self._given(inputs))]

    def _given(self, inputs: Tensors) -> dict[str, Any]:
        wanted = {value.name: FLOATS.get(value.type) for value in self.session.get_inputs()}
        return {name: tensor.detach().to("cpu", wanted.get(name)).contiguous().numpy() for name, tensor in inputs.items()}


def load(folder: Path, subject: Subject) -> OnnxRuntimeSession:
    """A session of `transformer/model.onnx` below the folder, with as many threads as PyTorch has.

    A bfloat16 model has no kernels on the CPU: there it is run in float32, every result rounded to bfloat16, and `options` say so.

    Raises:
        UnavailableError: a bfloat16 model too large to be rewritten in memory.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = ERRORS_ONLY
    providers = [p for p in PROVIDERS if p in onnxruntime.get_available_providers()]
    rewritten = None if providers[0] != PROVIDERS[-1] else _in_float32(folder / MODEL)
    session = onnxruntime.InferenceSession(rewritten or str(folder / MODEL), settings, providers=providers)
    options = {"providers": session.get_providers(), "intra_op_num_threads": settings.intra_op_num_threads}
    if rewritten:
        options["arithmetic"] = "float32, results rounded to bfloat16"
    return OnnxRuntimeSession(session, options)


def _in_float32(path: Path) -> bytes | None:
    """A bfloat16 model as the CPU can run it; None for one that it can run as it is."""
    import onnx
    import onnx_ir as ir

    from ppclc.backends import _onnx_graphs

    if not _onnx_graphs.has_dtype(ir.load(path), ir.DataType.BFLOAT16):
        return None
    size = sum(file.stat().st_size for file in path.parent.glob("model.onnx*"))
    if 2 * size > LARGEST_MESSAGE:
        raise UnavailableError(f"{path}: ONNX Runtime has no bfloat16 on the CPU, and {size / 1e9:.1f} GB are too many to be rewritten")
    # Types of all values are wanted, of which a file tells some.
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load(str(path))))
    _onnx_graphs.in_float32(model)
    return bytes(ir.to_proto(model).SerializeToString())


PLUGIN = Backend(name="onnxruntime", load=load, artefact="onnx", dtypes=(*DTYPES, "float8"), requires=(("onnxruntime", "onnxruntime"),))
