"""Adapters: the closed form against plain least squares, the student against its block with the maps in front, the budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ppclc.analysis.budget import PlanSettings, TargetSettings, adapted_spans, budget_of, even_plan
from ppclc.analysis.closed_forms import interval_adapters
from ppclc.analysis.edit_costs import EditCosts
from ppclc.analysis.moments import Moments
from ppclc.analysis.selection import Options, choose
from ppclc.data.samples import Samples, open_samples
from ppclc.errors import ModelError, PlanError, RecipeError
from ppclc.families import Family
from ppclc.loading.classes import count_parameters, empty_model, predicted_parameters, student_config
from ppclc.loading.sources import Source, open_source
from ppclc.models import apply_plan, block_state
from ppclc.passes.analyze import probe_set
from ppclc.passes.calibrate import CalibrateSettings, calibrate
from ppclc.plan import CompressionPlan
from ppclc.quality import velocity_error
from ppclc.records import CalibrationStats
from ppclc.teachers import ResidentTeacher

NAME = "qwen_image"
Banks = Callable[..., dict[str, dict[str, torch.Tensor]]]
PLANS = {
    "plain": CompressionPlan.of(NAME, 6, [(0, 1), (3, 5)], adapters=[(0, 1), (3, 5)]),
    "one of two": CompressionPlan.of(NAME, 6, [(0, 1), (3, 5)], adapters=[(3, 5)]),
    "rank and ffn": CompressionPlan.of(NAME, 6, [(1, 2)], [], 4, True, [(1, "image"), (1, "text")], [(1, 2)]),
    # Adapters of a whole block, of one whose text is mapped, of one that emits no text.
    "mapped": CompressionPlan.of(NAME, 6, [(0, 1), (2, 3), (4, 5)], [2], None, True, adapters=[(0, 1), (2, 3), (4, 5)]),
    "mapped to the end": CompressionPlan.of(NAME, 6, [(1, 2), (4, 5)], [3, 4], None, True, adapters=[(1, 2), (4, 5)]),
}


def run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs, return_dict=False)[0]
    return out


def config_of(model: Any) -> dict[str, Any]:
    return {"_class_name": type(model).__name__, **model.config}


def without_adapters(plan: CompressionPlan) -> CompressionPlan:
    """The same plan without them, and with dead code where nothing else makes the student a class of its own."""
    dead = plan.dead_code and bool(plan.text_stream or plan.ffn or plan.modulation_rank)
    return plan.model_copy(update={"adapters": (), "dead_code": dead})


# ------------------------------------------------------------------------------------------- the closed form


def rows(seed: int, width: int = 8) -> list[torch.Tensor]:
    """Rows (300, D) of five states that follow from one another, with a mean far from zero."""
    g = torch.Generator().manual_seed(seed)
    states = [torch.randn(300, width, generator=g, dtype=torch.float64) + 3]
    for _ in range(4):
        mixing = torch.randn(width, width, generator=g, dtype=torch.float64) / width
        states.append(states[-1] + torch.tanh(states[-1] @ mixing) + 0.2)
    return states


def stats_of(states: dict[str, list[torch.Tensor]], longest: int) -> CalibrationStats:
    moments = Moments()
    for stream, some in states.items():
        for j in range(len(some)):
            moments.add_far(stream, j, {i: some[i] for i in range(max(0, j - longest), j + 1)})
    return CalibrationStats(num_blocks=4, longest=longest, rows=moments.rows, samples=300, tensors=moments.tensors)


def test_without_a_ridge_adapters_are_least_squares_on_the_raw_rows() -> None:
    states = {"image": rows(0), "text": rows(1)}
    found = interval_adapters(stats_of(states, 3), 1e-13, 1, 3)
    assert {k: (tuple(v.shape), v.dtype) for k, v in found.items()} == {
        f"{s}_adapter.{k}": (shape, torch.float32) for s in states for k, shape in (("weight", (8, 8)), ("bias", (8,)))
    }
    for stream, some in states.items():
        wanted = np.linalg.lstsq(np.column_stack([some[1].numpy(), np.ones(300)]), some[3].numpy(), rcond=None)[0]
        assert np.abs(found[f"{stream}_adapter.weight"].numpy().T - wanted[:-1]).max() <= 1e-5
        assert np.abs(found[f"{stream}_adapter.bias"].numpy() - wanted[-1]).max() <= 1e-5


def test_a_ridge_pulls_towards_the_identity_and_leaves_the_mean_alone() -> None:
    states = {"image": rows(2), "text": rows(3)}
    stats, ridge = stats_of(states, 3), 0.05
    found = interval_adapters(stats, ridge, 0, 2)
    for stream, some in states.items():
        x, step = (v - v.mean(0) for v in (some[0], some[2] - some[0]))
        penalty = ridge * (x.square().sum() / 8).item()
        left = np.vstack([x.numpy(), penalty**0.5 * np.eye(8)])
        wanted = np.eye(8) + np.linalg.lstsq(left, np.vstack([step.numpy(), np.zeros((8, 8))]), rcond=None)[0]
        weight, bias = found[f"{stream}_adapter.weight"].double(), found[f"{stream}_adapter.bias"].double()
        assert np.abs(weight.numpy().T - wanted).max() <= 1e-6
        assert (some[0].mean(0) @ weight.T + bias - some[2].mean(0)).abs().max() <= 1e-5
    far = interval_adapters(stats, 1e9, 0, 2)["image_adapter.weight"]
    assert (far - torch.eye(8)).abs().max() <= 1e-6


def test_a_block_that_stands_where_it_stood_has_the_identity() -> None:
    found = interval_adapters(stats_of({"image": rows(0), "text": rows(1)}, 2), 1e-4, 2, 2)
    for stream in ("image", "text"):
        assert torch.equal(found[f"{stream}_adapter.weight"], torch.eye(8))
        assert torch.equal(found[f"{stream}_adapter.bias"], torch.zeros(8))


def test_blocks_out_of_reach_of_the_moments_are_refused() -> None:
    stats = stats_of({"image": rows(0), "text": rows(1)}, 2)
    with pytest.raises(PlanError, match=r"block 3 is 3 blocks from the interval's first, 0; calibrate\.longest = 2: wanted at least that"):
        interval_adapters(stats, 1e-4, 0, 3)


# -------------------------------------------------------------------------------------------- the student


@pytest.mark.parametrize("name", PLANS)
def test_identity_adapters_change_nothing(name: str, teacher: Any, family: Family, inputs: dict[str, Any], random_bank: Banks) -> None:
    plan = PLANS[name]
    bank = random_bank(teacher, plan)
    eye, zero = torch.eye(teacher.inner_dim), torch.zeros(teacher.inner_dim)
    identity = {f"{s}_adapter.{k}": v for s in ("image", "text") for k, v in (("weight", eye), ("bias", zero))}
    keys = [plan.interval_key(i) for i in plan.adapters]
    plain = without_adapters(plan)
    adapted = [plan.ffn_key(e.block, e.stream) for e in plan.ffn] + [plan.text_key(e.block) for e in plan.text_stream]
    bare_keys = [plain.ffn_key(e.block, e.stream) for e in plain.ffn] + [plain.text_key(e.block) for e in plain.text_stream]
    same_maps = {own: bank[other] for own, other in zip(bare_keys, adapted, strict=True)}
    wanted = run(apply_plan(teacher, plain, bank | same_maps), inputs)
    found = run(apply_plan(teacher, plan, bank | {k: bank[k] | identity for k in keys}), inputs)
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    # Without a record in the bank: the first block, which these records hold, and the identity.
    bare = {k: v for k, v in bank.items() if k not in keys}
    assert torch.equal(run(apply_plan(teacher, plan, bare), inputs), found)
    # They count, each of them.
    for key in keys:
        assert (run(apply_plan(teacher, plan, bare | {key: bank[key]}), inputs) - wanted).norm() > 1e-2 * wanted.norm()


@pytest.mark.parametrize("name", PLANS)
def test_what_comes_in_is_what_was_counted(name: str, teacher: Any, family: Family, random_bank: Banks) -> None:
    """A matrix and an offset a stream, but for text where it is mapped."""
    plan = PLANS[name]
    plain = plan.model_copy(update={"adapters": (), "dead_code": False})
    whole = plan.model_copy(update={"dead_code": False})
    mapped = {e.block for e in plan.text_stream}
    maps = sum(1 if i.first in mapped else 2 for i in plan.adapters)
    width = teacher.inner_dim
    more = predicted_parameters(family, config_of(teacher), whole) - predicted_parameters(family, config_of(teacher), plain)
    assert more == maps * (width**2 + width)
    student = apply_plan(teacher, plan, random_bank(teacher, plan))
    assert count_parameters(student) == predicted_parameters(family, config_of(teacher), plan)
    assert sum("_adapter." in n for n in student.state_dict()) == 2 * maps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rank and ffn", "mapped", "mapped to the end"])
def test_no_tensor_is_without_effect(name: str, teacher: Any, inputs: dict[str, Any], random_bank: Banks) -> None:
    plan = PLANS[name]
    student = apply_plan(teacher, plan, random_bank(teacher, plan))
    before = run(student, inputs)
    g = torch.Generator().manual_seed(7)
    for key, parameter in student.named_parameters():
        kept = parameter.data.clone()
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)
        assert not torch.equal(run(student, inputs), before), key
        parameter.data = kept
    assert torch.equal(run(student, inputs), before)


def test_a_distilled_block_comes_with_its_adapters_and_not_without(make_teacher: Callable[..., Any], teacher: Any) -> None:
    """A block that was distilled without adapters is another edit."""
    other = block_state(make_teacher(1, seed=9).transformer_blocks[0])
    maps = {
        f"{s}_adapter.{k}": torch.randn(32, 32)[: 32 if k == "weight" else 1].squeeze()
        for s in ("image", "text")
        for k in ("weight", "bias")
    }
    plan = PLANS["one of two"]
    state = apply_plan(teacher, plan, {"interval-0-1": other, "interval-3-5": other, "interval-3-5-adapted": other | maps}).state_dict()
    assert {n.split(".")[1] for n in state if "_adapter" in n} == {"2"}
    for name, tensor in (other | maps).items():
        assert torch.equal(state[f"transformer_blocks.2.{name}"], tensor)
    plain = apply_plan(teacher, plan, {"interval-3-5": other}).state_dict()
    assert torch.equal(plain["transformer_blocks.2.attn.to_q.weight"], teacher.transformer_blocks[3].attn.to_q.weight)


def test_configurations_that_lie_are_refused(teacher: Any, family: Family) -> None:
    edited = student_config(family, config_of(teacher), PLANS["one of two"])
    assert edited["adapted_blocks"] == [2]
    with pytest.raises(ModelError, match=r"adapted_blocks = \[3\]: wanted blocks within 0\.\.2"):
        empty_model(family, edited | {"adapted_blocks": [3]})
    assert "adapted_blocks" not in student_config(family, config_of(teacher), CompressionPlan.of(NAME, 6, [(0, 1)], modulation_rank=3))


# ------------------------------------------------------------------------------------ where a block starts


@pytest.fixture(scope="module")
def source(teacher_folder: Any) -> Source:
    return open_source(str(teacher_folder))


@pytest.fixture(scope="module")
def costs(source: Source, teacher: Any, family: Family) -> EditCosts:
    noise: Samples = open_samples("auto", source, None, "train")
    stats = calibrate(ResidentTeacher(teacher, family), noise, CalibrateSettings(samples=128, longest=2), lambda *_: None)
    return EditCosts(ResidentTeacher(teacher, family), probe_set(noise, 16), stats, 1e-4)


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 3), (4, 5)])
def test_the_cost_of_a_start_is_the_error_of_the_student(costs: EditCosts, teacher: Any, first: int, last: int) -> None:
    plan = CompressionPlan.of(NAME, 6, [(first, last)], adapters=[(first, last)])
    key = plan.interval_key(plan.intervals[0])
    by_start = {}
    for start in range(first, last + 1):
        record = block_state(teacher.transformer_blocks[start]) | interval_adapters(costs.stats, 1e-4, first, start)
        student = apply_plan(teacher, plan, {key: record})
        by_start[start] = velocity_error(teacher, student, costs.samples)
        assert costs.share(costs.adapted_from(first, last, start)) == pytest.approx(by_start[start], rel=1e-4)
    errors, best = costs.adapted(first, last)
    assert best == min(by_start, key=lambda s: by_start[s])
    assert costs.share(errors) == pytest.approx(by_start[best], rel=1e-4)


def test_blocks_beyond_the_moments_are_not_tried(costs: EditCosts) -> None:
    assert costs.stats.longest == 2
    assert costs.adapted(0, 5)[1] in (0, 2)


# ---------------------------------------------------------------------------------- the recipe and the budget


def test_the_recipe_says_which_intervals_have_adapters() -> None:
    by_hand: dict[str, Any] = {"intervals": [[1, 2], [4, 5]]}
    assert adapted_spans(PlanSettings()) == adapted_spans(PlanSettings(adapters="none", **by_hand)) == []
    assert adapted_spans(PlanSettings(adapters="auto")) is None
    assert adapted_spans(PlanSettings(adapters=[[4, 5]], **by_hand)) == [(4, 5)]
    for settings in (
        PlanSettings(adapters=[[1, 2]]),
        PlanSettings(adapters=[[1, 3]], **by_hand),
        PlanSettings(adapters=[[1, 2]], intervals="none"),
    ):
        with pytest.raises(RecipeError, match=r"plan\.adapters: got \[1, [23]\], but plan\.intervals = .*: wanted intervals that it lists"):
            adapted_spans(settings)


def test_plans_by_configuration_alone_have_them(source: Source) -> None:
    wanted = PlanSettings(intervals=[[1, 2], [4, 5]], adapters=[[4, 5]], modulation_rank="none")
    assert even_plan(source, TargetSettings(), wanted, "float32") == CompressionPlan.of(
        NAME, 6, [(1, 2), (4, 5)], dead_code=True, adapters=[(4, 5)]
    )
    budget = budget_of(source, TargetSettings(parameters=0.6), "float32")
    assert budget is not None
    plan = even_plan(source, TargetSettings(parameters=0.6), PlanSettings(adapters="auto"), "float32")
    assert plan.adapters == plan.intervals != ()
    assert budget.met(plan)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("target", [0.85, 0.7, 0.55, 0.4])
def test_the_budget_counts_them(source: Source, rank: int | None, target: float) -> None:
    """The estimate that orders the mixes misses none: of all chains the cheapest whose plan really fits is taken."""
    budget = budget_of(source, TargetSettings(parameters=target), "float32")
    assert budget is not None
    chains = {(n,): [(float(n), [(b, b + 1) for b in range(0, 2 * n, 2)])] for n in range(4)} | {
        (n,): [(float(n), [(0, n)])] for n in (4, 5)
    }
    options = Options(NAME, [6], chains, ranks=[(0.0, rank)], adapters=None)
    plan = choose(options, budget)
    fits = [n for n, ((_, spans),) in sorted(chains.items()) if budget.met(options.plan(spans, rank=rank))]
    assert plan == options.plan(chains[fits[0]][0][1], rank=rank)
    assert plan.adapters == plan.intervals
    assert plan.dead_code == bool(plan.intervals or rank)
