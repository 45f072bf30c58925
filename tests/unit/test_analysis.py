"""Calibration and analysis against brute force in float64, exhaustive search, and planted redundancy."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppclc import flow
from ppclc.errors import PlanError, RecipeError
from ppclc.families import Family
from ppclc.models import Source, apply_plan, count_parameters, open_source, predicted_parameters, trace
from ppclc.passes.analyze import (
    RANK_TOLERANCE,
    AnalyzeSettings,
    PlanSettings,
    Probes,
    Search,
    TargetSettings,
    analyze,
    cheapest_chains,
    cka_map,
    closed_form_bank,
    even_intervals,
    even_plan,
    first_difference_intervals,
    modulation_basis,
    parameter_limit,
    probe_set,
    text_maps,
)
from ppclc.passes.calibrate import CalibrateSettings, Moments, calibrate
from ppclc.plan import CompressionPlan
from ppclc.quality import velocity_error
from ppclc.records import Analysis, CalibrationStats
from ppclc.samples import Samples, open_samples

NAME = "qwen_image"
NAN = float("nan")


def quiet(*_: Any) -> None:
    """Progress that nobody watches."""


def centred(x: torch.Tensor) -> torch.Tensor:
    return x.double() - x.double().mean(0)


def close(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# -- moments -----------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_all_rows_at_once_and_masks_keep_rows_out() -> None:
    g = torch.Generator().manual_seed(0)
    batches = [[torch.randn(n, 7, 5, generator=g) + 0.5 for _ in range(4)] for n in (3, 8, 1)]
    masks = [torch.rand(len(b[0]), 7, generator=g) < 0.6 for b in batches]
    for masked in (False, True):
        moments = Moments(longest=2)
        for states, mask in zip(batches, masks, strict=True):
            moments.add("s", states, mask.long() if masked else None)
        rows = [
            torch.cat([b[i][m] if masked else b[i].flatten(0, 1) for b, m in zip(batches, masks, strict=True)]).double() for i in range(4)
        ]
        assert moments.rows["s"] == len(rows[0]) == (int(sum(m.sum() for m in masks)) if masked else 84)
        assert moments.tensors.keys() == {f"s.sum.{i}" for i in range(4)} | {
            f"s.cross.{i}.{j}" for i in range(4) for j in range(i, 4) if j - i <= 2
        }
        for key, value in moments.tensors.items():
            _, kind, *at = key.split(".")
            i, j = int(at[0]), int(at[-1])
            wanted = rows[i].sum(0) if kind == "sum" else rows[i].T @ rows[j]
            assert value.dtype == torch.float64
            assert close(value, wanted) < 1e-6  # float32 products over a batch


def test_calibrate_counts_what_the_teacher_passes_on(source: Source, teacher: Any, noise: Samples) -> None:
    stats = calibrate(teacher, source.family, noise, CalibrateSettings(samples=70, longest=3, seed=4), quiet)
    assert (stats.num_blocks, stats.longest, stats.samples) == (6, 3, 70)
    g = torch.Generator().manual_seed(4)
    seen = []
    for count in (64, 6):
        x, t, conditioning = noise.draw(count, g)
        seen.append(trace(teacher, source.family, {"hidden_states": x, "timestep": t, **conditioning}))
    tokens = noise.draw(1, g)[0].shape[1]
    assert stats.rows == {"image": 70 * tokens, "text": 70 * 5, "text_input": 70 * 5, "temb": 70}
    for stream in ("image", "text"):
        states = [torch.cat([s.states[stream][i].flatten(0, 1) for s in seen]).double() for i in range(7)]
        assert close(stats.tensors[f"{stream}.cross.2.5"], states[2].T @ states[5]) < 1e-6
        assert close(stats.tensors[f"{stream}.sum.6"], states[6].sum(0)) < 1e-6
        assert f"{stream}.cross.2.6" not in stats.tensors
    temb = torch.nn.functional.silu(torch.cat([s.temb for s in seen if s.temb is not None]).double())
    assert close(stats.tensors["temb.cross.0.0"], temb.T @ temb) < 1e-6
    # The modulated text state is what block 3's text keys are computed from.
    keys: list[torch.Tensor] = []
    hook = teacher.transformer_blocks[3].attn.add_k_proj.register_forward_pre_hook(lambda _, args: keys.append(args[0].double()))
    calibrate(teacher, source.family, noise, CalibrateSettings(samples=70, longest=3, seed=4), quiet)
    hook.remove()
    z = torch.cat([k.flatten(0, 1) for k in keys])
    assert close(stats.tensors["text_input.cross.3.3"], z.T @ z) < 1e-6


def test_calibrate_leaves_padded_text_out(source: Source, teacher: Any, noise: Samples) -> None:
    @dataclass(frozen=True)
    class Padded(Samples):
        length: int = 5
        junk: float = 0.0

        def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, flow.Conditioning]:
            x, t, conditioning = super().draw(count, generator)
            text = torch.cat([conditioning["encoder_hidden_states"], torch.full((count, self.length - 5, 16), self.junk)], 1)
            mask = torch.ones(count, self.length, dtype=torch.bool)
            mask[:, 5:] = False
            return x, t, {**conditioning, "encoder_hidden_states": text, "encoder_hidden_states_mask": mask}

    settings_ = CalibrateSettings(samples=8, longest=2)
    plain = calibrate(teacher, source.family, noise, settings_, quiet)
    padded = calibrate(teacher, source.family, Padded("noise", source, None, "train", 9, 3.0), settings_, quiet)
    assert padded.rows == plain.rows
    for key, value in plain.tensors.items():
        assert close(padded.tensors[key], value) < 1e-5, key


# -- probes and CKA ----------------------------------------------------------------------------------------------------


def states(length: int = 5, rows: int = 60, width: int = 6, seed: int = 0) -> list[torch.Tensor]:
    """Inputs of `length` blocks and the last output: each a noisy, slightly curved map of the one before."""
    g = torch.Generator().manual_seed(seed)
    xs = [torch.randn(rows, width, generator=g, dtype=torch.float64) + 2]
    for _ in range(length):
        turn = torch.randn(width, width, generator=g, dtype=torch.float64) / width**0.5
        xs.append(xs[-1] + 0.5 * torch.tanh(xs[-1] @ turn) + 0.1 * torch.randn(rows, width, generator=g, dtype=torch.float64))
    return xs


def stats_of(xs: list[torch.Tensor], longest: int, stream: str = "image") -> CalibrationStats:
    tensors = {f"{stream}.sum.{i}": x.sum(0) for i, x in enumerate(xs)}
    for i, j in itertools.combinations_with_replacement(range(len(xs)), 2):
        if j - i <= longest:
            tensors[f"{stream}.cross.{i}.{j}"] = xs[i].T @ xs[j]
    return CalibrationStats(num_blocks=len(xs) - 1, longest=longest, rows={stream: len(xs[0])}, samples=1, tensors=tensors)


def brute_map(x: torch.Tensor, y: torch.Tensor, ridge: float) -> torch.Tensor:
    """Least squares on rows, the ridge as extra rows that ask for the identity."""
    x, y = centred(x), centred(y)
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    weight = (ridge * x.square().sum(0).mean()).sqrt()
    return torch.linalg.lstsq(torch.cat([x, weight * eye]), torch.cat([y, weight * eye])).solution


def brute_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = centred(x), centred(y)
    return ((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())).item()


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 0.5])
def test_probes_are_ridge_least_squares_towards_the_identity(ridge: float) -> None:
    xs = states()
    probes = Probes(stats_of(xs, 4), "image", ridge)
    for i, j in [(0, 1), (1, 4), (4, 5)]:
        a = brute_map(xs[i], xs[j], ridge)
        assert close(probes.linear_map(i, j), a) < 1e-9
        assert close(probes.mean(i), xs[i].mean(0)) < 1e-12
    for i in range(5):
        a = brute_map(xs[i], xs[i + 1], ridge)
        left = (centred(xs[i + 1]) - centred(xs[i]) @ a).square().sum()
        whole = (centred(xs[i + 1]) - centred(xs[i])).square().sum()
        assert probes.error(i) == pytest.approx((left / whole).item(), rel=1e-8)
        assert 0 < probes.error(i) < 1


@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_cka_readings_by_direct_computation(ridge: float) -> None:
    xs = states()
    stats = stats_of(xs, 3)
    probes = Probes(stats, "image", ridge)
    maps = [brute_map(xs[i], xs[i + 1], ridge) for i in range(5)]
    tables = {reading: cka_map(probes, reading) for reading in ("equation", "caption")}
    for u, k in itertools.product(range(5), repeat=2):
        if not u <= k < u + 3:
            assert math.isnan(tables["equation"][u, k])
            assert math.isnan(tables["caption"][u, k])
            continue
        pushed = centred(xs[u + 1])
        for a in maps[u + 1 : k + 1]:
            pushed = pushed @ a
        assert tables["equation"][u, k].item() == pytest.approx(brute_cka(xs[u + 1], pushed), rel=1e-9)
        assert tables["caption"][u, k].item() == pytest.approx(brute_cka(xs[k + 1], pushed), rel=1e-9)
    assert tables["equation"].diagonal().tolist() == pytest.approx([1.0] * 5)
    assert (tables["equation"] - tables["caption"]).nan_to_num().abs().max() > 1e-3


@pytest.mark.parametrize("reading", ["equation", "caption"])
def test_cka_does_not_see_rotation_shift_or_scale(reading: str) -> None:
    xs = states()
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    turned = [37.0 * x @ turn + 11 for x in xs]
    before, after = (cka_map(Probes(stats_of(s, 3), "image", 1e-2), reading) for s in (xs, turned))
    assert (before - after).nan_to_num().abs().max() < 1e-8


def test_cka_of_true_outputs_does_not_see_a_rotation_of_each_state() -> None:
    xs = states()
    g = torch.Generator().manual_seed(4)
    turned = [x @ torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0] * 2.0**i for i, x in enumerate(xs)]
    before, after = (cka_map(Probes(stats_of(s, 3), "image", 1e-13), "caption") for s in (xs, turned))
    assert (before - after).nan_to_num().abs().max() < 1e-8


# -- PPCL's rule -------------------------------------------------------------------------------------------------------


def table_from(rows: dict[int, list[float]], length: int) -> torch.Tensor:
    table = torch.full((length, length), NAN, dtype=torch.float64)
    for u, row in rows.items():
        table[u, u : u + len(row)] = torch.tensor(row, dtype=torch.float64)
    return table


def test_first_differences_on_a_map_made_by_hand() -> None:
    rows = {0: [1.0, 0.90, 0.85, 0.70, 0.6, 0.5, 0.4], 3: [1.0, 0.90, 0.70, 0.6], 5: [1.0, 0.95], 6: [1.0]}
    intervals, deltas = first_difference_intervals(table_from(rows, 7))
    # From 0 the drop shrinks from 0.10 to 0.05 and then grows to 0.15: cut before 3. From 3 it grows at once: two blocks.
    assert intervals == [(0, 2), (3, 4), (5, 6)]
    assert deltas == pytest.approx([None, 0.10, 0.05, None, 0.10, None, 0.05])


def test_equal_drops_and_rises_of_cka_go_on_and_lone_blocks_are_no_interval() -> None:
    intervals, deltas = first_difference_intervals(table_from({0: [1.0, 0.75, 0.5, 0.25], 4: [1.0]}, 5))
    assert intervals == [(0, 3)]  # NaN ends it: no further moments
    assert deltas == [None, 0.25, 0.25, 0.25, None]
    assert first_difference_intervals(table_from({0: [1.0, 0.5, 0.75]}, 3))[0] == [(0, 2)]
    assert first_difference_intervals(table_from({0: [1.0]}, 1)) == ([], [None])


@settings(max_examples=150)
@given(st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_intervals_tile_the_depth_as_equation_5_says(length: int, longest: int, random: Any) -> None:
    table = table_from(
        {u: [random.choice([0.2, 0.5, 0.8, random.random()]) for _ in range(min(longest, length - u))] for u in range(length)}, length
    )
    intervals, u, wanted = first_difference_intervals(table)[0], 0, []
    while u < length:
        drops = {k: table[u, k - 1].item() - table[u, k].item() for k in range(u + 1, min(u + longest, length))}
        last = next((k - 1 for k in range(u + 2, length) if k not in drops or drops[k] > drops[k - 1]), max([u, *drops]))
        last = min(last, max([u, *drops]))
        if last > u:
            wanted.append((u, last))
        u = last + 1
    assert intervals == wanted


# -- chains ------------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.integers(2, 7), st.data())
def test_cheapest_chains_are_those_of_exhaustive_search(length: int, data: st.DataObject) -> None:
    spans = data.draw(st.lists(st.sampled_from(list(itertools.combinations(range(length), 2))), unique=True, max_size=9))
    costs = {span: data.draw(st.integers(0, 20)) / 4 for span in spans}
    found = cheapest_chains(length, costs)
    wanted: dict[int, float] = {}
    for n in range(len(spans) + 1):
        for chosen in itertools.combinations(sorted(spans), n):
            if all(a[1] < b[0] for a, b in itertools.pairwise(chosen)):
                removed = sum(v - u for u, v in chosen)
                wanted[removed] = min(wanted.get(removed, math.inf), sum(costs[s] for s in chosen))
    assert {k: c for k, (c, _) in found.items()} == wanted
    for removed, (cost, chain) in found.items():
        assert sum(v - u for u, v in chain) == removed
        assert sum(costs[s] for s in chain) == cost
        assert all(a[1] < b[0] for a, b in itertools.pairwise(chain))


@given(st.integers(1, 40), st.data())
def test_even_intervals_remove_what_was_asked(length: int, data: st.DataObject) -> None:
    removed = data.draw(st.integers(0, length - 1))
    spans = even_intervals(length, removed)
    assert sum(b - a for a, b in spans) == removed
    assert len(CompressionPlan.of(NAME, length, spans).kept) == length - removed
    sizes = [b - a + 1 for a, b in spans]
    assert not sizes or max(sizes) <= math.ceil(length / (length - removed))


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "dtype", "limit"),
    [
        ({"parameters": 0.5}, "float32", 500),
        ({"parameters": 1.0}, "float32", 1000),
        ({"parameters": 700}, "float32", 700),
        ({"parameters": 700.9}, "float32", 700),
        ({"bytes": 2000}, "float32", 500),
        ({"bytes": 0.25}, "float32", 250),
        ({"bytes": 1000}, "bfloat16", 500),
        ({}, "float32", None),
    ],
)
def test_parameter_limit(target: dict[str, float], dtype: str, limit: int | None) -> None:
    assert parameter_limit(1000, TargetSettings(**target), dtype) == limit


def test_targets_that_make_no_sense_are_refused() -> None:
    with pytest.raises(RecipeError, match="target: got parameters and bytes, wanted one of them"):
        parameter_limit(1000, TargetSettings(parameters=0.5, bytes=100), "float32")
    with pytest.raises(RecipeError, match=r"target\.parameters = 1001: wanted at most the teacher's 1000"):
        parameter_limit(1000, TargetSettings(parameters=1001), "float32")
    with pytest.raises(RecipeError, match=r"target\.bytes = 4001: wanted at most the teacher's 4000"):
        parameter_limit(1000, TargetSettings(bytes=4001), "float32")


# -- the search, on a tiny teacher -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(teacher_folder: Path) -> Source:
    return open_source(str(teacher_folder))


@pytest.fixture(scope="module")
def noise(source: Source) -> Samples:
    return open_samples("auto", source, None, "train")


class Measured(Search):
    """A search whose costs were measured before."""

    known: Analysis

    def measure_intervals(self, longest: int) -> None:
        self.interval_costs = {(c.first, c.last): c.cost for c in self.known.candidates if c.kind == "interval"}

    def measure_text(self) -> None:
        self.text_costs = {c.last - c.first + 1: c.cost for c in self.known.candidates if c.kind == "text_stream"}

    def measure_ranks(self) -> None:
        self.rank_costs = dict(self.known.modulation_error)


@dataclass
class Planted:
    """Eight blocks, of which 3 and 4 add a constant to both streams, with everything that analysis needs."""

    model: Any
    source: Source
    stats: CalibrationStats
    samples: Samples
    counts: dict[CompressionPlan, int] = field(default_factory=dict)

    def select(self, half: Analysis, target: float, plan: dict[str, Any] | None = None, strategy: Any = "output_error") -> CompressionPlan:
        """The plan for another target from costs that were measured before."""
        settings_ = AnalyzeSettings(strategy=strategy)
        search = Measured(self.model, self.source, self.stats, {}, [], settings_, PlanSettings(**(plan or {})), quiet)
        search.known, search._counts = half, self.counts
        return search.plan(int(target * count_parameters(self.model)), half.ppcl_intervals)

    def analyze(self, target: dict[str, float], plan: dict[str, Any] | None = None, **settings_: Any) -> Analysis:
        wanted = PlanSettings(**(plan or {}))
        chosen = AnalyzeSettings(**{"probes": 16, **settings_})
        return analyze(self.model, self.source, self.stats, self.samples, chosen, TargetSettings(**target), wanted, "float32", quiet)


@pytest.fixture(scope="module")
def planted(make_teacher: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, family: Family) -> Planted:
    model = make_teacher(8, seed=1)
    width = model.inner_dim
    for i in (3, 4):
        block = model.transformer_blocks[i]
        for mod, mlp in ((block.img_mod, block.img_mlp), (block.txt_mod, block.txt_mlp)):
            for gate in (2, 5):
                rows = slice(gate * width, (gate + 1) * width)
                mod[1].weight[rows] = 0
                mod[1].bias[rows] = 1 if gate == 5 else 0
            mlp.net[2].weight.zero_()
    folder = tmp_path_factory.mktemp("planted")
    model.save_pretrained(folder)
    source = open_source(str(folder))
    samples = open_samples("auto", source, model, "train")
    stats = calibrate(model, family, samples, CalibrateSettings(samples=128, longest=4), quiet)
    return Planted(model, source, stats, samples)


@pytest.fixture(scope="module")
def half(planted: Planted) -> Analysis:
    """Everything left to the selection, half of the parameters to go."""
    return planted.analyze({"parameters": 0.5})


def test_planted_redundancy_costs_nothing_and_nothing_else_is_as_cheap(half: Analysis) -> None:
    costs = {(c.first, c.last): c.cost for c in half.candidates if c.kind == "interval"}
    assert costs.keys() == {(u, v) for u, v in itertools.combinations(range(8), 2) if v - u < 4}
    assert costs[3, 4] < 1e-9
    others = [c for span, c in costs.items() if span != (3, 4)]
    assert min(others) > 1e-4
    # An affine block does not move CKA.
    assert half.tensors["cka"][0, 2, 4].item() == pytest.approx(1, abs=1e-6)


def test_the_smallest_depth_cut_takes_the_planted_interval(planted: Planted, half: Analysis) -> None:
    only_depth = {"text_stream": "none", "modulation_rank": "none"}
    analysis = planted.analyze({"parameters": 0.9}, only_depth)
    assert [(i.first, i.last) for i in analysis.plan.intervals] == [(3, 4)]
    assert not analysis.plan.has_width_edits
    # Costs do not depend on what else was measured before.
    assert analysis.candidates == [c for c in half.candidates if c.kind == "interval"]
    assert torch.equal(analysis.tensors["cka"].nan_to_num(), half.tensors["cka"].nan_to_num())


def test_costs_are_the_velocity_error_of_the_closed_form_stand_in(planted: Planted, half: Analysis) -> None:
    """By hand: blocks 1 and 2 replaced by one affine map a stream, fitted by least squares on the same draws."""
    g = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(2):
        x, t, conditioning = planted.samples.draw(64, g)
        seen.append(trace(planted.model, planted.source.family, {"hidden_states": x, "timestep": t, **conditioning}))
    maps = {}
    for stream in ("image", "text"):
        x, y = (torch.cat([s.states[stream][i].flatten(0, 1) for s in seen]).double() for i in (1, 3))
        a = brute_map(x, y, 1e-4)
        maps[stream] = (a.float(), (y.mean(0) - x.mean(0) @ a).float())

    class Affine(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            (a, c), (b, d) = maps["text"], maps["image"]
            return encoder_hidden_states @ a + c, hidden_states @ b + d

    student = copy.deepcopy(planted.model)
    student.transformer_blocks[1] = Affine()
    del student.transformer_blocks[2]
    wanted = velocity_error(planted.model, student, probe_set(planted.samples, 16))
    cost = next(c.cost for c in half.candidates if (c.kind, c.first, c.last) == ("interval", 1, 2))
    assert cost == pytest.approx(wanted, rel=1e-3)
    text = next(c for c in half.candidates if (c.kind, c.first, c.last) == ("text_stream", 6, 7))
    plan = CompressionPlan.of(NAME, 8, [], [6, 7], None, True)
    bank = closed_form_bank(planted.stats, 1e-4, plan, planted.source.family.text_key)
    student = apply_plan(planted.model, plan, bank)
    assert text.cost == pytest.approx(velocity_error(planted.model, student, probe_set(planted.samples, 16)), rel=1e-6)
    assert text.parameters == count_parameters(planted.model) - count_parameters(student)


def check_target(planted: Planted, plan: CompressionPlan, limit: float, by_hand: tuple[Any, ...] = ()) -> None:
    """At or under the limit, and no edit can be put back but those made by hand."""
    source = planted.source
    assert predicted_parameters(source.family, source.config, plan) <= limit
    assert plan.edits()
    for edit in set(plan.edits()) - set(by_hand):
        assert predicted_parameters(source.family, source.config, plan.without(edit)) > limit, edit


def test_half_of_the_parameters(planted: Planted, half: Analysis) -> None:
    check_target(planted, half.plan, 0.5 * count_parameters(planted.model))
    fit = [r for r, c in half.modulation_error.items() if c <= RANK_TOLERANCE]
    assert half.plan.modulation_rank in (None, *([min(fit)] if fit else []))


@pytest.mark.parametrize("target", [0.97, 0.9, 0.7, 0.6, 0.3])
@pytest.mark.parametrize("modulation_rank", ["auto", "none", 4])
def test_targets_are_met_with_no_edit_to_spare(planted: Planted, half: Analysis, target: float, modulation_rank: Any) -> None:
    plan = planted.select(half, target, {"modulation_rank": modulation_rank})
    check_target(planted, plan, target * count_parameters(planted.model), by_hand=("modulation_rank",) if modulation_rank == 4 else ())


@pytest.mark.parametrize("target", [0.9, 0.85, 0.6])
def test_ppcl_strategy_takes_its_own_intervals_only(planted: Planted, half: Analysis, target: float) -> None:
    plan = planted.select(half, target, strategy="ppcl")
    assert {(i.first, i.last) for i in plan.intervals} <= set(half.ppcl_intervals)
    check_target(planted, plan, target * count_parameters(planted.model))


def test_no_allowed_plan_of_depth_alone_is_cheaper(planted: Planted, half: Analysis) -> None:
    """Against all sets of disjoint intervals that meet the target."""
    costs = {(c.first, c.last): c.cost for c in half.candidates if c.kind == "interval"}
    chosen = planted.select(half, 0.65, {"text_stream": "none", "modulation_rank": "none"})
    removed = chosen.num_blocks - len(chosen.kept)
    cheapest = min(
        sum(costs[s] for s in spans)
        for n in range(1, 5)
        for spans in itertools.combinations(sorted(costs), n)
        if sum(v - u for u, v in spans) >= removed and all(a[1] < b[0] for a, b in itertools.pairwise(spans))
    )
    assert sum(costs[i.first, i.last] for i in chosen.intervals) == pytest.approx(cheapest, rel=1e-12)
    assert cheapest > 0


def test_bytes_are_those_of_the_weights(planted: Planted) -> None:
    whole = count_parameters(planted.model)
    plan = even_plan(planted.source, TargetSettings(bytes=int(0.7 * whole * 4)), PlanSettings(), "float32")
    assert 4 * predicted_parameters(planted.source.family, planted.source.config, plan) <= 0.7 * whole * 4
    assert plan == even_plan(planted.source, TargetSettings(parameters=int(0.7 * whole)), PlanSettings(), "float32")
    assert plan == even_plan(planted.source, TargetSettings(bytes=int(0.7 * whole * 2)), PlanSettings(), "bfloat16")


def test_targets_out_of_reach_are_refused(planted: Planted, half: Analysis) -> None:
    with pytest.raises(RecipeError, match=r"target: \d+ parameters cannot be reached by the edits that the recipe allows"):
        planted.select(half, 0.01)
    with pytest.raises(RecipeError, match="cannot be reached"):
        planted.select(half, 0.9, {"intervals": "none", "text_stream": "none", "modulation_rank": "none"})
    with pytest.raises(RecipeError, match=r"target: got nothing, wanted parameters or bytes, or plan\.intervals as a list"):
        planted.analyze({}, {"text_stream": "none", "modulation_rank": "none"})
    with pytest.raises(RecipeError, match=r"plan\.protect = \[8\]: wanted blocks within 0\.\.7"):
        planted.select(half, 0.9, {"protect": [8]})
    with pytest.raises(RecipeError, match="feed-forward edits are not supported"):
        planted.select(half, 0.9, {"ffn": [{"block": 2, "stream": "image"}]})
    with pytest.raises(RecipeError, match=r"plan\.modulation_rank = 33: wanted at most the width, 32"):
        planted.select(half, 0.9, {"modulation_rank": 33})


@pytest.mark.parametrize("protect", [[3, 4], [0, 1, 7]])
def test_protected_blocks_stay_as_they_are(planted: Planted, protect: list[int]) -> None:
    plan = planted.analyze({"parameters": 0.75}, {"protect": protect, "modulation_rank": "none"}).plan
    assert plan.edits()
    for block in protect:
        assert block in plan.kept
        assert not any(block in i for i in plan.intervals)
        assert block not in [e.block for e in plan.text_stream]


def test_protected_blocks_keep_their_text_stream_when_blocks_behind_them_go(planted: Planted) -> None:
    """The last three student blocks reach further back than the last three teacher blocks."""
    search = Search(planted.model, planted.source, planted.stats, {}, [], AnalyzeSettings(), PlanSettings(protect=[4]), quiet)
    assert search._suffix(2, [(5, 6)]) == [5, 7]
    assert search._suffix(3, [(5, 6)]) is None


def test_edits_made_by_hand_are_kept(planted: Planted, half: Analysis) -> None:
    by_hand = {"intervals": [[1, 2], [5, 7]], "text_stream": [3, 5], "modulation_rank": 7, "dead_code": False}
    plan = planted.analyze({}, by_hand).plan
    assert plan == CompressionPlan.of(NAME, 8, [(1, 2), (5, 7)], [3, 5], 7, False)
    assert planted.select(half, 0.9, by_hand) == plan  # though less would do
    assert even_plan(planted.source, TargetSettings(), PlanSettings(**by_hand), "float32") == plan
    with pytest.raises(RecipeError, match="cannot be reached"):
        planted.select(half, 0.3, by_hand)
    with pytest.raises(PlanError, match=r"text_stream: block 2: wanted a kept block"):
        planted.select(half, 0.9, by_hand | {"text_stream": [2]})


@pytest.mark.parametrize("target", [0.7])
def test_a_text_stream_made_by_hand_steers_the_free_intervals_around_it(planted: Planted, target: float) -> None:
    by_hand = {"text_stream": [4], "modulation_rank": "none"}
    for plan in (
        planted.analyze({"parameters": target}, by_hand).plan,
        even_plan(planted.source, TargetSettings(parameters=target), PlanSettings(**by_hand), "float32"),
    ):
        assert [e.block for e in plan.text_stream] == [4]
        assert predicted_parameters(planted.source.family, planted.source.config, plan) <= target * count_parameters(planted.model)


@pytest.mark.parametrize("target", [0.9, 0.6, 0.3])
def test_even_plan_meets_the_target_by_configuration_alone(planted: Planted, target: float) -> None:
    limit = target * count_parameters(planted.model)
    plan = even_plan(planted.source, TargetSettings(parameters=target), PlanSettings(), "float32")
    assert predicted_parameters(planted.source.family, planted.source.config, plan) <= limit
    protected = even_plan(planted.source, TargetSettings(parameters=0.6), PlanSettings(protect=[0, 1]), "float32")
    assert not any(b in i for b in (0, 1) for i in protected.intervals)


# -- closed forms ------------------------------------------------------------------------------------------------------


def test_modulation_basis_is_that_of_singular_vectors() -> None:
    g = torch.Generator().manual_seed(0)
    rows = (torch.randn(200, 8, generator=g, dtype=torch.float64) * torch.logspace(0, -3, 8, dtype=torch.float64)) @ torch.linalg.qr(
        torch.randn(8, 8, generator=g, dtype=torch.float64)
    )[0] + 3
    basis = modulation_basis(stats_of([rows], 1, "temb"))
    right = torch.linalg.svd(centred(rows))[2].T
    assert close(basis["mean"].double(), rows.mean(0)) < 1e-6
    turns = basis["basis"].double().T @ right
    assert (turns.abs() - torch.eye(8, dtype=torch.float64)).abs().max() < 1e-4


def test_text_maps_find_a_planted_relation_and_the_student_follows(
    make_teacher: Callable[..., Any], family: Family, tmp_path: Path
) -> None:
    model = make_teacher(5, seed=6)
    width = model.inner_dim
    g = torch.Generator().manual_seed(1)
    for block in model.transformer_blocks[2:]:
        linear = block.txt_mod[1]
        linear.weight.zero_()
        linear.bias[: 2 * width] = torch.randn(2 * width, generator=g) / 2  # its own constant shift and scale
        linear.bias[2 * width : 3 * width] = 0
        linear.bias[5 * width :] = 0
    model.save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    samples = open_samples("auto", source, model, "train")
    stats = calibrate(model, family, samples, CalibrateSettings(samples=64, longest=3), quiet)
    plan = CompressionPlan.of(NAME, 5, [], [3], None, False)
    for ridge, limit in ((1e-9, 1e-6), (1e-1, 1.0)):
        student = apply_plan(model, plan, closed_form_bank(stats, ridge, plan, family.text_key))
        error = velocity_error(model, student, probe_set(samples, 16))
        assert error < limit
        maps = text_maps(stats, ridge, (3, 3), (2, 2))
        assert (maps["text_out.weight"] - torch.eye(width)).abs().max() < 1e-4
    assert error > 1e-6  # a ridge that pulls is seen
    with pytest.raises(PlanError, match=r"block 4 is 4 blocks from its reference 0; calibrate\.longest = 3: wanted at least that"):
        text_maps(stats, 1e-4, (4, 4), (0, 0))
