"""16-bit ONNX models, what overflows in float16, and where an artefact that differs from eager goes wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from ppclc import plugins
from ppclc.artefacts.triage import Tapped, overflow
from ppclc.backends import Backend, ExportRequest, Written, _onnx_graphs
from ppclc.errors import RecipeError, VerificationError
from ppclc.families import FULL_PRECISION, Lowered, typed
from ppclc.models import apply_plan
from ppclc.passes.export import export_model
from ppclc.plan import CompressionPlan
from tests.contracts.test_families import FAMILIES, subject_of
from tests.unit.test_export import use_backend

ONNX: Backend = plugins.load("backends", "onnx")
RUNTIME: Backend = plugins.load("backends", "onnxruntime")


@dataclasses.dataclass
class Plain:
    """A module that is its own reference."""

    module: nn.Module

    def reference(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.module(**inputs)  # type: ignore[no-any-return]


def written(module: nn.Module, inputs: dict[str, torch.Tensor], dtype: str, out: Path, opset: int = 23) -> Any:
    """A session of a module that was lowered as back ends do it."""
    request = ExportRequest(module.eval(), inputs, {}, {}, dtype, out, {"opset": opset, "external_data": None})
    ONNX.export(request)  # type: ignore[misc]
    return RUNTIME.load(out, Plain(module))


class Clock(nn.Module):
    """What transformers do to a timestep in 16 bits: scaled there, then cosines in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float16))

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        scaled = (timestep.to(self.weight.dtype) * 1000).float()
        return torch.cos(scaled[:, None] * torch.tensor([1.0, 0.3, 0.1])) * self.weight.float()


@pytest.mark.slow
def test_a_timestep_is_rounded_as_eager_rounds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, inputs = Clock(), {"timestep": torch.tensor([0.5137, 0.733, 0.9991, 0.31])}
    wanted = clock(**inputs)
    exact = torch.cos((inputs["timestep"] * 1000)[:, None] * torch.tensor([1.0, 0.3, 0.1]))
    assert (wanted - exact).abs().max() > 0.05  # what the rounding is worth
    assert (written(clock, inputs, "float16", tmp_path / "kept").run(inputs) - wanted).abs().max() < 1e-4
    monkeypatch.setattr(_onnx_graphs, "explicit_roundings", lambda model: None)
    assert (written(clock, inputs, "float16", tmp_path / "lost").run(inputs) - wanted).abs().max() > 0.05


class Patches(nn.Module):
    """A convolution, and axes permuted by einsum, neither of which ONNX has in bfloat16 at opset 20."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nchw->nhwc", self.conv(x)) * 3


@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, 23])
def test_operators_that_a_dtype_lacks_become_islands_of_float32(tmp_path: Path, opset: int) -> None:
    module, inputs = Patches().to(torch.bfloat16), {"x": torch.randn(2, 3, 4, 6).to(torch.bfloat16)}
    session = written(module, inputs, "bfloat16", tmp_path, opset)
    assert torch.allclose(session.run(inputs), module(**inputs).float(), rtol=1e-2, atol=1e-2)
    graph = ir.load(tmp_path / "transformer" / "model.onnx")
    assert _onnx_graphs.count(graph, "Einsum") == 0
    [conv] = [n for n in graph.graph if n.op_type == "Conv"]
    producer = conv.inputs[0].producer()  # type: ignore[union-attr]
    assert (producer is not None and producer.op_type == "Cast") == (opset == 20)  # opset 22 has it


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_positions_and_timesteps_stay_float32(name: str, dtype: torch.dtype) -> None:
    subject = subject_of(name)
    lowered = subject.family.lowered(subject.model.to(dtype))
    inputs = lowered.inputs(**lowered.sizes[0])
    assert {n: v.dtype for n, v in inputs.items() if v.is_floating_point()} == {
        n: torch.float32 if n in FULL_PRECISION and not (n == "timestep" and name == "hunyuan_image") else dtype
        for n, v in inputs.items()
        if v.is_floating_point()
    }
    assert "timestep" in inputs
    with torch.no_grad():
        wanted, got = lowered.reference(inputs), lowered.module(**inputs)
    assert wanted.dtype == got.dtype == dtype
    assert (wanted - got).float().norm() <= 1e-2 * wanted.float().norm()
    assert typed(inputs, torch.float32)["hidden_states"].dtype == torch.float32


# -- overflow ----------------------------------------------------------------------------------------------------------


def test_float16_of_a_family_that_overflows_is_refused(tmp_path: Path) -> None:
    subject = subject_of("qwen_image", num_layers=1)
    with pytest.raises(RecipeError, match=r"qwen_image is known to overflow in it .*wanted bfloat16 or float32, or --force"):
        export_model(subject.model.half(), subject.family, "onnx", "float16", tmp_path / "x", "abc")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_overflows_is_refused_by_the_part_that_does(tmp_path: Path) -> None:
    subject = subject_of("flux", num_layers=2, num_single_layers=1)
    subject.model.transformer_blocks[1].ff.net[2].weight.data *= 5e4
    model = subject.model.half()
    with pytest.raises(
        VerificationError, match=r"overflows in float16: transformer_blocks\.1\.ff\.net\.2 \(Linear\) is the first"
    ) as raised:
        export_model(model, subject.family, "onnx", "float16", tmp_path / "x", "abc")
    assert "nothing was written" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_what_overflows_on_loud_text_alone_is_found(tmp_path: Path) -> None:
    """Gentle noise passes: only channels as loud as trained encoders have them overflow."""
    subject = subject_of("flux", num_layers=1, num_single_layers=1)
    weight = subject.model.context_embedder.weight.data
    weight[:, ::7] = weight[:, ::7].sign()
    weight *= 65504 / 8 / weight.abs().sum(1).max() * 2
    model = subject.model.half()
    lowered = subject.family.lowered(model)
    assert overflow(lowered, lowered.inputs(**lowered.sizes[0])) is None
    with pytest.raises(VerificationError, match=r"overflows in float16: context_embedder \(Linear\)"):
        export_model(model, subject.family, "onnx", "float16", tmp_path / "x", "abc")


# -- triage ------------------------------------------------------------------------------------------------------------


def damaged(part: str) -> Backend:
    """The ONNX back end with a fault: the bias of one part is off by one."""

    def export(request: ExportRequest) -> Written:
        told = ONNX.export(request)  # type: ignore[misc]
        path = request.out / "transformer" / "model.onnx"
        model = onnx.load(path)
        [bias] = [i for i in model.graph.initializer if i.name.endswith(f"{part}.bias")]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, bias.name))
        onnx.save(model, path)
        return told

    return dataclasses.replace(ONNX, name="faulty", export=export)


@pytest.mark.long
@pytest.mark.slow
def test_triage_names_the_block_and_its_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a student, whose numbers are its own."""
    subject = subject_of("qwen_image", num_layers=3)
    student = apply_plan(subject.model, CompressionPlan.of("qwen_image", 3, [(0, 1)]))
    use_backend(monkeypatch, damaged("transformer_blocks.1.img_mlp.net.2"))
    with pytest.raises(VerificationError) as raised:
        export_model(student, subject.family, "faulty", "float32", tmp_path / "x", "abc")
    words = str(raised.value)
    assert "differs from eager by max_abs = " in words
    assert "block 1 is the first that differs: transformer_blocks.1 (QwenImageTransformerBlock, relative L2 " in words
    assert "there transformer_blocks.1.img_mlp.net.2 (Linear, relative L2 " in words
    assert list(tmp_path.iterdir()) == []


def test_taps_give_what_parts_give() -> None:
    subject = subject_of("flux", num_layers=2, num_single_layers=1)
    lowered: Lowered = subject.family.lowered(subject.model)
    inputs = lowered.inputs(**lowered.sizes[0])
    tapped = Tapped(lowered.module, ["model.x_embedder", "model.transformer_blocks.1", "model.single_transformer_blocks.0"])
    with torch.no_grad():
        out, *parts = tapped(**inputs)
        assert torch.equal(out, lowered.module(**inputs))
        assert torch.equal(parts[0], subject.model.x_embedder(inputs["hidden_states"]))
    names = ["model.x_embedder", *(f"model.{p}.{n}" for p in ("transformer_blocks.1", "single_transformer_blocks.0") for n in (0, 1))]
    assert list(tapped.names) == names
    assert not any(part._forward_hooks for part in lowered.module.modules())
