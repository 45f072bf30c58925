"""Selection where estimates are hard: many width edits that overlap, and the first of which ends dead code too."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ppclc.analysis import selection
from ppclc.analysis.budget import TargetSettings, budget_of
from ppclc.analysis.selection import Options
from ppclc.loading.sources import open_source


def cheap_text_options(needed: int = 0, **changes: Any) -> Options:
    """Twelve blocks whose mapped text streams are next to free; no interval removes the block that is needed."""
    spans = [(u, v) for u, v in itertools.combinations(range(12), 2) if v - u < 6 and not u < needed <= v]
    costs = {(u, v): 0.01 * (v - u) ** 1.5 for u, v in spans}
    chains = selection.best_chains([12], costs, 6)
    runs = [(1e-4 * k, k) for k in range(9)]
    return Options(family="qwen_image", groups=[12], chains=chains, ranks=[(0.0, None), (1e-4, 4)], text_runs=runs, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.25, 0.2])
def test_small_targets_are_met_where_cheap_edits_promise_too_much(share: float) -> None:
    """With every text edit next to free, hundreds of mixes without depth or rank look cheaper than those that reach the target."""
    source = open_source("builtin:two-digits")
    ffns = sorted([(1e-5 * b, "text", b) for b in range(12)] + [(0.003 + 1e-4 * b, "image", b) for b in range(12)])
    options = cheap_text_options(ffns=ffns)
    budget = budget_of(source, TargetSettings(parameters=share), "float32")
    assert budget is not None
    for plan in selection.contenders(options, budget, 4):
        assert budget.met(plan)
        cheapest = [plan.without(e) for e in plan.edits() if selection_allows(plan, e)]
        assert not any(budget.met(p) for p in cheapest)


def selection_allows(plan: object, edit: object) -> bool:
    """Edits on which no other rests."""
    from ppclc.errors import PlanError

    try:
        plan.without(edit)  # type: ignore[attr-defined]
    except PlanError:
        return False
    return True


@pytest.mark.slow
def test_a_text_network_by_hand_leaves_out_the_mixes_that_contradict_it() -> None:
    """Of runs of mapped text blocks those after which its block still computes text; it is in every plan."""
    source = open_source("builtin:two-digits")
    options = cheap_text_options(needed=5, fixed_ffns=[(5, "text")])
    budget = budget_of(source, TargetSettings(parameters=0.5), "float32")
    assert budget is not None
    found = selection.contenders(options, budget, 4)
    assert found
    for plan in found:
        assert budget.met(plan)
        assert [(e.block, e.stream) for e in plan.ffn] == [(5, "text")]
        assert min((e.block for e in plan.text_stream), default=12) > 6 or not plan.dead_code
