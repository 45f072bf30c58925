"""TensorRT, else TensorRT-RTX: one engine of the ONNX model, with an optimization profile for each size that is asked for.

Strongly typed: what the graph computes in is what the engine does. TensorRT-RTX builds without a GPU; running an engine takes one in
either. The two libraries have the same interface but for `Library`, where all that tells them apart stands.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ppclc.backends import DTYPES, Backend, ExportRequest, Profile, Subject, Tensors, Written, onnx, onnxruntime
from ppclc.errors import RecipeError, UnavailableError, VerificationError
from ppclc.lowering import gpu
from ppclc.records import measured

ENGINE = "transformer/model.engine"
RECEIPT = "transformer/engine.json"
OPTIONS = {
    "library": None,  # tensorrt | tensorrt_rtx; null takes the first that is there
    "opset": None,  # null: 23, and 20 in float32, in which no attention is fused and one that stands as a single operator is refused
    "graph": None,  # folder of an ONNX export of the same model in the same dtype, to build from instead of lowering again
    "sizes": None,  # [{batch: 1, height: 64, width: 64, text: 512}], in tokens; null: the family's usual one
    "dynamic": False,  # one profile over all sizes, where false gives each its own
    "workspace_gb": None,
    "weight_streaming": False,
    "refit": False,
    "timing_cache": None,  # a file that builds share
}
FUSED, PLAIN = 23, 20
"""Opsets in which attention is one operator, and in which it is products and a softmax."""
MOST_TOLD = 200
"""Characters of a problem that the library tells at length."""
TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Library:
    """One of the two libraries, and all in which they differ."""

    module: Any

    @property
    def name(self) -> str:
        """`tensorrt` or `tensorrt_rtx`."""
        return str(self.module.__name__)

    @property
    def network_flags(self) -> int:
        """Strongly typed, which newer releases are without being told."""
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)

    @property
    def travels(self) -> bool:
        """Whether an engine runs on other GPUs than the one it was built on: TensorRT-RTX compiles its kernels where it runs."""
        return self.name == "tensorrt_rtx"

    @property
    def has_timing_cache(self) -> bool:
        """Whether what a build has timed serves the next; TensorRT-RTX times nothing while it builds."""
        return not self.travels


def library(wanted: str | None = None) -> Library:
    """The library of that name, else TensorRT, else TensorRT-RTX.

    Raises:
        RecipeError: no library of that name.
        UnavailableError: it is not installed, or does not load.
    """
    names = ("tensorrt", "tensorrt_rtx")
    if wanted not in (None, *names):
        raise RecipeError(f"export.library = {wanted!r}: wanted {' or '.join(names)}")
    for name in names if wanted is None else (wanted,):
        if find_spec(name) is not None:
            try:
                return Library(import_module(name))
            except (ImportError, OSError) as error:
                raise UnavailableError(f"{name} is installed but does not load: {error}") from None
    extra = str(wanted or "tensorrt-rtx").replace("_", "-")
    raise UnavailableError(f"{wanted or 'tensorrt or tensorrt_rtx'} is not installed here: pip install 'ppclc[{extra}]'")


@dataclass
class Log:
    """What a builder says: errors and warnings, and the list of layers that it made."""

    problems: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)

    def take(self, severity: str, message: str) -> None:
        """Keep what matters of a message."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.problems.append(message)
        if message.startswith("Layers:"):
            self.layers += [line for line in message.splitlines() if line.startswith("Name:")]

    def fused(self, profiles: int) -> int:
        """Attention layers of a profile; all profiles have as many."""
        return sum("mha" in line.partition(",")[0] for line in self.layers) // profiles

    def widened(self, profiles: int) -> int:
        """Matrix products and attention whose activations are float32, of a profile."""
        heavy = [line for line in self.layers if "LayerType: gemm" in line or "mha" in line.partition(",")[0]]
        return sum("Datatype: Float," in line.partition("Constants:")[0] for line in heavy) // profiles


def check_options(options: Mapping[str, Any]) -> None:
    """Raise RecipeError for values that a build cannot take, UnavailableError for a library that is not there."""
    library(options["library"])
    if options["graph"] is None and options["opset"] is not None:
        onnx.check_options({"opset": options["opset"], "external_data": None})
    for name in ("dynamic", "weight_streaming", "refit"):
        if not isinstance(options[name], bool):
            raise RecipeError(f"export.{name} = {options[name]!r}: wanted true or false")
    room = options["workspace_gb"]
    if room is not None and (isinstance(room, bool) or not isinstance(room, int | float) or room <= 0):
        raise RecipeError(f"export.workspace_gb = {room!r}: wanted a number above 0, or null")


def export(request: ExportRequest) -> Written:
    """Build the engine.

    Raises:
        RecipeError: an option that cannot be used.
        UnavailableError: the library is not there, or needs a GPU to build.
        VerificationError: the graph is refused, or cannot be built.
    """
    chosen, given = library(request.options["library"]), request.options["graph"]
    with TemporaryDirectory(prefix="ppclc-tensorrt-") as home:
        if given is None:
            lowered = replace(request, out=Path(home), options={"opset": opset_of(request), "external_data": None})
            seconds = onnx.export(lowered).seconds
        else:
            check_graph(Path(given), request)
            seconds = {}
        graph = Path(given or home) / onnxruntime.MODEL
        attentions = _attentions(graph)
        log = Log()
        with measured("build") as cost:
            engine = _build(chosen, graph, request, log)
    path = request.out / ENGINE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(engine)
    here = gpu()
    receipt: dict[str, Any] = {"library": chosen.name, "version": str(chosen.module.__version__), "gpu": here, "dtype": request.dtype}
    receipt |= {"profiles": [{name: [list(shape) for shape in shapes] for name, shapes in p.items()} for p in request.profiles]}
    (request.out / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", "utf-8")
    count = len(request.profiles)
    options = dict(request.options) | {
        "opset": opset_of(request) if given is None else None,
        "library": chosen.name,
        "library_version": str(chosen.module.__version__),
        "built_on": here,
        "attention_total": attentions,
        "attention_fused": log.fused(count),
        "float32_products": log.widened(count),
        "build_peak_bytes": cost[0].peak_rss_bytes,
    }
    return Written(options, {**seconds, "build": cost[0].seconds})


def opset_of(request: ExportRequest) -> int:
    """The opset that a model is lowered to on its way."""
    given = request.options["opset"]
    return int(given or (PLAIN if request.dtype == "float32" else FUSED))


def check_graph(folder: Path, request: ExportRequest) -> None:
    """Raise RecipeError for a folder that is no ONNX export of the same model in the same dtype."""
    try:
        receipt = json.loads((folder / "export.json").read_text("utf-8"))
        found = (receipt["model_digest"], receipt["dtype"], (folder / onnxruntime.MODEL).is_file())
    except (OSError, ValueError, KeyError, TypeError):
        raise RecipeError(f"export.graph = {str(folder)!r}: holds no ONNX export") from None
    dtype = request.label or request.dtype
    if found != (request.model_digest, dtype, True):
        raise RecipeError(f"export.graph = {str(folder)!r}: is of another model or dtype, wanted {dtype} of this one")


def _attentions(path: Path) -> int:
    """Attention operators of an ONNX model."""
    import onnx_ir as ir

    from ppclc.backends import _onnx_graphs

    return _onnx_graphs.count(ir.load(path), "Attention")


def _logger(trt: Any, log: Log) -> Any:
    """A logger of the library that tells a `Log` all."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.take(str(severity).rpartition(".")[2], message)

    return Logger()


def _build(chosen: Library, path: Path, request: ExportRequest, log: Log) -> bytes:
    trt, logger = chosen.module, _logger(chosen.module, log)
    builder = trt.Builder(logger)
    if builder is None:
        raise UnavailableError(f"{chosen.name} cannot build here: {'; '.join(log.problems) or 'no reason given'}")
    network = builder.create_network(chosen.network_flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        told = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise VerificationError(f"{chosen.name} does not take the ONNX model: {told}")
    config = _config(chosen, builder, request)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        told = "; ".join(" ".join(p.split())[:MOST_TOLD] for p in log.problems[-2:]) or "no reason given"
        way_out = (
            f"; wanted bfloat16 or float16 (--dtype), or a graph of opset {PLAIN}: it fuses no attention in float32"
            if request.dtype == "float32"
            else ""
        )
        raise VerificationError(f"{chosen.name} could not build the engine: {told}{way_out}")
    _keep_timing(chosen, config, request.options["timing_cache"])
    return bytes(engine)


def _config(chosen: Library, builder: Any, request: ExportRequest) -> Any:
    trt, options = chosen.module, request.options
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options["workspace_gb"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options["workspace_gb"] * 2**30))
    if options["weight_streaming"]:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options["refit"]:
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL if hasattr(trt.BuilderFlag, "REFIT_INDIVIDUAL") else trt.BuilderFlag.REFIT)
    if options["timing_cache"] and chosen.has_timing_cache:
        kept = Path(options["timing_cache"]).expanduser()
        config.set_timing_cache(config.create_timing_cache(kept.read_bytes() if kept.is_file() else b""), ignore_mismatch=True)
    for shapes in request.profiles:
        profile = builder.create_optimization_profile()
        for name, (least, usual, greatest) in shapes.items():
            profile.set_shape(name, least, usual, greatest)
        config.add_optimization_profile(profile)
    return config


def _keep_timing(chosen: Library, config: Any, place: str | None) -> None:
    if place and chosen.has_timing_cache:
        path = Path(place).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.new")
        draft.write_bytes(bytes(config.get_timing_cache().serialize()))
        draft.replace(path)


def cannot_run() -> str:
    """Why an engine cannot be run on this machine; empty where it can."""
    return "" if torch.cuda.is_available() else "there is no CUDA device here, which engines run on"


@dataclass
class TensorRTSession:
    """An engine on the current CUDA device; inputs are brought there, in the dtypes that it wants."""

    library: Library
    engine: Any
    context: Any
    profiles: Sequence[Profile]
    options: dict[str, Any]
    logger: Any = None
    """Lives as long as the engine, which tells it what goes wrong."""
    log: Log = field(default_factory=Log)
    current: int = 0
    addressed: int = 0
    """Which of the bound calls the context's shapes and addresses are of; calls are numbered from 1."""
    calls: int = 0

    def run(self, inputs: Tensors) -> torch.Tensor:
        """The first output, on the device."""
        return self.outputs(inputs)[0]

    def outputs(self, inputs: Tensors) -> list[torch.Tensor]:
        """All outputs, on the device.

        Raises:
            VerificationError: no profile takes inputs of these shapes, or the engine does not run.
        """
        return self._bound(inputs)()

    def bound(self, inputs: Tensors) -> Callable[[], torch.Tensor]:
        """A call on these inputs, whose result the next overwrites. Inputs in another dtype or place are those at the time of binding."""
        call = self._bound(inputs)
        return lambda: call()[0]

    def _bound(self, inputs: Tensors) -> Callable[[], list[torch.Tensor]]:
        given = {name: tensor.to("cuda", self._dtype(name)).contiguous() for name, tensor in inputs.items()}
        self._choose(given)
        self._address(given)
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        outputs = {
            name: torch.empty(tuple(self.context.get_tensor_shape(name)), dtype=self._dtype(name), device="cuda")
            for name in names
            if name not in inputs
        }
        self._address({}, outputs)
        self.calls += 1
        number = self.addressed = self.calls

        def call() -> list[torch.Tensor]:
            if self.addressed != number:  # another call was bound, or ran, in between
                self._choose(given)
                self._address(given, outputs)
                self.addressed = number
            stream = torch.cuda.current_stream().cuda_stream
            if torch.cuda.is_current_stream_capturing() and not self._can_be_captured(stream):
                raise UnavailableError(f"{self.library.name} cannot be captured with these shapes")
            if not self.context.execute_async_v3(stream):
                raise VerificationError(
                    f"{self.library.name}: the engine did not run: {'; '.join(self.log.problems[-3:]) or 'no reason given'}"
                )
            return list(outputs.values())

        return call

    def _address(self, given: Tensors, outputs: Tensors | None = None) -> None:
        """Tell the context shapes of inputs, and where all lie."""
        for name, tensor in given.items():
            self.context.set_input_shape(name, tuple(tensor.shape))
        for name, tensor in {**given, **(outputs or {})}.items():
            self.context.set_tensor_address(name, tensor.data_ptr())

    def _can_be_captured(self, stream: int) -> bool:
        """What TensorRT-RTX, which compiles kernels as it runs, says of itself; TensorRT always can."""
        return bool(self.context.is_stream_capturable(stream)) if self.library.travels else True

    def _dtype(self, name: str) -> torch.dtype:
        return TYPES[str(self.engine.get_tensor_dtype(name)).rpartition(".")[2]]

    def _choose(self, inputs: Tensors) -> None:
        """Take the first profile that has room for these shapes."""
        for number, profile in enumerate(self.profiles):
            if all(_within(tuple(inputs[name].shape), least, greatest) for name, (least, _, greatest) in profile.items()):
                if number != self.current:
                    self.context.set_optimization_profile_async(number, torch.cuda.current_stream().cuda_stream)
                    self.current = number
                return
        shapes = {name: list(tensor.shape) for name, tensor in inputs.items()}
        raise VerificationError(f"{self.library.name}: no optimization profile takes {shapes}; export with options.sizes that do")


def _within(shape: Sequence[int], least: Sequence[int], greatest: Sequence[int]) -> bool:
    return len(shape) == len(least) and all(a <= n <= b for n, a, b in zip(shape, least, greatest, strict=True))


def load(folder: Path, subject: Subject) -> TensorRTSession:
    """The engine below a folder, ready to run.

    Raises:
        UnavailableError: no GPU; another library, version or GPU than it was built with.
        VerificationError: the engine cannot be read.
    """
    receipt = json.loads((folder / RECEIPT).read_text("utf-8"))
    if reason := cannot_run():
        raise UnavailableError(f"{folder / ENGINE}: {reason}")
    chosen = library(receipt["library"])
    check_machine(receipt, {"version": str(chosen.module.__version__), "gpu": gpu()}, chosen.travels, folder)
    log = Log()
    logger = _logger(chosen.module, log)
    engine = chosen.module.Runtime(logger).deserialize_cuda_engine((folder / ENGINE).read_bytes())
    context = engine and engine.create_execution_context()
    if context is None:
        told = "; ".join(log.problems[-3:]) or "no reason given"
        raise VerificationError(f"{folder / ENGINE}: {chosen.name} cannot take it here: {told}; {_again(folder)}")
    profiles = [{name: tuple(map(tuple, shapes)) for name, shapes in p.items()} for p in receipt["profiles"]]
    options = {"library": chosen.name, "version": receipt["version"], "gpu": gpu(), "device": "cuda"}
    return TensorRTSession(chosen, engine, context, profiles, options, logger, log)  # type: ignore[arg-type]


def check_machine(receipt: dict[str, Any], here: dict[str, Any], travels: bool, folder: Path) -> None:
    """Raise UnavailableError for an engine that was built by another version, or on another GPU where that matters."""
    if receipt["version"] != here["version"]:
        raise UnavailableError(
            f"{folder / ENGINE}: built by {receipt['library']} {receipt['version']}, here is {here['version']}; {_again(folder)}"
        )
    if not travels and receipt["gpu"] != here["gpu"]:
        raise UnavailableError(f"{folder / ENGINE}: built on {receipt['gpu']}, here is {here['gpu']}; {_again(folder)}")


def _again(folder: Path) -> str:
    return f"build it again: ppclc export MODEL --backend tensorrt -o {shlex.quote(str(folder))}"


PLUGIN = Backend(
    name="tensorrt",
    load=load,
    export=export,
    requires=(("onnx", "onnx"), ("onnxscript", "onnx"), ("tensorrt|tensorrt_rtx", "tensorrt-rtx")),
    dtypes=(*DTYPES, "float8"),
    options=OPTIONS,
    check=check_options,
    from_files=True,
    cannot_run=cannot_run,
    graphs="captured",
)
