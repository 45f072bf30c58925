"""ONNX: `transformer/model.onnx`, inputs named as forward's arguments, output `out_hidden_states`; run with ONNX Runtime."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.onnx import ONNXProgram

from ppclc.backends import Backend, ExportRequest, Written, onnxruntime
from ppclc.errors import RecipeError, VerificationError
from ppclc.lowering import dtype_name, exported_program, quiet

OUTPUT = "out_hidden_states"
OPSETS = (20, 21, 22, 23)


def export(request: ExportRequest) -> Written:
    """Write and check the ONNX model.

    Weights go to one file beside it, `model.onnx.data`, beyond 1.5 GB or where `external_data` is true.

    Raises:
        RecipeError: a dtype other than float32, or an option that cannot be used.
        VerificationError: the model is not valid, or its inputs are not those of forward.
    """
    _check_request(request)
    path = request.out / onnxruntime.MODEL
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with quiet():
        captured = exported_program(request.module, request.inputs, request.dynamic, request.ranges)
        lowered = time.perf_counter()
        program = _program(captured, request)
        program.save(path, external_data=request.options["external_data"])
        written = time.perf_counter()
        _check_file(path, list(request.inputs))
    options = dict(request.options) | {"external_data": path.with_name(f"{path.name}.data").exists()}
    return Written(options, {"lower": lowered - start, "export": written - lowered, "check": time.perf_counter() - written})


def _check_request(request: ExportRequest) -> None:
    dtype, opset = dtype_name(request.module), request.options["opset"]
    if (request.dtype, dtype) != ("float32", "float32"):
        raise RecipeError(
            f"export.dtype = {request.dtype!r}, of a model in {dtype}: wanted float32 for both; onnx writes no other in this version"
        )
    if opset not in OPSETS:
        raise RecipeError(f"export.opset = {opset!r}: wanted one of {', '.join(map(str, OPSETS))}")
    if request.options["external_data"] not in (True, False, None):
        raise RecipeError(f"export.external_data = {request.options['external_data']!r}: wanted true, false or null")


def _program(captured: ExportedProgram, request: ExportRequest) -> ONNXProgram:
    """The exporter's program, axes by their names, without the traces of source files that it leaves in every node."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    program = torch.onnx.export(
        captured,
        dynamo=True,
        opset_version=request.options["opset"],
        output_names=[OUTPUT],
        # The axes are dynamic already; given as words, they name the symbols.
        dynamic_shapes={name: dict(request.dynamic.get(name, {})) for name in request.inputs},
        optimize=True,
        verbose=False,
    )
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)
    return program


def _check_file(path: Path, inputs: list[str]) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path))  # by its path: a model beyond 2 GB fits no single message
    except onnx.checker.ValidationError as error:
        raise VerificationError(f"{path.name}: not valid ONNX: {error}") from None
    graph = onnx.load(str(path), load_external_data=False).graph
    got = [value.name for value in graph.input], [value.name for value in graph.output]
    if got != (inputs, [OUTPUT]):
        raise VerificationError(f"{path.name}: has inputs and outputs {got}, wanted {(inputs, [OUTPUT])}")


PLUGIN = Backend(
    name="onnx",
    load=onnxruntime.load,
    export=export,
    requires=(("onnx", "onnx"), ("onnxscript", "onnx"), ("onnxruntime", "onnxruntime")),
    options={"opset": 23, "external_data": None},
)
