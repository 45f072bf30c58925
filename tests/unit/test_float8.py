"""Large linear maps in E4M3: eager and graph compute the same numbers, by scales that calibration found."""

from __future__ import annotations

import dataclasses
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from ppclc import compiler
from ppclc.artefacts.triage import Tapped, block_paths
from ppclc.backends import ExportRequest, _onnx_graphs, onnx, onnxruntime
from ppclc.loading.float8 import LARGEST, Float8Linear, in_float8, large_linears
from ppclc.lowering import passes
from ppclc.models import apply_plan
from ppclc.passes import export as export_pass
from ppclc.passes.export import export_model, told
from ppclc.plan import CompressionPlan
from ppclc.recipe import parse_recipe
from ppclc.records import Parity
from ppclc.screens.display import Display
from tests.contracts.test_families import EDITED, random_bank, subject_of
from tests.unit.test_export import an_echo, use_backend


def test_a_map_s_numbers_are_those_of_its_scales() -> None:
    linear = nn.Linear(8, 4).to(torch.bfloat16)
    quantized = Float8Linear(linear, 7.0)
    assert quantized.weight8.dtype == torch.float8_e4m3fn
    assert float(quantized.weight8.float().abs().max()) == LARGEST
    x = torch.linspace(-9, 9, 16).reshape(2, 8).to(torch.bfloat16)
    scale = torch.tensor(7 / 448, dtype=torch.bfloat16)
    by_hand = (x.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.bfloat16) * scale
    weight = quantized.weight8.to(torch.bfloat16) * quantized.weight_scale
    assert torch.equal(quantized(x), nn.functional.linear(by_hand, weight, linear.bias))
    assert by_hand.abs().max() <= 7.1  # what was not seen in calibration is kept within its range
    assert (quantized(x.clamp(-7, 7)) - linear(x.clamp(-7, 7))).float().norm() < 0.05 * linear(x).float().norm()


@pytest.mark.parametrize("name", EDITED)
def test_the_maps_are_those_of_blocks_and_no_modulation(name: str) -> None:
    subject = subject_of(name)
    model = subject.model.to(torch.bfloat16)
    lowered = subject.family.lowered(model)
    paths = large_linears(subject.family, model.config, lowered.module)
    assert len(paths) >= 2 * subject.length
    assert all("mod" not in p.split(".")[-2:][0] and ".norm" not in p for p in paths)
    before = {n: t.data_ptr() for n, t in model.state_dict().items()}
    inputs = lowered.inputs(**lowered.sizes[0])
    with torch.no_grad():
        plain = lowered.reference(inputs)
        quantized, told = in_float8(lowered, subject.family, model.config, [inputs])
        distance = (quantized.reference(inputs) - plain).float().norm() / plain.float().norm()
        assert torch.equal(lowered.reference(inputs), plain)  # the model is as it was
    assert 1e-3 < distance < 0.2
    assert told["linear_maps"] == len(paths)
    assert {n: t.data_ptr() for n, t in model.state_dict().items()} == before


@pytest.mark.long
@pytest.mark.slow
def test_a_float8_model_runs_elsewhere_as_here_and_is_built(tmp_path: Path) -> None:
    subject = subject_of("qwen_image", num_layers=2)
    model = subject.model.to(torch.bfloat16)
    export = export_model(model, subject.family, "onnx", "float8", tmp_path / "onnx", "abc")
    assert (export.dtype, export.options["float8"]["linear_maps"]) == ("float8", 24)
    assert export.options["float8"]["scales"] == "random inputs"
    assert "scales from random inputs" in told(export)[0]
    assert export.parity is not None
    assert export.parity.rel_l2 <= 2e-2  # from eager with the same rounded numbers
    assert 1e-3 < export.options["float8"]["rel_l2_to_bfloat16"] < 0.2
    graph = ir.load(tmp_path / "onnx" / "transformer" / "model.onnx")
    # Of 24 maps the last block's three of text are read by nothing; those that share an input share its rounding.
    assert (_onnx_graphs.count(graph, "QuantizeLinear"), _onnx_graphs.count(graph, "DequantizeLinear")) == (13, 13 + 21)
    stored = [
        v for v in graph.graph.initializers.values() if v.dtype == ir.DataType.FLOAT8E4M3FN and v.shape is not None and len(v.shape) == 2
    ]
    assert len(stored) == 21
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is not installed: pip install 'ppclc[tensorrt-rtx]'")
    options = {"graph": str(tmp_path / "onnx"), "library": "tensorrt_rtx"}
    engine = export_model(model, subject.family, "tensorrt", "float8", tmp_path / "engine", "abc", options=options)
    assert engine.options["attention_fused"] == engine.options["attention_total"] == 2
    assert engine.options["float32_products"] == 0


@pytest.mark.slow
def test_a_run_s_own_samples_give_the_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {
        "model": {"path": "builtin:two-digits"},
        "calibrate": {"samples": 64},
        "plan": {"intervals": [[3, 4]], "text_stream": "none", "ffn": "none", "modulation_rank": "none"},
    }
    run = compiler.compress(parse_recipe(recipe, "r"), "r", tmp_path / "out", Display(0, -1), until="calibrate")
    lowered = run.source.family.lowered(run.teacher)
    batches = list(compiler.calibration_batches(run, lowered))
    assert len(batches) == 8
    wanted = lowered.inputs(**lowered.sizes[0])
    assert all(b.keys() == wanted.keys() for b in batches)
    assert all(b["hidden_states"].shape == (8, 32, 12) and b["hidden_states"].dtype == torch.float32 for b in batches)
    with torch.no_grad():
        lowered.module(**batches[0])
    again = list(compiler.calibration_batches(run, lowered))
    assert all(torch.equal(a["hidden_states"], b["hidden_states"]) for a, b in zip(batches, again, strict=True))


def test_scales_of_random_inputs_give_way_to_those_of_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of("qwen_image", num_layers=1)
    model = subject.model.to(torch.bfloat16)
    use_backend(monkeypatch, dataclasses.replace(an_echo(), dtypes=("float8",)))

    def scales(calibration: Any) -> Any:
        done = export_model(model, subject.family, "echo", "float8", tmp_path / "x", "abc", calibration=calibration)
        return done.options["float8"]["scales"]

    def samples(lowered: Any) -> list[Any]:
        return [lowered.inputs(**lowered.sizes[0])]

    assert scales(None) == "random inputs"
    assert scales(samples) == "samples of the run"
    assert scales(None) == "samples of the run"  # kept


def test_roundings_of_an_artefact_may_part_from_eager_s_as_far_as_both_part_from_bfloat16() -> None:
    assert export_pass._quantized_limit(0.001) == 2e-2
    assert export_pass._quantized_limit(0.03) == pytest.approx(0.0424, abs=1e-4)
    assert passes(Parity(max_abs=9.0, rel_l2=0.04, cosine=1.0), "bfloat16", 0.0424)
    assert not passes(Parity(max_abs=9.0, rel_l2=0.05, cosine=1.0), "bfloat16", 0.0424)
    assert not passes(Parity(max_abs=9.0, rel_l2=math.nan, cosine=1.0), "bfloat16", 0.0424)


@pytest.mark.slow
def test_taps_that_are_one_value_keep_their_names(tmp_path: Path) -> None:
    """Of blocks whose text streams are mapped the text passes unchanged, so that several of them give the same."""
    subject = subject_of("qwen_image", num_layers=3)
    plan = CompressionPlan.of("qwen_image", 3, [], [1, 2], None, True)
    model = apply_plan(subject.model, plan, random_bank(subject, plan))
    lowered = subject.family.lowered(model)
    tapped = Tapped(lowered.module, block_paths(subject.family, dict(model.config)))
    inputs = lowered.inputs(**lowered.sizes[0])
    with torch.no_grad():
        wanted = tapped(**inputs)
    request = ExportRequest(
        tapped, inputs, lowered.dynamic, lowered.ranges, "float32", tmp_path, {"opset": 23, "external_data": None}, taps=tapped.names
    )
    onnx.export(request)
    session = onnxruntime.load(tmp_path, lowered)
    found = session.outputs(inputs)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
