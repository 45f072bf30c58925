"""bench: latency and memory of several targets in one interleaved run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from ppclc import kernels, plugins
from ppclc.artefacts.receipts import read_export, runner, runner_of
from ppclc.backends import Backend, Tensors
from ppclc.benching.roofline import Roofline, Work, measured_roofline, work_of
from ppclc.benching.targets import EAGER, BenchTarget, Provider, Sdpa, graph_target, is_eager, own_stream, session_target
from ppclc.benching.timing import Call, Stopwatch, interleaved, stopwatch
from ppclc.costs.predictions import activation_bytes
from ppclc.errors import PpclcError, RecipeError, UnavailableError, first_line, memory_lacks
from ppclc.families import Family, Lowered
from ppclc.kernels import Kernels
from ppclc.loading.classes import model_outline
from ppclc.machine.devices import device_here, give_back
from ppclc.machine.gpu_state import gpu_state
from ppclc.records import Benchmark, BenchRow, Export

VERSION = 3
TEACHER = "teacher"
RESAMPLES = 2000
UNEVEN = 0.25
"""A run is noisy when p90 lies further than this share above p50, or `DRIFT` between the medians of its halves."""
DRIFT = 0.1
STEADY = 0.05
"""Warming up ends when the medians of the last two runs of three calls differ by no more than this share."""
LONGEST_LOOP_S = 60.0
LOOPS = 3
Progress = Callable[[float, str], None]


class BenchSettings(BaseModel):
    """Section `bench`.

    runs: timed calls a target. batch: samples a call. steps: of a whole image, timed as a loop of calls; guidance: two calls a step, as
    classifier-free guidance takes. sdpa: PyTorch's attention, pinned for eager and compiled models; null leaves it to PyTorch.
    compiled: torch.compile as a second baseline; null: on a GPU alone. cuda_graphs: calls as CUDA graphs too, where the back end has them; null: on a
    GPU. providers: of ONNX Runtime, as [cuda, cpu]; null: the best that there is for the device, without TensorRT. size: of a call, as {height: 64,
    width: 64, text: 512}, image sides in tokens; null: that of the published models on a GPU, a small one on a CPU. device: cpu, cuda, or null for a
    GPU where there is one. kernels: of eager models on a GPU, as a recipe's `kernels`; null: as that says, else auto. torch is what plain diffusers
    does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    runs: Annotated[int, Field(ge=2)] = 50
    batch: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=1)] = 20
    guidance: bool = False
    sdpa: Sdpa | None = None
    compiled: bool | None = None
    cuda_graphs: bool | None = None
    providers: Annotated[list[Provider], Field(min_length=1)] | None = None
    size: dict[str, Annotated[int, Field(ge=1)]] | None = None
    device: Literal["cpu", "cuda"] | None = None
    kernels: Kernels | None = None


def run_bench(
    targets: Sequence[BenchTarget],
    inputs: Tensors,
    shape: Mapping[str, int],
    runs: int,
    device: str,
    dtype: str,
    progress: Progress | None = None,
    *,
    warmup: int | None = None,
    seed: int = 0,
    watch: Stopwatch | None = None,
    steps: int = 0,
    calls_a_step: int = 1,
    roofline: Roofline | None = None,
) -> Benchmark:
    """Latencies of the targets on the same inputs, in milliseconds, by `timing.interleaved` and a `watch`, which is the device's own unless one is given.

    Memory is watched while warming up, where it costs no time that counts. warmup: calls a target, None until its calls are steady. steps: of
    a loop of calls that is timed as a whole, of `calls_a_step` calls each; 0 for none.

    Raises:
        RecipeError: fewer than one run or one warm-up run.
    """
    for name, value in (("runs", runs), ("warmup", 1 if warmup is None else warmup)):
        if value < 1:
            raise RecipeError(f"bench.{name} = {value}: wanted a whole number above 0")
    watch, warmed = watch or stopwatch(device), [0] * len(targets)

    def warm(number: int) -> None:
        call = partial(targets[number].run, inputs)
        warmed[number] = _repeat(call, warmup) if warmup is not None else until_steady(call, watch)

    peaks = [target.peak(partial(warm, number)) for number, target in enumerate(targets)]
    nanoseconds = interleaved([partial(target.run, inputs) for target in targets], runs, random.Random(seed), watch, progress)
    whole = _loops(targets, inputs, nanoseconds, steps, calls_a_step, watch, random.Random(seed))
    teachers = {(t.backend, t.cuda_graph): times for t, times in zip(targets, nanoseconds, strict=True) if t.label == TEACHER}
    same = {"device": device, "dtype": dtype, "shape": dict(shape), "clock": watch.name}
    rows = [
        _row(
            target,
            times,
            teachers.get((target.backend, target.cuda_graph)),
            roofline,
            peak_bytes=peak,
            warmup=count,
            end_to_end_ms=loop,
            **same,
        )
        for target, times, peak, count, loop in zip(targets, nanoseconds, peaks, warmed, whole, strict=True)
    ]
    return Benchmark(rows=rows, steps=steps, calls_a_step=calls_a_step)


def _repeat(call: Callable[[], Any], times: int) -> int:
    for _ in range(times):
        call()
    return times


def until_steady(call: Call, watch: Stopwatch, most: int = 60, longest_s: float = 20.0) -> int:
    """Call until two runs of three calls have medians within `STEADY`, and say how often; no more than `most` times or `longest_s` seconds."""
    times: list[int] = []
    while len(times) < most and (len(times) < 3 or sum(times) < longest_s * 1e9):
        times.append(watch.ns(call))
        if len(times) >= 6:
            earlier, later = float(np.median(times[-6:-3])), float(np.median(times[-3:]))
            if abs(later - earlier) <= STEADY * max(earlier, 1.0):
                break
    return len(times)


def _loops(
    targets: Sequence[BenchTarget],
    inputs: Tensors,
    nanoseconds: Sequence[Sequence[int]],
    steps: int,
    calls_a_step: int,
    watch: Stopwatch,
    order: random.Random,
) -> list[float | None]:
    """Milliseconds of whole loops, the median of some, by target; None where there are none or they would take too long."""
    calls = steps * calls_a_step
    long = [float(np.median(times)) * calls / 1e9 > LONGEST_LOOP_S for times in nanoseconds]
    chosen = [i for i, _ in enumerate(targets) if steps and not long[i]]

    def loop(target: BenchTarget) -> None:
        for _ in range(calls):
            target.run(inputs)

    times = interleaved([partial(loop, targets[i]) for i in chosen], LOOPS, order, watch) if chosen else []
    found = {i: float(np.median(t)) / 1e6 for i, t in zip(chosen, times, strict=True)}
    return [found.get(i) for i in range(len(targets))]


def _row(target: BenchTarget, nanoseconds: list[int], teacher: list[int] | None, roofline: Roofline | None, **same: Any) -> BenchRow:
    ms = np.array(nanoseconds) / 1e6
    p10, p50, p90, p99 = (float(p) for p in np.percentile(ms, [10, 50, 90, 99]))
    speedup, interval = (None, None) if teacher is None else ratio(np.array(teacher) / 1e6, ms)
    floor = roofline.floor_s(target.work) * 1e3 if roofline and target.work else None
    work = target.work
    return BenchRow(
        target=target.label,
        backend=target.backend,
        runs=len(nanoseconds),
        mean_ms=float(ms.mean()),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        spread=(p90 - p10) / p50 if p50 > 0 else 0.0,
        noise=noise(ms),
        speedup=speedup,
        speedup_ci95=interval,
        samples_per_s=1e3 * same["shape"].get("batch", 1) / p50 if p50 > 0 else None,
        parameters=work.parameters if work else None,
        flops=work.flops if work else None,
        floor_ms=floor,
        floor_share=floor / p50 if floor and p50 > 0 else None,
        sdpa=target.sdpa,
        cuda_graph=target.cuda_graph,
        session=dict(target.session),
        **same,
    )


def ratio(teacher: np.ndarray[Any, Any], times: np.ndarray[Any, Any]) -> tuple[float | None, tuple[float, float] | None]:
    """The teacher's median over another's, and its 95 % interval by resampling the rounds that both ran in."""
    median = float(np.median(times))
    if median <= 0 or len(teacher) != len(times):
        return None, None
    rounds = np.random.default_rng(0).integers(0, len(times), (RESAMPLES, len(times)))
    ratios = np.median(teacher[rounds], axis=1) / np.maximum(np.median(times[rounds], axis=1), 1e-12)
    low, high = (float(p) for p in np.percentile(ratios, [2.5, 97.5]))
    return float(np.median(teacher)) / median, (low, high)


def noise(ms: np.ndarray[Any, Any]) -> str:
    """Why a run is not to be trusted to the last digit; empty where nothing speaks against it."""
    p50, p90 = (float(p) for p in np.percentile(ms, [50, 90]))
    found = []
    if p50 > 0 and (p90 - p50) / p50 > UNEVEN:
        found.append(f"one call in ten took {100 * (p90 - p50) / p50:.0f} % longer than the median")
    half = len(ms) // 2
    if half >= 5 and p50 > 0:
        drift = float(np.median(ms[half:]) / np.median(ms[:half]) - 1)
        if abs(drift) > DRIFT:
            found.append(f"its second half took {abs(100 * drift):.0f} % {'longer' if drift > 0 else 'less'} than the first")
    return "; ".join(found)


def is_fair(export: Export, dtype: str) -> bool:
    """Whether an artefact is timed beside eager in a dtype: it is in that dtype, and this machine has kernels for it."""
    return export.dtype == dtype and "arithmetic" not in export.options.get("session", {})


@dataclass(frozen=True)
class Benched:
    """A model to be timed, eager and as artefacts. model: None for an artefact alone, of which `lowered` has inputs and no weights."""

    label: str
    config: Mapping[str, Any]
    model: Any
    lowered: Lowered
    exports: Sequence[Path] = ()


def bench_models(
    family: Family, subjects: Sequence[Benched], settings: BenchSettings, dtype: str, progress: Progress
) -> tuple[Benchmark, list[str]]:
    """Latency of models by label, eager and as their artefacts, on one set of inputs; and what was left out, and why.

    Models are brought to the device, and stay there.

    Raises:
        RecipeError: models that do not take the same inputs, a size that is none, or a GPU that is asked for and not there.
        UnavailableError: a provider, or kernels, that are asked for and not there, or no memory for any of the models.
    """
    with kernels.switched(settings.kernels or kernels.chosen()):
        return _bench_models(family, subjects, settings, dtype, progress)


def _bench_models(
    family: Family, subjects: Sequence[Benched], settings: BenchSettings, dtype: str, progress: Progress
) -> tuple[Benchmark, list[str]]:
    device = device_of(settings)
    size = size_of(settings, subjects[0].lowered, device)
    inputs = {name: tensor.to(device) for name, tensor in subjects[0].lowered.inputs(**size).items()}
    shapes = [{n: tuple(t.shape) for n, t in s.lowered.inputs(**size).items()} for s in subjects]
    if any(s != shapes[0] for s in shapes):
        raise RecipeError(
            f"bench: {', '.join(s.label for s in subjects)} take inputs of different shapes; wanted a teacher and its students"
        )
    works = {s.label: work_of(family, s.config, inputs, getattr(torch, dtype)) for s in subjects}
    with own_stream(device):
        roofline, without = _roofline_here(device, dtype)
        targets, notes = _targets(subjects, works, inputs, settings, device, dtype)
        notes = without + notes
        if not targets:
            way = "; wanted a smaller bench.size, or a device with more memory" if any("no memory left" in note for note in notes) else ""
            raise UnavailableError(f"bench: {'; '.join(notes) or 'nothing to time'}{way}")
        before = gpu_state(device)
        result = run_bench(
            targets,
            inputs,
            size,
            settings.runs,
            device,
            dtype,
            progress,
            steps=settings.steps,
            calls_a_step=2 if settings.guidance else 1,
            roofline=roofline,
        )
    told = {}
    if roofline:
        told = {"copy_bytes_per_s": roofline.bytes_per_s, "matrix_flops_per_s": roofline.flops_per_s, "threads": roofline.threads}
    gpu = {"before": before, "after": gpu_state(device)} if device != "cpu" else {}
    return result.model_copy(update={"roofline": told, "gpu": gpu, "notes": notes}), notes


def check_size(settings: BenchSettings, family: Family, config: Mapping[str, Any]) -> None:
    """Raise RecipeError for a size that a model of this configuration does not take."""
    if settings.size is None:
        return
    size = size_of(settings, family.lowered(model_outline(family, config)), "cpu")
    if family.is_edited(config):
        return
    low = dict(config) | {g.count_key: min(int(config[g.count_key]), 2) for g in family.groups}
    try:  # of two blocks a group, in shapes alone
        activation_bytes(family, low, "float32", size)
    except RuntimeError as error:
        raise RecipeError(f"bench.size = {settings.size}: the model does not take it ({' '.join(str(error).split())[:120]})") from None


def check_providers(settings: BenchSettings, exports: Iterable[str]) -> None:
    """Raise RecipeError for providers where nothing is timed that has any."""
    if settings.providers is not None and not any("providers" in plugins.load("backends", runner(name)).run_options for name in exports):
        raise RecipeError(f"bench.providers = {settings.providers}: nothing is timed in ONNX Runtime; wanted an export by onnx, or null")


def device_of(settings: BenchSettings) -> str:
    """`cpu` or `cuda`. Raises UnavailableError for a GPU that is not there, RecipeError for what takes one where none is to be used."""
    device = settings.device or device_here()
    if device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("bench.device = 'cuda': there is no CUDA device here; wanted cpu, or null")
    if device == "cpu" and settings.cuda_graphs:
        raise RecipeError("bench.cuda_graphs = True: a CPU has none; wanted false or null, or a CUDA device")
    return device


def size_of(settings: BenchSettings, lowered: Lowered, device: str) -> dict[str, int]:
    """What the inputs are made by. Raises RecipeError for a size with other names than batch's companions."""
    if settings.size is None:
        return {**(lowered.sizes[0] if device == "cpu" else lowered.usual), "batch": settings.batch}
    wanted = set(lowered.usual) - {"batch"}
    if set(settings.size) != wanted:
        raise RecipeError(f"bench.size = {settings.size}: wanted {', '.join(sorted(wanted))}, whole numbers above 0, image sides in tokens")
    return {"batch": settings.batch, **settings.size}


def _roofline_here(device: str, dtype: str) -> tuple[Roofline | None, list[str]]:
    """What the device does at most, or a note why that could not be measured."""
    try:
        return measured_roofline(device, getattr(torch, dtype), torch.get_num_threads()), []
    except Exception as error:
        if not (lacking := memory_lacks(error)):
            raise
        return None, [f"the roofline was not measured: {lacking}"]
    finally:
        give_back()


def _moved(subject: Benched, device: str) -> str:
    """Put a model on the device; why it could not be, with the model on the CPU again, empty where it is there."""
    try:
        subject.model.to(device)
        subject.lowered.module.to(device)
    except Exception as error:
        if not (lacking := memory_lacks(error)):
            raise
        subject.model.to("cpu")
        subject.lowered.module.to("cpu")
        give_back()
        return lacking
    return ""


def _targets(
    subjects: Sequence[Benched], works: Mapping[str, Work], inputs: Tensors, settings: BenchSettings, device: str, dtype: str
) -> tuple[list[BenchTarget], list[str]]:
    compiled = settings.compiled if settings.compiled is not None else device != "cpu"
    made = TargetMaker(inputs, settings, device)
    eager = [s for s in subjects if s.model is not None]
    for subject in eager:
        if lacking := _moved(subject, device):
            made.notes.append(f"{subject.label} was not timed: {lacking}, beside what is timed already")
            continue
        for backend in (EAGER, "compile") if compiled else (EAGER,):
            made.add(subject, backend, Path(), works[subject.label])
    if eager and not compiled and settings.compiled is None:
        made.notes.append("torch.compile was not timed: on a CPU it compiles for minutes; bench.compiled: true times it")
    for subject, folder in [(s, f) for s in subjects for f in s.exports]:
        export = read_export(folder)
        if is_fair(export, dtype):
            made.add(subject, runner_of(export), folder, works[subject.label])
        else:
            why = "" if export.dtype != dtype else ", for which there are no kernels here"
            made.notes.append(f"{folder} was not timed: it is in {export.dtype}{why}")
    return made.targets, made.notes


class TargetMaker:
    """Targets that have run once, as they are and as CUDA graphs, and notes on those that did not."""

    def __init__(self, inputs: Tensors, settings: BenchSettings, device: str) -> None:
        self.inputs, self.settings, self.device = inputs, settings, device
        self.graphs = settings.cuda_graphs if settings.cuda_graphs is not None else device != "cpu"
        self.targets: list[BenchTarget] = []
        self.notes: list[str] = []

    def add(self, subject: Benched, backend: str, folder: Path, work: Work) -> None:
        """A model in a back end, then its CUDA graph. Raises what eager raises, and what is wrong with the settings."""
        plugin: Backend = plugins.load("backends", backend)
        sdpa = self.settings.sdpa if is_eager(plugin) else None
        place = (subject.label, backend, folder, subject.lowered, self.device, sdpa, work)
        options = self._options(plugin)
        name = f"{subject.label} in {backend}" if is_eager(plugin) else str(folder)
        asked = backend == EAGER or (self.settings.providers is not None and "providers" in plugin.run_options)
        plain = self._tried(name, asked, lambda: session_target(*place, options))
        if plain is None or not self.graphs or not plugin.graphs:
            return

        def graph() -> BenchTarget:
            if plugin.graphs == "captured":
                return graph_target(plain)
            return replace(session_target(*place, {**options, "cuda_graph": True}), cuda_graph=True)

        self._tried(f"{name} as a CUDA graph", False, graph)

    def _options(self, plugin: Backend) -> dict[str, Any]:
        if "providers" not in plugin.run_options:
            return {}
        usual = ["cpu"] if self.device == "cpu" else None
        return {"providers": usual if self.settings.providers is None else self.settings.providers}

    def _tried(self, name: str, asked: bool, make: Callable[[], BenchTarget]) -> BenchTarget | None:
        """A target that was kept because it ran; else None, and why not is noted, or raised where it was asked for."""
        try:
            target = make()
            target.run(self.inputs)
            if self.device != "cpu":
                torch.cuda.synchronize()
        except Exception as error:  # runtimes raise what they like
            lacking = memory_lacks(error)
            if isinstance(error, RecipeError) or (asked and not lacking):
                raise
            why = lacking or (error if isinstance(error, PpclcError) else first_line(error))
            self.notes.append(f"{name} was not timed: {why}")
        else:
            self.targets.append(target)
            return target
        give_back()  # only now nothing holds what failed any more
        return None
