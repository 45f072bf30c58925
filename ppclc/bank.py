"""The bank: the distilled edits of a run, one record each, found again by what they were made from.

An interval learns from the teacher alone (arXiv 2511.16156, equations 6 and 7), so that its record serves every
plan that contains it. Width edits that were not trained follow from the calibration record in closed form.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppclc.analysis.budget import PlanSettings, adapted_spans
from ppclc.analysis.closed_forms import closed_form_bank
from ppclc.families import Bank, Family
from ppclc.passes import distill
from ppclc.passes.distill import DistillSettings
from ppclc.plan import CompressionPlan, Interval
from ppclc.records import Analysis, CalibrationStats, Distilled, Job, Record, Store, read_record

RECORD = re.compile(r"(?P<key>(?:interval|text|ffn)-[\w-]+)-(?P<digest>[0-9a-f]{16})")
INTERVAL = re.compile(r"interval-(\d+)-(\d+)(-adapted)?")
WIDTH = re.compile(r"(?:ffn|text)-(?P<first>\d+)-(?:(?P<last>\d+a?)-)?(?:(?P<ref>\d+)-(?P<ref_last>\d+a?)|image|text)")
"""A width edit's own block, first and last, and a text stream's reference; `ffn-2-image` stands on a block of the teacher's, an `a`
stands for adapters."""
MODULATION = "modulation"
ADAPTED = "-adapted"


def interval_job(key: str, start: int, settings: DistillSettings, source: str, base: Record, stats: Record, ridge: float) -> Job:
    """What an interval's record is made from. start: the teacher block that the student block starts from.

    Here and in `width_job` is said, and nowhere else, what a distilled edit depends on. source: identity of the
    samples. base: teacher and dtype. Adapters start in closed form, from the moments.
    """
    told = settings.local() | {"source": source, "start": start}
    adapted = key.endswith(ADAPTED)
    return Job(key, distill.VERSION, told | {"ridge": ridge} if adapted else told, (base, stats) if adapted else (base,))


def width_job(key: str, settings: DistillSettings, source: str, base: Record, stats: Record, ridge: float, under: Sequence[Record]) -> Job:
    """What the record of a text stream's or a feed-forward network's maps is made from. under: the interval that its block stands for."""
    told = settings.local("ffn" if key.startswith("ffn-") else "text") | {"source": source}
    return Job(key, distill.VERSION, [told, ridge], (base, stats, *under))


def start_of(analysis: Analysis, key: str, interval: Interval) -> int:
    """The teacher block that an interval's student block starts from; the first for one that nobody considered."""
    return analysis.starts.get(key, analysis.starts.get(interval.key, interval.first))


def considered(analysis: Analysis) -> list[tuple[int, int]]:
    """First and last block of every interval that an analysis has measured or picked."""
    picked = {(int(m[1]), int(m[2])) for m in map(INTERVAL.fullmatch, analysis.starts) if m}
    return sorted(picked | {(c.first, c.last) for c in analysis.candidates if c.kind == "interval"})


def interval_plan(plan: CompressionPlan, interval: Interval, wanted: PlanSettings) -> CompressionPlan:
    """The plan of one interval alone: with adapters as a plan has it, else where the recipe wants adapters for all."""
    adapted = interval in plan.adapters if interval in plan.intervals else adapted_spans(wanted) is None
    span = (interval.first, interval.last)
    return CompressionPlan.of(plan.family, plan.num_blocks, [span], adapters=[span] if adapted else [])


def intervals_to_distill(
    analysis: Analysis, plan: CompressionPlan, settings: DistillSettings, wanted: PlanSettings
) -> list[CompressionPlan]:
    """A plan of its own for each of the plan's intervals; with `distill.bank: all`, of every other one that the analysis considered after them."""
    spans = considered(analysis) if settings.bank == "all" else []
    every = dict.fromkeys([*plan.intervals, *(Interval(first=u, last=v) for u, v in spans)])
    return [interval_plan(plan, i, wanted) for i in every]


def needed(plan: CompressionPlan, family: Family) -> list[str]:
    """Keys in the bank of every edit of a plan: intervals, text streams, feed-forward networks, the modulation."""
    text = [plan.text_key(e.block) for e in plan.text_stream]
    ffn = [plan.ffn_key(e.block, e.stream) for e in plan.ffn]
    return [*(plan.interval_key(i) for i in plan.intervals), *text, *ffn, *([MODULATION] if plan.modulation_rank is not None else [])]


def held_edits(
    store: Store, analysis: Analysis, stats: Record, ridge: float, settings: DistillSettings, source: str, base: Record
) -> dict[str, Path]:
    """Folder by key of every distilled edit that a run's recipe would use again as it is."""
    folders = [
        (m, f) for f in sorted((store.out / "records").glob("*/")) if (m := RECORD.fullmatch(f.name)) and (f / "record.json").is_file()
    ]
    found: dict[str, Path] = {}
    for name, folder in folders:
        if span := INTERVAL.fullmatch(name["key"]):
            start = start_of(analysis, name["key"], Interval(first=int(span[1]), last=int(span[2])))
            if _is_of(store, interval_job(name["key"], start, settings, source, base, stats, ridge), name["digest"]):
                found[name["key"]] = folder
    for name, folder in folders:
        if not INTERVAL.fullmatch(name["key"]):
            below = _below(found, name["key"])
            if below is not None and _is_of(store, width_job(name["key"], settings, source, base, stats, ridge, below), name["digest"]):
                found[name["key"]] = folder
    return found


def _below(found: Mapping[str, Path], key: str) -> list[Record] | None:
    """The records of the intervals that a width edit stands on, reference first; None where one is not there."""
    match = WIDTH.fullmatch(key)
    spans = [(match["ref"], match["ref_last"]), (match["first"], match["last"])] if match else []
    keys = [f"interval-{u}-{v.rstrip('a')}{ADAPTED if v.endswith('a') else ''}" for u, v in spans if v and u != v]
    return [Record(digest=found[k].name.rpartition("-")[2]) for k in keys] if set(keys) <= set(found) else None


def _is_of(store: Store, job: Job, digest: str) -> bool:
    return store.digest(job.name, job.version, job.settings, *job.inputs) == digest


@dataclass(frozen=True)
class EditBank:
    """The distilled edits of one teacher by key, and what the others follow from in closed form."""

    folders: Mapping[str, Path]
    stats: CalibrationStats
    ridge: float
    family: Family

    def intervals(self, adapted: Collection[tuple[int, int]] | None = ()) -> list[tuple[int, int]]:
        """First and last block of every interval that is held in its form: with adapters if it is among `adapted`, None for all."""
        found = [(int(m[1]), int(m[2]), bool(m[3])) for m in map(INTERVAL.fullmatch, self.folders) if m]
        return sorted((u, v) for u, v, has in found if has == (adapted is None or (u, v) in adapted))

    def lacking(self, plan: CompressionPlan) -> list[str]:
        """Keys of a plan's intervals that are not held; everything else has a closed form."""
        return [key for i in plan.intervals if (key := plan.interval_key(i)) not in self.folders]

    def trained(self, plan: CompressionPlan) -> list[str]:
        """Keys of a plan's edits that are held."""
        return [key for key in needed(plan, self.family) if key in self.folders]

    def closed(self, plan: CompressionPlan) -> list[str]:
        """Keys of a plan's edits that are taken in closed form."""
        return [key for key in needed(plan, self.family) if key not in self.folders and not INTERVAL.match(key)]

    def read(self, plan: CompressionPlan) -> tuple[list[Distilled], Bank]:
        """A plan's distilled edits, and the bank that `apply_plan` takes for it.

        Raises:
            PlanError: a text stream whose reference is farther away than the moments reach.
        """
        edits = [read_record(Distilled, self.folders[key]) for key in self.trained(plan)]
        return edits, joined(self.stats, self.ridge, plan, self.family, edits)


def joined(
    stats: CalibrationStats, ridge: float, plan: CompressionPlan, family: Family, edits: Iterable[Distilled]
) -> dict[str, Mapping[str, Any]]:
    """The bank of a plan: closed forms, and distilled edits over them."""
    return closed_form_bank(stats, ridge, plan) | {e.edit: e.tensors for e in edits}
