"""The ladder: one denoising step of whole models of random weights at their full size, from the teacher down, like beside like.

All models of one teacher share its tensors on the GPU, those that have the same name and shape: what differs is what a plan takes away.
So they are timed in turn, round by round, in the same minute and at the same clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.measuring import (
    NotRun,
    Proof,
    Row,
    alive,
    ceiling,
    host_ms,
    interleaved_ms,
    kernels,
    peak_above,
    pinned_or_not,
    reclaim,
    short,
    told,
)
from ppclc.analysis.budget import even_plan
from ppclc.benching.roofline import Roofline, Work
from ppclc.families import Family, typed
from ppclc.kernels import lacks
from ppclc.loading.classes import DTYPES, empty_model, student_config
from ppclc.loading.published import open_outline, published_config
from ppclc.models import blocks_of
from ppclc.passes.bench import ratio
from ppclc.plan import CompressionPlan
from ppclc.recipe import find_recipe, read_recipe

DTYPE = "bfloat16"
SDPA = ("flash", "cudnn", "efficient")
ROUNDS, SEARCH_ROUNDS, WARMUPS = 6, 4, 2
RECOMPILES = 64
"""Kinds of blocks that are compiled beside each other: width edits make several."""
BUILD_S, COMPILE_S, TIMING_S = 15, 15, 12
"""About what building a family's models takes, compiling a kind of block, and timing in one way, in seconds on 16 cores."""
MANY_KINDS, RESERVED_S = 4, 150
"""A model with so many kinds of blocks or more of its own is compiled where so much time is left behind it."""
TEACHER = "teacher"
Pool = dict[tuple[str, tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True)
class Rung:
    """A model of the ladder: its name, and its configuration. kinds: how many kinds of blocks it has that the rungs before have not."""

    label: str
    config: Mapping[str, Any]
    kinds: int = 0


@dataclass(frozen=True)
class Ladder:
    """A published teacher and what is made of it. height, width: in tokens."""

    name: str
    family: Family
    rungs: Sequence[Rung]
    height: int
    width: int
    text: int


@dataclass
class Stood:
    """A rung's model on the device. peak_bytes: of a forward above its weights; flops: of a forward; output: of plain eager; all once one was looked at."""

    rung: Rung
    model: Any
    blocks: Sequence[nn.Module]
    weight_bytes: int
    parameters: int
    peak_bytes: int = 0
    flops: int = 0
    output: torch.Tensor | None = None


def recipe_config(name: str) -> dict[str, Any]:
    """The configuration of the student that a shipped recipe makes, whose plan is written out in it."""
    recipe = read_recipe(find_recipe(name))
    source = open_outline(*recipe.model.place)
    plan = even_plan(source, recipe.target, recipe.plan, recipe.model.dtype)
    return student_config(source.family, source.config, plan)


def qwen_image(tiny: bool) -> Ladder:
    """Qwen-Image at 1328 x 1328 pixels with 512 text tokens, PPCL's depth and width layouts, and modulation at rank 64."""
    if tiny:
        return _tiny("qwen_image", rank=4)
    family, config = published_config("Qwen/Qwen-Image")
    rungs = [
        Rung(TEACHER, config, kinds=1),
        Rung("14B: 42 of 60 blocks", config | {"num_layers": 42}),
        Rung("12B: 35 of 60 blocks", recipe_config("qwen_image_12b")),
        Rung("rank 64", recipe_config("qwen_image_rank64"), kinds=2),
        Rung("12B, rank 64", recipe_config("qwen_image_12b_rank64")),
        Rung("10B: 35 blocks, narrowed", recipe_config("qwen_image_10b"), kinds=5),
    ]
    return Ladder("Qwen-Image", family, rungs, 83, 83, 512)


def flux(tiny: bool) -> Ladder:
    """FLUX.1-dev at 1024 x 1024 pixels with 512 text tokens, and an 8B: the layout of FLUX.1 Lite, since the paper prints none for its own."""
    if tiny:
        return _tiny("flux", rank=None)
    family, config = published_config("black-forest-labs/FLUX.1-dev")
    rungs = [Rung(TEACHER, config, kinds=2), Rung("8B: 8 of 19 double blocks", config | {"num_layers": 8})]
    return Ladder("FLUX.1-dev", family, rungs, 64, 64, 512)


def _tiny(name: str, rank: int | None) -> Ladder:
    from ppclc import plugins

    family: Family = plugins.load("families", name)
    config = {**family.tiny_config, "_class_name": family.class_name}
    rungs = [Rung(TEACHER, config), Rung("fewer blocks", config | {"num_layers": 3})]
    if rank is not None:
        plan = CompressionPlan.of(name, family.num_blocks(config), [(1, 2)], [3], rank)
        rungs.append(Rung("narrowed", student_config(family, config, plan)))
    return Ladder(f"tiny {name}", family, rungs, 4, 6, 5)


def ladder(proof: Proof) -> list[Row]:
    """A row for each model and way of running it."""
    rows: list[Row] = []
    for make in (qwen_image, flux):
        try:
            proof.needs(BUILD_S + 15)
            rows += _climbed(proof, make(proof.tiny))
        except NotRun as reason:
            rows.append({"model": make.__name__, "not_run": str(reason)})
        except Exception as error:
            rows.append({"model": make.__name__, "not_run": f"{type(error).__name__}: {short(error)}", "broke": True})
            if proof.is_cuda and not alive():
                raise
        if proof.is_cuda:
            torch._dynamo.reset()
        reclaim()
    if all("not_run" in row for row in rows):
        raise NotRun("; ".join(row["not_run"] for row in rows))
    return rows


def _climbed(proof: Proof, given: Ladder) -> list[Row]:
    if proof.is_cuda:
        torch._dynamo.config.recompile_limit = RECOMPILES
    inputs = inputs_of(given, proof)
    pool: Pool = {}
    stood = [stand(given.family, rung, pool, proof) for rung in given.rungs]
    proof.say(f"{given.name}: {len(stood)} models, {sum(t.nbytes for t in pool.values()) / 1e9:.1f} GB of weights")
    with torch.no_grad():
        return [
            {"model": given.name, "tokens": given.height * given.width + given.text, **row}
            for row in _runs(proof, given.family, stood, inputs)
        ]


def _runs(proof: Proof, family: Family, stood: Sequence[Stood], inputs: Mapping[str, Any]) -> Iterator[Row]:
    """Eager in each attention for the teacher, then in the fastest for all: eager, with kernels, compiled."""
    with kernels("torch"):
        found, best = _attentions(proof, stood[0], inputs)
    yield from found
    with pinned_or_not(best), kernels("torch"):
        for one in stood:
            _look_at(one, inputs, proof.device)
    yield from _timed(proof, stood, inputs, {"way": "eager", "kernels": "torch", "sdpa": best or "PyTorch's choice"}, best)
    yield from _guarded(proof, {"way": "eager", "kernels": "triton"}, partial(_with_kernels, proof, family, stood, inputs, best))
    yield from _guarded(proof, {"way": "torch.compile", "kernels": "torch"}, partial(_compiled, proof, stood, inputs, best))


def _guarded(proof: Proof, same: Row, run: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of one way; where it cannot be gone, one row with the reason."""
    try:
        yield from run()
    except NotRun as reason:
        yield same | {"not_run": str(reason)}
    except Exception as error:
        if proof.is_cuda and not alive():
            raise
        yield same | {"not_run": f"{type(error).__name__}: {short(error)}", "broke": True}
        proof.say(f"{same}: {short(error)}")


def _attentions(proof: Proof, teacher: Stood, inputs: Mapping[str, Any]) -> tuple[list[Row], str | None]:
    """A row for each attention that the teacher runs with, and the fastest."""
    if not proof.is_cuda:
        return [], None
    rows, times = [], dict[str, float]()
    for sdpa in SDPA:
        same: Row = {"layout": TEACHER, "way": "eager, attentions", "kernels": "torch", "sdpa": sdpa}
        try:
            with pinned_or_not(sdpa):
                ms = interleaved_ms({"": partial(_call, teacher.model, inputs)}, proof, SEARCH_ROUNDS, 1)[""]
            times[sdpa] = median(ms)
            rows.append(same | {"ms": times[sdpa], "spread": (max(ms) - min(ms)) / times[sdpa]})
        except RuntimeError as error:
            if not alive():
                raise
            rows.append(same | {"not_run": short(error)})
        proof.say(told(rows[-1]))
    if not times:
        raise NotRun("no attention of PyTorch's runs")
    return rows, min(times, key=lambda sdpa: times[sdpa])


def _look_at(one: Stood, inputs: Mapping[str, Any], device: str) -> None:
    """Count a forward's operations, and watch its memory."""
    with FlopCounterMode(display=False) as counter:
        one.output = _call(one.model, inputs)
    one.flops = int(counter.get_total_flops())
    one.peak_bytes = peak_above(partial(_call, one.model, inputs), device)


def _apart(one: Stood, inputs: Mapping[str, Any]) -> float:
    """The relative distance of what a model gives now from what it gave in plain eager; NaN where either is not finite."""
    assert one.output is not None
    wanted = one.output.double()
    return float((_call(one.model, inputs).double() - wanted).norm() / wanted.norm())


def _timed(proof: Proof, stood: Sequence[Stood], inputs: Mapping[str, Any], same: Row, sdpa: str | None) -> list[Row]:
    """A row for each model, timed in turn."""
    with pinned_or_not(sdpa), kernels(same["kernels"]):
        apart = {s.rung.label: _apart(s, inputs) for s in stood}
        times = interleaved_ms(
            {s.rung.label: partial(_call, s.model, inputs) for s in stood}, proof, 3 if proof.tiny else ROUNDS, 1 if proof.tiny else WARMUPS
        )
        host = {s.rung.label: host_ms(partial(_call, s.model, inputs), proof.device) for s in stood}
    teacher = np.array(times[TEACHER]) if TEACHER in times else None
    rows = []
    for one in stood:
        ms = np.array(times[one.rung.label])
        middle = float(np.median(ms))
        times_faster, interval = (None, None) if teacher is None else ratio(teacher, ms)
        roofline = Roofline(proof.device, DTYPE, 1, ceiling(proof, "copy"), ceiling(proof, f"matrix {DTYPE}"))
        floor = roofline.floor_s(Work(one.flops, one.weight_bytes, one.parameters)) * 1e3
        rows.append(
            {"layout": one.rung.label}
            | same
            | {
                "ms": middle,
                "spread": float((ms.max() - ms.min()) / middle),
                "host_ms": host[one.rung.label],
                "rounds_ms": times[one.rung.label],
                "speedup": times_faster,
                "speedup_ci95": interval,
                "roofline_share": floor / middle,
                "rel_l2_to_eager": apart[one.rung.label],
                "tflop": one.flops / 1e12,
                "parameters": one.parameters,
                "weight_bytes": one.weight_bytes,
                "peak_bytes": one.weight_bytes + one.peak_bytes,
            }
        )
        proof.say(told(rows[-1]))
    return rows


def _with_kernels(proof: Proof, family: Family, stood: Sequence[Stood], inputs: Mapping[str, Any], sdpa: str | None) -> Iterator[Row]:
    """The models with the chains within their blocks in kernels: their classes ask the switch at every call."""
    if reason := lacks():
        raise NotRun(reason)
    if not getattr(family, "fused", dict)():
        raise NotRun(f"no kernels for whole models of {family.name} in this version")
    proof.needs(20)
    yield from _timed(proof, stood, inputs, {"way": "eager", "kernels": "triton", "sdpa": sdpa or "PyTorch's choice"}, sdpa)


def _compiled(proof: Proof, stood: Sequence[Stood], inputs: Mapping[str, Any], sdpa: str | None) -> Iterator[Row]:
    """The models with every block compiled; one that there is no time to compile is left out, the teacher last of all."""
    proof.on_gpu("torch.compile")
    ready: list[Stood] = []
    for one in stood:
        try:
            proof.needs(one.rung.kinds * COMPILE_S + TIMING_S + (RESERVED_S if one.rung.kinds >= MANY_KINDS else 0))
            proof.say(f"compiling {one.rung.label}")
            for block in one.blocks:
                block.compile()
            with pinned_or_not(sdpa), kernels("torch"):
                _call(one.model, inputs)
            torch.cuda.synchronize()
            ready.append(one)
        except NotRun as reason:
            yield {"layout": one.rung.label, "way": "torch.compile", "kernels": "torch", "not_run": str(reason)}
    if ready:
        yield from _timed(proof, ready, inputs, {"way": "torch.compile", "kernels": "torch", "sdpa": sdpa}, sdpa)
    for one in stood:
        for block in one.blocks:
            block._compiled_call_impl = None


def stand(family: Family, rung: Rung, pool: Pool, proof: Proof) -> Stood:
    """A rung's model on the device, of random weights; tensors that the pool has by name and shape are shared with it, the others put there.

    Nothing of its size is ever on the CPU.
    """
    model = empty_model(family, rung.config).eval().requires_grad_(False)
    dtype = torch.float32 if proof.tiny else DTYPES[DTYPE]
    state = {}
    for name, tensor in model.state_dict().items():
        key = (name, tuple(tensor.shape))
        if key not in pool:
            made = torch.empty(tensor.shape, dtype=dtype, device=proof.device)
            # Norms at 1 and products that keep the size of what they are given: values are those of a model, as far as clocks can tell.
            pool[key] = made.fill_(1.0) if made.dim() == 1 and name.endswith("weight") else made.normal_(std=0.02)
        state[name] = pool[key]
    model.load_state_dict(state, strict=True, assign=True)
    model._apply(lambda t: t.to(proof.device))  # buffers that no checkpoint has
    return Stood(rung, model, blocks_of(model, family), sum(t.nbytes for t in state.values()), sum(t.numel() for t in state.values()))


def inputs_of(given: Ladder, proof: Proof) -> dict[str, Any]:
    """Keyword arguments of a forward of one sample on the device."""
    family, config = given.family, given.rungs[0].config
    dtype = torch.float32 if proof.tiny else DTYPES[DTYPE]
    made = typed(family.example_inputs(config, 1, given.height, given.width, given.text, torch.Generator().manual_seed(0)), dtype)
    return {name: value.to(proof.device) if isinstance(value, torch.Tensor) else value for name, value in made.items()}


def _call(model: Any, inputs: Mapping[str, Any]) -> Any:
    return model(**inputs, return_dict=False)[0]
