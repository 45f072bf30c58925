"""What a block costs on this machine, or its GPU, and each edit saves, measured from a configuration alone.

Latency depends on a model's configuration and not on its weights. So small models of the same widths
with random weights are timed, a few blocks deep, and the cost of a block is the slope over depth: two
and four blocks of a model tell what sixty cost. Every edit is one row of `EDITS`: a plan that holds it,
and how often a plan holds it; the rows are solved for one after the other.
"""

from __future__ import annotations

import inspect
import os
import platform
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from ppclc import families
from ppclc.benching.timing import Stopwatch, interleaved, stopwatch
from ppclc.errors import RecipeError, UnavailableError
from ppclc.families import Family
from ppclc.loading.classes import DTYPES, count_parameters, model_outline, random_model, student_config
from ppclc.loading.sources import Source
from ppclc.machine.devices import device_here, free_bytes
from ppclc.plan import CompressionPlan
from ppclc.records import digest_of, write_text

VERSION = 3
SHALLOW, DEEP, DEEPEST = 2, 4, 8
"""Blocks of the models that are timed: SHALLOW, and from DEEP to DEEPEST as the teacher's depth allows."""
DEEPER_BYTES = 500e6
"""Weights of a model that may be deeper than DEEP: blocks beyond that size cost far more than their timing is unsure."""
MEMORY_SHARE = 0.5
"""Share of the free memory that the weights of the timed models may take."""
Progress = Callable[[float, str], None]
Call = Callable[[], Any]


@dataclass(frozen=True)
class EditCost:
    """One thing that a plan may hold: `count(plan, width)` says how often, `probe(blocks, width)` makes a plan that holds it.

    A probe may hold edits that stand before its own in `EDITS`, and none that stand after it. `blocks` are those of
    the first group, which has the streams and networks that may go. `there`: whether a family can take it.
    """

    name: str
    count: Callable[[CompressionPlan, int], float]
    probe: Callable[[int, int], dict[str, Any]]
    there: Callable[[Family], bool] = lambda family: bool(family.student_class)


def _rank_cut(plan: CompressionPlan, width: int) -> float:
    """Share of a modulation's inputs that the plan takes away."""
    return 0.0 if plan.modulation_rank is None else 1 - plan.modulation_rank / width


def _maps_text(family: Family) -> bool:
    return bool(family.groups[0].text_modules)


EDITS: tuple[EditCost, ...] = (
    # A student's own class at full rank: what its blocks cost beside the stock ones.
    EditCost("student_class", lambda p, w: len(p.kept) if p.has_width_edits else 0, lambda n, w: {"modulation_rank": w}),
    EditCost("modulation_rank", lambda p, w: len(p.kept) * _rank_cut(p, w), lambda n, w: {"modulation_rank": _low(w)}),
    EditCost("text_stream", lambda p, w: len(p.text_stream), lambda n, w: {"text_stream": range(1, n)}, _maps_text),
    # A mapped block has one modulation less to make smaller.
    EditCost(
        "text_stream_rank",
        lambda p, w: len(p.text_stream) * _rank_cut(p, w),
        lambda n, w: {"text_stream": range(1, n), "modulation_rank": _low(w)},
        _maps_text,
    ),
    EditCost(
        "dead_code",
        lambda p, w: int(p.dead_code),
        lambda n, w: {"modulation_rank": w, "dead_code": True},
        lambda family: family.has_dead_code,
    ),
    EditCost(
        "image_ffn",
        lambda p, w: sum(e.stream == "image" for e in p.ffn),
        lambda n, w: {"ffn": [(b, "image") for b in range(n)]},
        lambda family: "image" in family.groups[0].ffn_modules,
    ),
    EditCost(
        "text_ffn",
        lambda p, w: sum(e.stream == "text" for e in p.ffn),
        lambda n, w: {"ffn": [(b, "text") for b in range(n - 1)]},
        lambda family: "text" in family.groups[0].ffn_modules,
    ),
    # Those of a mapped block are counted like any, though it has one map less.
    EditCost("adapters", lambda p, w: len(p.adapters), lambda n, w: {"intervals": _pairs(n), "adapters": _pairs(n)}),
)
"""Milliseconds are solved for in this order."""


def edits_of(family: Family) -> list[EditCost]:
    """The rows of `EDITS` that a family can take."""
    return [edit for edit in EDITS if edit.there(family)]


def _pairs(blocks: int) -> list[tuple[int, int]]:
    """Every block in an interval of two."""
    return [(b, b + 1) for b in range(0, blocks - 1, 2)]


def _low(width: int) -> int:
    return max(1, width // 8)


class BlockCosts(BaseModel):
    """Milliseconds of one eager forward, by part: everything outside blocks, a block by group, what an edit adds.

    Savings are negative. `key` says what was measured and where.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: int
    family: str
    key: dict[str, Any]
    runs: int
    base_ms: float
    block_ms: dict[str, float]
    edit_ms: dict[str, float]

    def latency_ms(self, plan: CompressionPlan, config: Mapping[str, Any]) -> float:
        """Predicted latency of the plan's student; `config` is the teacher's."""
        family = families.of_config(config, "config")
        blocks = sum(self.block_ms[name] * count for name, count in blocks_by_group(family, config, plan).items())
        width = width_of(config)
        edits = sum(self.edit_ms.get(edit.name, 0.0) * edit.count(plan, width) for edit in EDITS)
        return self.base_ms + blocks + edits


def width_of(config: Mapping[str, Any]) -> int:
    """Features of a state."""
    return int(config["attention_head_dim"]) * int(config["num_attention_heads"])


def blocks_by_group(family: Family, config: Mapping[str, Any], plan: CompressionPlan) -> dict[str, int]:
    """Blocks of each group that a plan keeps."""
    counts, first = {}, 0
    for group in family.groups:
        last = first + int(config[group.count_key])
        counts[group.name] = sum(first <= block < last for block in plan.kept)
        first = last
    return counts


def default_size(family: Family, batch: int = 1) -> dict[str, int]:
    """The size that bench runs at: batch, image grid and text length of the family's example."""
    parameters = inspect.signature(family.example_inputs).parameters
    return {n: parameters[n].default for n in ("height", "width", "text")} | {"batch": batch}


def size_on(family: Family, config: Mapping[str, Any], device: str) -> dict[str, int]:
    """The size that bench runs at on a device unless it is told one: on a GPU that of the published models."""
    if device == "cpu":
        return default_size(family)
    outline = model_outline(family, dict(config) | {g.count_key: SHALLOW for g in family.groups})
    return dict(family.lowered(outline).usual) | {"batch": 1}


def example_call(model: Any, family: Family, config: Mapping[str, Any], size: Mapping[str, int]) -> Call:
    """A function that runs the model once, without gradients, on random inputs of a size, where it is."""
    inputs = family.example_inputs(config, **size, generator=torch.Generator().manual_seed(0))
    of = next(model.parameters())
    placed = {k: v.to(of.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    given = {k: v.to(of.dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in placed.items()}

    def call() -> Any:
        with torch.no_grad():
            return model(**given, return_dict=False)[0]

    return call


def measure(
    family: Family,
    config: Mapping[str, Any],
    dtype: str,
    device: str = "cpu",
    size: Mapping[str, int] | None = None,
    runs: int = 30,
    progress: Progress | None = None,
    *,
    warmup: int = 3,
    make: Callable[[Mapping[str, Any]], Call] | None = None,
    watch: Stopwatch | None = None,
) -> BlockCosts:
    """Costs of a teacher's configuration by part on a device: medians of `runs` forwards of each model, interleaved.

    `make` turns a configuration into what is timed: by default one forward of a model with random weights. `watch`: the device's own unless one is given.

    Nothing is kept: see `keep`.

    Raises:
        UnavailableError: too little memory for models of a few blocks.
    """
    size = dict(size or size_on(family, config, device))
    deep = depth_that_fits(family, config, dtype, device)
    pool: dict[Any, torch.Tensor] = {}
    make = make or (lambda c: example_call(random_model(family, c, dtype, pool, device), family, c, size))
    probes = _probes(family, config, deep)
    calls = [make(student_config(family, shallow, plan)) for shallow, plan in probes]
    for call in calls:
        for _ in range(warmup):
            call()
    times = interleaved(calls, runs, random.Random(0), watch or stopwatch(device), progress)
    return _solve(family, probes, [median(t) / 1e6 for t in times], key_of(family, config, dtype, device, size), runs)


def _probes(family: Family, config: Mapping[str, Any], deep: int) -> list[tuple[dict[str, Any], CompressionPlan]]:
    """Teacher configuration and plan of every model that is timed: the shallow one, one deeper by group, one an edit."""
    low = dict(config) | {g.count_key: SHALLOW for g in family.groups}
    depths = [low, *(low | {g.count_key: deep} for g in family.groups)]
    rows = [(c, CompressionPlan.of(family.name, family.num_blocks(c))) for c in depths]
    wide = depths[1]
    first, blocks = family.sizes(wide)[0], family.num_blocks(wide)
    edits = [CompressionPlan.of(family.name, blocks, **edit.probe(first, width_of(config))) for edit in edits_of(family)]
    return rows + [(wide, plan) for plan in edits]


def _solve(
    family: Family, probes: Sequence[tuple[dict[str, Any], CompressionPlan]], ms: Sequence[float], key: dict[str, Any], runs: int
) -> BlockCosts:
    low_config, groups = probes[0][0], family.groups
    block_ms = {
        g.name: (ms[1 + i] - ms[0]) / (int(probes[1 + i][0][g.count_key]) - int(low_config[g.count_key])) for i, g in enumerate(groups)
    }
    base = ms[0] - sum(block_ms[g.name] * int(low_config[g.count_key]) for g in groups)
    costs = BlockCosts(version=VERSION, family=family.name, key=key, runs=runs, base_ms=base, block_ms=block_ms, edit_ms={})
    for edit, (config, plan), time_ms in zip(edits_of(family), probes[1 + len(groups) :], ms[1 + len(groups) :], strict=True):
        known = costs.latency_ms(plan, config)
        found = (time_ms - known) / edit.count(plan, width_of(config))
        costs = costs.model_copy(update={"edit_ms": costs.edit_ms | {edit.name: found}})
    return costs


def depth_that_fits(family: Family, config: Mapping[str, Any], dtype: str, device: str = "cpu") -> int:
    """Blocks of the deeper models, by the teacher's depth and the memory that is free on a device.

    Raises:
        UnavailableError: there is not even room for DEEP blocks.
    """
    size = DTYPES[dtype].itemsize
    shallow, deeper = (
        count_parameters(model_outline(family, dict(config) | {g.count_key: n for g in family.groups})) * size
        for n in (SHALLOW, SHALLOW + 1)
    )
    block = deeper - shallow
    # Edits change at most half of a block's tensors; those are there twice.
    need = 1.5 * (shallow + block * (DEEP - SHALLOW))
    room = MEMORY_SHARE * free_bytes(device)
    if need > room:
        where = "" if device == "cpu" else " on the GPU"
        raise UnavailableError(
            f"block costs: {room / 1e9:.1f} GB of memory{where} may be taken, half of what is free; wanted {need / 1e9:.1f} GB to time a few blocks in {dtype}"
        )
    fits = SHALLOW + int((min(room / 1.5, DEEPER_BYTES) - shallow) / block)
    return max(DEEP, min(DEEPEST, family.num_blocks(config), fits))


def key_of(
    family: Family, config: Mapping[str, Any], dtype: str, device: str = "cpu", size: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """All that a latency depends on: configuration, dtype, size, device, and this machine as PyTorch uses it."""
    gpu = {} if device == "cpu" else {"gpu": torch.cuda.get_device_name()}
    return {
        "config": {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(config.items()) if not k.startswith("_")},
        "dtype": dtype,
        "size": dict(size or size_on(family, config, device)),
        "device": device,
        "machine": platform.node(),
        "processor": _processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **gpu,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Where costs are kept for this user: `PPCLC_CACHE`, else `ppclc` in `XDG_CACHE_HOME` or in `~/.cache`."""
    if own := os.environ.get("PPCLC_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ppclc"


def cache_file(key: Mapping[str, Any]) -> Path:
    """The file of costs measured under that key."""
    return cache_folder() / f"block-costs-{digest_of([VERSION, key])}.json"


def keep(costs: BlockCosts) -> Path:
    """Write costs to the cache; says where. Raises OutputError when that cannot be written."""
    path = cache_file(costs.key)
    write_text(path, costs.model_dump_json(indent=1) + "\n")
    return path


def read(
    family: Family, config: Mapping[str, Any], dtype: str, device: str | None = None, size: Mapping[str, int] | None = None
) -> BlockCosts | None:
    """The costs kept for a teacher's configuration on this machine, on its GPU where there is one; None where they were not measured."""
    key = key_of(family, config, dtype, device or device_here(), size)
    try:
        costs = BlockCosts.model_validate_json(cache_file(key).read_text("utf-8"))
    except (OSError, ValueError, ValidationError):
        return None
    return costs if costs.key == key else None


def require_block_costs(source: Source, dtype: str, key: str = "target.latency_ms") -> BlockCosts:
    """The costs kept for a teacher on this machine, on its GPU where there is one.

    Raises:
        RecipeError: they were not measured; says the command that measures them.
    """
    costs = read(source.family, source.config, dtype)
    if costs is None:
        here = "this machine" if device_here() == "cpu" else "this machine's GPU"
        raise RecipeError(
            f"{key}: needs the cost of a block of {source.path} in {dtype}, which was not measured on {here}; "
            f"run first: {bench_command(source, dtype)}"
        )
    return costs


def bench_command(source: Source, dtype: str) -> str:
    """The command that measures a model's block costs."""
    model = source.path if source.has_weights else f"--random-weights {source.path}"
    return f"ppclc bench {model}" + ("" if dtype == "float32" else f" --dtype {dtype}")
