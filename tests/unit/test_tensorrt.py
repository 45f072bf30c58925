"""TensorRT: engines that TensorRT-RTX builds without a GPU, what is asked of a build, and what is refused."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ppclc import plugins
from ppclc.backends import tensorrt
from ppclc.errors import RecipeError, UnavailableError, VerificationError
from ppclc.passes.export import check_sizes, export_model, profiles, sizes_of
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
    with pytest.raises(RecipeError, match=r"export\.sizes = .*wanted a list of \{batch, height, width, text\}"):
        check_sizes(teacher.family.lowered(teacher.model), {"sizes": sizes})


@pytest.mark.parametrize("name", plugins.names("families"))
def test_every_family_has_a_usual_size(name: str) -> None:
    subject = subject_of(name)
    [profile] = profiles(subject.family.lowered(subject.model), {**tensorrt.OPTIONS})
    assert all(len({*map(len, shapes)}) == 1 for shapes in profile.values())
    least, usual, greatest = profile["encoder_hidden_states"]
    assert (least[1], usual[1], greatest[1]) == (1, 512, 512)


def test_another_library_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"export\.library = 'tensorflow': wanted tensorrt or tensorrt_rtx"):
        tensorrt.library("tensorflow")


def test_a_missing_library_is_told_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None)
    for wanted, extra in ((None, "tensorrt-rtx"), ("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx")):
        with pytest.raises(UnavailableError, match=rf"pip install 'ppclc\[{extra}\]'"):
            tensorrt.library(wanted)


@pytest.mark.slow
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


# -- a session, by stand-ins -------------------------------------------------------------------------------------------


class Engine:
    """An engine and its context that write down what they are told: a doubling of x, whose addresses it never reads."""

    num_io_tensors = 2

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.shape: tuple[int, ...] = ()

    def get_tensor_name(self, number: int) -> str:
        return ("x", "y")[number]

    def get_tensor_dtype(self, name: str) -> str:
        return "DataType.BF16"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.log.append(("shape", name, shape))

    def set_tensor_address(self, name: str, address: int) -> None:
        self.log.append(("address", name, address))

    def set_optimization_profile_async(self, number: int, stream: int) -> None:
        self.log.append(("profile", number, stream))

    def execute_async_v3(self, stream: int) -> bool:
        self.log.append(("execute", stream))
        return self.shape != (4, 3)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> tensorrt.TensorRTSession:
    """A session on stream 7, whose tensors lie on the host."""
    empty, to = torch.empty, torch.Tensor.to
    monkeypatch.setattr(torch, "empty", lambda *a, device, **k: empty(*a, **k))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, dtype: to(self, dtype))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    engine = Engine()
    profiles = [{"x": ((1, 3), (1, 3), (1, 3))}, {"x": ((2, 3), (2, 3), (4, 3))}]
    library = tensorrt.Library(SimpleNamespace(__name__="tensorrt"))
    return tensorrt.TensorRTSession(library, engine, engine, profiles, {})  # type: ignore[arg-type]


def test_a_bound_call_is_told_once_and_again_after_another(session: tensorrt.TensorRTSession) -> None:
    one, two = torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16)
    call = session.bound({"x": one})
    log = session.engine.log
    got = call()
    told = [("address", "x", one.data_ptr()), ("address", "y", got.data_ptr())]
    assert log == [("shape", "x", (1, 3)), *told, ("execute", 7)]
    assert call() is got
    assert log[4:] == [("execute", 7)]
    session.run({"x": two})  # by the other profile
    assert ("profile", 1, 7) in log
    del log[:]
    assert call() is got
    assert log == [("profile", 0, 7), ("shape", "x", (1, 3)), *told, ("execute", 7)]


def test_shapes_without_a_profile_and_an_engine_that_fails_are_told(session: tensorrt.TensorRTSession) -> None:
    with pytest.raises(VerificationError, match=r"no optimization profile takes \{'x': \[5, 3\]\}"):
        session.bound({"x": torch.ones(5, 3)})
    session.log.take("ERROR", "out of memory")
    with pytest.raises(VerificationError, match="the engine did not run: out of memory"):
        session.run({"x": torch.ones(4, 3)})


def test_what_cannot_be_captured_is_told_before_it_is_tried(session: tensorrt.TensorRTSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call = session.bound({"x": torch.ones(1, 3)})
    call()  # TensorRT does not say
    session.library = tensorrt.Library(SimpleNamespace(__name__="tensorrt_rtx"))
    session.context.is_stream_capturable = lambda stream: False
    before = len(session.engine.log)
    with pytest.raises(UnavailableError, match="tensorrt_rtx cannot be captured with these shapes"):
        call()
    assert len(session.engine.log) == before


def test_an_artefact_is_compared_at_the_sizes_that_it_is_built_for(teacher: Any) -> None:
    lowered = teacher.family.lowered(teacher.model)
    assert sizes_of(lowered, {"opset": 23}) == lowered.sizes
    assert sizes_of(lowered, {"sizes": None}) == [lowered.usual]
    assert sizes_of(lowered, {"sizes": SIZES}) == SIZES
