"""What every back end must keep over the families with all edits: teacher, and students with depth, width and modulation edits, in every dtype.

Lowering is what takes time, so that models are as small as their edits allow, and most of them run with `make test-long` alone; CI runs
those of ONNX and TensorRT-RTX. What a machine cannot do is a strict expected failure.
"""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from ppclc import plugins
from ppclc.backends import _onnx_graphs
from ppclc.backends.tensorrt import ENGINE
from ppclc.loading.classes import DTYPES
from ppclc.lowering import MAX_ABS, REL_L2, exported_program, parity, passes, quiet
from ppclc.models import apply_plan
from ppclc.passes.export import export_model, with_outliers
from ppclc.plan import CompressionPlan
from tests.contracts.test_families import random_bank, subject_of

SMALL: dict[str, dict[str, Any]] = {
    "qwen_image": {"num_layers": 3},
    "flux": {"num_layers": 2, "num_single_layers": 1},
    "flux2": {"num_layers": 2, "num_single_layers": 1},
    "sd3": {"num_layers": 3, "dual_attention_layers": (0,)},
}
ROLES = ("teacher", "depth", "width", "modulation")
MODELS = [(family, role) for family in SMALL for role in ROLES]
ALL = [(family, "all") for family in SMALL]
"""Students with all of these edits at once, and a block more."""


def first(*shown: tuple[str, str]) -> list[Any]:
    """All models, of which those that are not `shown` take many minutes together, and are run where the long tests are."""
    return [pytest.param(*m, marks=[] if m in shown else pytest.mark.long) for m in [*MODELS, *ALL]]


def edited(family: str, role: str) -> CompressionPlan | None:
    """Two blocks become one; or one loses its text stream and another a network; or modulation is of rank 4."""
    count = sum(v for k, v in SMALL[family].items() if k.startswith("num_"))
    front = plugins.load("families", family)
    name, dead = front.name, front.has_dead_code
    if role == "all":
        cut = [(2, 3)] if family == "sd3" else [(0, 1)]
        return CompressionPlan.of(name, count + 1, cut, [1 if family == "sd3" else 2], 4, dead, [(0, "image"), (0, "text")])
    if role == "depth":
        return CompressionPlan.of(name, count, [(1, 2) if family == "sd3" else (0, 1)])
    if role == "width":
        return CompressionPlan.of(name, count, [], [1], None, dead, [(0, "image"), (0, "text")])
    return CompressionPlan.of(name, count, [], [], 4, dead) if role == "modulation" else None


@cache
def model_of(family: str, role: str) -> Any:
    more = {"num_layers": SMALL[family]["num_layers"] + 1} if role == "all" else {}
    subject = subject_of(family, **{**SMALL[family], **more})
    plan = edited(family, role)
    return subject.model if plan is None else apply_plan(subject.model, plan, random_bank(subject, plan))


def in_dtype(family: str, role: str, dtype: str) -> Any:
    model = model_of(family, role)
    return model if dtype == "float32" else copy.deepcopy(model).to(DTYPES[dtype])


def lower(family: str, role: str, dtype: str, backend: str, folder: Path, **options: Any) -> Any:
    front = plugins.load("families", family)
    return export_model(in_dtype(family, role, dtype), front, backend, dtype, folder, "digest", options=options, force=True)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "role"), first())
def test_a_graph_is_what_the_exporter_s_own_optimizer_makes_of_it(family: str, role: str) -> None:
    """Ours leaves out rules that find nothing, one of which takes time by the square of the graph."""
    from onnxscript._framework_apis import torch_2_8

    model = in_dtype(family, role, "bfloat16")
    lowered = plugins.load("families", family).lowered(model)
    with quiet():
        captured = exported_program(lowered.module, lowered.inputs(**lowered.sizes[0]), lowered.dynamic, lowered.ranges)
        ours = torch.onnx.export(captured, dynamo=True, opset_version=23, optimize=False, verbose=False).model
    theirs = ours.clone()
    _onnx_graphs.optimize(ours)
    torch_2_8.optimize(theirs)
    found, wanted = (Counter(node.op_type for node in graph) for graph in (ours.graph, theirs.graph))
    assert found == wanted
    assert len(ours.graph.initializers) == len(theirs.graph.initializers)
    assert len(ours.functions) == len(theirs.functions) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("family", "role"), first())  # daily: tests/unit/test_export.py, tests/e2e/test_exported.py
def test_float32_runs_elsewhere_as_here(family: str, role: str, tmp_path: Path) -> None:
    export = lower(family, role, "float32", "onnxruntime", tmp_path / "x")
    assert export.parity is not None
    assert export.parity.max_abs <= MAX_ABS["float32"] == 1e-4
    # Sizes that export did not compare at, by a session of its own.
    model = in_dtype(family, role, "float32")
    lowered = plugins.load("families", family).lowered(model)
    session = plugins.load("backends", "onnxruntime").load(tmp_path / "x", lowered)
    inputs = lowered.inputs(batch=4, height=2, width=6, text=11)
    with torch.no_grad():
        wanted = lowered.reference(inputs)
    assert (session.run(inputs) - wanted).abs().max() <= 1e-4
    assert wanted.abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("family", "role"), first(("qwen_image", "all")))
def test_bfloat16_runs_elsewhere_as_here_and_is_built_with_every_attention_fused(family: str, role: str, tmp_path: Path) -> None:
    """One ONNX model for both: in ONNX Runtime against eager, and as an engine of TensorRT-RTX, which needs no GPU to be built."""
    export = lower(family, role, "bfloat16", "onnx", tmp_path / "x")
    model = in_dtype(family, role, "bfloat16")
    lowered = plugins.load("families", family).lowered(model)
    session = plugins.load("backends", "onnxruntime").load(tmp_path / "x", lowered)
    assert session.options["arithmetic"] == "float32, results rounded to bfloat16"
    inputs = lowered.inputs(batch=2, height=2, width=6, text=11)
    with torch.no_grad():
        distances = [parity(lowered.reference(given), session.run(given)) for given in (inputs, with_outliers(inputs))]
    assert all(d.rel_l2 <= REL_L2["bfloat16"] == 2e-2 for d in distances)
    assert export.parity is not None
    assert export.parity.rel_l2 <= 2e-2
    graph = ir.load(tmp_path / "x" / "transformer" / "model.onnx")
    weights = [v for v in graph.graph.initializers.values() if str(v.name).endswith(".weight")]
    assert weights
    assert {v.dtype for v in weights} == {ir.DataType.BFLOAT16}
    attentions = _onnx_graphs.count(graph, "Attention")
    assert attentions >= lowered_blocks(model, family)
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is not installed: pip install 'ppclc[tensorrt-rtx]'")
    # The engine, of the graph that was just run.
    engine = lower(family, role, "bfloat16", "tensorrt", tmp_path / "engine", graph=str(tmp_path / "x"), library="tensorrt_rtx")
    assert (engine.options["attention_fused"], engine.options["attention_total"]) == (attentions, attentions)
    assert engine.options["float32_products"] == 0
    assert (tmp_path / "engine" / ENGINE).stat().st_size > 100_000


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed: pip install 'ppclc[tensorrt-rtx]'")
@pytest.mark.parametrize(("family", "role"), [(family, "teacher") for family in SMALL] + ALL)
def test_a_float32_engine_that_runs_elsewhere_is_built(family: str, role: str, tmp_path: Path) -> None:
    """Of a graph in which attention is products and a softmax: as one operator it has no kernel in float32."""
    engine = lower(family, role, "float32", "tensorrt", tmp_path, library="tensorrt_rtx")
    assert engine.options["opset"] == 20
    assert (engine.options["attention_fused"], engine.options["attention_total"]) == (0, 0)
    assert engine.options["float32_products"] > 0
    assert (tmp_path / ENGINE).stat().st_size > 100_000


def lowered_blocks(model: Any, family: str) -> int:
    return int(plugins.load("families", family).num_blocks(dict(model.config)))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL)
def test_float16_runs_elsewhere_as_here(family: str, tmp_path: Path) -> None:
    export = lower(family, "teacher", "float16", "onnxruntime", tmp_path / "x")
    assert export.parity is not None
    assert export.parity.rel_l2 <= REL_L2["float16"] == 2e-2
    assert "arithmetic" not in export.options["session"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize(("family", "role"), first())
def test_compiled_blocks_give_what_eager_gives(family: str, role: str) -> None:
    lowered = plugins.load("families", family).lowered(in_dtype(family, role, "float32"))
    inputs = lowered.inputs(**lowered.sizes[0])
    with torch.no_grad():
        wanted = lowered.reference(inputs)
    before = torch._dynamo.config.recompile_limit
    distance = parity(wanted, plugins.load("backends", "compile").load(Path(), lowered).run(inputs))
    assert torch._dynamo.config.recompile_limit > before  # each block may be of a kind of its own
    assert passes(distance, "float32")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "role"), first())
def test_packages_run_elsewhere_as_here(family: str, role: str, tmp_path: Path) -> None:
    export = lower(family, role, "float32", "aotinductor", tmp_path / "x")
    assert export.parity is not None
    assert export.parity.max_abs <= 1e-4


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.xfail(condition=not torch.cuda.is_available(), raises=AssertionError, strict=True, reason="engines run on a GPU alone")
def test_an_engine_runs_as_eager_does(tmp_path: Path) -> None:
    subject = subject_of("qwen_image", num_layers=1)
    model = subject.model.to(torch.bfloat16)
    export = export_model(model, subject.family, "tensorrt", "bfloat16", tmp_path / "x", "digest")
    assert export.parity is not None, export.options["session"]["not_run"]
    assert export.parity.rel_l2 <= 2e-2
