"""Which far moments a recipe can need: all that an interval may span, or, of a plan that is fixed by hand, those of its own edits.

A matrix of Qwen-Image's width takes 75 MB, and far moments are some 1,800 of them; its published depth cut needs 294.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ppclc.analysis.budget import PlanSettings, by_hand
from ppclc.analysis.detection import Span
from ppclc.analysis.moments import BANDS, CHUNKS
from ppclc.costs.blocks import width_of
from ppclc.families import STREAMS, Family
from ppclc.plan import CompressionPlan
from ppclc.teachers import TEXT_INPUT

KINDS = (*STREAMS, TEXT_INPUT)
GROUPED_BYTES = 256 * 2**20
"""Most memory that moments by group may take; beyond it the analysis goes without its stability."""
Runs = tuple[Span, ...]


@dataclass(frozen=True)
class Reach:
    """Far moments that are kept: of a kind in `runs` those that relate two states of one run (first and last, both inside), of others all within reach.

    networks: blocks and streams whose feed-forward networks have moments; None for all.
    """

    runs: Mapping[str, Runs] = field(default_factory=dict)
    networks: frozenset[tuple[int, str]] | None = None

    def before(self, kind: str, number: int, longest: int) -> list[int]:
        """The states that state `number` is related to, itself among them, none where it is related to none."""
        first = max(0, number - longest)
        if kind in self.runs:
            starts = [a for a, b in self.runs[kind] if a <= number <= b]
            first = max(first, min(starts, default=number + 1))
        return list(range(first, number + 1))

    def has_network(self, block: int, stream: str) -> bool:
        """Whether a feed-forward network has moments."""
        return self.networks is None or (block, stream) in self.networks

    @property
    def is_empty(self) -> bool:
        """Whether there are no far moments at all."""
        return self.networks == frozenset() and all(kind in self.runs and not self.runs[kind] for kind in KINDS)

    @property
    def identity(self) -> dict[str, Any]:
        """What a record depends on; nothing where all is kept."""
        networks = {} if self.networks is None else {"networks": sorted(self.networks)}
        return {kind: sorted(runs) for kind, runs in sorted(self.runs.items())} | networks


EVERYTHING = Reach()


@dataclass(frozen=True)
class MomentCounts:
    """Square matrices that a calibration keeps, as `far` and `ffn` those of a share of the batches.

    near: of each stream, once; groups: how often these are kept, whole and by band and chunk. far: by kind; far_states: that they relate. ffn: by stream.
    """

    near: int
    groups: int
    far: Mapping[str, int]
    far_states: int
    ffn: Mapping[str, int]

    @property
    def matrices(self) -> int:
        """All of them, with that of the time embedding."""
        return len(STREAMS) * self.near * self.groups + sum(self.far.values()) + sum(self.ffn.values()) + 1


def moment_counts(family: Family, config: Mapping[str, Any], longest: int, reach: Reach = EVERYTHING) -> MomentCounts:
    """What a calibration of a teacher keeps."""
    blocks, texted = family.num_blocks(config), family.text_blocks(config)
    numbers = {**dict.fromkeys(STREAMS, range(blocks + 1)), TEXT_INPUT: texted}
    far = {kind: [len(reach.before(kind, n, longest)) for n in there] for kind, there in numbers.items()}
    return MomentCounts(
        near=2 * blocks + 1,
        groups=1 + (BANDS + CHUNKS if grouped(blocks, len(STREAMS) * [width_of(config)]) else 0),
        far={kind: sum(related) for kind, related in far.items()},
        far_states=sum(bool(n) for related in far.values() for n in related),
        ffn={s: 2 * sum(s in family.ffn_streams(config, b) and reach.has_network(b, s) for b in range(blocks)) for s in STREAMS},
    )


def grouped(blocks: int, widths: Iterable[int]) -> bool:
    """Whether near moments of streams of these widths are kept by band and chunk too."""
    return 8 * sum(2 * (blocks + 1) * width**2 for width in widths) * (BANDS + CHUNKS) <= GROUPED_BYTES


def reach_of(family: Family, config: Mapping[str, Any], wanted: PlanSettings, targeted: bool, reading: str) -> Reach:
    """What a recipe's plan leaves to be decided, or what its edits by hand are made from.

    targeted: whether the recipe has a target; without one nothing is decided. reading: as `analyze.reading`, of which `caption` relates all states.
    """
    if wanted.intervals == "auto":  # which text stream or network goes well with them is not known either
        return EVERYTHING if targeted else Reach(networks=_networks(wanted, targeted))
    spans = [(a, b) for a, b in wanted.intervals] if isinstance(wanted.intervals, list) else []
    if wanted.text_stream == "auto" and targeted:
        return EVERYTHING if reading == "caption" else Reach(_kinds({"image": spans}), _networks(wanted, targeted))
    text = wanted.text_stream if isinstance(wanted.text_stream, list) else []
    plan = CompressionPlan.of(family.name, family.num_blocks(config), spans, text)
    mapped = [_text_span(plan, edit.block, edit.reference) for edit in plan.text_stream]
    inputs = [(edit.reference, edit.block - 1) for edit in plan.text_stream]
    runs = {"image": spans, "text": [*spans, *mapped], TEXT_INPUT: inputs}
    if reading == "caption":
        del runs["image"], runs["text"]
    return Reach(_kinds(runs), _networks(wanted, targeted))


def _kinds(spans: Mapping[str, Iterable[Span]]) -> dict[str, Runs]:
    """Runs of states: those of an interval's blocks and the one behind its last, put together where one lies in another."""
    found = {}
    for kind, blocks in spans.items():
        runs = {(first, last + 1) for first, last in blocks}
        found[kind] = tuple(sorted(r for r in runs if not any(o != r and o[0] <= r[0] and r[1] <= o[1] for o in runs)))
    return found


def _text_span(plan: CompressionPlan, block: int, reference: int) -> Span:
    """From a text stream's reference to the end of its block: other references, of plans with some edits put back, lie in between."""
    interval = plan.interval_at(block)
    return reference, interval.last if interval else block


def _networks(wanted: PlanSettings, targeted: bool) -> frozenset[tuple[int, str]] | None:
    hand = by_hand(wanted)
    if hand is not None:
        return frozenset(hand)
    return None if targeted else frozenset()
