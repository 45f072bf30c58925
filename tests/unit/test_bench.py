"""Bench: figures from a clock that is known, and a run whose order favours no one."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ppclc import kernels, plugins
from ppclc.backends import Backend
from ppclc.benching import targets as bench_targets
from ppclc.benching.files import markdown, write_bench
from ppclc.benching.graphs import Captured
from ppclc.benching.roofline import Roofline, Work, measured_roofline, work_of
from ppclc.benching.targets import BenchTarget, BoundRun, session_target
from ppclc.benching.timing import by_clock
from ppclc.errors import RecipeError, UnavailableError
from ppclc.families import Family, qwen_image
from ppclc.loading.classes import model_class, random_model
from ppclc.passes import bench
from ppclc.passes.bench import (
    Benched,
    BenchSettings,
    TargetMaker,
    bench_models,
    check_size,
    device_of,
    noise,
    ratio,
    run_bench,
    size_of,
)
from ppclc.recipe import bench_settings
from ppclc.records import Benchmark
from tests.contracts.test_families import subject_of

FAMILY: Family = plugins.load("families", "qwen_image")
SHAPE = {"batch": 1, "image_tokens": 4}


class World:
    """A clock that only targets move, and the order in which they ran."""

    def __init__(self) -> None:
        self.now = 0
        self.calls: list[str] = []

    def target(self, label: str, backend: str, durations: Callable[[int], int]) -> BenchTarget:
        """A target whose n-th call, warm-up included, takes `durations(n)` nanoseconds."""
        calls = [0]

        def run(inputs: dict[str, torch.Tensor]) -> None:
            self.calls.append(f"{label}/{backend}")
            self.now += durations(calls[0])
            calls[0] += 1

        def peak(run_once: Callable[[], None]) -> int:
            run_once()
            return len(label)

        return BenchTarget(label, backend, run, peak)

    def bench(self, targets: list[BenchTarget], runs: int, **more: Any) -> Benchmark:
        return run_bench(targets, {}, SHAPE, runs, "cpu", "float32", watch=by_clock(lambda: self.now), **more)


@pytest.mark.slow
def test_figures_are_those_of_numpy() -> None:
    world, generator = World(), np.random.default_rng(0)
    durations = generator.integers(1_000_000, 90_000_000, 40)
    (row,) = world.bench([world.target("teacher", "eager", lambda n: int(durations[n]))], runs=37, warmup=3).rows
    ms = durations[3:] / 1e6
    assert row.mean_ms == pytest.approx(ms.mean(), rel=1e-12)
    for got, percent in ((row.p50_ms, 50), (row.p90_ms, 90), (row.p99_ms, 99)):
        assert got == pytest.approx(np.percentile(ms, percent), rel=1e-12)
    assert (row.runs, row.warmup, row.device, row.dtype, row.shape) == (37, 3, "cpu", "float32", SHAPE)


@pytest.mark.slow
def test_figures_by_hand() -> None:
    world = World()
    (row,) = world.bench([world.target("teacher", "eager", lambda n: (n + 1) * 1_000_000)], runs=5, warmup=1).rows
    assert (row.mean_ms, row.p50_ms) == (4.0, 4.0)
    assert row.p90_ms == pytest.approx(5.6, rel=1e-12)
    assert row.p99_ms == pytest.approx(5.96, rel=1e-12)


@pytest.mark.slow
def test_one_run_is_all_its_percentiles() -> None:
    world = World()
    (row,) = world.bench([world.target("teacher", "eager", lambda n: 7_000_000)], runs=1).rows
    assert row.mean_ms == row.p50_ms == row.p90_ms == row.p99_ms == 7.0


@pytest.mark.slow
def test_speedup_is_against_the_teacher_in_the_same_back_end() -> None:
    world = World()
    times = {("teacher", "eager"): 8, ("student", "eager"): 4, ("teacher", "onnx"): 6, ("student", "onnx"): 2, ("out/a", "trt"): 1}
    targets = [world.target(label, backend, lambda n, ms=ms: ms * 1_000_000) for (label, backend), ms in times.items()]  # type: ignore[misc]
    rows = world.bench(targets, runs=3).rows
    assert [(r.target, r.backend) for r in rows] == list(times)
    assert [r.speedup for r in rows] == [1.0, 2.0, 1.0, 3.0, None]
    assert [r.peak_bytes for r in rows] == [7, 7, 7, 7, 5]


@pytest.mark.slow
def test_every_round_runs_each_target_once_in_changing_order() -> None:
    world = World()
    targets = [world.target(label, "eager", lambda n: 1) for label in "abc"]
    world.bench(targets, runs=30, warmup=2)
    warm, timed = world.calls[:6], world.calls[6:]
    assert warm == ["a/eager"] * 2 + ["b/eager"] * 2 + ["c/eager"] * 2
    rounds = [tuple(timed[i : i + 3]) for i in range(0, 90, 3)]
    assert all(sorted(r) == ["a/eager", "b/eager", "c/eager"] for r in rounds)
    assert len(set(rounds)) == 6


@pytest.mark.slow
def test_the_order_is_that_of_the_seed() -> None:
    orders = []
    for seed in (0, 0, 1):
        world = World()
        world.bench([world.target(label, "eager", lambda n: 1) for label in "abcd"], runs=5, seed=seed)
        orders.append(world.calls)
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_no_garbage_is_collected_while_timing(before: bool) -> None:
    seen: list[bool] = []
    target = BenchTarget("teacher", "eager", lambda inputs: seen.append(gc.isenabled()), lambda run: 0)
    was = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        run_bench([target], {}, SHAPE, 4, "cpu", "float32")
        assert seen == [False] * 4
        assert gc.isenabled() is before
    finally:
        (gc.enable if was else gc.disable)()


@pytest.mark.slow
def test_a_target_that_fails_leaves_the_collector_on() -> None:
    def fail(inputs: dict[str, torch.Tensor]) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run_bench([BenchTarget("teacher", "eager", fail, lambda run: 0)], {}, SHAPE, 1, "cpu", "float32")
    assert gc.isenabled()


@pytest.mark.parametrize(("runs", "warmup", "name"), [(0, 3, "runs"), (5, 0, "warmup")])
def test_counts_below_one_are_refused(runs: int, warmup: int, name: str) -> None:
    with pytest.raises(RecipeError, match=rf"bench\.{name} = 0: wanted a whole number above 0"):
        World().bench([], runs, warmup=warmup)


@pytest.mark.slow
def test_progress_counts_rounds() -> None:
    world, seen = World(), []
    world.bench([world.target("teacher", "eager", lambda n: 1)], runs=4, progress=lambda done, what: seen.append(done))
    assert seen == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.slow
def test_eager_targets_on_the_real_clock() -> None:
    torch.manual_seed(0)
    models = []
    for layers in (3, 1):
        config = {**FAMILY.tiny_config, "num_layers": layers}
        models.append(model_class(FAMILY, config).from_config(config).eval())
    lowered = [FAMILY.lowered(model) for model in models]
    inputs = lowered[0].inputs(**lowered[0].sizes[0])
    targets = [session_target(label, "eager", Path(), one, "cpu", None) for label, one in zip(("teacher", "student"), lowered, strict=True)]
    assert not targets[0].run(inputs).requires_grad
    teacher, student = run_bench(targets, inputs, dict(lowered[0].sizes[0]), 15, "cpu", "float32").rows
    assert 0 < student.p50_ms < teacher.p50_ms <= teacher.p90_ms <= teacher.p99_ms
    assert student.speedup == teacher.p50_ms / student.p50_ms
    assert min(teacher.peak_bytes, student.peak_bytes) > 50_000_000


# -- what a row says beside its percentiles ----------------------------------------------------------------------------


def test_the_ratio_s_interval_is_over_rounds() -> None:
    """Paired: rounds that are slow for both leave the ratio as it is."""
    generator = np.random.default_rng(0)
    weather = generator.uniform(1, 1.05, 200)
    teacher, student = 10 * weather, 5 * weather * generator.normal(1, 0.001, 200)
    value, interval = ratio(teacher, student)
    assert value is not None
    assert interval is not None
    assert value == np.median(teacher) / np.median(student)
    assert 1.97 < interval[0] < value < interval[1] < 2.03
    assert ratio(teacher, teacher) == (1.0, (1.0, 1.0))
    assert ratio(teacher, np.zeros(200)) == (None, None)


def test_a_noisy_run_says_so() -> None:
    calm = np.full(40, 5.0)
    assert noise(calm) == ""
    uneven = calm.copy()
    uneven[::8] = 9
    assert noise(uneven) == "one call in ten took 80 % longer than the median"
    assert noise(np.concatenate([calm[:20], 1.2 * calm[20:]])) == "its second half took 20 % longer than the first"
    assert noise(np.concatenate([calm[:20], 0.8 * calm[20:]])) == "its second half took 20 % less than the first"


@pytest.mark.slow
def test_warming_up_ends_when_calls_are_steady() -> None:
    world = World()
    slow_start = [90, 60, 40, 30, 20, 12, 10]
    (row,) = world.bench([world.target("teacher", "eager", lambda n: 1_000_000 * (slow_start[n] if n < 7 else 10))], runs=5).rows
    assert row.warmup == 11  # medians of calls 6 to 8 and 9 to 11 are equal
    assert row.p50_ms == row.p99_ms == 10
    world = World()
    (row,) = world.bench([world.target("teacher", "eager", lambda n: 2**n * 1_000_000)], runs=2, warmup=None).rows
    assert row.warmup < 20  # one that never is ends after its time


@pytest.mark.slow
def test_a_loop_is_timed_as_a_whole() -> None:
    world = World()
    targets = [world.target("teacher", "eager", lambda n: 4_000_000), world.target("student", "eager", lambda n: 10_000_000_000)]
    result = world.bench(targets, runs=2, warmup=1, steps=5, calls_a_step=2)
    assert [row.end_to_end_ms for row in result.rows] == [40.0, None]  # 100 s would be too long
    assert (result.steps, result.calls_a_step) == (5, 2)
    assert world.calls.count("teacher/eager") == 1 + 2 + 3 * 10


@pytest.mark.slow
def test_the_floor_is_arithmetic_or_weights() -> None:
    best = Roofline("cpu", "float32", 1, bytes_per_s=1e9, flops_per_s=1e12)
    assert best.floor_s(Work(flops=10**10, bytes=10**6, parameters=1)) == pytest.approx(0.01)
    assert best.floor_s(Work(flops=10**6, bytes=10**9, parameters=1)) == pytest.approx(1)
    world = World()
    target = dataclasses.replace(world.target("teacher", "eager", lambda n: 40_000_000), work=Work(10**10, 10**6, 7))
    (row,) = world.bench([target], runs=2, warmup=1, roofline=best).rows
    assert (row.floor_ms, row.floor_share, row.parameters, row.flops) == (10.0, 0.25, 7, 10**10)
    assert row.samples_per_s == 25


@pytest.mark.slow
@pytest.mark.parametrize("name", plugins.names("families"))
def test_operations_are_counted_without_computing(name: str) -> None:
    """Twice the batch twice the work but for no token; a longer text more; all of it at a size that no memory here would hold."""
    subject = subject_of(name)
    lowered = subject.family.lowered(subject.model)

    def flops(**size: int) -> int:
        inputs = lowered.inputs(**{"batch": 1, "height": 4, "width": 4, "text": 6, **size})
        return work_of(subject.family, subject.config, inputs, torch.float32).flops

    once = flops()
    assert flops(batch=2) == 2 * once
    assert flops(text=12) > once
    work = work_of(subject.family, subject.config, lowered.inputs(batch=1, height=4, width=4, text=6), torch.float32)
    assert work.parameters == sum(p.numel() for p in subject.model.parameters())
    assert work.bytes == 4 * work.parameters


@pytest.mark.slow
def test_operations_of_a_published_model_are_those_of_the_literature() -> None:
    """141 TFLOP for a call of Qwen-Image at 1328 x 1328 with 512 text tokens: counted by hand from widths and lengths."""
    config = {"_class_name": "QwenImageTransformer2DModel", "num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24}
    config |= {"joint_attention_dim": 3584, "in_channels": 64, "out_channels": 16, "axes_dims_rope": (16, 56, 56), "patch_size": 2}
    tokens, width = 83 * 83 + 512, 3072
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    inputs = {
        "hidden_states": torch.empty(1, 83 * 83, 64, **meta),  # type: ignore[call-overload]
        "encoder_hidden_states": torch.empty(1, 512, 3584, **meta),  # type: ignore[call-overload]
        "timestep": torch.empty(1, device="meta"),
        "img_ids": torch.empty(83 * 83, 3, device="meta"),
        "txt_ids": torch.empty(512, 3, device="meta"),
    }
    work = work_of(FAMILY, config, inputs, torch.bfloat16)
    by_hand = 60 * (24 * tokens * width**2 + 4 * tokens**2 * width)  # projections and networks, then attention
    assert work.parameters == 20_430_401_088
    assert work.flops == pytest.approx(by_hand, rel=5e-3)
    assert work.flops == pytest.approx(141.0e12, rel=1e-2)


@pytest.mark.slow
def test_the_roofline_of_this_machine_is_plausible() -> None:
    best = measured_roofline("cpu", torch.float32, torch.get_num_threads())
    assert 1e8 < best.bytes_per_s < 1e12
    assert 1e9 < best.flops_per_s < 1e14


@pytest.mark.slow
def test_a_result_is_written_as_json_markdown_and_a_picture(tmp_path: Path) -> None:
    world = World()
    targets = [
        dataclasses.replace(world.target(label, "eager", lambda n, ms=ms: ms * 1_000_000), work=Work(10**9, 10**6, size))
        for label, ms, size in (("teacher", 8, 4_000_000), ("student", 4, 2_000_000))
    ]
    result = world.bench(targets, runs=4, steps=3, roofline=Roofline("cpu", "float32", 1, 1e9, 1e12))
    result = result.model_copy(update={"roofline": {"copy_bytes_per_s": 1e9, "matrix_flops_per_s": 1e12}})
    files = write_bench(result, {"cores": 2, "torch": "2.13"}, tmp_path)
    assert [f.name for f in files] == ["bench.json", "bench.md", "bench.png"]
    document = json.loads(files[0].read_text("utf-8"))
    assert [r["p50_ms"] for r in document["rows"]] == [8, 4]
    assert document["machine"] == {"cores": 2, "torch": "2.13"}
    text = files[1].read_text("utf-8")
    assert "| student | eager | cpu | float32 | 4.00 | 4.00 | 4.00 | 2.00 (2.00 to 2.00) | 250 | 25 % | " in text
    assert "3 steps of 1 call each: teacher in eager 24 ms, student in eager 12 ms." in text
    assert "cores 2; torch 2.13." in text
    assert files[2].stat().st_size > 5_000


def test_attention_is_pinned_while_a_model_runs() -> None:
    seen: list[bool] = []

    def reference(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled())
        return torch.zeros(1)

    lowered = dataclasses.replace(FAMILY.lowered(subject_of("qwen_image", num_layers=1).model), reference=reference)
    target = session_target("teacher", "eager", Path(), lowered, "cpu", "math")
    target.run({})
    assert seen == [False]
    assert target.sdpa == "math"
    assert session_target("teacher", "eager", Path(), lowered, "cpu", None).sdpa == "PyTorch's choice on cpu"


# -- where, how, and what is left out -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_row_says_its_clock_and_a_graph_is_compared_with_the_teacher_s() -> None:
    world, ms = World(), {("teacher", False): 8, ("student", False): 4, ("teacher", True): 6, ("student", True): 2}
    targets = [
        dataclasses.replace(world.target(label, "eager", lambda n, t=t: t * 1_000_000), cuda_graph=graph, session={"threads": 1})  # type: ignore[misc]
        for (label, graph), t in ms.items()
    ]
    result = world.bench(targets, runs=3, steps=1)
    assert [row.speedup for row in result.rows] == [1.0, 2.0, 1.0, 3.0]
    assert [row.place for row in result.rows] == ["eager"] * 2 + ["eager, CUDA graph"] * 2
    assert {(row.clock, row.session["threads"]) for row in result.rows} == {("perf_counter_ns", 1)}
    result = result.model_copy(update={"gpu": {"before": "clocks.sm 1980 MHz", "after": "not told"}, "notes": ["x was not timed: y"]})
    text = markdown(result, {})
    assert "| student | eager, CUDA graph | cpu | float32 | 2.00 |" in text
    assert "student in eager, CUDA graph 2 ms." in text
    for line in ("Timed by perf_counter_ns.", "The GPU before: clocks.sm 1980 MHz.", "The GPU after: not told.", "x was not timed: y."):
        assert f"\n{line}\n" in text


def benched(label: str, layers: int, **config: Any) -> Benched:
    subject = subject_of("qwen_image", num_layers=layers, **config)
    return Benched(label, subject.config, subject.model, FAMILY.lowered(subject.model))


def timed(subjects: list[Benched], **settings: Any) -> tuple[Benchmark, list[str]]:
    return bench_models(FAMILY, subjects, BenchSettings(runs=2, steps=1, device="cpu", **settings), "float32", lambda *_: None)


@pytest.mark.slow
def test_models_are_timed_at_a_size_that_is_asked_for() -> None:
    result, notes = timed([benched("teacher", 2), benched("student", 1)], size={"height": 2, "width": 6, "text": 3}, batch=2)
    assert [row.shape for row in result.rows] == [{"batch": 2, "height": 2, "width": 6, "text": 3}] * 2
    assert [(row.target, row.backend, row.cuda_graph) for row in result.rows] == [("teacher", "eager", False), ("student", "eager", False)]
    assert (result.gpu, result.notes) == ({}, notes)
    assert "torch.compile was not timed" in notes[0]
    assert all(row.session == {"threads": torch.get_num_threads(), "kernels": "torch"} for row in result.rows)


def test_on_a_gpu_a_call_is_as_large_as_published_models_are_used() -> None:
    lowered = benched("teacher", 1).lowered
    assert size_of(BenchSettings(), lowered, "cuda") == {"batch": 1, "height": 64, "width": 64, "text": 512}
    assert size_of(BenchSettings(), lowered, "cpu") == {**lowered.sizes[0], "batch": 1}


def test_settings_that_this_machine_cannot_follow_are_refused() -> None:
    subjects = [benched("teacher", 1)]
    with pytest.raises(RecipeError, match=r"bench\.size = \{'height': 4\}: wanted height, text, width"):
        timed(subjects, size={"height": 4})
    with pytest.raises(RecipeError, match=r"bench\.cuda_graphs = True: a CPU has none"):
        timed(subjects, cuda_graphs=True)
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="there is no CUDA device here"):
            device_of(BenchSettings(device="cuda"))


def test_a_size_beyond_the_model_s_positions_is_refused_before_anything_runs(family: Family, teacher: Any) -> None:
    config = {**teacher.config, "_class_name": family.class_name}
    check_size(BenchSettings(size={"height": 4, "width": 60, "text": 8}), family, config)
    with pytest.raises(RecipeError, match=r"bench\.size = .*: the model does not take it"):
        check_size(BenchSettings(size={"height": 4, "width": 100_000, "text": 8}), family, config)


class Fake:
    """A back end whose sessions say where they run, and may fail."""

    def __init__(self, fails: str = "", device: str = "cpu", graphs: str = "") -> None:
        self.fails, self.options, self.loaded = fails, {"device": device}, list[dict[str, Any]]()
        self.plugin = Backend("fake", self.load, artefact="onnx", run_options={"providers": None, "cuda_graph": False}, graphs=graphs)  # type: ignore[arg-type]

    def load(self, folder: Path, subject: Any, **options: Any) -> Any:
        self.loaded.append(options)
        return self

    def bound(self, inputs: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
        if self.fails:
            raise ValueError(f"{self.fails}\nand much more")
        return lambda: torch.zeros(1)


def made_by(fake: Fake, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> TargetMaker:
    monkeypatch.setattr(bench.plugins, "load", lambda kind, name: fake.plugin)
    maker = TargetMaker({"x": torch.zeros(1)}, BenchSettings(**settings), "cpu")
    maker.add(Benched("teacher", {}, None, None), "fake", Path("out/x"), Work(1, 1, 1))  # type: ignore[arg-type]
    return maker


def test_what_does_not_run_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    maker = made_by(Fake("no profile takes that"), monkeypatch)
    assert (maker.targets, maker.notes) == ([], ["out/x was not timed: no profile takes that"])
    maker = made_by(Fake(device="cuda"), monkeypatch)
    assert maker.notes == ["out/x was not timed: fake runs it on cuda, wanted cpu as everything that it is timed beside"]
    with pytest.raises(ValueError, match="and much more"):
        made_by(Fake("asked for"), monkeypatch, providers=["cpu"])


def test_providers_reach_the_back_end_and_its_own_graphs_are_a_target_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    assert len(made_by(fake, monkeypatch).targets) == 1
    made_by(fake, monkeypatch, providers=["cuda", "cpu"])
    assert fake.loaded == [{"providers": ["cpu"]}, {"providers": ["cuda", "cpu"]}]
    fake = Fake(graphs="own")
    maker = made_by(fake, monkeypatch, cuda_graphs=True)
    assert [(t.cuda_graph, t.session) for t in maker.targets] == [(False, {"device": "cpu"}), (True, {"device": "cpu"})]
    assert fake.loaded[1] == {"providers": ["cpu"], "cuda_graph": True}


def test_a_graph_that_cannot_be_captured_leaves_the_plain_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(bind: Any, inputs: Any) -> Any:
        raise UnavailableError("cannot be captured as a CUDA graph: it waits")

    monkeypatch.setattr(bench_targets, "captured", refuse)
    maker = made_by(Fake(graphs="captured"), monkeypatch, cuda_graphs=True)
    assert [t.cuda_graph for t in maker.targets] == [False]
    assert maker.notes == ["out/x as a CUDA graph was not timed: cannot be captured as a CUDA graph: it waits"]


def test_a_replay_s_memory_is_that_of_its_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench_targets, "captured", lambda bind, inputs: Captured(SimpleNamespace(replay=lambda: None), inputs, bind(inputs)(), 900)
    )
    monkeypatch.setattr(bench_targets, "peak_on_device", lambda run: run() or 100)
    monkeypatch.setattr(bench_targets, "held_by_others", lambda: 50)
    maker = made_by(Fake(graphs="captured"), monkeypatch, cuda_graphs=True)
    plain, graph = maker.targets
    assert graph.peak(lambda: None) == 950
    assert torch.equal(graph.run(maker.inputs), plain.run(maker.inputs))


def test_inputs_are_bound_once() -> None:
    bound: list[Any] = []
    run = BoundRun(lambda inputs: bound.append(inputs) or (lambda: len(bound)))  # type: ignore[func-returns-value]
    one: dict[str, torch.Tensor] = {}
    other: dict[str, torch.Tensor] = {}
    assert [run(one), run(one), run(other), run(other)] == [1, 1, 2, 2]


def test_a_pair_with_random_weights_takes_the_memory_of_its_teacher() -> None:
    """A student by depth has no tensor of its own; every storage is as long as what is in it."""
    pool: Any = {}
    pair = [random_model(FAMILY, {**FAMILY.tiny_config, "num_layers": n}, "bfloat16", pool, "cpu") for n in (4, 2)]
    storages = [{t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()} for model in pair]
    assert sum({**storages[0], **storages[1]}.values()) == sum(storages[0].values()) == 2 * sum(p.numel() for p in pair[0].parameters())
    assert storages[1].keys() < storages[0].keys()
    lowered = [FAMILY.lowered(model) for model in pair]  # what is exported or compiled shares them too
    assert {p.untyped_storage().data_ptr() for one in lowered for p in one.module.parameters()} == storages[0].keys()
    assert {p.dtype for model in pair for p in model.parameters()} == {torch.bfloat16}


def test_random_weights_are_made_where_they_are_wanted() -> None:
    pool: Any = {}
    model = random_model(FAMILY, FAMILY.tiny_config, "bfloat16", pool, "meta")
    assert {t.device.type for t in [*pool.values(), *model.parameters(), *model.buffers()]} == {"meta"}
    assert {t.dtype for t in pool.values()} == {torch.bfloat16}


def test_positions_on_a_device_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    own = qwen_image.images_of
    monkeypatch.setattr(qwen_image, "images_of", lambda ids: seen.append(1) or own(ids))  # type: ignore[func-returns-value]
    lowered = benched("teacher", 1).lowered
    inputs = lowered.inputs(batch=1, height=4, width=6, text=3)
    with torch.no_grad():
        first, again = lowered.reference(inputs), lowered.reference(inputs)
        assert (len(seen), torch.equal(first, again)) == (1, True)
        inputs["img_ids"].copy_(lowered.inputs(batch=1, height=6, width=4, text=3)["img_ids"])
        other = lowered.reference(inputs)
    assert len(seen) == 2
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("bench.size={height: 0, width: 2, text: 1}", r"bench\.size\.height = 0"),
        ("bench.runs=1", r"bench\.runs = 1"),
        ("bench.sdpa=fast", r"bench\.sdpa = 'fast': wanted 'flash', 'efficient', 'cudnn' or 'math'"),
        ("bench.speed=1", r"bench\.speed = 1: unknown key"),
        ("verify.scenes=3", "--set verify: wanted a key of section bench"),
    ],
)
def test_settings_that_are_none_are_refused(change: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        bench_settings([change])
    assert bench_settings(["bench.runs=7", "bench.sdpa=math"]) == BenchSettings(runs=7, sdpa="math")


@pytest.mark.slow
def test_kernels_are_switched_for_the_bench_alone_and_refused_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = subject_of("qwen_image").model
    one = Benched("teacher", dict(model.config), model, FAMILY.lowered(model))
    seen: list[str] = []
    monkeypatch.setattr(bench, "run_bench", lambda *args, **kwargs: seen.append(kernels.chosen()) or Benchmark(rows=[]))
    for wanted in (None, "torch"):
        bench_models(FAMILY, [one], BenchSettings(runs=2, device="cpu", kernels=wanted), "float32", lambda *_: None)
    assert seen == ["auto", "torch"]
    assert kernels.chosen() == "auto"
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match=r"kernels = 'triton': .*wanted auto or torch here"):
            bench_models(FAMILY, [one], BenchSettings(runs=2, kernels="triton"), "float32", lambda *_: None)
