"""ONNX Runtime: runs what the back end `onnx` writes, on the execution providers that are asked for, or the best that are here.

Inputs and outputs are bound to tensors where they lie (IO binding): on a GPU nothing goes through the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ppclc.backends import DTYPES, Backend, Shape, Subject, Tensors
from ppclc.errors import RecipeError, UnavailableError, VerificationError, first_line

MODEL = "transformer/model.onnx"
PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "nv_tensorrt_rtx": "NvTensorRTRTXExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
"""What a provider is called here, and by ONNX Runtime."""
USUAL = ("cuda", "cpu")
"""Those that are taken where nothing is asked for and they are there: TensorRT's build for minutes at the first run."""
INSTALL = {
    "tensorrt": "pip install 'ppclc[onnxruntime-gpu]' in the place of onnxruntime, and TensorRT 10",
    "nv_tensorrt_rtx": "it takes a build of ONNX Runtime with that provider",
    "cuda": "pip install 'ppclc[onnxruntime-gpu]' in the place of onnxruntime",
    "cpu": "pip install 'ppclc[onnxruntime]'",
}
GRAPHS = {
    PROVIDERS["tensorrt"]: "trt_cuda_graph_enable",
    PROVIDERS["nv_tensorrt_rtx"]: "enable_cuda_graph",
    PROVIDERS["cuda"]: "enable_cuda_graph",
}
"""The option by which a provider records a CUDA graph and replays it."""
ERRORS_ONLY = 3
TYPES = {
    "tensor(float)": (torch.float32, 1),
    "tensor(uint8)": (torch.uint8, 2),
    "tensor(int8)": (torch.int8, 3),
    "tensor(int32)": (torch.int32, 6),
    "tensor(int64)": (torch.int64, 7),
    "tensor(bool)": (torch.bool, 9),
    "tensor(float16)": (torch.float16, 10),
    "tensor(double)": (torch.float64, 11),
    "tensor(bfloat16)": (torch.bfloat16, 16),
}
"""PyTorch's dtype and ONNX's number of it; numpy, which bindings could do without otherwise, has no bfloat16."""
LARGEST_MESSAGE = 1_900_000_000
"""Bytes of a model that is handed over in memory, which protobuf limits to 2 GiB."""


@dataclass
class OnnxRuntimeSession:
    """An `onnxruntime.InferenceSession` that takes tensors from anywhere, in whatever dtype where floating-point ones are wanted, and gives them on its device."""

    session: Any
    options: dict[str, Any]
    shapes: dict[tuple[Shape, ...], list[Shape]] = field(default_factory=dict)
    """Shapes of all outputs by those of inputs, where names of axes do not tell them."""

    def run(self, inputs: Tensors) -> torch.Tensor:
        """The first output."""
        return self.bound(inputs)()

    def outputs(self, inputs: Tensors) -> list[torch.Tensor]:
        """All outputs."""
        return self._bound(inputs, self.session.get_outputs())()

    def bound(self, inputs: Tensors) -> Callable[[], torch.Tensor]:
        """A call on these inputs, bound once; the next call overwrites its result. Inputs in another dtype or place are those at the time of binding."""
        call = self._bound(inputs, self.session.get_outputs()[:1])
        return lambda: call()[0]

    def _bound(self, inputs: Tensors, wanted: Sequence[Any]) -> Callable[[], list[torch.Tensor]]:
        device = str(self.options["device"])
        given = {value.name: self._placed(inputs[value.name], value.type) for value in self.session.get_inputs()}
        binding = self.session.io_binding()
        for value in self.session.get_inputs():
            tensor = given[value.name]
            binding.bind_input(value.name, device, _index(tensor), TYPES[value.type][1], tuple(tensor.shape), tensor.data_ptr())
        found = []
        for value, shape in zip(wanted, self._shapes(given, binding, wanted), strict=True):
            dtype, number = TYPES[value.type]
            tensor = torch.empty(shape, dtype=dtype, device=device)
            binding.bind_output(value.name, device, _index(tensor), number, shape, tensor.data_ptr())
            found.append(tensor)

        def call() -> list[torch.Tensor]:
            # The runtime has a stream of its own, and knows nothing of what PyTorch has yet to do.
            if device != "cpu":
                torch.cuda.current_stream().synchronize()
            assert given  # bound by their addresses, they live as long as the call
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return found

        return call

    def _placed(self, tensor: torch.Tensor, kind: str) -> torch.Tensor:
        dtype = TYPES[kind][0]
        if tensor.dtype != dtype and not dtype.is_floating_point:
            raise VerificationError(f"onnxruntime: got an input of {tensor.dtype}, wanted {kind}")
        return tensor.detach().to(self.options["device"], dtype).contiguous()

    def _shapes(self, given: Tensors, binding: Any, wanted: Sequence[Any]) -> list[Shape]:
        """Shapes of outputs, by the names of axes that they share with inputs; where those do not tell, by a run whose outputs the runtime allocates."""
        sizes: dict[Any, int] = {}
        for value in self.session.get_inputs():
            sizes |= {axis: n for axis, n in zip(value.shape, given[value.name].shape, strict=True) if isinstance(axis, str)}
        named = [[axis if isinstance(axis, int) else sizes.get(axis) for axis in value.shape] for value in wanted]
        if all(axis is not None for shape in named for axis in shape):
            return [tuple(int(axis or 0) for axis in shape) for shape in named]
        key = tuple(tuple(given[value.name].shape) for value in self.session.get_inputs())
        known = self.shapes.get(key, [])
        if len(known) < len(wanted):
            for value in wanted:
                binding.bind_output(value.name, self.options["device"], _index(next(iter(given.values()))))
            self.session.run_with_iobinding(binding)
            known = self.shapes[key] = [tuple(map(int, output.shape())) for output in binding.get_outputs()]
            binding.clear_binding_outputs()
        return known[: len(wanted)]


def _index(tensor: torch.Tensor) -> int:
    return tensor.device.index or 0


def chosen_providers(wanted: Sequence[str] | None, available: Sequence[str]) -> list[str]:
    """Providers by ONNX Runtime's names, in their order; without a wish those of `USUAL` that are there.

    Raises:
        RecipeError: a provider that is not known here.
        UnavailableError: one that this build of ONNX Runtime has not.
    """
    here = [short for short, name in PROVIDERS.items() if name in available]
    if wanted is None:
        return [PROVIDERS[short] for short in USUAL if short in here]
    for short in wanted:
        if short not in PROVIDERS:
            raise RecipeError(f"bench.providers = {list(wanted)}: {short!r} is no provider; wanted some of {', '.join(PROVIDERS)}")
        if short not in here:
            raise UnavailableError(f"onnxruntime has no {PROVIDERS[short]} here, it has {', '.join(here) or 'none'}: {INSTALL[short]}")
    if not wanted:
        raise RecipeError(f"bench.providers = []: wanted null, or some of {', '.join(PROVIDERS)}")
    return [PROVIDERS[short] for short in dict.fromkeys(wanted)]


def provider_options(name: str, cuda_graph: bool) -> dict[str, str]:
    """What a provider is told: the current device; and float32 in float32, where PyTorch has no TF32 either unless it is asked for."""
    if name not in GRAPHS:
        return {}
    told = {"device_id": str(torch.cuda.current_device() if torch.cuda.is_available() else 0)}
    told |= {"use_tf32": "1" if torch.backends.cuda.matmul.allow_tf32 else "0"} if name == PROVIDERS["cuda"] else {}
    return told | ({GRAPHS[name]: "1"} if cuda_graph else {})


def load(folder: Path, subject: Subject, providers: Sequence[str] | None = None, cuda_graph: bool = False) -> OnnxRuntimeSession:
    """A session of `transformer/model.onnx` below the folder, with as many threads as PyTorch has.

    providers: short names as in `PROVIDERS`, the first first. cuda_graph: the first provider records its work as a CUDA graph, on bound tensors.
    A bfloat16 model has no kernels on the CPU: there it is run in float32, every result rounded to bfloat16, and `options` say so.

    Raises:
        RecipeError, UnavailableError: as `chosen_providers` does; a provider that is there and does not start, or has no CUDA graphs.
        UnavailableError: a bfloat16 model too large to be rewritten in memory.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = ERRORS_ONLY
    chosen = chosen_providers(providers, onnxruntime.get_available_providers())
    if cuda_graph and chosen[0] not in GRAPHS:
        raise UnavailableError(f"onnxruntime: {chosen[0]} has no CUDA graphs")
    rewritten = None if chosen[0] != PROVIDERS["cpu"] else _in_float32(folder / MODEL)
    told = {name: provider_options(name, cuda_graph and name == chosen[0]) for name in chosen}
    try:
        session = onnxruntime.InferenceSession(rewritten or str(folder / MODEL), settings, providers=list(told.items()))
    except Exception as error:
        if chosen == [PROVIDERS["cpu"]]:
            raise
        raise UnavailableError(f"onnxruntime does not start with {', '.join(chosen)}: {first_line(error)}") from error
    taken = session.get_providers()
    if taken[0] != chosen[0]:
        if providers is None and not cuda_graph:
            return load(folder, subject, ["cpu"])
        raise UnavailableError(f"onnxruntime: {chosen[0]} does not start here, {taken[0]} would run in its place; are its libraries there?")
    options = {"providers": taken, "device": "cpu" if taken[0] not in GRAPHS else "cuda", "io_binding": True}
    options |= {"provider_options": {name: given for name, given in told.items() if given and name in taken}}
    options |= {"intra_op_num_threads": settings.intra_op_num_threads}
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


RUN_OPTIONS: Mapping[str, Any] = {"providers": None, "cuda_graph": False}
PLUGIN = Backend(
    name="onnxruntime",
    load=load,
    artefact="onnx",
    dtypes=(*DTYPES, "float8"),
    requires=(("onnxruntime", "onnxruntime"),),
    run_options=RUN_OPTIONS,
    graphs="own",
)
