"""What bench and back ends do on a GPU: right results where tensors lie there, CUDA graphs that equal their calls bit for bit, events as the clock."""

from __future__ import annotations

import copy
import gc
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from ppclc import plugins
from ppclc.backends import aotinductor
from ppclc.benching.graphs import captured
from ppclc.benching.roofline import measured_roofline
from ppclc.benching.targets import own_stream
from ppclc.benching.timing import by_cuda_events, stopwatch
from ppclc.costs.blocks import example_call, measure
from ppclc.environment import accelerator
from ppclc.errors import UnavailableError, VerificationError
from ppclc.families import Lowered
from ppclc.loading.classes import DTYPES, random_model, student_config
from ppclc.lowering import parity
from ppclc.passes.bench import Benched, BenchSettings, bench_models
from ppclc.passes.export import export_model
from ppclc.plan import CompressionPlan
from ppclc.records import Export
from tests.contracts.test_families import subject_of

# What libraries warn of on a GPU is theirs, and not what is tested here.
pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"), pytest.mark.filterwarnings("ignore")]

SMALL = {"qwen_image": {"num_layers": 1}, "flux": {"num_layers": 1, "num_single_layers": 1}}
SIZE = {"batch": 2, "height": 4, "width": 8, "text": 16}
LIMITS = {"float32": 1e-3, "bfloat16": 2e-2}
"""Relative L2 between implementations: a GPU's exponential, times a thousand, is another phase of the time embedding than the host's."""


def lowered_on(name: str, dtype: str, device: str) -> Lowered:
    subject = subject_of(name, **SMALL[name])
    subject.model.to(device, DTYPES[dtype])
    lowered: Lowered = subject.family.lowered(subject.model)
    lowered.module.to(device)
    return lowered


def inputs_of(lowered: Lowered, device: str, **size: int) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in lowered.inputs(**{**SIZE, **size}).items()}


def doubled(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: 2 * t if n in ("hidden_states", "encoder_hidden_states") else t.clone() for n, t in inputs.items()}


def test_events_measure_what_the_device_does() -> None:
    def work() -> None:
        torch.cuda._sleep(20_000_000)

    watch = by_cuda_events()
    watch.ns(work)
    for _ in range(3):
        by_events = watch.ns(work)
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        work()
        torch.cuda.synchronize()
        by_host = time.perf_counter_ns() - start
        if abs(by_events - by_host) < 0.1 * by_host:
            break
    assert by_events == pytest.approx(by_host, rel=0.1)
    assert by_events > 2_000_000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SMALL)
def test_eager_gives_there_what_it_gives_here_and_its_graph_the_same_bit_for_bit(name: str, dtype: str) -> None:
    here, there = (lowered_on(name, dtype, device) for device in ("cpu", "cuda"))
    session = plugins.load("backends", "eager").load(Path(), there)
    inputs = inputs_of(there, "cuda")
    with torch.no_grad():
        wanted = here.reference(inputs_of(here, "cpu"))
    with own_stream("cuda"):
        got = session.run(inputs)
        graph = captured(session.bound, inputs)
        assert torch.equal(graph(), got)
        others = doubled(inputs)
        graph.put(others)
        again = graph().clone()
        assert torch.equal(again, session.run(others))
        assert not torch.equal(again, got)
    assert got.device.type == "cuda"
    assert parity(wanted, got).rel_l2 <= LIMITS[dtype]
    assert graph.peak_bytes > sum(p.numel() * p.element_size() for p in there.module.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_compiled_blocks_give_what_eager_gives_and_their_graph_the_same_bit_for_bit(name: str) -> None:
    lowered = lowered_on(name, "bfloat16", "cuda")
    inputs = inputs_of(lowered, "cuda")
    with torch.no_grad():
        wanted = lowered.reference(inputs)
    session = plugins.load("backends", "compile").load(Path(), lowered)
    with own_stream("cuda"):
        got = session.run(inputs)
        graph = captured(session.bound, inputs)
        assert torch.equal(graph(), got)
    torch.cuda.synchronize()
    assert parity(wanted, got).rel_l2 <= LIMITS["bfloat16"]


def test_what_waits_for_the_device_is_no_graph_and_harms_none() -> None:
    def waits(given: dict[str, torch.Tensor]) -> Any:
        return lambda: given["x"] * float(given["x"].sum())

    x = torch.ones(4, device="cuda")
    with own_stream("cuda"):
        with pytest.raises(UnavailableError, match=r"cannot be captured as a CUDA graph: .*synchronizing"):
            captured(waits, {"x": x})
        graph = captured(lambda given: lambda: given["x"] * 3, {"x": x})
        assert torch.equal(graph(), 3 * x)
    assert torch.cuda.get_sync_debug_mode() == 0


def test_random_weights_are_made_on_the_gpu_and_shared() -> None:
    family = plugins.load("families", "qwen_image")
    config = {**family.tiny_config, "num_attention_heads": 32, "axes_dims_rope": (4, 6, 6)}
    pool: Any = {}
    gc.collect()  # what earlier tests left
    before = torch.cuda.memory_allocated()
    teacher = random_model(family, {**config, "num_layers": 4}, "bfloat16", pool, "cuda")
    size = sum(p.numel() * p.element_size() for p in teacher.parameters())
    taken = torch.cuda.memory_allocated() - before
    assert size <= taken < 1.1 * size + 2**23  # the allocator rounds up
    student = random_model(family, {**config, "num_layers": 2}, "bfloat16", pool, "cuda")
    assert torch.cuda.memory_allocated() - before - taken < 2**20
    assert {t.device.type for model in (teacher, student) for t in [*model.parameters(), *model.buffers()]} == {"cuda"}


def test_the_roofline_is_that_of_a_gpu() -> None:
    best = measured_roofline("cuda", torch.bfloat16, 1)
    assert 1e11 < best.bytes_per_s < 2e13
    assert 1e12 < best.flops_per_s < 1e16


def test_the_gpu_tells_its_state() -> None:
    told = accelerator()
    assert "compute capability" in told["gpu"]
    assert told["clocks_and_temperature"] == "not told" or "clocks.sm" in told["clocks_and_temperature"]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path, Export]]:
    """A package by dtype, with its model on the host. Skips, with the reason, where nothing here compiles for a GPU."""
    if reason := aotinductor.lacks():
        pytest.skip(reason)
    found = {}
    for dtype in LIMITS:
        subject, folder = subject_of("qwen_image", **SMALL["qwen_image"]), tmp_path_factory.mktemp("package") / dtype
        subject.model.to(DTYPES[dtype])
        try:
            found[dtype] = (subject, folder, export_model(subject.model, subject.family, "aotinductor", dtype, folder, "digest"))
        except VerificationError as error:
            if any(lacking in str(error) for lacking in ("cuda.h", "cuda_runtime", "-lcuda", "CUDA_HOME", "nvcc")):
                pytest.skip(f"no CUDA headers or libraries to compile with: {error}")
            raise
    return found


@pytest.mark.parametrize("dtype", LIMITS)
def test_a_package_is_compiled_for_the_gpu_and_leaves_the_model_where_it_was(packages: Any, dtype: str) -> None:
    subject, folder, export = packages[dtype]
    assert export.options["device"] == export.options["session"]["device"] == "cuda"
    assert export.parity.rel_l2 <= LIMITS[dtype]
    assert {t.device.type for t in [*subject.model.parameters(), *subject.model.buffers()]} == {"cpu"}
    lowered = subject.family.lowered(subject.model)
    session = plugins.load("backends", "aotinductor").load(folder, lowered)
    inputs = inputs_of(lowered, "cpu", height=6, text=9)
    with torch.no_grad():
        wanted = lowered.reference(inputs)
    for device in ("cpu", "cuda"):  # inputs are brought where they are wanted
        got = session.bound({name: tensor.to(device) for name, tensor in inputs.items()})()
        assert got.device.type == "cuda"
        assert parity(wanted, got).rel_l2 <= LIMITS[dtype]


def benched(label: str, layers: int, exports: tuple[Path, ...] = ()) -> Benched:
    subject = subject_of("qwen_image", num_layers=layers)
    subject.model.to(torch.bfloat16)
    return Benched(label, subject.config, subject.model, subject.family.lowered(subject.model), exports)


def test_models_are_timed_from_end_to_end(packages: Any) -> None:
    _, folder, _ = packages["bfloat16"]
    pair = [benched("teacher", 3), benched("student", 1, (folder,))]
    size = {"height": 4, "width": 8, "text": 16}
    settings = BenchSettings(runs=10, steps=2, size=size, batch=2)
    result, notes = bench_models(plugins.load("families", "qwen_image"), pair, settings, "bfloat16", lambda *_: None)
    assert notes == result.notes == []
    both = [(backend, graph) for backend in ("eager", "compile") for graph in (False, True)]
    wanted = [(label, *place) for label in ("teacher", "student") for place in both] + [("student", "aotinductor", False)]
    assert [(row.target, row.backend, row.cuda_graph) for row in result.rows] == wanted
    rows = {(row.target, row.backend, row.cuda_graph): row for row in result.rows}
    for row in result.rows:
        assert (row.clock, row.device, row.dtype, row.shape) == ("cuda events", "cuda", "bfloat16", {**size, "batch": 2})
        assert 0 < row.p50_ms <= row.p90_ms
        assert row.end_to_end_ms is not None
        assert row.peak_bytes > 10_000_000
        assert (row.speedup is None) == (row.backend == "aotinductor")
        assert row.sdpa == ("" if row.backend == "aotinductor" else "PyTorch's choice on cuda")
    # A tiny model is bound by launches, of which a replay has one.
    assert rows["teacher", "eager", True].p50_ms < 0.8 * rows["teacher", "eager", False].p50_ms
    assert rows["student", "eager", False].speedup > 1.2
    assert set(result.gpu) == {"before", "after"}
    assert result.roofline["matrix_flops_per_s"] > 1e12


def test_onnx_runtime_runs_on_the_gpu_or_is_left_out(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    subject = subject_of("qwen_image", num_layers=1)
    model = copy.deepcopy(subject.model)
    export = export_model(model, subject.family, "onnxruntime", "float32", tmp_path / "x", "digest")
    assert export.parity is not None
    assert export.parity.max_abs <= 1e-4
    one = Benched("student", subject.config, None, subject.family.lowered(model), (tmp_path / "x",))
    settings = BenchSettings(runs=4, steps=1, size={"height": 4, "width": 8, "text": 16})
    bench = partial(bench_models, subject.family, [one], settings, "float32", lambda *_: None)
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        with pytest.raises(UnavailableError, match="x was not timed: onnxruntime runs it on cpu, wanted cuda as everything"):
            bench()
        return
    result, _ = bench()
    assert result.rows[0].session["device"] == "cuda"
    session = plugins.load("backends", "onnxruntime").load(tmp_path / "x", one.lowered, providers=["cuda", "cpu"])
    inputs = one.lowered.inputs(**SIZE)
    given = {name: tensor.cuda() for name, tensor in inputs.items()}
    with torch.no_grad():
        wanted = one.lowered.reference(inputs)
    call = session.bound(given)
    got = call()
    assert got.device.type == "cuda"
    assert parity(wanted, got).rel_l2 <= LIMITS["float32"]
    assert call().data_ptr() == got.data_ptr()


def test_block_costs_on_the_gpu_add_up_to_what_is_measured() -> None:
    """Within a third, of a plan with fewer blocks; in milliseconds of the device, of which a model this small takes most to be launched."""
    subject = subject_of("qwen_image", num_layers=6, attention_head_dim=64, num_attention_heads=12, axes_dims_rope=(16, 24, 24))
    family, config = subject.family, subject.config
    size = {"batch": 1, "height": 32, "width": 32, "text": 64}
    costs = measure(family, config, "bfloat16", "cuda", size, runs=20)
    assert costs.key["device"] == "cuda"
    plan = CompressionPlan.of(family.name, 6, [(1, 2), (3, 4)])
    ms = {}
    for label, cut in (("teacher", CompressionPlan.of(family.name, 6)), ("student", plan)):
        model = random_model(family, student_config(family, config, cut), "bfloat16", device="cuda")
        call = example_call(model, family, config, size)
        watch = stopwatch("cuda")
        ms[label] = sorted(watch.ns(call) for _ in range(30))[15] / 1e6
        assert costs.latency_ms(cut, config) == pytest.approx(ms[label], rel=0.35)
    assert ms["student"] < ms["teacher"]


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed: pip install 'ppclc[tensorrt-rtx]'")
def test_an_engine_runs_as_eager_does_or_says_why_not(tmp_path: Path) -> None:
    subject = subject_of("qwen_image", num_layers=1)
    subject.model.to(torch.bfloat16)
    sizes = [{"batch": 1, "height": 4, "width": 8, "text": 16}, {"batch": 2, "height": 4, "width": 8, "text": 16}]
    options = {"sizes": sizes, "library": "tensorrt_rtx"}
    try:
        export = export_model(subject.model, subject.family, "tensorrt", "bfloat16", tmp_path / "x", "digest", options=options)
    except (VerificationError, UnavailableError) as error:
        if "differs from eager" in str(error):
            raise
        pytest.skip(f"TensorRT-RTX refuses this GPU: {error}")
    assert export.parity is not None
    assert export.parity.rel_l2 <= 2e-2
    lowered = subject.family.lowered(subject.model)
    session = plugins.load("backends", "tensorrt").load(tmp_path / "x", lowered)
    one, other = (inputs_of(lowered, "cuda", **size) for size in sizes)
    with own_stream("cuda"):
        call = session.bound(one)
        first = call().clone()
        beside = session.bound(other)  # by another profile, and back
        assert beside().shape[0] == 2
        assert torch.equal(call(), first)
        try:
            graph = captured(session.bound, one)
        except UnavailableError as error:
            pytest.skip(f"it runs, and has no CUDA graph: {error}")
        assert torch.equal(graph(), first)
