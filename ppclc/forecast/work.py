"""What a recipe's passes have before them, as far as it is known before anything runs: samples, moments, edits that are tried and distilled."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

from ppclc.analysis.budget import allows
from ppclc.analysis.detection import Span, group_ranges
from ppclc.analysis.edit_costs import kept_choices
from ppclc.analysis.reach import MomentCounts, moment_counts, reach_of
from ppclc.analysis.search import AnalyzeSettings
from ppclc.costs.predictions import Prediction
from ppclc.data.samples import TRAJECTORY_STEPS
from ppclc.data_size import sample_size
from ppclc.forecast.speeds import NOT_MEASURED, Speeds
from ppclc.loading.sources import Source
from ppclc.machine.devices import device_here
from ppclc.plan import CompressionPlan
from ppclc.recipe import Recipe
from ppclc.room import analysis_here

SIDE_BY_SIDE = 1.1
"""What threads that run beside each other lose."""


@dataclass(frozen=True)
class Work:
    """What the passes have before them."""

    recipe: Recipe
    source: Source
    plan: CompressionPlan
    teacher: Prediction
    student: Prediction
    speeds: Speeds = NOT_MEASURED
    lanes: int = 1

    @property
    def blocks(self) -> int:
        """Blocks of the teacher."""
        return self.plan.num_blocks

    @cached_property
    def analysis(self) -> AnalyzeSettings:
        """Section `analyze` as teacher and device allow it."""
        return analysis_here(self.recipe, self.source, device_here())

    @cached_property
    def size(self) -> dict[str, int]:
        """What a sample is made of."""
        return sample_size(self.recipe, self.source)

    @property
    def judged(self) -> bool:
        """Whether the model has a task that judges images."""
        return self.source.task is not None

    @property
    def targeted(self) -> bool:
        """Whether the analysis is to reach a target, and so weighs what is left free."""
        return self.recipe.target.is_given

    @cached_property
    def moments(self) -> MomentCounts:
        """What the calibration keeps."""
        recipe, family, config = self.recipe, self.source.family, self.source.config
        reach = reach_of(family, config, recipe.plan, self.targeted, recipe.analyze.reading)
        return moment_counts(family, config, recipe.calibrate.longest, reach)

    @cached_property
    def draw_s(self) -> float:
        """Seconds that a sample takes to be drawn, beside the teacher's own forward."""
        return TRAJECTORY_STEPS * self.speeds.teacher_s if self.recipe.calibrate.source == "prompts" else 0.0

    def beside(self, *seconds: float) -> float:
        """Wall time of things that run beside each other in threads of their own."""
        return max(max(seconds), sum(seconds) / min(self.lanes, len(seconds))) * (SIDE_BY_SIDE if len(seconds) > 1 else 1)


def intervals_of(work: Work) -> list[Span]:
    """Every interval that the recipe allows, short ones first."""
    longest = min(work.recipe.calibrate.longest, work.blocks)
    ranges = group_ranges(work.source.family.sizes(work.source.config))
    pairs = [(u, v) for first, end in ranges for u in range(first, end) for v in range(u + 1, min(u + longest, end))]
    spans = [(u, v) for u, v in pairs if allows(work.recipe.plan, u, v)]
    return sorted(spans, key=lambda s: (s[1] - s[0], s))


def interval_forwards(work: Work, u: int, v: int) -> float:
    """Forwards of one sample that the cost of an interval takes."""
    return work.analysis.probes * len(kept_choices(u, v)) * (work.blocks - v) / work.blocks


def distilled_spans(work: Work) -> list[Span]:
    """Intervals that are distilled: the plan's, and with `distill.bank: all` every other one whose cost the budget lets be measured."""
    own, settings = [(i.first, i.last) for i in work.plan.intervals], work.analysis
    measured = work.targeted and work.recipe.plan.intervals == "auto" and settings.strategy == "output_error"
    if work.recipe.distill.bank == "plan" or not measured:
        return own
    spent = itertools.accumulate((interval_forwards(work, *span) for span in intervals_of(work)), initial=0.0)
    considered = [
        s
        for s, after in zip(intervals_of(work), itertools.islice(spent, 1, None), strict=True)
        if after <= settings.budget - settings.probes
    ]
    return list(dict.fromkeys([*own, *considered]))


def shares_weights(work: Work) -> bool:
    """Whether a supernet says which blocks go."""
    settings = work.analysis
    searched = work.targeted and settings.strategy == "output_error" and work.recipe.plan.intervals == "auto"
    return searched and settings.supernet_steps > 0 and bool(work.plan.intervals)


def trial_students(work: Work) -> int:
    """Students that are trained for a while before one plan is taken: of one depth a supernet leaves one, if no width is free."""
    settings, wanted = work.analysis, work.recipe.plan
    several = "auto" in (wanted.text_stream, wanted.ffn, wanted.modulation_rank) or not shares_weights(work)
    return settings.trials if work.targeted and settings.strategy == "output_error" and settings.trials > 1 and several else 0


def start_students(work: Work) -> int:
    """Students of the plan that start from first, middle or last blocks, less the one that was tried with other plans: the search most often found one of these."""
    settings, plan = work.analysis, work.plan
    if not (work.targeted and settings.strategy == "output_error" and settings.trials > 1):
        return 0
    lengths = [i.last - i.first for i in plan.intervals if i not in plan.adapters]
    return min(max(lengths), 2) + (trial_students(work) == 0) if lengths else 0
