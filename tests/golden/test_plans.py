"""Plans that a rewrite must leave as they are: raise a pass's VERSION when one of these changes on purpose."""

from __future__ import annotations

import torch

from ppclc.analysis.budget import PlanSettings, TargetSettings, even_plan
from ppclc.analysis.detection import first_difference_intervals
from ppclc.analysis.selection import cheapest_chains
from ppclc.loading.sources import open_source


def test_even_plan_of_the_embedded_teacher() -> None:
    plan = even_plan(open_source("builtin:two-digits"), TargetSettings(parameters=0.5), PlanSettings(), "float32")
    # Three pairs at rank 8 would leave 51.9 %.
    assert [(i.first, i.last) for i in plan.intervals] == [(0, 1), (4, 5), (6, 7), (10, 11)]
    assert plan.modulation_rank == 8
    assert plan.dead_code


def test_first_difference_rule_on_a_fixed_map() -> None:
    cka = torch.full((6, 6), float("nan"), dtype=torch.float64)
    rows = {0: [1.0, 0.90, 0.85, 0.60], 3: [1.0, 0.99, 0.97]}
    for u, row in rows.items():
        cka[u, u : u + len(row)] = torch.tensor(row, dtype=torch.float64)
    assert first_difference_intervals(cka.tolist())[0] == [(0, 2), (3, 4)]


def test_cheapest_chains_on_fixed_costs() -> None:
    costs = {(0, 1): 5.0, (1, 2): 1.0, (2, 3): 2.0, (1, 3): 2.6, (4, 5): 1.5}
    chains = cheapest_chains([6], costs)
    assert chains == {
        (0,): (0.0, []),
        (1,): (1.0, [(1, 2)]),
        (2,): (2.5, [(1, 2), (4, 5)]),
        (3,): (4.1, [(1, 3), (4, 5)]),
    } | {k: v for k, v in chains.items() if k > (3,)}
