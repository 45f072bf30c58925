"""ONNX: `transformer/model.onnx`, inputs named as forward's arguments, output `out_hidden_states`; run with ONNX Runtime.

In 16 bits positions, timestep and guidance are float32 inputs all the same. Extra outputs, which triage asks for, are named by their place.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.onnx import ONNXProgram

from ppclc.backends import DTYPES, Backend, ExportRequest, Written, onnxruntime
from ppclc.errors import RecipeError, VerificationError
from ppclc.lowering import dtype_name, exported_program, quiet

OUTPUT = "out_hidden_states"
OPSETS = (20, 21, 22, 23)


def export(request: ExportRequest) -> Written:
    """Write and check the ONNX model.

    Weights go to one file beside it, `model.onnx.data`, beyond 1.5 GB or where `external_data` is true. Where they are to stay out of memory that is
    a safetensors file, with the model's own names, that the graph points into.

    Raises:
        RecipeError: a model of another dtype, or an option that cannot be used.
        VerificationError: the model is not valid, or its inputs are not those of forward.
    """
    _check_request(request)
    import onnx_ir

    from ppclc.backends import _onnx_graphs

    path = request.out / onnxruntime.MODEL
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with quiet():
        captured = exported_program(request.module, request.inputs, request.dynamic, request.ranges)
        lowered = time.perf_counter()
        program = _program(captured, request)
        if request.store is None:
            program.save(path, external_data=request.options["external_data"])
        else:
            _onnx_graphs.point_to(program.model, f"{path.name}.data", request.store(path.with_name(f"{path.name}.data")), path.parent)
            onnx_ir.save(program.model, path)
        written = time.perf_counter()
        _check_file(path, list(request.inputs), output_names(request))
    options = dict(request.options) | {"external_data": path.with_name(f"{path.name}.data").exists()}
    return Written(options, {"lower": lowered - start, "export": written - lowered, "check": time.perf_counter() - written})


def _check_request(request: ExportRequest) -> None:
    dtype = dtype_name(request.module)
    if request.dtype != dtype:
        raise RecipeError(f"export.dtype = {request.dtype!r}, of a model in {dtype}: wanted the same for both")
    check_options(request.options)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise RecipeError for values that an export cannot take."""
    opset = options["opset"]
    if opset not in OPSETS:
        raise RecipeError(f"export.opset = {opset!r}: wanted one of {', '.join(map(str, OPSETS))}")
    if not any(options["external_data"] is value for value in (True, False, None)):
        raise RecipeError(f"export.external_data = {options['external_data']!r}: wanted true, false or null")


def output_names(request: ExportRequest) -> list[str]:
    """Names of the outputs in their order, the model's own first."""
    return [OUTPUT, *request.taps]


def _program(captured: ExportedProgram, request: ExportRequest) -> ONNXProgram:
    """The exporter's program, axes by their names, without the traces of source files that it leaves in every node."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    from ppclc.backends import _onnx_graphs

    program = torch.onnx.export(
        captured,
        dynamo=True,
        opset_version=request.options["opset"],
        output_names=output_names(request),
        # The axes are dynamic already; given as words, they name the symbols.
        dynamic_shapes={name: dict(request.dynamic.get(name, {})) for name in request.inputs},
        optimize=False,  # but by what follows
        verbose=False,
    )
    assert program is not None
    _onnx_graphs.optimize(program.model, read=request.store is None)
    ClearMetadataAndDocStringPass()(program.model)
    for output, name in zip(program.model.graph.outputs, output_names(request), strict=True):
        output.name = name  # of taps that turned out to be one value all but the first were given names of their own
    if request.dtype != "float32":
        _onnx_graphs.plain_permutations(program.model)
        _onnx_graphs.explicit_roundings(program.model)
        _onnx_graphs.islands(program.model)
    return program


def _check_file(path: Path, inputs: list[str], outputs: list[str]) -> None:
    import onnx

    try:
        # By its path: a model beyond 2 GB fits no single message. In full: that alone finds operators that a dtype has not.
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(f"{path.name}: not valid ONNX: {error}") from None
    graph = onnx.load(str(path), load_external_data=False).graph
    got = [value.name for value in graph.input], [value.name for value in graph.output]
    if got != (inputs, outputs):
        raise VerificationError(f"{path.name}: has inputs and outputs {got}, wanted {(inputs, outputs)}")


PLUGIN = Backend(
    name="onnx",
    load=onnxruntime.load,
    export=export,
    requires=(("onnx", "onnx"), ("onnxscript", "onnx"), ("onnxruntime", "onnxruntime")),
    dtypes=(*DTYPES, "float8"),
    from_files=True,
    options={"opset": 23, "external_data": None},
    check=check_options,
)
