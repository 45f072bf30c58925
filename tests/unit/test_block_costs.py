"""Block costs: exact from a clock that is known, near on a model that was never timed, kept and refused as they should be."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ppclc.benching.timing import by_clock, interleaved
from ppclc.costs import blocks as block_costs
from ppclc.costs.blocks import EDITS, default_size, example_call, measure, require_block_costs
from ppclc.errors import RecipeError, UnavailableError
from ppclc.families import Family
from ppclc.loading.classes import random_model, student_config
from ppclc.loading.sources import Source, open_source
from ppclc.machine.devices import free_bytes
from ppclc.plan import CompressionPlan

MS = 1_000_000
BASE, BLOCK, CLASS, MAPPED, DEAD = 7 * MS, 40 * MS, 2 * MS, -15 * MS, -4 * MS
RANK, MAPPED_RANK = -8 * MS, 3 * MS
FFN = {"image": -9 * MS, "text": -6 * MS}
ADAPTER = 5 * MS
PLANS: dict[str, dict[str, Any]] = {
    "empty": {},
    "merged": {"intervals": [(1, 3), (5, 6)]},
    "mapped": {"text_stream": [4, 8, 9]},
    "rank": {"modulation_rank": 4},
    "ffn": {"ffn": [(1, "image"), (2, "image"), (2, "text")]},
    "adapters": {"intervals": [(1, 3), (5, 6)], "adapters": [(1, 3)]},
    "all": {"intervals": [(2, 4)], "text_stream": [8, 9], "modulation_rank": 12, "dead_code": True},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPCLC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(family: Family) -> dict[str, Any]:
    return {**family.tiny_config, "_class_name": family.class_name, "num_layers": 10}


class World:
    """A clock that only forwards move, by a price list."""

    def __init__(self, width: int) -> None:
        self.now, self.width = 0, width
        self.made: list[int] = []
        self.watch = by_clock(lambda: self.now)

    def price(self, config: Mapping[str, Any]) -> int:
        """Nanoseconds of a forward."""
        blocks, rank = config["num_layers"], config.get("modulation_rank")
        mapped = config.get("mapped_text_blocks") or []
        cut = 0.0 if rank is None else 1 - rank / self.width
        wide = "dead_code" in config
        edits = CLASS * blocks * wide + MAPPED * len(mapped) + DEAD * bool(config.get("dead_code"))
        edits += sum(ns * len(config.get(f"linear_ffn_{stream}_blocks") or []) for stream, ns in FFN.items())
        edits += ADAPTER * len(config.get("adapted_blocks") or [])
        return round(BASE + BLOCK * blocks + edits + cut * (RANK * blocks + MAPPED_RANK * len(mapped)))

    def make(self, config: Mapping[str, Any]) -> Callable[[], None]:
        self.made.append(config["num_layers"])

        def call() -> None:
            self.now += self.price(config)

        return call


@pytest.fixture
def world() -> World:
    return World(32)


@pytest.mark.slow
def test_every_edit_s_cost_is_found_exactly(family: Family, config: dict[str, Any], world: World) -> None:
    costs = measure(family, config, "float32", make=world.make, watch=world.watch, runs=3)
    assert costs.base_ms == pytest.approx(BASE / MS)
    assert costs.block_ms == {"transformer_blocks": pytest.approx(BLOCK / MS)}
    wanted = {"student_class": CLASS, "modulation_rank": RANK, "text_stream": MAPPED, "text_stream_rank": MAPPED_RANK, "dead_code": DEAD}
    wanted |= {f"{stream}_ffn": ns for stream, ns in FFN.items()} | {"adapters": ADAPTER}
    assert costs.edit_ms == {name: pytest.approx(ns / MS) for name, ns in wanted.items()}
    assert set(costs.edit_ms) == {edit.name for edit in EDITS}
    assert sorted(world.made) == [2, 4] + [8] * 8  # adapters stand before merged pairs


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_costs_the_sum_of_its_parts(name: str, family: Family, config: dict[str, Any], world: World) -> None:
    costs = measure(family, config, "float32", make=world.make, watch=world.watch, runs=2)
    plan = CompressionPlan.of(family.name, 10, **PLANS[name])
    assert costs.latency_ms(plan, config) == pytest.approx(world.price(student_config(family, config, plan)) / MS)


@pytest.mark.slow
def test_deep_models_are_timed_as_shallow_ones(
    family: Family, config: dict[str, Any], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_costs, "DEEPER_BYTES", 0)
    costs = measure(family, {**config, "num_layers": 600}, "float32", make=world.make, watch=world.watch, runs=2)
    assert max(world.made) == 4
    assert costs.latency_ms(CompressionPlan.of(family.name, 600), {**config, "num_layers": 600}) == pytest.approx((BASE + 600 * BLOCK) / MS)


def test_a_model_beyond_memory_is_refused(family: Family, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=200_000))
    with pytest.raises(UnavailableError, match=r"0\.0 GB of memory may be taken, half of what is free; wanted [\d.]+ GB .* in float32"):
        measure(family, config, "float32")


@pytest.mark.slow
def test_costs_are_kept_and_found_again(family: Family, config: dict[str, Any], world: World, tmp_path: Path) -> None:
    assert block_costs.read(family, config, "float32") is None
    costs = measure(family, config, "float32", make=world.make, watch=world.watch, runs=2)
    assert block_costs.read(family, config, "float32") is None
    path = block_costs.keep(costs)
    assert path.parent == tmp_path / "cache"
    assert block_costs.read(family, config, "float32") == costs
    assert block_costs.read(family, config, "bfloat16") is None
    assert block_costs.read(family, {**config, "num_layers": 11}, "float32") is None
    assert block_costs.read(family, config, "float32", size={**default_size(family), "text": 9}) is None
    path.write_text("{")
    assert block_costs.read(family, config, "float32") is None


@pytest.mark.parametrize(
    ("own", "xdg", "wanted"), [("a", "b", "a"), (None, "b", "b/ppclc"), (None, None, "home/.cache/ppclc"), ("", "", "home/.cache/ppclc")]
)
def test_the_cache_lies_where_the_user_says(
    own: str | None, xdg: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in (("PPCLC_CACHE", own), ("XDG_CACHE_HOME", xdg)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(tmp_path / value) if value else "")
    assert block_costs.cache_folder() == tmp_path / wanted


@pytest.mark.slow
def test_without_costs_the_command_is_told(
    family: Family, config: dict[str, Any], teacher_folder: Path, tmp_path: Path, world: World
) -> None:
    source = open_source(str(teacher_folder))
    with pytest.raises(RecipeError, match=r"^target\.latency_ms: ") as refused:
        require_block_costs(source, "float32")
    assert str(refused.value).endswith(f"run first: ppclc bench {teacher_folder}")
    bare = Source("bare", tmp_path, config, family)
    with pytest.raises(RecipeError, match=r"run first: ppclc bench --random-weights bare --dtype bfloat16$"):
        require_block_costs(bare, "bfloat16")
    costs = measure(family, config, "float32", make=world.make, watch=world.watch, runs=2)
    block_costs.keep(costs)
    assert require_block_costs(bare, "float32") == costs


@pytest.mark.slow
def test_a_gpu_s_costs_are_its_own(family: Family, config: dict[str, Any], world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept under its name, at the size of the published models; where there is a GPU they are what a plan goes by."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    on_cpu = measure(family, config, "float32", make=world.make, watch=world.watch, runs=2)
    monkeypatch.setattr(block_costs, "free_bytes", lambda device: 10**12 if device == "cuda" else 0)
    on_gpu = measure(family, config, "float32", "cuda", make=world.make, watch=world.watch, runs=2)
    assert (on_cpu.key["device"], on_cpu.key["size"]) == ("cpu", default_size(family))
    assert (on_gpu.key["device"], on_gpu.key["gpu"]) == ("cuda", "a GPU")
    assert on_gpu.key["size"] == {"batch": 1, "height": 64, "width": 64, "text": 512}
    block_costs.keep(on_gpu)
    assert block_costs.read(family, config, "float32") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert block_costs.read(family, config, "float32") == on_gpu
    assert require_block_costs(Source("bare", Path(), config, family), "float32") == on_gpu
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another GPU")
    with pytest.raises(RecipeError, match="not measured on this machine's GPU; run first: ppclc bench --random-weights bare"):
        require_block_costs(Source("bare", Path(), config, family), "float32")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_free_memory_is_that_of_the_device(device: str, family: Family, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10 if device == "cpu" else 10**12))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (3, 10**12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda where: 9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda where: 2)
    assert free_bytes(device) == 10
    with pytest.raises(UnavailableError, match="of memory on the GPU may" if device == "cuda" else "of memory may"):
        block_costs.depth_that_fits(family, config, "float32", device)


def test_models_that_are_timed_share_their_weights(family: Family, config: dict[str, Any]) -> None:
    pool: dict[Any, Any] = {}
    a, b = (random_model(family, {**config, "num_layers": n}, "bfloat16", pool) for n in (2, 3))
    mine, other = a.state_dict(), b.state_dict()
    assert all(mine[name].data_ptr() == other[name].data_ptr() for name in mine)
    assert all(p.std() > 0 for p in b.parameters() if p.numel() > 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", *(pytest.param(n, marks=pytest.mark.long) for n in ("mapped", "merged", "ffn", "adapters"))])
def test_an_unseen_plan_s_latency_is_near(name: str, family: Family) -> None:
    """Within 15 % of what is measured, as a share of the teacher's: the machine may change its pace between the two.

    Best of five: noise can only spoil an agreement, not make one.
    """
    config = {**family.tiny_config, "_class_name": family.class_name, "num_layers": 10, "attention_head_dim": 32, "num_attention_heads": 8}
    config |= {"axes_dims_rope": (8, 12, 12), "joint_attention_dim": 256}
    plans = [CompressionPlan.of(family.name, 10), CompressionPlan.of(family.name, 10, **PLANS[name])]
    size = default_size(family)
    calls = [example_call(random_model(family, c, "float32"), family, c, size) for c in (student_config(family, config, p) for p in plans)]
    off = []
    for attempt in range(5):
        costs = measure(family, config, "float32", runs=20)
        teacher, student = (median(t) / 1e6 for t in interleaved(calls, 20, random.Random(attempt)))
        predicted = costs.latency_ms(plans[1], config) / costs.latency_ms(plans[0], config)
        off.append(abs(predicted / (student / teacher) - 1))
        if off[-1] < 0.15:
            return
    pytest.fail(f"predicted share of the teacher's latency is off by {off}")
