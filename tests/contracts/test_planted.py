"""Every family: redundancy planted among random blocks is found by probes, CKA and the selection, near-misses beside it are not.

Planted: a block that is the identity, one that is exactly linear, and the second of two equal blocks of which it undoes nothing
(an idempotent pair). Beside each stands its near-miss: the same with a small nonlinear rest. A block that alone writes the output
stands among blocks that hardly do anything, and must stay.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppclc import plugins
from ppclc.analysis.budget import PlanSettings, TargetSettings
from ppclc.analysis.closed_forms import Probes, cka_map
from ppclc.analysis.edit_costs import EditCosts
from ppclc.analysis.moments import near_of
from ppclc.analysis.search import AnalyzeSettings, Search
from ppclc.analysis.selection import cheapest_chains
from ppclc.data.samples import Samples, open_samples
from ppclc.families import STREAMS, Family
from ppclc.loading.classes import model_class, predicted_parameters
from ppclc.loading.sources import Source
from ppclc.models import blocks_of
from ppclc.passes.analyze import probe_set
from ppclc.passes.calibrate import CalibrateSettings, calibrate
from ppclc.teachers import ResidentTeacher
from tests.tracing import StandIn

LOADED: list[Family] = [plugins.load("families", name) for name in plugins.names("families")]
# Planted blocks have no feed-forward networks and no text modulation to be traced.
FAMILIES = [replace(f, groups=(replace(f.groups[0], ffn_inputs={}, text_modules=()),)) for f in LOADED if len(f.groups) == 1]
BLOCKS, LONGEST, RIDGE = 6, 3, 1e-8
FREE, NEAR = 1e-7, 1e-5
"""Squared relative velocity errors: at most FREE is nothing, at least NEAR is something."""
States = dict[str, torch.Tensor]


@dataclass
class Case:
    """A random teacher with planted blocks; any one of `planted` may go for nothing, all else costs."""

    model: Any
    source: Source
    planted: set[int]
    samples: Samples

    @property
    def teacher(self) -> ResidentTeacher:
        """The same, run block by block."""
        return ResidentTeacher(self.model, self.source.family)


def random_teacher(family: Family, seed: int) -> Any:
    config = {**family.tiny_config, **{g.count_key: BLOCKS for g in family.groups}}
    if "dual_attention_layers" in config:  # planted blocks have one shape
        config["dual_attention_layers"] = ()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(family, {"_class_name": family.class_name}).from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def identity(_: random.Random) -> Callable[[States], States]:
    return lambda states: states


def linear(rng: random.Random) -> Callable[[States], States]:
    maps: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
    seed = rng.randrange(2**31)

    def run(states: States) -> States:
        out = {}
        for n, (stream, x) in enumerate(states.items()):
            width = x.shape[-1]
            if (stream, width) not in maps:
                g = torch.Generator().manual_seed(seed + n)
                maps[stream, width] = torch.randn(width, width, generator=g) * 0.3 / width**0.5, torch.randn(width, generator=g) * 0.3
            a, b = maps[stream, width]
            out[stream] = x + x @ a + b
        return out

    return run


def idempotent(rng: random.Random) -> Callable[[States], States]:
    """The second half of the features becomes a curved function of the first: doing it twice is doing it once."""
    seed = rng.randrange(2**31)

    def run(states: States) -> States:
        out = {}
        for n, (stream, x) in enumerate(states.items()):
            half = x.shape[-1] // 2
            a = torch.randn(half, x.shape[-1] - half, generator=torch.Generator().manual_seed(seed + n)) / half**0.5
            out[stream] = torch.cat([x[..., :half], torch.tanh(x[..., :half] @ a)], dim=-1)
        return out

    return run


def nearly(function: Callable[[States], States], seed: int) -> Callable[[States], States]:
    """The near-miss: a small curved rest on top."""

    def run(states: States) -> States:
        out = {}
        for n, (stream, x) in enumerate(function(states).items()):
            a = torch.randn(x.shape[-1], x.shape[-1], generator=torch.Generator().manual_seed(seed + n)) / x.shape[-1] ** 0.5
            out[stream] = x + 0.3 * torch.sin(3 * x @ a)
        return out

    return run


def plant(family: Family, seed: int, kind: str, at: int) -> Case:
    """A teacher with one redundant block at `at` and its near-miss right after the pair."""
    rng = random.Random(seed)
    model = random_teacher(family, seed)
    blocks = model.get_submodule(family.groups[0].path)
    if kind == "twins":
        twin = idempotent(rng)
        put = {at - 1: twin, at: twin, at + 1: nearly(identity(rng), seed)}
    else:
        made = identity(rng) if kind == "identity" else linear(rng)
        put = {at: made, at + 1: nearly(made, seed)}
    for i, function in put.items():
        blocks[i] = StandIn(family.groups[0], function)
    source = Source("planted", Path(), dict(model.config), family)
    planted = {at - 1, at} if kind == "twins" else {at}
    return Case(model, source, planted, open_samples("noise", source, model, "train"))


def search(case: Case, seed: int) -> tuple[Search, Any]:
    stats = calibrate(case.teacher, case.samples, CalibrateSettings(samples=64, longest=LONGEST, seed=seed), lambda *_: None)
    costs = EditCosts(case.teacher, probe_set(case.samples, 16), stats, RIDGE)
    only_depth = PlanSettings(text_stream="none", modulation_rank="none", ffn="none")
    return Search(case.source, costs, AnalyzeSettings(probes=16), only_depth, [], [], lambda *_: None), stats


def check(family: Family, seed: int, kind: str, at: int) -> None:
    case = plant(family, seed, kind, at)
    found, stats = search(case, seed)
    for stream in STREAMS:
        probes = Probes(near_of(stats.tensors, stats.rows, stream, BLOCKS), RIDGE)
        assert probes.error(at) < 1e-6, "the probe of a planted block leaves nothing"
        assert probes.error(at + 1) > 1e-3, "the probe of the near-miss leaves something"
        table = cka_map(probes, LONGEST)
        if kind != "linear" and at > 1:
            # A block that passes its input on costs no CKA.
            assert abs(table[at - 2, at] - table[at - 2, at - 1]) < 1e-6
    found.measure_intervals()
    free = {s for s, c in found.interval_costs.items() if c < FREE}
    assert free == {(u, v) for u, v in itertools.combinations(range(BLOCKS), 2) if v - u == 1 and case.planted & {u, v}}
    assert all({u, v} - {found.kept[u, v]} <= case.planted for u, v in free)
    assert min(c for s, c in found.interval_costs.items() if s not in free) > NEAR
    cost, spans = cheapest_chains([BLOCKS], found.interval_costs)[1,]
    assert cost < FREE
    assert {b for u, v in spans for b in range(u, v + 1) if b != found.kept[u, v]} <= case.planted
    # And end to end: one block fewer is asked for, and it is that one.
    target = TargetSettings(parameters=found_limit(case, found))
    plan = found.plan(target, "float32")
    assert {(i.first, i.last) for i in plan.intervals} <= free
    assert len(plan.kept) == BLOCKS - 1


def found_limit(case: Case, found: Search) -> int:
    family, config = case.source.family, case.source.config
    return predicted_parameters(family, config, found.options.plan([(0, 1)]))


MANY = 200 if os.environ.get("PPCLC_LONG") == "1" else 40
cases = st.tuples(st.integers(0, 10**6), st.sampled_from(["identity", "linear", "twins"]), st.integers(1, BLOCKS - 3))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@settings(max_examples=10)
@given(case=cases)
def test_planted_redundancy_is_found(family: Family, case: tuple[int, str, int]) -> None:
    check(family, *case)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name == "qwen_image"], ids=lambda f: f.name)
@settings(max_examples=MANY)
@given(case=cases)
def test_planted_redundancy_is_found_in_many_models(family: Family, case: tuple[int, str, int]) -> None:
    check(family, *case)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), writer=st.integers(0, BLOCKS - 1))
def test_the_block_that_alone_writes_the_output_stays(family: Family, seed: int, writer: int) -> None:
    """All other blocks do a thousandth of what they did, so every cut of one block must leave the writer."""
    model = random_teacher(family, seed)
    blocks = model.get_submodule(family.groups[0].path)

    class Faint(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, **kwargs: Any) -> Any:
            group = family.groups[0]
            before, shared = group.given((), kwargs, None)
            after = group.call(self.block, before, shared)
            return group.output({s: before[s] + 1e-3 * (after[s] - before[s]) for s in STREAMS})

    for i, block in enumerate(list(blocks_of(model, family))):
        if i != writer:
            blocks[i] = Faint(block)
    source = Source("planted", Path(), dict(model.config), family)
    case = Case(model, source, set(), open_samples("noise", source, model, "train"))
    found, _ = search(case, seed)
    found.measure_intervals()
    for removed in range(1, BLOCKS - 2):
        chains = cheapest_chains([BLOCKS], found.interval_costs)
        spans = chains[removed,][1]
        gone = {b for u, v in spans for b in range(u, v + 1) if b != found.kept[u, v]}
        assert writer not in gone
    drops = found.drop_errors
    assert max(range(BLOCKS), key=drops.__getitem__) == writer
