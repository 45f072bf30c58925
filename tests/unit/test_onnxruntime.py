"""ONNX Runtime: bound tensors give bit for bit what its own arrays do, and providers are those that were asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from ppclc.backends import onnxruntime as back_end
from ppclc.backends.onnxruntime import PROVIDERS, OnnxRuntimeSession, chosen_providers, load, provider_options
from ppclc.benching.targets import Provider
from ppclc.errors import RecipeError, UnavailableError, VerificationError

HERE = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


def written(folder: Path, axes: tuple[str, ...] = ("batch", "tokens", "batch", "tokens"), kind: int = TensorProto.FLOAT) -> Path:
    """A model of two outputs, sums and products of what it is given."""
    x = helper.make_tensor_value_info("x", kind, [axes[0], axes[1], 3])
    y = helper.make_tensor_value_info("y", kind, [axes[0], axes[1], 3])
    out = [helper.make_tensor_value_info(name, kind, [axes[2], axes[3], 3]) for name in ("sum", "product")]
    nodes = [helper.make_node("Add", ["x", "y"], ["sum"]), helper.make_node("Mul", ["x", "y"], ["product"])]
    model = helper.make_model(helper.make_graph(nodes, "g", [x, y], out), opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "transformer").mkdir()
    onnx.save(model, folder / "transformer" / "model.onnx")
    return folder


def two(batch: int = 2, tokens: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.randn(batch, tokens, 3).to(dtype) for name in ("x", "y")}


@pytest.fixture
def session(tmp_path: Path) -> OnnxRuntimeSession:
    return load(written(tmp_path), SimpleNamespace())  # type: ignore[arg-type]


def test_bound_tensors_give_what_arrays_do(session: OnnxRuntimeSession) -> None:
    for size in ((2, 5), (1, 7)):
        given = two(*size)
        wanted = session.session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        assert torch.equal(session.run(given), torch.from_numpy(wanted[0]))
        assert all(torch.equal(a, torch.from_numpy(b)) for a, b in zip(session.outputs(given), wanted, strict=True))
    assert session.options["providers"] == ["CPUExecutionProvider"]
    assert (session.options["device"], session.options["io_binding"]) == ("cpu", True)
    assert session.shapes == {}  # axes told all shapes


def test_a_bound_call_reads_its_inputs_where_they_lie_and_writes_one_output(session: OnnxRuntimeSession) -> None:
    given = two()
    call = session.bound(given)
    first = call()
    address, before = first.data_ptr(), first.clone()
    given["x"] += 1
    assert call().data_ptr() == address
    assert torch.equal(first, given["x"] + given["y"])
    assert not torch.equal(first, before)


def test_results_of_runs_are_not_written_again(session: OnnxRuntimeSession) -> None:
    given, other = two(), two()
    first = session.run(given)
    kept = first.clone()
    session.run(other)
    assert torch.equal(first, kept)


def test_inputs_of_another_dtype_or_layout_are_taken(session: OnnxRuntimeSession, tmp_path: Path) -> None:
    given = {name: tensor.to(torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in two().items()}
    assert not given["x"].is_contiguous()
    assert torch.equal(session.run(given), given["x"].float() + given["y"].float())
    whole = {name: torch.arange(6).view(1, 2, 3) for name in ("x", "y")}  # positions, as some pipelines give them
    assert torch.equal(session.run(whole), 2.0 * whole["x"])
    (tmp_path / "whole").mkdir()
    counts = load(written(tmp_path / "whole", kind=TensorProto.INT64), SimpleNamespace())  # type: ignore[arg-type]
    assert torch.equal(counts.run(whole), 2 * whole["x"])
    with pytest.raises(VerificationError, match=r"got an input of torch\.float32, wanted tensor\(int64\)"):
        counts.run(two())


def test_outputs_whose_axes_no_input_has_are_found_by_a_run(tmp_path: Path) -> None:
    session = load(written(tmp_path, ("a", "b", "c", "d")), SimpleNamespace())  # type: ignore[arg-type]
    runs = count_runs(session)
    given = two()
    assert torch.equal(session.run(given), given["x"] + given["y"])
    assert torch.equal(session.run(given), given["x"] + given["y"])
    assert runs == [1, 1, 1]  # one of them to see the shape, once
    assert [tuple(o.shape) for o in session.outputs(two(3, 4))] == [(3, 4, 3)] * 2


def count_runs(session: OnnxRuntimeSession) -> list[int]:
    runs, own = [], session.session
    session.session = SimpleNamespace(
        get_inputs=own.get_inputs,
        get_outputs=own.get_outputs,
        io_binding=own.io_binding,
        run_with_iobinding=lambda binding: (runs.append(1), own.run_with_iobinding(binding)),
    )
    return runs


def test_float16_is_bound_as_it_is(tmp_path: Path) -> None:
    session = load(written(tmp_path, kind=TensorProto.FLOAT16), SimpleNamespace())  # type: ignore[arg-type]
    given = two(dtype=torch.float16)
    got = session.run(given)
    assert got.dtype == torch.float16
    assert torch.equal(got, given["x"] + given["y"])


def test_types_are_those_of_onnx() -> None:
    names = {"tensor(float)": "FLOAT", "tensor(double)": "DOUBLE"}
    for kind, (dtype, number) in back_end.TYPES.items():
        name = names.get(kind, kind.removeprefix("tensor(").removesuffix(")").upper())
        assert TensorProto.DataType.Value(name) == number
        assert str(dtype).removeprefix("torch.") in (kind.removeprefix("tensor(").removesuffix(")"), "float32", "float64")


# -- providers ---------------------------------------------------------------------------------------------------------


def test_the_usual_providers_are_the_best_without_tensorrt() -> None:
    assert chosen_providers(None, HERE) == HERE[1:]
    assert chosen_providers(None, ["AzureExecutionProvider", *HERE[2:]]) == HERE[2:]
    assert chosen_providers(["tensorrt", "cuda", "cuda"], HERE) == HERE[:2]
    assert chosen_providers(["nv_tensorrt_rtx"], ["NvTensorRTRTXExecutionProvider"]) == ["NvTensorRTRTXExecutionProvider"]


def test_a_recipe_knows_the_providers_that_the_back_end_knows() -> None:
    assert get_args(Provider) == tuple(PROVIDERS)


def test_providers_that_are_none_or_not_here_are_refused() -> None:
    with pytest.raises(RecipeError, match="'fpga' is no provider; wanted some of tensorrt, nv_tensorrt_rtx, cuda, cpu"):
        chosen_providers(["cpu", "fpga"], HERE)
    with pytest.raises(RecipeError, match=r"bench\.providers = \[\]"):
        chosen_providers([], HERE)
    with pytest.raises(UnavailableError, match=r"no CUDAExecutionProvider here, it has cpu: pip install 'ppclc\[onnxruntime-gpu\]'"):
        chosen_providers(["cuda"], HERE[2:])


def test_a_provider_is_told_the_device_and_to_keep_float32() -> None:
    assert provider_options("CPUExecutionProvider", False) == {}
    assert provider_options("CUDAExecutionProvider", False) == {"device_id": "0", "use_tf32": "0"}
    assert provider_options("CUDAExecutionProvider", True)["enable_cuda_graph"] == "1"
    assert provider_options("TensorrtExecutionProvider", True) == {"device_id": "0", "trt_cuda_graph_enable": "1"}


class Runtime:
    """`onnxruntime` as a machine with a GPU has it; providers in `broken` do not start, as their libraries lack."""

    def __init__(self, broken: tuple[str, ...] = ()) -> None:
        self.broken, self.given = broken, list[Any]()
        self.SessionOptions = SimpleNamespace

    def get_available_providers(self) -> list[str]:
        return HERE

    def InferenceSession(self, model: Any, settings: Any, providers: list[Any]) -> Any:  # noqa: N802
        self.given.append(providers)
        taken = [name for name, _ in providers if name not in self.broken]
        return SimpleNamespace(get_providers=lambda: [*taken, *([] if HERE[2] in taken else HERE[2:])])


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runtime]:
    def install(*broken: str) -> Runtime:
        made = Runtime(broken)
        monkeypatch.setitem(sys.modules, "onnxruntime", made)
        return made

    return install


def test_options_say_what_was_taken_and_what_it_was_told(runtime: Callable[..., Runtime], tmp_path: Path) -> None:
    made = runtime()
    session = load(written(tmp_path), SimpleNamespace(), cuda_graph=True)  # type: ignore[arg-type]
    told = {"device_id": "0", "use_tf32": "0", "enable_cuda_graph": "1"}
    assert made.given == [[(HERE[1], told), (HERE[2], {})]]
    assert session.options["providers"] == HERE[1:]
    assert session.options["device"] == "cuda"
    assert session.options["provider_options"] == {HERE[1]: told}


def test_a_provider_that_does_not_start_is_told_where_it_was_asked_for(runtime: Callable[..., Runtime], tmp_path: Path) -> None:
    made, folder = runtime(HERE[1]), written(tmp_path)
    subject: Any = SimpleNamespace()
    assert load(folder, subject).options["device"] == "cpu"
    assert [name for name, _ in made.given[-1]] == HERE[2:]
    for more in ({"providers": ["cuda"]}, {"cuda_graph": True}):
        with pytest.raises(
            UnavailableError, match="CUDAExecutionProvider does not start here, CPUExecutionProvider would run in its place"
        ):
            load(folder, subject, **more)  # type: ignore[arg-type]
    with pytest.raises(UnavailableError, match="CPUExecutionProvider has no CUDA graphs"):
        load(folder, subject, ["cpu"], cuda_graph=True)


def test_on_a_gpu_addresses_are_bound_and_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a runtime that only writes down what it is told, since there need be no GPU here: `cuda` is a name for it, and the host for PyTorch."""
    log: list[tuple[Any, ...]] = []
    binding = SimpleNamespace(
        bind_input=lambda *told: log.append(("input", *told)),
        bind_output=lambda *told: log.append(("output", *told)),
        synchronize_outputs=lambda: log.append(("wait",)),
    )
    session = SimpleNamespace(
        get_inputs=lambda: [SimpleNamespace(name="x", type="tensor(bfloat16)", shape=["batch", 4])],
        get_outputs=lambda: [SimpleNamespace(name="y", type="tensor(bfloat16)", shape=["batch", 8])],
        io_binding=lambda: binding,
        run_with_iobinding=lambda given: log.append(("run", given is binding)),
    )

    empty, to = torch.empty, torch.Tensor.to
    monkeypatch.setattr(back_end.torch, "empty", lambda *a, device, **k: empty(*a, device="cpu", **k))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, dtype: to(self, "cpu", dtype))
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: log.append(("stream",)))
    )  # what PyTorch has yet to do comes first
    x = torch.ones(3, 4, dtype=torch.bfloat16)
    call = OnnxRuntimeSession(session, {"device": "cuda"}).bound({"x": x})
    assert log[0] == ("input", "x", "cuda", 0, TensorProto.BFLOAT16, (3, 4), x.data_ptr())
    got = call()
    assert log[1] == ("output", "y", "cuda", 0, TensorProto.BFLOAT16, (3, 8), got.data_ptr())
    assert log[2:] == [("stream",), ("run", True), ("wait",)]
    assert call() is got
    assert len(log) == 8  # bound once
