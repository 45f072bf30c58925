"""From costs to a plan under a budget: dynamic programming over intervals, then the cheapest mix of edits. No torch.

Costs are squared relative velocity errors, added up as if independent. Values (parameters, bytes,
milliseconds) are nearly additive too: single edits give an estimate that orders the mixes, and the mix that
is taken is counted exactly.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

from ppclc.analysis.detection import group_ranges, removed_by
from ppclc.errors import PlanError, RecipeError
from ppclc.plan import CompressionPlan, FfnEdit, Interval, TextStreamEdit, kept_blocks

Span = tuple[int, int]
Chain = tuple[float, list[Span]]
"""Cost and disjoint intervals."""
Removed = tuple[int, ...]
"""Blocks of each group that go."""
NEARLY = 1.02
"""Mixes whose estimate is at most so many times the limit are counted exactly."""
MORE_FFNS, FAR_ABOVE = 8, 1.25
"""FFN edits that a mix may take beyond its estimate, and the share of the limit above which none would help."""
COUNTED = 400
"""Most mixes that are counted exactly."""


def cheapest_chains(groups: Sequence[int], costs: Mapping[Span, float]) -> dict[Removed, Chain]:
    """For every number of removed blocks of each group, the disjoint intervals of least total cost."""
    return {removed: chains[0] for removed, chains in best_chains(groups, costs, 1).items()}


def best_chains(groups: Sequence[int], costs: Mapping[Span, float], count: int) -> dict[Removed, list[Chain]]:
    """For every number of removed blocks of each group, the `count` sets of disjoint intervals of least total cost, cheapest first.

    Dynamic programming over the blocks of a group; no interval reaches over the end of one.
    """
    found: dict[Removed, list[Chain]] = {(): [(0.0, [])]}
    for first, end in group_ranges(groups):
        own = _best_within(first, end, costs, count)
        found = {(*removed, n): _cheapest_sums(chains, more, count) for removed, chains in found.items() for n, more in own.items()}
    return found


def _best_within(first: int, end: int, costs: Mapping[Span, float], count: int) -> dict[int, list[Chain]]:
    """The same within one group, by the number of its removed blocks."""
    ending: dict[int, list[tuple[Span, float]]] = {}
    for (u, v), cost in costs.items():
        if first <= u and v < end:
            ending.setdefault(v, []).append(((u, v), cost))
    best: list[dict[int, list[Chain]]] = [{0: [(0.0, [])]}]
    for last in range(first, end):
        here = {removed: list(chains) for removed, chains in best[-1].items()}
        for (u, v), cost in ending.get(last, []):
            for removed, chains in best[u - first].items():
                here.setdefault(removed + v - u, []).extend((total + cost, [*chain, (u, v)]) for total, chain in chains)
        best.append({removed: sorted(chains, key=lambda c: c[0])[:count] for removed, chains in here.items()})
    return best[-1]


def _cheapest_sums(chains: Sequence[Chain], more: Sequence[Chain], count: int) -> list[Chain]:
    """The `count` cheapest of all joins of one chain of each, both being sorted."""
    joins = ((a + b, [*left, *right]) for n, (a, left) in enumerate(chains) for b, right in more[: -(-count // (n + 1))])
    return heapq.nsmallest(count, joins, key=lambda c: c[0])


@dataclass(frozen=True)
class Budget:
    """What the student may be: `value(plan)` at most `limit`. `name` is the recipe's key below `target`."""

    name: str
    limit: float
    value: Callable[[CompressionPlan], float]

    def met(self, plan: CompressionPlan) -> bool:
        """Whether a plan is within the budget."""
        return self.value(plan) <= self.limit


@dataclass(frozen=True)
class Options:
    """What may be chosen, each with its cost; a single choice of cost 0 is one made by hand.

    groups: blocks of each group. chains: by removed blocks, cheapest first. ranks: modulation ranks, None for the whole.
    text_runs: the last k student blocks of those that have a text stream, or `text_blocks` fixed by hand. texted: numbers
    of those blocks in the teacher, None for all. text_ends: whether nothing reads text after the last of them.
    dead_text: whether that block computes it all the same, so that dead code can go. ffns: (stream, block) by rising cost,
    or `fixed_ffns` by hand. adapters: the intervals that have them, None for every interval of a plan
    that can: of `adaptable`, first blocks and ends of groups, where it is given.
    """

    family: str
    groups: Sequence[int]
    chains: Mapping[Removed, Sequence[Chain]]
    ranks: Sequence[tuple[float, int | None]] = ((0.0, None),)
    text_runs: Sequence[tuple[float, int]] = ((0.0, 0),)
    text_blocks: Sequence[int] | None = None
    ffns: Sequence[tuple[float, str, int]] = ()
    fixed_ffns: Sequence[tuple[int, str]] | None = None
    fixed_intervals: bool = False
    adapters: frozenset[Span] | None = frozenset()
    dead_code: bool = True
    protect: frozenset[int] = frozenset()
    text_reach: int = 10
    texted: range | None = None
    adaptable: Sequence[Span] | None = None
    dead_text: bool = True
    text_ends: bool = True

    @property
    def num_blocks(self) -> int:
        """Blocks of all groups together."""
        return sum(self.groups)

    def plan(
        self, spans: Sequence[Span], text: Sequence[int] = (), rank: int | None = None, ffn: Sequence[tuple[int, str]] = ()
    ) -> CompressionPlan:
        """The plan with these edits; dead code goes where the recipe allows and the class changes anyway."""
        adapters = self.adapted(spans)
        dead = self.dead_code and self.dead_text and bool(text or ffn or rank is not None or adapters)
        return CompressionPlan.of(self.family, self.num_blocks, list(spans), list(text), rank, dead, list(ffn), adapters)

    def adapted(self, spans: Sequence[Span]) -> list[Span]:
        """Those of some intervals that have adapters."""
        if self.adapters is not None:
            return [s for s in spans if s in self.adapters]
        return [s for s in spans if self.adaptable is None or any(first <= s[0] < end for first, end in self.adaptable)]

    def run(self, k: int, spans: Sequence[Span]) -> list[int] | None:
        """The last k student blocks, as teacher numbers; None when they are protected or out of reach of the moments."""
        there = range(self.num_blocks) if self.texted is None else self.texted
        kept = [b for b in kept_blocks(self.num_blocks, list(spans)) if b in there]
        if k >= len(kept) or (k and there.stop - kept[len(kept) - k - 1] > self.text_reach):
            return [] if not k else None
        blocks = list(kept[len(kept) - k :]) if k else []
        return None if self.protect & set(blocks) else blocks

    def text(self, k: int, spans: Sequence[Span]) -> list[int] | None:
        """The mapped blocks: those made by hand, else the last k, None when they cannot be."""
        return self.run(k, spans) if self.text_blocks is None else list(self.text_blocks)

    def usable_ffns(self, spans: Sequence[Span], text: Sequence[int]) -> list[tuple[float, str, int]]:
        """Free FFN edits that go with these intervals and mapped blocks.

        Where text ends with the last block, that block has no text network to replace once dead code is gone.
        """
        if self.fixed_ffns is not None:
            return []
        kept = kept_blocks(self.num_blocks, list(spans))
        full = [b for b in kept if b not in text]
        full = full[:-1] if self.text_ends else full
        return [f for f in self.ffns if f[2] in (full if f[1] == "text" else kept)]


@dataclass(frozen=True, order=True)
class Mix:
    """One choice of each kind, by rising cost: the `chain`-th set of intervals that removes so many blocks, and so on."""

    cost: float
    removed: Removed
    chain: int
    rank: int | None = field(compare=False)
    text: int = field(compare=False)
    ffns: int = field(compare=False)


def choose(options: Options, budget: Budget) -> CompressionPlan:
    """The plan within the budget of least total cost, with no edit that the budget does not need.

    Raises:
        RecipeError: no mix of the options comes down to the budget.
        PlanError: edits made by hand that contradict each other.
    """
    return contenders(options, budget, 1)[0]


def contenders(options: Options, budget: Budget, count: int) -> list[CompressionPlan]:
    """Up to `count` different plans within the budget, by rising cost, none with an edit that the budget does not need.

    At most half of them remove the same number of blocks, so that depth and width are both among them.

    Raises:
        RecipeError: no mix of the options comes down to the budget.
        PlanError: edits made by hand that contradict each other.
    """
    found: list[CompressionPlan] = []
    by_removed: dict[Removed, int] = {}
    for mix in itertools.islice(sorted(_mixes(options, budget)), COUNTED):
        if by_removed.get(mix.removed, 0) >= max(1, -(-count // 2)) or len(found) >= count:
            continue
        within = _within(options, mix, budget)
        if within is None:
            continue
        plan = put_back(within, options, budget)
        if plan not in found:
            found.append(plan)
            by_removed[mix.removed] = by_removed.get(mix.removed, 0) + 1
    if not found:
        raise RecipeError(
            f"target.{budget.name}: {figure(budget.limit)} cannot be reached by the edits that the recipe allows; "
            "wanted a larger target, or fewer of them forbidden below plan"
        )
    return found


def figure(value: float) -> str:
    """A budget's value for people: counts whole, small numbers to four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def only_plan(options: Options) -> CompressionPlan:
    """The plan when nothing is left to choose: every edit made by hand. Raises PlanError for edits that contradict each other."""
    (((_, spans),),) = options.chains.values()
    return options.plan(spans, options.text_blocks or (), options.ranks[0][1], options.fixed_ffns or ())


def _mixes(options: Options, budget: Budget) -> Iterator[Mix]:
    """All mixes whose estimated value is nearly within the budget, with as few FFN edits as that takes."""
    for rank_cost, rank in options.ranks:
        saving = _Savings(options, budget, rank)
        for (removed, chains), (text_cost, k) in itertools.product(options.chains.items(), options.text_runs):
            for n, (chain_cost, spans) in enumerate(chains):
                text = options.text(k, spans)
                if text is None or not fits(options, budget, spans, text, rank):
                    continue
                value = saving.base - sum(n * each for n, each in zip(removed, saving.block, strict=True)) - saving.text(k)
                value += saving.adapters(len(options.adapted(spans)))
                dead = 0.0 if text else saving.dead
                for ffns, cost in _ffn_counts(options.usable_ffns(spans, text), saving, value, budget.limit * NEARLY, dead):
                    yield Mix(round(chain_cost + text_cost + rank_cost + cost, 9), removed, n, rank, k, ffns)


def fits(options: Options, budget: Budget, spans: Sequence[Span], text: Sequence[int], rank: int | None) -> bool:
    """Whether feed-forward networks by hand go with these edits. Raises PlanError where all of them were made by hand."""
    if not options.fixed_ffns:
        return True
    try:
        budget.value(options.plan(spans, text, rank, options.fixed_ffns))
    except PlanError:
        if options.fixed_intervals and options.text_blocks is not None:
            raise
        return False
    return True


def _ffn_counts(
    usable: Sequence[tuple[float, str, int]], saving: _Savings, value: float, limit: float, dead: float
) -> Iterator[tuple[int, float]]:
    """How many of the cheapest FFN edits bring a value to the limit, and one and two more, with their costs. `dead`: what the first saves besides."""
    cost, over = 0.0, 0
    for n in range(len(usable) + 1):
        if n == 1:
            value -= dead
        if value <= limit:
            yield n, cost
            over += 1
        if over > 2 or n == len(usable):
            return
        cost += usable[n][0]
        value -= saving.ffn(usable[n][1])


class _Savings:
    """What single edits save of the budget's value beside a modulation rank, each counted once."""

    def __init__(self, options: Options, budget: Budget, rank: int | None) -> None:
        self.options, self.budget, self.rank = options, budget, rank
        self.bare = replace(options, adapters=frozenset())
        self.base = self._value([])
        self.pairs = _apart(s for s in sorted(_pairs(options)) if self._fits(s))
        self.block = [self._of_block(n) for n in range(len(options.groups))]
        self.text = cache(self._text)
        self.ffn = cache(self._ffn)
        self.adapters = cache(self._adapters)

    def _plan(self, spans: Sequence[Span], text: Sequence[int], ffn: Sequence[tuple[int, str]]) -> CompressionPlan:
        return self.bare.plan(spans, text, self.rank, ffn)

    def _value(self, spans: Sequence[Span], adapters: Sequence[Span] = ()) -> float:
        """The budget's value with these intervals beside the edits made by hand."""
        options = replace(self.bare, adapters=frozenset(adapters))
        return self.budget.value(options.plan(spans, self.options.text_blocks or (), self.rank, tuple(self.options.fixed_ffns or ())))

    def _adapters(self, count: int) -> float:
        """What adapters of so many intervals add: the first may bring the student's own class, the others add alike."""
        if not count or not self.pairs:
            return 0.0
        two = self.pairs[:2]
        first = self._value(self.pairs[:1], self.pairs[:1]) - self._value(self.pairs[:1])
        second = self._value(two, two) - self._value(two, two[:1]) if len(two) == 2 else first
        return first + (count - 1) * second

    def _of_block(self, group: int) -> float:
        """What one block less of a group saves."""
        some = next((s for s in self.pairs if removed_by([s], self.options.groups)[group]), None)
        return self.base - self._value([some]) if some else 0.0

    def _fits(self, span: Span) -> bool:
        try:
            self._plan([span], self.options.text_blocks or (), tuple(self.options.fixed_ffns or ()))
        except PlanError:
            return False
        return True

    def _text(self, k: int) -> float:
        blocks = self.options.run(k, []) or []
        beside = tuple(self.options.fixed_ffns or ()) if fits(self.options, self.budget, [], blocks, self.rank) else ()
        return self._beside(beside) - self.budget.value(self._plan([], blocks, beside)) if blocks else 0.0

    def _ffn(self, stream: str) -> float:
        """What one more edit of a stream saves: the first of all may bring the end of dead code as well."""
        blocks = sorted(b for _, s, b in self.options.ffns if s == stream)[:2]
        return self._beside([(b, stream) for b in blocks[:-1]]) - self._beside([(b, stream) for b in blocks])

    def _beside(self, ffn: Sequence[tuple[int, str]]) -> float:
        return self.budget.value(self._plan([], self.options.text_blocks or (), ffn))

    @cached_property
    def dead(self) -> float:
        """What the first FFN edit saves beyond its own network, where nothing else changes the class of the student."""
        if not self.options.ffns or self.rank is not None or self.options.text_blocks:
            return 0.0
        _, stream, _ = self.options.ffns[0]
        block = min(b for _, s, b in self.options.ffns if s == stream)
        return self.base - self._beside([(block, stream)]) - self.ffn(stream)


def _pairs(options: Options) -> set[Span]:
    return {(u, u + 1) for first, end in group_ranges(options.groups) for u in range(first, end - 1)}


def _apart(spans: Iterable[Span]) -> list[Span]:
    """Disjoint ones of intervals in order, first come first."""
    found: list[Span] = []
    for span in spans:
        if not found or span[0] > found[-1][1]:
            found.append(span)
    return found


def _plan_of(options: Options, mix: Mix) -> CompressionPlan:
    """The plan of a mix."""
    spans = options.chains[mix.removed][mix.chain][1]
    text = options.text(mix.text, spans) or []
    free = [(b, s) for _, s, b in options.usable_ffns(spans, text)[: mix.ffns]]
    return options.plan(spans, text, mix.rank, options.fixed_ffns if options.fixed_ffns is not None else sorted(free))


def _within(options: Options, mix: Mix, budget: Budget) -> CompressionPlan | None:
    """The plan of a mix, with more FFN edits where the estimate was too low: edits beside each other save less than each alone."""
    for more in range(MORE_FFNS + 1):
        plan = _plan_of(options, replace(mix, ffns=mix.ffns + more))
        value = budget.value(plan)
        if value <= budget.limit:
            return plan
        if value > FAR_ABOVE * budget.limit or len(plan.ffn) < mix.ffns + more:
            return None
    return None


def put_back(plan: CompressionPlan, options: Options, budget: Budget) -> CompressionPlan:
    """The plan without any free edit that the budget does not need; intervals are put back first, FFNs next, then text streams."""

    def by_hand(edit: object) -> bool:
        if isinstance(edit, Interval):
            return options.fixed_intervals
        if isinstance(edit, TextStreamEdit):
            return options.text_blocks is not None
        if isinstance(edit, FfnEdit):
            return options.fixed_ffns is not None
        return len(options.ranks) == 1

    while True:
        for edit in plan.edits():
            if by_hand(edit):
                continue
            try:
                larger = plan.without(edit)
            except PlanError:  # another edit rests on this one
                continue
            if budget.met(larger):
                plan = larger
                break
        else:
            return plan
