"""TensorRT: engines that TensorRT-RTX builds without a GPU, what is asked of a build, and what is refused."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from ppclc import plugins
from ppclc.backends import tensorrt
from ppclc.errors import RecipeError, UnavailableError
from ppclc.passes.export import check_sizes, export_model, profiles
from ppclc.records import Export
from tests.contracts.test_families import subject_of

SIZES = [{"batch": 1, "height": 4, "width": 8, "text": 16}, {"batch": 2, "height": 8, "width": 8, "text": 9}]


BUILDS = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed: pip install 'ppclc[tensorrt-rtx]'")


@pytest.fixture(scope="module")
def teacher() -> Any:
    subject = subject_of("qwen_image", num_layers=1)
    subject.model.to(torch.bfloat16)
    return subject


@pytest.fixture(scope="module")
def graph(teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX export that engines are built from."""
    folder = tmp_path_factory.mktemp("graph") / "onnx"
    export_model(teacher.model, teacher.family, "onnx", "bfloat16", folder, "abc")
    return folder


def build(teacher: Any, graph: Path, out: Path, **options: Any) -> Export:
    given = {"graph": str(graph), "library": "tensorrt_rtx", **options}
    return export_model(teacher.model, teacher.family, "tensorrt", "bfloat16", out, "abc", options=given)


@BUILDS
@pytest.mark.slow
def test_an_engine_has_a_profile_a_size_with_any_text_up_to_its_length(teacher: Any, graph: Path, tmp_path: Path) -> None:
    export = build(teacher, graph, tmp_path / "x", sizes=SIZES)
    receipt = json.loads((tmp_path / "x" / tensorrt.RECEIPT).read_text("utf-8"))
    image = [p["hidden_states"] for p in receipt["profiles"]]
    assert image == [[[1, 32, 12]] * 3, [[2, 64, 12]] * 3]  # static
    assert [p["encoder_hidden_states"] for p in receipt["profiles"]] == [
        [[1, 1, 16], [1, 16, 16], [1, 16, 16]],
        [[2, 1, 16], [2, 9, 16], [2, 9, 16]],
    ]
    assert export.shapes == SIZES
    assert (export.options["attention_fused"], export.options["attention_total"], export.options["float32_products"]) == (1, 1, 0)
    assert export.options["build_peak_bytes"] > 50_000_000
    assert export.seconds.keys() == {"prepare", "build"}  # nothing was lowered again
    assert export.versions["tensorrt_rtx"] == receipt["version"] == export.options["library_version"]
    if not torch.cuda.is_available():
        assert export.parity is None
        assert "no CUDA device" in export.options["session"]["not_run"]


@BUILDS
@pytest.mark.slow
def test_one_profile_spans_all_sizes_where_that_is_asked_for_and_weights_stream_and_are_refitted(
    teacher: Any, graph: Path, tmp_path: Path
) -> None:
    export = build(teacher, graph, tmp_path / "x", sizes=SIZES, dynamic=True, weight_streaming=True, refit=True, workspace_gb=1)
    [profile] = json.loads((tmp_path / "x" / tensorrt.RECEIPT).read_text("utf-8"))["profiles"]
    assert profile["hidden_states"] == [[1, 1, 12], [1, 32, 12], [2, 64, 12]]
    assert export.options["attention_fused"] == export.options["attention_total"] == 1


@pytest.mark.parametrize(
    "sizes",
    [[], {}, "1024", [{"batch": 1}], [{**SIZES[0], "batch": 0}], [{**SIZES[0], "text": 1.5}], [{**SIZES[0], "depth": 1}], [SIZES[0], None]],
)
def test_sizes_that_are_none_are_refused(teacher: Any, sizes: Any) -> None:
    with pytest.raises(RecipeError, match=r"export\.options\.sizes = .*wanted a list of \{batch, height, width, text\}"):
        check_sizes(teacher.family.lowered(teacher.model), {"sizes": sizes})


@pytest.mark.parametrize("name", plugins.names("families"))
def test_every_family_has_a_usual_size(name: str) -> None:
    subject = subject_of(name)
    [profile] = profiles(subject.family.lowered(subject.model), {**tensorrt.OPTIONS})
    assert all(len({*map(len, shapes)}) == 1 for shapes in profile.values())
    least, usual, greatest = profile["encoder_hidden_states"]
    assert (least[1], usual[1], greatest[1]) == (1, 512, 512)


def test_another_library_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"export\.options\.library = 'tensorflow': wanted tensorrt or tensorrt_rtx"):
        tensorrt.library("tensorflow")


def test_a_missing_library_is_told_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None)
    for wanted, extra in ((None, "tensorrt-rtx"), ("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx")):
        with pytest.raises(UnavailableError, match=rf"pip install 'ppclc\[{extra}\]'"):
            tensorrt.library(wanted)


def test_a_graph_of_another_model_is_refused(teacher: Any, graph: Path, tmp_path: Path) -> None:
    told = json.loads((graph / "export.json").read_text("utf-8"))
    for name, change in {"model": {"model_digest": "def"}, "dtype": {"dtype": "float32"}}.items():
        other = tmp_path / name
        (other / "transformer").mkdir(parents=True)
        (other / "transformer" / "model.onnx").write_bytes(b"")
        (other / "export.json").write_text(json.dumps(told | change), "utf-8")
        with pytest.raises(RecipeError, match="is of another model or dtype, wanted bfloat16 of this one"):
            build(teacher, other, tmp_path / "x")
    with pytest.raises(RecipeError, match="holds no ONNX export"):
        build(teacher, tmp_path, tmp_path / "x")
    assert not (tmp_path / "x").exists()


RECEIPT = {"library": "tensorrt", "version": "11.0", "gpu": "NVIDIA H100, compute capability 9.0, driver 13000"}


@pytest.mark.parametrize(
    ("change", "words"),
    [({"version": "11.1"}, "built by tensorrt 11.0, here is 11.1"), ({"gpu": "NVIDIA L4"}, "built on NVIDIA H100.*, here is NVIDIA L4")],
)
def test_an_engine_of_another_machine_is_refused_with_the_command_that_builds_it_again(change: dict[str, str], words: str) -> None:
    with pytest.raises(
        UnavailableError, match=rf"{words}; build it again: ppclc export MODEL --backend tensorrt -o 'out/my model'"
    ) as told:
        tensorrt.check_machine(RECEIPT, RECEIPT | change, False, Path("out/my model"))
    assert told.value.exit_code == 3


def test_an_engine_that_travels_runs_on_other_gpus() -> None:
    tensorrt.check_machine(RECEIPT, RECEIPT | {"gpu": "NVIDIA L4"}, True, Path("out"))


def test_layers_are_counted_as_the_builder_lists_them() -> None:
    log = tensorrt.Log()
    attention = "Name: _gemm_mha_v2_myl{0}_24, LayerType: kgen, Inputs: [ {{ Name: x, Datatype: {1}, Format: y }}], Constants: [ {{ Datatype: Float, }}]"
    product = "Name: node_MatMul_1_myl{0}_3, LayerType: gemm, Inputs: [ {{ Name: x, Datatype: {1}, Format: y }}], Constants: [ {{ Datatype: Float, }}]"
    lines = [line.format(p, kind) for p in (0, 1) for line, kind in ((attention, "BFloat16"), (product, "BFloat16"), (product, "Float"))]
    log.take("VERBOSE", "Layers:\n" + "\n".join(lines) + "\nBindings:\nhidden_states_mha")
    log.take("ERROR", "something")
    assert (log.fused(2), log.widened(2), log.problems) == (1, 1, ["something"])
