"""Exports whose weights stay in their files: the same graph and the same output as from memory, and nothing read that need not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file

from ppclc.errors import ModelError, RecipeError, VerificationError
from ppclc.loading.checkpoints import places_in
from ppclc.loading.mapped import mapped_model
from ppclc.loading.sources import open_source
from ppclc.models import apply_plan, load_model, load_source, save_model
from ppclc.passes import export
from ppclc.passes.export import export_source
from ppclc.plan import CompressionPlan
from tests.contracts.test_families import random_bank, subject_of


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a width-edited student."""
    subject = subject_of("qwen_image", num_layers=2, num_attention_heads=4)
    plan = CompressionPlan.of("qwen_image", 2, [], [1], None, True, [(0, "image")])
    folder = tmp_path_factory.mktemp("student") / "model"
    save_model(apply_plan(subject.model, plan, random_bank(subject, plan)), plan, folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mapped_model_is_the_model(student: Path, tmp_path: Path, dtype: str) -> None:
    source = open_source(str(student))
    model, places = mapped_model(source, dtype, tmp_path / "cast.safetensors")
    wanted = load_model(student, dtype).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert places.keys() == wanted.keys()
    assert (tmp_path / "cast.safetensors").exists() == (dtype == "bfloat16")  # stored in float32
    assert {p.file for p in places.values()} == {source.weight_files()[0] if dtype == "float32" else tmp_path / "cast.safetensors"}


def test_weights_that_are_not_finite_are_told(tmp_path: Path) -> None:
    subject = subject_of("qwen_image", num_layers=1)
    subject.model.proj_out.weight.data[0, 0] = float("nan")
    save_model(subject.model, CompressionPlan.of("qwen_image", 1), tmp_path / "model")
    with pytest.raises(ModelError, match=r"proj_out\.weight holds NaN"):
        mapped_model(open_source(str(tmp_path / "model")), "float32", tmp_path / "cast")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
def test_a_large_model_s_graph_points_into_a_file_with_its_weights(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(export, "LARGE", 0)
    monkeypatch.setattr(export, "load_source", None)  # would be all of it in memory
    source = open_source(str(student))
    record = export_source(source, "onnx", dtype, tmp_path / "x", options={"compare": True})
    assert record.parity is not None  # within the dtype's limit, or it would have been refused
    home = tmp_path / "x" / "transformer"
    assert sorted(p.name for p in home.iterdir()) == ["config.json", "model.onnx", "model.onnx.data"]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    wanted = load_source(source, dtype).state_dict()
    stored = load_file(home / "model.onnx.data")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in stored.items())
    assert stored.keys() == wanted.keys()
    places = places_in(home / "model.onnx.data")
    outside = {
        n: v.const_value for n, v in ir.load(home / "model.onnx").graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)
    }
    large = {f"model.{n}" for n, t in wanted.items() if t.numel() > 1024}
    assert outside.keys() == large
    assert all(t.offset == places[n.removeprefix("model.")].start for n, t in outside.items())
    assert (home / "model.onnx").stat().st_size < 400_000


def test_what_is_large_is_not_compared_unless_asked(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def noted(*args: Any) -> str:
        seen.append({"store": args[9], "compared": args[10]})
        return "made"

    monkeypatch.setattr(export, "LARGE", 0)
    monkeypatch.setattr(export, "export_model", noted)
    source = open_source(str(student))
    for value in (None, True, False):
        export_source(source, "onnx", "float32", tmp_path / "x", options={"compare": value})
    assert [s["compared"] for s in seen] == [False, True, False]
    assert all(s["store"] is not None for s in seen)
    with pytest.raises(RecipeError, match=r"export\.compare = 'yes': wanted true, false or null"):
        export_source(source, "onnx", "float32", tmp_path / "x", options={"compare": "yes"})


def test_a_large_model_that_overflows_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of("flux", num_layers=2, num_single_layers=1)
    subject.model.transformer_blocks[1].ff.net[2].weight.data *= 5e4
    save_model(subject.model, CompressionPlan.of("flux", 3), tmp_path / "model")
    monkeypatch.setattr(export, "LARGE", 0)
    with pytest.raises(VerificationError, match=r"overflows in float16: transformer_blocks\.1\.ff\.net\.2 \(Linear\)"):
        export_source(open_source(str(tmp_path / "model")), "onnx", "float16", tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
