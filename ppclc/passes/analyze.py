"""analyze: probes, CKA, first differences, candidates with their costs, and the plan that meets the target.

PPCL's detection (arXiv 2511.16156) follows from second moments alone (`ppclc.analysis.closed_forms`). The selection
under a budget is ours: a candidate's cost is the velocity error with a closed-form stand-in swapped in
(`ppclc.analysis.edit_costs`), and the cheapest mix of edits that meets the target is taken (`ppclc.analysis.selection`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ppclc.analysis import detection
from ppclc.analysis.budget import PlanSettings, TargetSettings
from ppclc.analysis.closed_forms import Probes, cka_map, far_of, modulation_basis
from ppclc.analysis.detection import Span
from ppclc.analysis.edit_costs import EditCosts
from ppclc.analysis.journal import Journal
from ppclc.analysis.moments import BANDS, CHUNKS, near_of, solving_device
from ppclc.analysis.search import RESAMPLES, AnalyzeSettings, Lessons, Search, agreement
from ppclc.data.samples import Sample, Samples
from ppclc.families import STREAMS
from ppclc.loading.sources import Source
from ppclc.records import Agreement, Analysis, CalibrationStats
from ppclc.teachers import Teacher

VERSION = 7


def analyze(
    teacher: Teacher,
    source: Source,
    stats: CalibrationStats,
    samples: Samples,
    settings: AnalyzeSettings,
    target: TargetSettings,
    wanted: PlanSettings,
    dtype: str,
    progress: Callable[[float, str], None],
    lessons: Lessons = Lessons(),  # noqa: B008 (frozen)
    work: Path | None = None,
) -> Analysis:
    """The analysis and the plan. A streamed teacher is not trained: settings must leave out the supernet and trials.

    work: a folder for what has been found, so that an analysis that was stopped goes on from there, to the same result.

    Raises:
        RecipeError: a target that no allowed set of edits reaches.
        PlanError: edits fixed by hand that this model cannot take.
    """
    family = source.family
    streams = list(STREAMS)
    device = solving_device(teacher.device)
    probes = {s: Probes(near_of(stats.tensors, stats.rows, s, stats.num_blocks, device=device), settings.ridge) for s in streams}
    far = {s: far_of(stats, s, device) if settings.reading == "caption" else None for s in streams}
    maps = {s: cka_map(p, stats.longest, far[s]) for s, p in probes.items()}
    sizes = family.sizes(source.config)
    detected = {s: detection.first_difference_intervals(m.tolist(), sizes) for s, m in maps.items()}
    journal = Journal(work / "found.jsonl" if work else None)
    costs = EditCosts(teacher, probe_set(samples, settings.probes), stats, settings.ridge, settings.budget, journal)
    search = Search(source, costs, settings, wanted, maps[streams[0]].tolist(), detected[streams[0]][0], progress)
    plan = search.plan(target, dtype, samples, lessons)
    starts = search.all_starts(plan)
    modulation = {f"modulation.{k}": v for k, v in modulation_basis(stats).items()} if "temb" in stats.rows else {}
    return Analysis(
        reading=settings.reading,
        strategy=settings.strategy,
        streams=streams,
        probe_error={s: [p.error(i) for i in range(stats.num_blocks)] for s, p in probes.items()},
        first_differences={s: d[1] for s, d in detected.items()},
        ppcl_intervals=detected[streams[0]][0],
        candidates=search.candidates(),
        modulation_error=search.rank_costs,
        stability={**detection_stability(stats, streams[0], settings, sizes, detected[streams[0]][0]), **search.stability(plan)},
        work=search.work(),
        supernet=search.scores,
        trials=search.trials,
        start_trials=search.start_trials,
        starts=starts,
        plan=plan,
        tensors={"cka": torch.stack([maps[s] for s in streams]), **modulation},
    )


def probe_set(samples: Samples, count: int) -> list[Sample]:
    """The samples on which candidates are swapped in, in batches of at most 64."""
    generator = torch.Generator().manual_seed(20)
    return [samples.draw(min(64, count - i), generator) for i in range(0, count, 64)]


def detection_stability(
    stats: CalibrationStats, stream: str, settings: AnalyzeSettings, sizes: Sequence[int], chosen: Sequence[Span]
) -> dict[str, Agreement]:
    """How far PPCL's intervals agree on resampled chunks of the calibration samples and on single timestep bands.

    Always in the equation reading, which near moments suffice for; nothing where moments were not grouped.
    """
    chunks = [f"chunk.{c}." for c in range(CHUNKS) if f"chunk.{c}.{stream}" in stats.rows]
    if not stats.grouped or len(chunks) < 2 or settings.reading != "equation":
        return {}

    def detect(weights: Mapping[str, float]) -> list[Span]:
        near = near_of(stats.tensors, stats.rows, stream, stats.num_blocks, weights)
        return detection.first_difference_intervals(cka_map(Probes(near, settings.ridge), stats.longest).tolist(), sizes)[0]

    generator = torch.Generator().manual_seed(0)
    resampled = []
    for _ in range(RESAMPLES):
        drawn = torch.bincount(torch.randint(len(chunks), (len(chunks),), generator=generator), minlength=len(chunks))
        resampled.append(detect({c: float(w) for c, w in zip(chunks, drawn.tolist(), strict=True) if w}))
    bands = [b for b in range(BANDS) if f"band.{b}.{stream}" in stats.rows]
    return {
        "ppcl.resamples": agreement(chosen, resampled),
        "ppcl.bands": agreement(chosen, [detect({f"band.{b}.": 1.0}) for b in bands]),
    }
