"""Calibration and analysis against brute force in float64, exhaustive search, and planted redundancy."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppclc.analysis import trials
from ppclc.analysis.budget import RANK_TOLERANCE, PlanSettings, TargetSettings, budget_of, even_plan
from ppclc.analysis.closed_forms import Probes, cka_map, closed_form_bank, far_of, linear_map, modulation_basis, text_maps
from ppclc.analysis.detection import even_intervals, first_difference_intervals, spans_of_dropped, trimmed
from ppclc.analysis.edit_costs import EditCosts, kept_choices
from ppclc.analysis.moments import BANDS, Moments, near_of
from ppclc.analysis.search import AnalyzeSettings, Search, agreement
from ppclc.analysis.selection import cheapest_chains
from ppclc.analysis.supernet import Supernet, fits
from ppclc.costs.blocks import BlockCosts
from ppclc.costs.predictions import vram_bytes, weight_bytes
from ppclc.data import flow
from ppclc.data.samples import Samples, open_samples
from ppclc.errors import PlanError, RecipeError
from ppclc.families import Family
from ppclc.loading.classes import count_parameters, empty_model, predicted_parameters, student_config
from ppclc.loading.sources import Source, open_source
from ppclc.models import apply_plan
from ppclc.passes.analyze import analyze, probe_set
from ppclc.passes.calibrate import CalibrateSettings, by_timestep, calibrate
from ppclc.plan import CompressionPlan
from ppclc.quality import velocity_error
from ppclc.records import Analysis, CalibrationStats
from ppclc.teachers import ResidentTeacher
from tests.tracing import trace

NAME = "qwen_image"
NAN = float("nan")


def quiet(*_: Any) -> None:
    """Progress that nobody watches."""


def centred(x: torch.Tensor) -> torch.Tensor:
    return x.double() - x.double().mean(0)


def close(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# -- moments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False])
def test_moments_are_those_of_all_rows_at_once_under_every_prefix(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not together:
        monkeypatch.setattr("ppclc.analysis.moments.TOGETHER", 0)
    g = torch.Generator().manual_seed(0)
    batches = [[torch.randn(n, 5, generator=g) + 0.5 for _ in range(4)] for n in (30, 80, 10)]
    moments = Moments()
    for n, states in enumerate(batches):
        moments.add_near("s", states, ("", f"chunk.{n % 2}."))
        for j in range(len(states)):
            moments.add_far("s", j, {i: states[i] for i in range(max(0, j - 2), j + 1)})
    rows = [torch.cat([b[i] for b in batches]).double() for i in range(4)]
    odd = [b.double() for b in batches[1]]
    assert moments.rows == {"s": 120, "chunk.0.s": 40, "chunk.1.s": 80, "far.s": 120}
    for prefix, xs in (("", rows), ("chunk.1.", odd)):
        wanted: dict[str, Any] = {"sum": [x.sum(0) for x in xs], "second": [x.T @ x for x in xs]}
        wanted["residual"] = [x.T @ (y - x) for x, y in itertools.pairwise(xs)]
        wanted["step"] = [(y - x).square().sum() for x, y in itertools.pairwise(xs)]
        for name, values in wanted.items():
            assert close(moments.tensors[f"{prefix}s.{name}"], torch.stack(values)) < 1e-6, name  # float32 products over a batch
    crosses = {k for k in moments.tensors if ".cross." in k}
    assert crosses == {f"far.s.cross.{i}.{j}" for i in range(4) for j in range(i, 4) if j - i <= 2}
    for key in crosses:
        i, j = map(int, key.split(".")[-2:])
        assert close(moments.tensors[key], rows[i].T @ rows[j]) < 1e-6
    assert {v.dtype for v in moments.tensors.values()} == {torch.float64}


def test_a_sum_is_its_own_memory_from_the_first_value_on() -> None:
    """What is handed in may be the next one's memory afterwards, as on the way from a GPU."""
    sums, value = Moments(), torch.arange(6.0).view(2, 3).T
    for _ in range(2):
        sums.accumulate("far.image.cross.0.1", value)
        value *= 10
    found = sums.tensors["far.image.cross.0.1"]
    assert found.is_contiguous()
    assert torch.equal(found, 11 * torch.arange(6.0).view(2, 3).T)


def test_weighted_chunks_are_the_moments_of_repeated_rows() -> None:
    g = torch.Generator().manual_seed(1)
    batches = [[torch.randn(9, 3, generator=g, dtype=torch.float64) for _ in range(3)] for _ in range(3)]
    moments, direct = Moments(), Moments()
    for n, states in enumerate(batches):
        moments.add_near("s", states, ("", f"chunk.{n}."))
    for n in (0, 0, 2):
        direct.add_near("s", batches[n])
    weighted = near_of(moments.tensors, moments.rows, "s", 2, {"chunk.0.": 2.0, "chunk.2.": 1.0})
    plain = near_of(direct.tensors, direct.rows, "s", 2)
    assert weighted.rows == plain.rows == 27
    for i in range(2):
        assert close(weighted.second(i), plain.second(i)) < 1e-12
        assert close(weighted.residual(i), plain.residual(i)) < 1e-12
        assert weighted.step(i) == pytest.approx(plain.step(i), rel=1e-12)


@pytest.mark.parametrize("together", [True, False])
def test_of_many_image_tokens_a_part_enters_the_sums_another_in_each_sample(
    source: Source, teacher: Any, noise: Samples, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not together:
        for module in ("ppclc.analysis.moments", "ppclc.passes.calibrate"):
            monkeypatch.setattr(f"{module}.TOGETHER", 0)
    g = torch.Generator().manual_seed(4)
    batches = [by_timestep(noise.draw(count, g)) for count in (64, 6)]
    seen = [trace(teacher, source.family, {"hidden_states": x, "timestep": t, **more}) for x, t, more in batches]
    tokens = seen[0].states["image"][0].shape[1]
    settings = CalibrateSettings(samples=70, longest=3, seed=4, tokens=tokens // 2)
    stats = calibrate(ResidentTeacher(teacher, source.family), noise, settings, quiet)
    chosen = [[x[:, n::2].flatten(0, 1).double() for x in s.states["image"]] for n, s in enumerate(seen)]
    assert stats.rows["image"] == stats.rows["far.image"] == stats.rows["ffn.image"] == 70 * tokens // 2
    assert stats.rows["text"] == 350  # all of it
    states = [torch.cat(parts) for parts in zip(*chosen, strict=True)]
    assert close(stats.tensors["image.second"][4], states[4].T @ states[4]) < 1e-6
    assert close(stats.tensors["image.residual"][4], states[4].T @ (states[5] - states[4])) < 1e-5
    assert close(stats.tensors["far.image.cross.2.5"], states[2].T @ states[5]) < 1e-6


def test_calibrate_counts_what_the_teacher_passes_on(source: Source, teacher: Any, noise: Samples) -> None:
    stats = calibrate(ResidentTeacher(teacher, source.family), noise, CalibrateSettings(samples=70, longest=3, seed=4), quiet)
    assert (stats.num_blocks, stats.longest, stats.samples) == (6, 3, 70)
    g = torch.Generator().manual_seed(4)
    seen, bands = [], []
    for count in (64, 6):
        x, t, conditioning = by_timestep(noise.draw(count, g))
        seen.append(trace(teacher, source.family, {"hidden_states": x, "timestep": t, **conditioning}))
        bands.append((t * BANDS).long().clamp(max=BANDS - 1))
    tokens = seen[0].states["image"][0].shape[1]
    # Two batches: both enter the far moments.
    rows = {k: n for k, n in stats.rows.items() if not k.startswith(("chunk.", "band."))}
    text = dict.fromkeys(("text", "far.text", "far.text_input", "ffn.text"), 350)
    assert rows == {**dict.fromkeys(("image", "far.image", "ffn.image"), 70 * tokens), "temb": 70, **text}
    for stream in ("image", "text"):
        states = [torch.cat([s.states[stream][i].flatten(0, 1) for s in seen]).double() for i in range(7)]
        assert close(stats.tensors[f"far.{stream}.cross.2.5"], states[2].T @ states[5]) < 1e-6
        assert close(stats.tensors[f"{stream}.residual"][5], states[5].T @ (states[6] - states[5])) < 1e-5
        assert close(stats.tensors[f"{stream}.sum"][6], states[6].sum(0)) < 1e-6
        assert f"far.{stream}.cross.2.6" not in stats.tensors
        inside = torch.cat([s.states[stream][4][b == 1].flatten(0, 1) for s, b in zip(seen, bands, strict=True)]).double()
        assert stats.rows[f"band.1.{stream}"] == len(inside)
        assert close(stats.tensors[f"band.1.{stream}.second"][4], inside.T @ inside) < 1e-6
        assert close(stats.tensors[f"chunk.1.{stream}.sum"][2], seen[1].states[stream][2].flatten(0, 1).double().sum(0)) < 1e-6
    temb = torch.nn.functional.silu(torch.cat([s.temb for s in seen if s.temb is not None]).double())
    assert close(stats.tensors["temb.second"][0], temb.T @ temb) < 1e-6
    # The modulated text state is what block 3's text keys are computed from.
    keys: list[torch.Tensor] = []
    hook = teacher.transformer_blocks[3].attn.add_k_proj.register_forward_pre_hook(lambda _, args: keys.append(args[0].double()))
    calibrate(ResidentTeacher(teacher, source.family), noise, CalibrateSettings(samples=70, longest=3, seed=4), quiet)
    hook.remove()
    z = torch.cat([k.flatten(0, 1) for k in keys])
    assert close(stats.tensors["far.text_input.cross.3.3"], z.T @ z) < 1e-6


def test_sorting_by_timestep_keeps_every_sample_together(noise: Samples) -> None:
    x, t, conditioning = noise.draw(9, torch.Generator().manual_seed(2))
    sorted_x, sorted_t, sorted_conditioning = by_timestep((x, t, conditioning))
    assert bool((sorted_t.diff() >= 0).all())
    for i, row in enumerate(sorted_x):
        j = next(j for j in range(9) if torch.equal(x[j], row))
        assert t[j] == sorted_t[i]
        assert torch.equal(conditioning["encoder_hidden_states"][j], sorted_conditioning["encoder_hidden_states"][i])
    assert sorted_conditioning["img_shapes"] == conditioning["img_shapes"]


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
    plain = calibrate(ResidentTeacher(teacher, source.family), noise, settings_, quiet)
    padded = calibrate(ResidentTeacher(teacher, source.family), Padded("noise", source, None, "train", 9, 3.0), settings_, quiet)
    assert padded.rows == plain.rows
    for key, value in plain.tensors.items():
        # The step's energy is small beside the states that it is the difference of.
        assert close(padded.tensors[key], value) < 1e-4, key


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
    moments = Moments()
    moments.add_near(stream, xs)
    for j in range(len(xs)):
        moments.add_far(stream, j, {i: xs[i] for i in range(max(0, j - longest), j + 1)})
    return CalibrationStats(num_blocks=len(xs) - 1, longest=longest, rows=moments.rows, samples=1, tensors=moments.tensors)


def probes_of(stats: CalibrationStats, ridge: float, stream: str = "image") -> Probes:
    return Probes(near_of(stats.tensors, stats.rows, stream, stats.num_blocks), ridge)


def table_of(stats: CalibrationStats, ridge: float, reading: str) -> torch.Tensor:
    return cka_map(probes_of(stats, ridge), stats.longest, far_of(stats, "image") if reading == "caption" else None)


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
def test_probes_and_far_maps_are_ridge_least_squares_towards_the_identity(ridge: float) -> None:
    xs = states()
    stats = stats_of(xs, 4)
    probes, far = probes_of(stats, ridge), far_of(stats, "image")
    for i, j in [(0, 1), (1, 4), (4, 5)]:
        a = brute_map(xs[i], xs[j], ridge)
        found, offset = linear_map(far, i, j, ridge)
        assert close(found, a) < 1e-9
        assert close(offset, xs[j].mean(0) - xs[i].mean(0) @ a) < 1e-9
    for i in range(5):
        a = brute_map(xs[i], xs[i + 1], ridge)
        assert close(probes.step(i) + torch.eye(6, dtype=torch.float64), a) < 1e-9
        left = (centred(xs[i + 1]) - centred(xs[i]) @ a).square().sum()
        whole = (centred(xs[i + 1]) - centred(xs[i])).square().sum()
        assert probes.error(i) == pytest.approx((left / whole).item(), rel=1e-8)
        assert 0 < probes.error(i) < 1


@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_cka_readings_by_direct_computation(ridge: float) -> None:
    xs = states()
    stats = stats_of(xs, 3)
    maps = [brute_map(xs[i], xs[i + 1], ridge) for i in range(5)]
    tables = {reading: table_of(stats, ridge, reading) for reading in ("equation", "caption")}
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
    before, after = (table_of(stats_of(s, 3), 1e-2, reading) for s in (xs, turned))
    assert (before - after).nan_to_num().abs().max() < 1e-8


def test_cka_of_true_outputs_does_not_see_a_rotation_of_each_state() -> None:
    xs = states()
    g = torch.Generator().manual_seed(4)
    turned = [x @ torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0] * 2.0**i for i, x in enumerate(xs)]
    before, after = (table_of(stats_of(s, 3), 1e-13, "caption") for s in (xs, turned))
    assert (before - after).nan_to_num().abs().max() < 1e-8


# -- PPCL's rule -------------------------------------------------------------------------------------------------------


def table_from(rows: dict[int, list[float]], length: int) -> torch.Tensor:
    table = torch.full((length, length), NAN, dtype=torch.float64)
    for u, row in rows.items():
        table[u, u : u + len(row)] = torch.tensor(row, dtype=torch.float64)
    return table


def test_first_differences_on_a_map_made_by_hand() -> None:
    rows = {0: [1.0, 0.90, 0.85, 0.70, 0.6, 0.5, 0.4], 3: [1.0, 0.90, 0.70, 0.6], 5: [1.0, 0.95], 6: [1.0]}
    intervals, deltas = first_difference_intervals(table_from(rows, 7).tolist())
    # From 0 the drop shrinks from 0.10 to 0.05 and then grows to 0.15: cut before 3. From 3 it grows at once: two blocks.
    assert intervals == [(0, 2), (3, 4), (5, 6)]
    assert deltas == pytest.approx([None, 0.10, 0.05, None, 0.10, None, 0.05])


def test_equal_drops_and_rises_of_cka_go_on_and_lone_blocks_are_no_interval() -> None:
    intervals, deltas = first_difference_intervals(table_from({0: [1.0, 0.75, 0.5, 0.25], 4: [1.0]}, 5).tolist())
    assert intervals == [(0, 3)]  # NaN ends it: no further moments
    assert deltas == [None, 0.25, 0.25, 0.25, None]
    assert first_difference_intervals(table_from({0: [1.0, 0.5, 0.75]}, 3).tolist())[0] == [(0, 2)]
    assert first_difference_intervals(table_from({0: [1.0]}, 1).tolist()) == ([], [None])


@pytest.mark.slow
@settings(max_examples=150)
@given(st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_intervals_tile_the_depth_as_equation_5_says(length: int, longest: int, random: Any) -> None:
    table = table_from(
        {u: [random.choice([0.2, 0.5, 0.8, random.random()]) for _ in range(min(longest, length - u))] for u in range(length)}, length
    )
    intervals, u, wanted = first_difference_intervals(table.tolist())[0], 0, []
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
    found = {n: chain for (n,), chain in cheapest_chains([length], costs).items()}
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
    spans = even_intervals([length], removed)
    assert sum(b - a for a, b in spans) == removed
    assert len(CompressionPlan.of(NAME, length, spans).kept) == length - removed
    sizes = [b - a + 1 for a, b in spans]
    assert not sizes or max(sizes) <= math.ceil(length / (length - removed))


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "dtype", "share"),
    [
        ({"parameters": 0.5}, "float32", 0.5),
        ({"parameters": 1.0}, "float32", 1.0),
        ({"bytes": 0.25}, "bfloat16", 0.25),
    ],
)
def test_shares_are_of_the_teacher(source: Source, teacher: Any, target: dict[str, float], dtype: str, share: float) -> None:
    budget = budget_of(source, TargetSettings(**target), dtype)
    empty = CompressionPlan.of(NAME, 6)
    assert budget
    if "bytes" in target:  # with the header of the file
        assert budget.value(empty) == weight_bytes(teacher, dtype) > 2 * count_parameters(teacher)
    else:
        assert budget.value(empty) == count_parameters(teacher)
    assert budget.limit == share * budget.value(empty)


def test_numbers_above_one_are_counts(source: Source, teacher: Any) -> None:
    whole = count_parameters(teacher)
    for target, dtype, limit in (({"parameters": whole - 7}, "float32", whole - 7), ({"bytes": 4 * whole}, "float32", 4 * whole)):
        budget = budget_of(source, TargetSettings(**target), dtype)
        assert budget
        assert budget.limit == limit
    assert budget_of(source, TargetSettings(), "float32") is None


@pytest.mark.slow
def test_targets_that_make_no_sense_are_refused(source: Source, teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPCLC_CACHE", str(tmp_path))  # others may have kept what a block costs
    whole = count_parameters(teacher)
    with pytest.raises(RecipeError, match="target: got parameters and bytes, wanted one of them"):
        budget_of(source, TargetSettings(parameters=0.5, bytes=100_000), "float32")
    with pytest.raises(RecipeError, match=rf"target\.parameters = {whole + 1}: wanted at most the teacher's {whole:,}"):
        budget_of(source, TargetSettings(parameters=whole + 1), "float32")
    with pytest.raises(
        RecipeError, match=rf"target\.bytes = {8 * whole}: wanted at most the teacher's {weight_bytes(teacher, 'float32'):,}"
    ):
        budget_of(source, TargetSettings(bytes=8 * whole), "float32")
    with pytest.raises(RecipeError, match=r"target\.vram_gb = 40: wanted at most the teacher's 0\.0"):
        budget_of(source, TargetSettings(vram_gb=40), "float32")
    with pytest.raises(RecipeError, match=r"target\.latency_ms: needs the cost of a block.*run first: ppclc bench"):
        budget_of(source, TargetSettings(latency_ms=3), "float32")


# -- the search, on a tiny teacher -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(teacher_folder: Path) -> Source:
    return open_source(str(teacher_folder))


@pytest.fixture(scope="module")
def noise(source: Source) -> Samples:
    return open_samples("auto", source, None, "train")


@dataclass
class Planted:
    """Eight blocks, of which 3 and 4 add a constant to both streams, with everything that analysis needs."""

    model: Any
    source: Source
    stats: CalibrationStats
    samples: Samples

    def search(self, plan: dict[str, Any] | None = None, strategy: Any = "output_error") -> Search:
        """A search that starts from what an earlier one of the same strategy has measured."""
        wanted = PlanSettings(**(plan or {}))
        costs = EditCosts(ResidentTeacher(self.model, self.source.family), probe_set(self.samples, 16), self.stats, 1e-4)
        table = cka_map(probes_of(self.stats, 1e-4), 4)
        ppcl = first_difference_intervals(table.tolist())[0]
        return Search(self.source, costs, AnalyzeSettings(strategy=strategy, probes=16), wanted, table.tolist(), ppcl, quiet)

    def select(self, target: float, plan: dict[str, Any] | None = None, strategy: Any = "output_error") -> CompressionPlan:
        return self.search(plan, strategy).plan(TargetSettings(parameters=int(target * count_parameters(self.model))), "float32")

    def analyze(
        self,
        target: dict[str, float],
        plan: dict[str, Any] | None = None,
        work: Path | None = None,
        progress: Callable[[float, str], None] = quiet,
        **settings_: Any,
    ) -> Analysis:
        wanted = PlanSettings(**(plan or {}))
        chosen = AnalyzeSettings(**{"probes": 16, "trials": 0, "supernet_steps": 0, **settings_})
        return analyze(
            ResidentTeacher(self.model, self.source.family),
            self.source,
            self.stats,
            self.samples,
            chosen,
            TargetSettings(**target),
            wanted,
            "float32",
            progress,
            work=work,
        )


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
    stats = calibrate(ResidentTeacher(model, family), samples, CalibrateSettings(samples=128, longest=4), quiet)
    return Planted(model, source, stats, samples)


@pytest.fixture(scope="module")
def half(planted: Planted) -> Analysis:
    """Everything left to the selection, half of the parameters to go."""
    return planted.analyze({"parameters": 0.5})


def free(span: tuple[int, int]) -> bool:
    """Whether an interval of the planted teacher can be replaced for nothing: all of it but one block adds a constant."""
    return len([b for b in range(span[0], span[1] + 1) if b not in (3, 4)]) <= 1


@pytest.mark.slow
def test_planted_redundancy_costs_nothing_and_nothing_else_is_as_cheap(half: Analysis) -> None:
    costs = {(c.first, c.last): c.cost for c in half.candidates if c.kind == "interval"}
    assert costs.keys() == {(u, v) for u, v in itertools.combinations(range(8), 2) if v - u < 4}
    assert {s for s, c in costs.items() if c < 1e-9} == {s for s in costs if free(s)} == {(2, 3), (3, 4), (4, 5), (2, 4), (3, 5)}
    assert min(c for s, c in costs.items() if not free(s)) > 1e-4
    # An affine block does not move CKA.
    assert half.tensors["cka"][0, 2, 4].item() == pytest.approx(1, abs=1e-6)
    assert half.probe_error["image"][3] == half.probe_error["text"][4] == 0
    assert min(half.probe_error["image"][i] for i in (0, 1, 2, 5, 6, 7)) > 1e-3


@pytest.mark.slow
def test_the_smallest_depth_cuts_take_the_planted_blocks(planted: Planted, half: Analysis) -> None:
    only_depth = {"text_stream": "none", "ffn": "none", "modulation_rank": "none"}
    for target, removed in ((0.9, 1), (0.8, 2)):
        analysis = planted.analyze({"parameters": target}, only_depth)
        spans = [(i.first, i.last) for i in analysis.plan.intervals]
        assert all(free(s) for s in spans)
        assert sum(v - u for u, v in spans) == removed
        assert all(analysis.starts[f"interval-{u}-{v}"] not in (3, 4) or (u, v) == (3, 4) for u, v in spans)
        assert not analysis.plan.has_width_edits
    # Costs do not depend on what else was measured before.
    assert analysis.candidates == [c for c in half.candidates if c.kind == "interval"]
    assert torch.equal(analysis.tensors["cka"].nan_to_num(), half.tensors["cka"].nan_to_num())


@pytest.mark.slow
def test_cuts_that_cost_nothing_are_taken_without_a_supernet(planted: Planted) -> None:
    only_depth = {"text_stream": "none", "ffn": "none", "modulation_rank": "none"}
    for target, searched in ((0.8, False), (0.65, True)):
        analysis = planted.analyze({"parameters": target}, only_depth, supernet_steps=4, supernet_sets=8)
        assert bool(analysis.supernet) == searched
        if not searched:
            assert analysis.plan == planted.analyze({"parameters": target}, only_depth).plan


def test_the_supernet_is_always_asked_for_a_set_that_it_can_leave_out(planted: Planted) -> None:
    search = planted.search({"protect": [3]})
    search.kept |= {(0, 1): 0, (4, 5): 5}  # to drop 4 alone would be to merge it into the protected block 3
    sets = search._known_sets((2,), [(0.0, [(0, 1), (4, 5)])])
    assert sets
    assert all(fits(d, search.spans, [8]) for d in sets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_picked", lambda *_: None)
        assert search._known_sets((2,), [(0.0, [(0, 1), (4, 5)])]) == [(1, 5)]


@pytest.mark.slow
def test_trials_take_the_plan_that_learns_best(planted: Planted) -> None:
    only_depth = {"text_stream": "none", "ffn": "none", "modulation_rank": "none"}
    analysis = planted.analyze({"parameters": 0.65}, only_depth, trials=4, trial_steps=6)
    plans, errors = [t.plan for t in analysis.trials], [dict(t.errors) for t in analysis.trials]
    assert analysis.plan == plans[0]
    assert len(plans) == 4
    assert [sorted(e) for e in errors] == [[0, 2, 4, 6], [0, 2, 4], [0, 2], [0, 2]]
    assert min(errors[0].values()) < min(errors[1].values())
    least = [min(e[0], e[2]) for e in errors]
    assert max(least[:2]) <= min(least[2:])
    # The same once more, from the start in every round as for models whose students cannot all be kept.
    again = planted.analyze({"parameters": 0.65}, only_depth, trials=4, trial_steps=6)
    assert again.trials == analysis.trials
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "HELD_BYTES", 0)
        assert planted.analyze({"parameters": 0.65}, only_depth, trials=4, trial_steps=6).trials == analysis.trials


@pytest.mark.slow
def test_an_analysis_that_is_stopped_goes_on_to_the_same_result(planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped again and again, in every part: no cost is measured twice, and the supernet is trained for sets alone that were not judged."""
    settings: dict[str, Any] = {"supernet_steps": 3, "supernet_sets": 6, "trials": 3, "trial_steps": 3}
    walks, steps = [0], [0]
    walk, train = EditCosts._walk, Supernet.train
    monkeypatch.setattr(EditCosts, "_walk", lambda *a: (walks.append(len(a[1])), walk(*a))[1])
    monkeypatch.setattr(Supernet, "train", lambda *a: (steps.append(1), train(*a))[1])
    monkeypatch.setattr(trials, "TRAJECTORY_STEPS", 2)
    of_depth = {"text_stream": "none", "ffn": "none", "modulation_rank": "none"}
    analyzed = partial(planted.analyze, {"parameters": 0.65}, of_depth, **settings)
    whole = analyzed()
    measured, walks[:], steps[:] = sum(walks), [0], [0]
    seen = dict.fromkeys(("intervals", "shared", "sets", "trials"), 0)
    left = [("intervals", 3), ("intervals", 9), ("shared", 2), ("sets", 1), ("sets", 4), ("trials", 1), ("trials", 3), ("trials", 5)]

    def stop(_: float, note: str) -> None:
        kind = note.split()[0]
        seen[kind] += 1
        if (kind, seen[kind]) in left:
            left.remove((kind, seen[kind]))
            raise KeyboardInterrupt

    for attempt in range(1, len(left) + 2):
        try:
            found = analyzed(work=tmp_path, progress=stop)
        except KeyboardInterrupt:
            if attempt % 3 == 0:  # a kill may cut off what was being written
                with (tmp_path / "found.jsonl").open("ab") as file:
                    file.write(b'["[\\"errors\\", 0, 1')
    assert not left
    assert found == whole.model_copy(update={"tensors": found.tensors})
    assert all(torch.equal(found.tensors[k].nan_to_num(), t.nan_to_num()) for k, t in whole.tensors.items())
    assert sum(walks) == measured
    assert analyzed(work=tmp_path).plan == whole.plan  # as a run that was killed before its record was whole
    assert sum(walks) == measured
    assert sum(steps) == 3  # it was stopped itself, and twice between sets


@pytest.mark.slow
def test_blocks_start_where_their_student_learns_best(planted: Planted) -> None:
    """Of blocks 2 to 4 only 2 does more than add a constant: a student's block that starts elsewhere learns from nothing."""
    by_hand = {"intervals": [[2, 4]], "text_stream": "none", "ffn": "none", "modulation_rank": "none"}
    analysis = planted.analyze({"parameters": 0.9}, by_hand, trials=2, trial_steps=4)
    tried = {r.starts["interval-2-4"]: r.errors for r in analysis.start_trials}
    assert list(tried) == [2, *sorted(set(tried) - {2}, key=lambda b: min(e for _, e in tried[b]))]
    assert set(tried) == {2, 3, 4}
    assert all([step for step, _ in errors] == [0, 4] for errors in tried.values())
    assert analysis.starts["interval-2-4"] == 2
    search = planted.search(by_hand)
    search.kept[2, 4] = 4  # what the search had found gives way to what learns best
    teaching = trials.Teaching.of(planted.model, planted.samples, 4, 8, 1e-3, 16)
    search._try_starts(analysis.plan, lambda: teaching)
    assert search.start(2, 4) == 2
    assert not planted.analyze({"parameters": 0.9}, by_hand, trials=1, trial_steps=4).start_trials


@pytest.mark.slow
def test_a_search_with_adapters_counts_them_and_says_where_their_blocks_start(planted: Planted) -> None:
    only_depth = {"text_stream": "none", "ffn": "none", "modulation_rank": "none", "adapters": "auto"}
    analysis = planted.analyze({"parameters": 0.65}, only_depth, trials=2, trial_steps=3)
    assert len(analysis.trials) == 2
    for plan in (analysis.plan, *(t.plan for t in analysis.trials)):
        assert plan.adapters == plan.intervals != ()
        check_target(planted, plan, 0.65 * count_parameters(planted.model))
    search = planted.search(only_depth)
    for interval in analysis.plan.intervals:
        assert analysis.starts[analysis.plan.interval_key(interval)] == search.costs.adapted(interval.first, interval.last)[1]
    # An interval saves one adapter of each stream less; dead code would go with the first.
    width, whole = planted.model.inner_dim, only_depth | {"dead_code": False}
    saved = []
    for adapters in ("none", "auto"):
        search = planted.search(whole | {"adapters": adapters})
        search.measure_intervals()
        saved.append(next(c.parameters for c in search.candidates() if (c.first, c.last) == (2, 3)))
    assert saved[0] - saved[1] == 2 * (width**2 + width)


@pytest.mark.slow
def test_costs_are_the_velocity_error_of_the_closed_form_stand_in(planted: Planted, half: Analysis) -> None:
    """By hand: blocks 1 and 2 replaced by one of them and one affine map a stream, fitted by least squares on the same draws."""
    g = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(2):
        x, t, conditioning = planted.samples.draw(64, g)
        seen.append(trace(planted.model, planted.source.family, {"hidden_states": x, "timestep": t, **conditioning}))

    def fitted(i: int, j: int) -> dict[str, Any]:
        maps = {}
        for stream in ("image", "text"):
            x, y = (torch.cat([s.states[stream][k].flatten(0, 1) for s in seen]).double() for k in (i, j))
            a = brute_map(x, y, 1e-4)
            maps[stream] = (a.float(), (y.mean(0) - x.mean(0) @ a).float())
        return maps

    def affine(maps: dict[str, Any]) -> torch.nn.Module:
        class Affine(torch.nn.Module):
            def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any) -> Any:
                (a, c), (b, d) = maps["text"], maps["image"]
                return encoder_hidden_states @ a + c, hidden_states @ b + d

        return Affine()

    wanted = []
    for linear in (1, 2):
        student = copy.deepcopy(planted.model)
        student.transformer_blocks[linear] = affine(fitted(linear, linear + 1))
        wanted.append(velocity_error(planted.model, student, probe_set(planted.samples, 16)))
    cost = next(c.cost for c in half.candidates if (c.kind, c.first, c.last) == ("interval", 1, 2))
    assert cost == pytest.approx(min(wanted), rel=1e-3)
    costs = planted.search().costs
    errors, kept = costs.intervals([(1, 2)])[1, 2]
    assert kept == (2 if wanted[0] < wanted[1] else 1)
    assert costs.share(costs.cuts([{(1, 2): kept}])[0]) == pytest.approx(costs.share(errors), rel=1e-6)
    student = copy.deepcopy(planted.model)
    del student.transformer_blocks[5]
    assert costs.share(costs.dropped([5])[0]) == pytest.approx(
        velocity_error(planted.model, student, probe_set(planted.samples, 16)), rel=1e-6
    )
    text = next(c for c in half.candidates if (c.kind, c.first, c.last) == ("text_stream", 6, 7))
    plan = CompressionPlan.of(NAME, 8, [], [6, 7], None, True)
    bank = closed_form_bank(planted.stats, 1e-4, plan)
    student = apply_plan(planted.model, plan, bank)
    assert text.cost == pytest.approx(velocity_error(planted.model, student, probe_set(planted.samples, 16)), rel=1e-6)
    assert text.parameters == count_parameters(planted.model) - count_parameters(student)


@pytest.mark.slow
def test_a_budget_of_forwards_is_kept_and_takes_short_intervals_first(planted: Planted) -> None:
    analysis = planted.analyze({"parameters": 0.9}, {"text_stream": "none", "ffn": "none", "modulation_rank": "none"}, budget=300)
    spans = [(c.first, c.last) for c in analysis.candidates]
    assert 0 < len(spans) == analysis.work["considered"] < analysis.work["possible"]
    assert analysis.work["intervals"] <= 300
    assert analysis.work["intervals"] == pytest.approx(analysis.work["spent"])
    longest = max(v - u for u, v in spans)
    assert {s for s in itertools.combinations(range(8), 2) if s[1] - s[0] < longest} <= set(spans)


def test_work_is_counted_in_forwards(planted: Planted) -> None:
    costs = planted.search().costs
    assert costs.spent == 16  # the traced forward of the probe set
    costs.intervals([(2, 4)])
    assert costs.spent == 16 + costs.interval_price(2, 4) == 16 + 3 * 16 * 4 / 8
    assert [kept_choices(2, 4), kept_choices(1, 6)] == [[2, 3, 4], [1, 3, 6]]


def check_target(planted: Planted, plan: CompressionPlan, limit: float, by_hand: tuple[Any, ...] = ()) -> None:
    """At or under the limit, and no edit can be put back but those made by hand."""
    source = planted.source
    assert predicted_parameters(source.family, source.config, plan) <= limit
    assert plan.edits()
    for edit in set(plan.edits()) - set(by_hand):
        assert predicted_parameters(source.family, source.config, plan.without(edit)) > limit, edit


@pytest.mark.slow
def test_half_of_the_parameters(planted: Planted, half: Analysis) -> None:
    check_target(planted, half.plan, 0.5 * count_parameters(planted.model))
    fit = [r for r, c in half.modulation_error.items() if c <= RANK_TOLERANCE]
    assert half.plan.modulation_rank in (None, *([min(fit)] if fit else []))


@pytest.mark.slow
def test_a_modulation_rank_costs_no_more_than_the_recipe_allows(planted: Planted, half: Analysis) -> None:
    """Given by hand it is refused above the limit, which names a rank that would do; chosen, it is the least below it."""
    costs = half.modulation_error
    rank = min(costs)
    limit = 1.01 * min(costs.values())  # that of the largest rank
    with pytest.raises(
        RecipeError, match=rf"plan.modulation_rank = {rank}: costs .* plan.modulation_error = .*: wanted a rank of \d+ or more"
    ):
        planted.select(0.7, {"modulation_rank": rank, "modulation_error": limit})
    chosen = planted.select(0.6, {"modulation_error": limit, "ffn": "none", "text_stream": "none"}).modulation_rank
    assert chosen is None or costs[chosen] <= limit
    assert planted.select(0.7, {"modulation_rank": rank, "modulation_error": 1.01 * costs[rank]}).modulation_rank == rank


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.97, 0.9, 0.7, 0.6, 0.3])
@pytest.mark.parametrize("modulation_rank", ["auto", "none", 4])
def test_targets_are_met_with_no_edit_to_spare(planted: Planted, half: Analysis, target: float, modulation_rank: Any) -> None:
    plan = planted.select(target, {"modulation_rank": modulation_rank})
    check_target(planted, plan, target * count_parameters(planted.model), by_hand=("modulation_rank",) if modulation_rank == 4 else ())


@pytest.mark.parametrize("target", [0.9, 0.6])
@pytest.mark.parametrize("strategy", ["ppcl", "block_influence", "laptop", "even"])
def test_rival_strategies_take_their_own_intervals_only(planted: Planted, target: float, strategy: Any) -> None:
    only_depth = {"text_stream": "none", "ffn": "none", "modulation_rank": "none"}
    search = planted.search(only_depth, strategy)
    plan = search.plan(TargetSettings(parameters=target), "float32")
    found = {(i.first, i.last) for i in plan.intervals}
    removed = plan.num_blocks - len(plan.kept)
    assert found == set(search._picked(strategy, removed) or {})
    assert predicted_parameters(planted.source.family, planted.source.config, plan) <= target * count_parameters(planted.model)
    if strategy == "ppcl":
        assert all(any(u <= a and b <= v for u, v in search.ppcl) for a, b in found)
        assert all(search.start(*s) == s[0] for s in found)


@pytest.mark.slow
def test_scores_of_the_rivals_by_hand(planted: Planted) -> None:
    search = planted.search(strategy="laptop")
    samples = probe_set(planted.samples, 16)
    for block in (0, 3, 7):
        student = copy.deepcopy(planted.model)
        del student.transformer_blocks[block]
        assert search.drop_errors[block] == pytest.approx(velocity_error(planted.model, student, samples), rel=1e-6)
        cosines = []
        for x, t, conditioning in samples:
            seen = trace(planted.model, planted.source.family, {"hidden_states": x, "timestep": t, **conditioning}).states["image"]
            a, b = seen[block].double(), seen[block + 1].double()
            cosines.append(((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).flatten())
        assert search.influences[block] == pytest.approx(1 - torch.cat(cosines).mean().item(), abs=1e-6)


@given(st.integers(1, 12), st.data())
def test_dropped_blocks_join_the_kept_block_before_them(length: int, data: st.DataObject) -> None:
    dropped = data.draw(st.lists(st.integers(0, length - 1), unique=True))
    spans = spans_of_dropped(dropped, [length])
    if len(dropped) == length:
        assert spans is None
        return
    assert spans is not None
    gone = {b for (u, v), stays in spans.items() for b in range(u, v + 1) if b != stays}
    assert gone == set(dropped)
    for (u, _), stays in spans.items():
        assert stays == u or all(b in dropped for b in range(stays))


def test_ppcl_is_trimmed_to_the_budget_from_its_lowest_cka() -> None:
    cka = [[1.0] * 9 for _ in range(9)]
    cka[0][2], cka[3][4], cka[5][8] = 0.9, 0.7, 0.8
    ppcl = [(0, 2), (3, 4), (5, 8)]
    assert trimmed(ppcl, cka, 7) is None
    assert trimmed(ppcl, cka, 6) == ppcl
    assert trimmed(ppcl, cka, 5) == [(0, 2), (5, 8)]
    assert trimmed(ppcl, cka, 4) == [(0, 2), (5, 7)]
    assert trimmed(ppcl, cka, 2) == [(0, 2)]
    assert trimmed(ppcl, cka, 0) == []


def test_agreement_is_the_jaccard_index_of_intervals(planted: Planted, half: Analysis) -> None:
    found = agreement([(0, 1), (3, 5)], [[(0, 1), (3, 5)], [(0, 1)], [(2, 4)]])
    assert (found.jaccard, found.lowest, found.highest, found.runs) == (0.5, 0.0, 1.0, 3)
    assert half.stability.keys() == {"ppcl.resamples", "ppcl.bands", "selection.resamples", "selection.bands"}
    assert all(0 <= a.lowest <= a.jaccard <= a.highest <= 1 for a in half.stability.values())


@pytest.mark.slow
def test_no_allowed_plan_of_depth_alone_is_cheaper(planted: Planted, half: Analysis) -> None:
    """Against all sets of disjoint intervals that meet the target."""
    costs = {(c.first, c.last): c.cost for c in half.candidates if c.kind == "interval"}
    chosen = planted.select(0.65, {"text_stream": "none", "ffn": "none", "modulation_rank": "none"})
    removed = chosen.num_blocks - len(chosen.kept)
    cheapest = min(
        sum(costs[s] for s in spans)
        for n in range(1, 5)
        for spans in itertools.combinations(sorted(costs), n)
        if sum(v - u for u, v in spans) >= removed and all(a[1] < b[0] for a, b in itertools.pairwise(spans))
    )
    assert sum(costs[i.first, i.last] for i in chosen.intervals) == pytest.approx(cheapest, rel=1e-12)
    assert cheapest > 0


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.7), ("bfloat16", 0.5)])
def test_bytes_are_those_of_the_weight_files(planted: Planted, dtype: str, share: float) -> None:
    family, config = planted.source.family, planted.source.config
    limit = int(share * weight_bytes(planted.model, dtype))
    plan = even_plan(planted.source, TargetSettings(bytes=limit), PlanSettings(), dtype)
    assert weight_bytes(empty_model(family, student_config(family, config, plan)), dtype) <= limit
    assert plan == even_plan(planted.source, TargetSettings(bytes=share), PlanSettings(), dtype)


@pytest.mark.slow
def test_memory_and_latency_are_targets_too(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a target counts: the plan is within it, and putting back any edit would not be."""
    family, config = planted.source.family, planted.source.config
    names = ("base_ms", "block_ms", "edit_ms")
    parts: dict[str, Any] = dict(zip(names, (1.0, {"transformer_blocks": 2.0}, {"text_stream": -0.75, "text_ffn": -0.25}), strict=True))
    costs = BlockCosts(version=1, family=NAME, key={}, runs=1, **parts)
    monkeypatch.setattr("ppclc.analysis.budget.require_block_costs", lambda *_: costs)
    gb = vram_bytes(family, config, CompressionPlan.of(NAME, 8), "float32") / 1e9
    for target in ({"vram_gb": 0.7 * gb}, {"latency_ms": 12.0}):
        budget = budget_of(planted.source, TargetSettings(**target), "float32")
        assert budget
        plan = planted.search().plan(TargetSettings(**target), "float32")
        assert budget.met(plan)
        assert not any(budget.met(plan.without(edit)) for edit in plan.edits())
    assert costs.latency_ms(plan, config) <= 12 < costs.latency_ms(CompressionPlan.of(NAME, 8), config) == 17


@pytest.mark.slow
def test_targets_out_of_reach_are_refused(planted: Planted, half: Analysis) -> None:
    with pytest.raises(RecipeError, match=r"target\.parameters: [\d,]+ cannot be reached by the edits that the recipe allows"):
        planted.select(0.01)
    with pytest.raises(RecipeError, match="cannot be reached"):
        planted.select(0.9, {"intervals": "none", "text_stream": "none", "ffn": "none", "modulation_rank": "none"})
    with pytest.raises(
        RecipeError, match=r"target: got nothing, wanted parameters, bytes, vram_gb or latency_ms, or plan\.intervals as a list"
    ):
        planted.analyze({}, {"text_stream": "none", "ffn": "none", "modulation_rank": "none"})
    with pytest.raises(RecipeError, match=r"plan\.modulation_rank = 33: wanted at most the width, 32"):
        planted.select(0.9, {"modulation_rank": 33})


@pytest.mark.slow
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
    options = planted.search({"protect": [4], "modulation_rank": "none", "text_stream": "none", "ffn": "none", "intervals": "none"}).options
    assert options.run(2, [(5, 6)]) == [5, 7]
    assert options.run(3, [(5, 6)]) is None


@pytest.mark.slow
def test_edits_made_by_hand_are_kept(planted: Planted, half: Analysis) -> None:
    by_hand = {"intervals": [[1, 2], [5, 7]], "text_stream": [3, 5], "modulation_rank": 7, "dead_code": False}
    plan = planted.analyze({}, by_hand).plan
    assert plan == CompressionPlan.of(NAME, 8, [(1, 2), (5, 7)], [3, 5], 7, False)
    assert planted.select(0.9, by_hand) == plan  # though less would do
    assert even_plan(planted.source, TargetSettings(), PlanSettings(**by_hand), "float32") == plan
    # Counted with what the edits by hand save: free networks do the rest, as far as they go.
    smaller = planted.select(0.3, by_hand)
    assert smaller.ffn
    assert smaller.model_copy(update={"ffn": ()}) == plan
    assert predicted_parameters(planted.source.family, planted.source.config, smaller) <= 0.3 * count_parameters(planted.model)
    with pytest.raises(RecipeError, match="cannot be reached"):
        planted.select(0.1, by_hand)
    with pytest.raises(PlanError, match=r"text_stream: block 2: wanted a kept block"):
        planted.select(0.9, by_hand | {"text_stream": [2]})


@pytest.mark.slow
def test_intervals_made_by_hand_count_towards_the_target(planted: Planted) -> None:
    """Alone they come down to the target, and no other edit is free to help."""
    only = {"intervals": [[1, 2], [5, 7]], "text_stream": "none", "ffn": "none", "modulation_rank": "none"}
    assert planted.select(0.7, only) == CompressionPlan.of(NAME, 8, [(1, 2), (5, 7)])


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.7])
def test_a_text_stream_made_by_hand_steers_the_free_intervals_around_it(planted: Planted, target: float) -> None:
    by_hand = {"text_stream": [4], "modulation_rank": "none"}
    for plan in (
        planted.analyze({"parameters": target}, by_hand).plan,
        even_plan(planted.source, TargetSettings(parameters=target), PlanSettings(**by_hand), "float32"),
    ):
        assert [e.block for e in plan.text_stream] == [4]
        assert predicted_parameters(planted.source.family, planted.source.config, plan) <= target * count_parameters(planted.model)


@pytest.mark.slow
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
    stats = calibrate(ResidentTeacher(model, family), samples, CalibrateSettings(samples=64, longest=3), quiet)
    plan = CompressionPlan.of(NAME, 5, [], [3], None, False)
    for ridge, limit in ((1e-9, 1e-6), (1e-1, 1.0)):
        student = apply_plan(model, plan, closed_form_bank(stats, ridge, plan))
        error = velocity_error(model, student, probe_set(samples, 16))
        assert error < limit
        maps = text_maps(stats, ridge, (3, 3), (2, 2))
        assert (maps["text_out.weight"] - torch.eye(width)).abs().max() < 1e-4
    assert error > 1e-6  # a ridge that pulls is seen
    with pytest.raises(PlanError, match=r"block 4 is 4 blocks from its reference 0; calibrate\.longest = 3: wanted at least that"):
        text_maps(stats, 1e-4, (4, 4), (0, 0))
