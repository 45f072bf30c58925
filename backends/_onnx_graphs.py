"""What an ONNX graph in 16 bits needs, so that it is valid, keeps its roundings, and can be run where there are no kernels for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
MOVES = {
    *("Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose"),
    *("Unsqueeze", "Cast", "ConstantOfShape", "Constant"),
}
"""Operators whose results are their inputs' own numbers, so that they round nothing."""
SMALL = 1024
"""Values of a tensor that may be read and kept within the graph."""
LARGEST_INSIDE = 2**24
"""Bytes of a constant that may stay in a graph whose weights lie elsewhere."""
ARITHMETIC = {"Add", "Div", "Mul", "Sub"}
RULES = (
    *("mul_by_1_rule", "add_0_rule", "sub_0_rule", "div_by_1_rule"),
    *("cast_constant_of_shape_rule", "cast_constant_of_shape_without_value_rule"),
    *("collapse_slice_rule", "collapse_slice2_rule", "materialize_reshape_shape_rule"),
    *("cast_cast_rule", "no_op_cast_rule", "no_op_expand_rule"),
    *("flatten_to_reshape_rule", "reshape_reshape_rule"),  # in this order
    *("no_op_transpose_rule", "transpose_transpose_rule", "unsqueeze_unsqueeze_rule", "squeeze_reshape_1d_rule"),
    "remove_optional_bias_from_gemm_rule",
)
"""Of onnxscript's common rules those that a transformer can meet."""
COMMUTE = ("mul_by_1_rule", "add_0_rule")
"""Rules whose operands may stand either way."""


def cast_to(value: Any, dtype: ir.DataType, name: str) -> ir.Node:
    """A Cast of a value, its output typed and named."""
    node = ir.node("Cast", [value], attributes={"to": int(dtype)}, num_outputs=1)
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, dtype, value.shape
    return node


def plain_permutations(model: ir.Model) -> None:
    """Each Einsum that only permutes axes becomes a Transpose: ONNX has no Einsum in bfloat16."""
    for node in list(model.graph):
        if node.op_type != "Einsum" or len(node.inputs) != 1:
            continue
        before, _, after = node.attributes["equation"].as_string().replace(" ", "").partition("->")
        if sorted(before) != sorted(after) or len(set(before)) != len(before):
            continue
        moved = ir.node("Transpose", list(node.inputs), attributes={"perm": [before.index(axis) for axis in after]}, num_outputs=1)
        _replace(model, node, moved)


def explicit_roundings(model: ir.Model) -> None:
    """Arithmetic on a number a sample that is read in float32 alone is done in float32 and rounded by a Cast of its own.

    A time embedding is cosines of a thousand times the timestep, of which 16 bits hold three digits: a runtime that computes in
    float32 for want of a kernel, and leaves the rounding out, as ONNX Runtime does on the CPU, gives another phase.
    """
    for node in list(model.graph):
        output: Any = node.outputs[0]
        readers = [use.node for use in output.uses()]
        wide = bool(readers) and all(r.op_type == "Cast" and r.attributes["to"].as_int() == ir.DataType.FLOAT for r in readers)
        if node.op_type not in ARITHMETIC or output.dtype not in HALVES or not wide or output.shape is None or len(output.shape) != 1:
            continue
        rounded, shape = output.dtype, output.shape
        widened = [cast_to(value, ir.DataType.FLOAT, f"{output.name}_wide_{i}") for i, value in enumerate(node.inputs)]
        exact = ir.node(node.op_type, [n.outputs[0] for n in widened], num_outputs=1)
        exact.outputs[0].name, exact.outputs[0].dtype, exact.outputs[0].shape = f"{output.name}_wide", ir.DataType.FLOAT, shape
        model.graph.insert_before(node, [*widened, exact])
        _replace(model, node, cast_to(exact.outputs[0], ir.DataType(rounded), f"{output.name}_rounded"))


def islands(model: ir.Model) -> None:
    """Each operator that the opset has not in bfloat16 is done in float32, between Casts."""
    for node in list(model.graph):
        if node.domain or all(_has(node, value, position, model.opset_imports[""]) for value, position in _narrow(node)):
            continue
        for i, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.BFLOAT16:
                wide = cast_to(value, ir.DataType.FLOAT, f"{value.name}_for_{node.outputs[0].name}")
                model.graph.insert_before(node, [wide])
                node.replace_input_with(i, wide.outputs[0])
        for output in node.outputs:
            if output.dtype == ir.DataType.BFLOAT16:
                output.dtype = ir.DataType.FLOAT
                back = cast_to(output, ir.DataType.BFLOAT16, str(output.name))
                output.name = f"{output.name}_wide"
                ir.convenience.replace_all_uses_with(output, back.outputs[0], replace_graph_outputs=True)
                back.replace_input_with(0, output)
                model.graph.insert_after(node, [back])


def _narrow(node: ir.Node) -> Iterator[tuple[str, int]]:
    """Inputs and outputs of a node in bfloat16, as the side and the position."""
    for side, values in (("inputs", node.inputs), ("outputs", node.outputs)):
        yield from ((side, i) for i, v in enumerate(values) if v is not None and v.dtype == ir.DataType.BFLOAT16)


def _has(node: ir.Node, side: str, position: int, opset: int) -> bool:
    """Whether an operator takes, or gives, bfloat16 at a position."""
    formal = getattr(onnx.defs.get_schema(node.op_type, opset, ""), side)
    return "tensor(bfloat16)" in formal[min(position, len(formal) - 1)].types


def _replace(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    """Put a node of one output in another's place; its output keeps the name, type and shape."""
    before: Any = old.outputs[0]
    after: Any = new.outputs[0]
    model.graph.insert_before(old, [new])
    after.name, after.dtype, after.shape = before.name, before.dtype, before.shape
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    model.graph.remove(old, safe=True)


def count(model: ir.Model, *types: str) -> int:
    """Operators of some types."""
    counted = Counter(node.op_type for node in model.graph.all_nodes())
    return sum(counted[t] for t in types)


def has_dtype(model: ir.Model, dtype: ir.DataType) -> bool:
    """Whether an input or a weight is of a dtype."""
    return any(value.dtype == dtype for value in [*model.graph.inputs, *model.graph.initializers.values()])


def optimize(model: ir.Model, read: bool = True) -> None:
    """What the exporter does to a graph at its end, with the rules that a transformer can meet.

    Left out are those of convolutions and their like, and the search for slices that a Split could stand for: it never finds any here, and takes
    time that grows with the square of the graph, minutes for sixty blocks. read: whether weights may be looked at; where not, none is transposed.
    """
    import onnxscript.optimizer
    import onnxscript.rewriter.onnx_fusions
    from onnx_ir.passes import common
    from onnxscript.rewriter import RewriteRuleSet

    def fold(node: ir.Node) -> bool | None:
        if read or node.op_type != "Transpose":
            return None
        large = any(v is not None and v.const_value is not None and v.const_value.size > SMALL for v in node.inputs)
        return False if large else None

    rules = RewriteRuleSet(_rules())
    common.InlinePass()(model)
    for _ in range(2):
        folded = onnxscript.optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=fold).modified
        rewritten = rules.apply_to_model(model)
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
        if not (folded or rewritten):
            break
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    if hasattr(common, "OutputFixPass"):  # which the oldest that we allow has not
        common.OutputFixPass()(model)
    common.NameFixPass()(model)
    onnxscript.rewriter.onnx_fusions.fuse(model)


def _rules() -> list[Any]:
    """The rules of `RULES` that this onnxscript has."""
    from onnxscript.rewriter.rules import common

    found = {name: getattr(common, name) for name in RULES if hasattr(common, name)}
    return [each for name, rule in found.items() for each in (rule.commute() if name in COMMUTE else [rule])]


def point_to(model: ir.Model, location: str, stored: Mapping[str, tuple[int, int]], folder: Path) -> None:
    """Take weights from a file beside the model, by their names; what is small, or was made of small ones, stays in it.

    Raises:
        ValueError: a large tensor that is not in the file, which would have had to be read.
    """
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.size <= SMALL:
            continue
        offset, length = stored.get(name, (0, 0))
        if length == tensor.nbytes:
            shape = ir.Shape([int(n) for n in tensor.shape])  # type: ignore[arg-type]
            value.const_value = ir.ExternalTensor(location, offset, length, tensor.dtype, shape=shape, name=name, base_dir=folder)
        elif tensor.nbytes > LARGEST_INSIDE:
            raise ValueError(f"{name} of {tensor.nbytes} bytes is not among the stored weights")


def in_float32(model: ir.Model) -> None:
    """A bfloat16 graph as one that any runtime takes: weights, inputs and arithmetic in float32, every result rounded to bfloat16.

    What eager PyTorch does on a CPU, too: it adds up in float32 and stores in bfloat16.
    """
    narrow, graph = ir.DataType.BFLOAT16, model.graph
    for value in graph.inputs:
        if value.dtype == narrow:
            value.dtype = ir.DataType.FLOAT
    for value in graph.initializers.values():
        if value.dtype == narrow:
            assert value.const_value is not None
            value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.dtype = ir.DataType.FLOAT
    for node in list(graph):
        _check_flat(node)
        narrowed = [output for output in node.outputs if output.dtype == narrow]
        if node.op_type == "Cast" and narrowed:
            _widen_after(model, node, node.outputs[0])
            continue
        for output in narrowed:
            output.dtype = ir.DataType.FLOAT
        if node.op_type == "ConstantOfShape" and narrowed:
            fill = node.attributes["value"].as_tensor().numpy().astype(np.float32)
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(fill))
        if node.op_type not in MOVES:
            for output in narrowed:
                _round_after(model, node, output)


def _check_flat(node: ir.Node) -> None:
    if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in _attributes(node)):
        raise ValueError(f"{node.op_type}: a graph within the graph")


def _attributes(node: ir.Node) -> Iterator[Any]:
    return (a for a in node.attributes.values() if isinstance(a, ir.Attr))


def _widen_after(model: ir.Model, node: ir.Node, output: Any) -> None:
    """What reads the output of a Cast to bfloat16, which rounds, gets it as float32."""
    wide = cast_to(output, ir.DataType.FLOAT, f"{output.name}__exact")
    ir.convenience.replace_all_uses_with(output, wide.outputs[0], replace_graph_outputs=True)
    wide.replace_input_with(0, output)
    model.graph.insert_after(node, [wide])


def _round_after(model: ir.Model, node: ir.Node, output: Any) -> None:
    """What reads an output gets it rounded to bfloat16."""
    rounding = cast_to(output, ir.DataType.BFLOAT16, f"{output.name}__rounded")
    wide = cast_to(rounding.outputs[0], ir.DataType.FLOAT, f"{output.name}__exact")
    ir.convenience.replace_all_uses_with(output, wide.outputs[0], replace_graph_outputs=True)
    rounding.replace_input_with(0, output)
    model.graph.insert_after(node, [rounding, wide])
