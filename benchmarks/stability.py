"""How far the chosen intervals depend on the calibration: agreement between independent calibrations, by their size.

    python -m benchmarks.stability [--samples 512 2048 4096] [--seeds 0 1 2 3 4 5] [--removed 3 4 6]

For every size, calibrations on different seeds; the Jaccard index of the intervals that two of them choose,
over all pairs, with the 95 % interval of its mean over seeds left out one at a time (jackknife). PPCL's rule
reads moments alone; ours also a probe set, which is drawn anew for every seed.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch

from benchmarks.results_file import write_results
from ppclc.analysis.budget import PlanSettings
from ppclc.analysis.closed_forms import Probes, cka_map
from ppclc.analysis.detection import Span, first_difference_intervals
from ppclc.analysis.edit_costs import EditCosts
from ppclc.analysis.moments import near_of
from ppclc.analysis.search import AnalyzeSettings, Search
from ppclc.analysis.selection import cheapest_chains
from ppclc.data.samples import Samples, open_samples
from ppclc.loading.sources import open_source
from ppclc.models import load_source, quiet_libraries, set_threads
from ppclc.passes.calibrate import CalibrateSettings, calibrate
from ppclc.teachers import ResidentTeacher, Teacher


def nothing(*_: Any) -> None:
    """Progress that nobody watches."""


def jaccard(a: list[Span], b: list[Span]) -> float:
    """Intervals that both have, as a share of those that either has."""
    either = set(a) | set(b)
    return len(set(a) & set(b)) / len(either) if either else 1.0


def agreement(chosen: list[list[Span]]) -> dict[str, Any]:
    """Mean Jaccard index over pairs, with its jackknife interval."""

    def mean(some: list[list[Span]]) -> float:
        values = [jaccard(a, b) for a, b in itertools.combinations(some, 2)]
        return sum(values) / len(values)

    n = len(chosen)
    left_out = torch.tensor([mean(chosen[:i] + chosen[i + 1 :]) for i in range(n)], dtype=torch.float64)
    half = 1.96 * ((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt().item()
    whole = mean(chosen)
    return {"jaccard": whole, "ci95": [max(0.0, whole - half), min(1.0, whole + half)], "n": n, "chosen": chosen}


def choices(
    teacher: Teacher, source: Any, samples: Samples, count: int, seed: int, removed: list[int], budget: int
) -> dict[str, list[Span]]:
    """The intervals of PPCL's rule, and ours by the number of removed blocks."""
    stats = calibrate(teacher, samples, CalibrateSettings(samples=count, seed=seed), nothing)
    table = cka_map(Probes(near_of(stats.tensors, stats.rows, "image", stats.num_blocks), 1e-4), stats.longest)
    settings = AnalyzeSettings(budget=budget)
    generator = torch.Generator().manual_seed(1000 + seed)
    costs = EditCosts(teacher, [samples.draw(64, generator) for _ in range(2)], stats, settings.ridge)
    search = Search(source, costs, settings, PlanSettings(), [], [], nothing)
    search.measure_intervals()
    chains = cheapest_chains(search.sizes, search.interval_costs)
    return {"ppcl": first_difference_intervals(table.tolist())[0]} | {f"ours_{n}": chains[(n,)][1] for n in removed}


def main() -> None:
    """Calibrate over and over, compare, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--removed", type=int, nargs="+", default=[3, 4, 6])
    parser.add_argument("--budget", type=int, default=6144)
    options = parser.parse_args()
    quiet_libraries()
    source = open_source("builtin:two-digits")
    set_threads(source)
    teacher = ResidentTeacher(load_source(source), source.family)
    samples = open_samples("images", source, teacher, "choose")
    table = {}
    for count in options.samples:
        found = [choices(teacher, source, samples, count, seed, options.removed, options.budget) for seed in options.seeds]
        table[str(count)] = {rule: agreement([f[rule] for f in found]) for rule in found[0]}
        print(count, {rule: round(row["jaccard"], 3) for rule, row in table[str(count)].items()}, flush=True)
    print(write_results("stability", {"options": vars(options), "by_samples": table}))


if __name__ == "__main__":
    main()
