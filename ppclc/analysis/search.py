"""The search for a plan: costs of candidate edits, measured as they are needed, a supernet for depth, and trials between close plans."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from ppclc.analysis import detection, selection, supernet, trials
from ppclc.analysis.budget import (
    RANK_TOLERANCE,
    PlanSettings,
    TargetSettings,
    adapted_spans,
    allows,
    budget_of,
    by_hand,
    check_target,
    layout,
)
from ppclc.analysis.closed_forms import Bank, closed_form_bank, interval_adapters
from ppclc.analysis.detection import Span, even_intervals
from ppclc.analysis.edit_costs import EditCosts
from ppclc.analysis.moments import BANDS
from ppclc.analysis.selection import Budget, Chain, Options, Removed
from ppclc.analysis.supernet import Dropped
from ppclc.data.samples import Samples
from ppclc.errors import RecipeError
from ppclc.families import STREAMS
from ppclc.loading.classes import predicted_parameters
from ppclc.loading.sources import Source
from ppclc.plan import CompressionPlan, Interval
from ppclc.records import Agreement, Candidate, SetScore, StartResult, TrialResult
from ppclc.teachers import ResidentTeacher

MAX_TEXT_BLOCKS = 8
FREE = 1e-3
"""Largest squared relative velocity error of intervals that are taken without a search: nothing is to be gained."""
RESAMPLES = 40
SEVERAL = 8
"""Chains that are looked at for every one that is tried: many of them drop the same blocks into different neighbours."""
Strategy = Literal["output_error", "ppcl", "block_influence", "laptop", "even"]


class AnalyzeSettings(BaseModel):
    """Section `analyze` of a recipe.

    strategy: what chooses the blocks that go. `output_error` is ours; `ppcl` the paper's first differences,
    trimmed to the budget; `block_influence` ShortGPT's; `laptop` LAPTOP-Diff's additive output loss; `even`
    evenly spaced blocks. probes: samples on which candidates are swapped in, and that students of trials are
    judged on. budget: most forwards of one sample through the teacher that costs of intervals may take; short
    intervals come first. supernet_steps: training of one network for all depths, by which `supernet_sets` sets
    of blocks are judged before some are tried; 0 leaves it out. trials: plans that are trained for `trial_steps`,
    the better half each time further, to pick the one that samples nearest to the teacher; of that one, students whose
    blocks start elsewhere are trained as long, to pick the starts. Below 2 the first is taken as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    reading: Literal["equation", "caption"] = "equation"
    ridge: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    strategy: Strategy = "output_error"
    probes: Annotated[int, Field(ge=16)] = 128
    budget: Annotated[int, Field(ge=1)] = 16384
    supernet_steps: Annotated[int, Field(ge=0)] = 200
    supernet_sets: Annotated[int, Field(ge=1)] = 64
    trials: Annotated[int, Field(ge=0)] = 8
    trial_steps: Annotated[int, Field(ge=3)] = 60

    def untrained(self) -> AnalyzeSettings:
        """The same without anything that is trained."""
        return self.model_copy(update={"supernet_steps": 0, "trials": 0})

    @property
    def learns(self) -> bool:
        """Whether anything is trained before the plan is taken."""
        return self.strategy == "output_error" and (self.supernet_steps > 0 or self.trials > 1)


@dataclass(frozen=True)
class Lessons:
    """How trials and the supernet are taught: the fine-tune's batch and peak learning rate."""

    batch: int = 64
    learning_rate: float = 1e-3


Taught = Callable[[], trials.Teaching]
"""What trainings learn from, made when it is first asked for: where the journal knows what they came to, it is not."""


class Search:
    """Costs of candidate edits, measured as they are needed, and the options that they make for the selection."""

    def __init__(
        self,
        source: Source,
        costs: EditCosts,
        settings: AnalyzeSettings,
        wanted: PlanSettings,
        cka: Sequence[Sequence[float]],
        ppcl: Sequence[Span],
        progress: Callable[[float, str], None],
    ) -> None:
        self.source, self.costs, self.settings, self.wanted = source, costs, settings, wanted
        self.cka, self.ppcl, self.progress, self.journal = cka, ppcl, progress, costs.journal
        self.length, self.longest = costs.length, costs.stats.longest
        self.sizes = source.family.sizes(source.config)
        self.adapted = adapted_spans(wanted)
        self.interval_errors: dict[Span, torch.Tensor] = {}
        self.kept: dict[Span, int] = {}
        self.starts: dict[Span, int] = {}
        self.adapted_starts: dict[Span, int] = {}
        self.hand_errors: dict[Span, torch.Tensor] = {}
        self.text_costs: dict[int, float] = {}
        self.rank_costs: dict[int, float] = {}
        self.ffn_costs: list[tuple[float, str, int]] = []
        self.budget: Budget | None = None
        self.trials: list[TrialResult] = []
        self.start_trials: list[StartResult] = []
        self.scores: list[SetScore] = []
        self.set_errors: dict[Removed, list[tuple[Dropped, torch.Tensor]]] = {}

    @property
    def whole(self) -> Any:
        """The teacher as one model, which only a resident one is."""
        assert isinstance(self.costs.teacher, ResidentTeacher), "a streamed teacher is not trained"
        return self.costs.teacher.model

    @property
    def interval_costs(self) -> dict[Span, float]:
        """Cost of every interval that was measured."""
        return {span: self.costs.share(errors) for span, errors in self.interval_errors.items()}

    @cached_property
    def spans(self) -> list[Span]:
        """Intervals that may be chosen, short ones first, as many as the budget of forwards allows."""
        ranges = detection.group_ranges(self.sizes)
        pairs = (pair for first, end in ranges for pair in itertools.combinations(range(first, end), 2))
        every = [(u, v) for u, v in pairs if v - u < self.longest and allows(self.wanted, u, v)]
        taken = []
        left = float(self.settings.budget - self.costs.count)
        for u, v in sorted(every, key=lambda s: (s[1] - s[0], s)):
            left -= self.costs.interval_price(u, v)
            if left < 0:
                break
            taken.append((u, v))
        self.possible = len(every)
        return taken

    def measure_intervals(self) -> None:
        """Velocity error with each candidate interval replaced by its best stand-in."""
        for span, (errors, kept) in self.costs.intervals(self.spans, self._told("intervals")).items():
            self.interval_errors[span], self.kept[span] = errors, kept

    def _told(self, what: str) -> Callable[[float], None]:
        """Progress of one kind of edits."""
        return lambda done: self.progress(done, what)

    def measure_text(self) -> None:
        """Velocity error with the text stream of the last k blocks mapped, for each k."""
        there = self.source.family.text_blocks(self.source.config)
        runs = {k: list(there[-k:]) for k in range(1, min(MAX_TEXT_BLOCKS, self.longest - 1, len(there) - 1) + 1)}
        free = {k: blocks for k, blocks in runs.items() if not any(b in self.wanted.protect for b in blocks)}
        self.text_costs = self._student_costs({k: self._wide(text=blocks) for k, blocks in free.items()}, "text stream")

    def measure_ranks(self) -> None:
        """Velocity error by modulation rank: 4, 8, 16, ... below the width."""
        ranks = [r for r in (2**i for i in range(2, 16)) if r < self.width] if self.source.family.modulations else []
        self.rank_costs = self._student_costs({rank: self._wide(rank=rank) for rank in ranks}, "modulation rank")

    @property
    def width(self) -> int:
        """Features of a state, and of the time embedding."""
        return int(self.costs.stats.tensors["image.sum"].shape[-1])

    def _student_costs(self, plans: Mapping[int, CompressionPlan], what: str) -> dict[int, float]:
        errors = self.costs.students(list(plans.values()), self._told(what))
        return {key: self.costs.share(e) for key, e in zip(plans, errors, strict=True)}

    def _wide(self, text: Sequence[int] = (), rank: int | None = None) -> CompressionPlan:
        """The plan of one width edit alone."""
        dead = self.wanted.dead_code and self.source.family.has_dead_code and bool(text or rank is not None)
        return CompressionPlan.of(self.source.family.name, self.length, [], list(text), rank, dead)

    def plan(
        self,
        target: TargetSettings,
        dtype: str,
        samples: Samples | None = None,
        lessons: Lessons = Lessons(),
    ) -> CompressionPlan:
        """The plan that meets the target at the least cost, hand-made edits kept as they are.

        Given samples to learn from, a supernet says which blocks go, the plans of least cost are tried, and the one
        that comes to sample nearest to the teacher is taken.

        Raises:
            RecipeError: no target and no intervals by hand, or a target that no allowed mix of edits reaches.
        """
        self.budget = budget_of(self.source, target, dtype)
        options = self.options
        if self.budget is None:
            check_target(self.wanted, self.budget)
            return selection.only_plan(options)
        learns = samples is not None and self.settings.learns
        count = max(1, self.settings.trials) if learns else 1
        found = selection.contenders(options, self.budget, count)
        if samples is None or not learns:
            return found[0]
        steps = max(self.settings.supernet_steps, self.settings.trial_steps if self.settings.trials > 1 else 0)
        teaching = cache(
            partial(trials.Teaching.of, self.whole, samples, steps, lessons.batch, lessons.learning_rate, self.settings.probes)
        )
        depths = sorted({self._removed(p) for p in found})
        if self.settings.supernet_steps and self.wanted.intervals == "auto" and any(map(any, depths)):
            chains = self._shared({n: options.chains[n] for n in {(0,) * len(self.sizes), *depths}}, teaching)
            found = selection.contenders(replace(options, chains=chains), self.budget, count)
        if self.settings.trials < 2:
            return found[0]
        chosen = self._tried(found, teaching) if len(found) > 1 else found[0]
        self._try_starts(chosen, teaching)
        return chosen

    def _removed(self, plan: CompressionPlan) -> Removed:
        """Blocks of each group that go with a plan."""
        return detection.removed_by([(i.first, i.last) for i in plan.intervals], self.sizes)

    def _shared(self, cheapest: Mapping[Removed, Sequence[Chain]], teaching: Taught) -> dict[Removed, list[Chain]]:
        """Intervals by the number of blocks they remove: the supernet's best, at the cost of the cheapest by output error.

        The cost says what depth is worth against width, the supernet which blocks go. Where the cheapest costs next
        to nothing as it is, it stays.
        """
        spans = set(self.spans)
        allowed = {v for u, v in spans if v - u == 1}
        chains = {n: list(c[:1]) for n, c in cheapest.items()}
        room = detection.removed_by([(b - 1, b) for b in allowed], self.sizes)
        searched = [n for n, c in chains.items() if any(n) and all(a <= b for a, b in zip(n, room, strict=True)) and c[0][0] > FREE]
        if not searched:
            return chains
        self.starts |= {s: self.kept[s] for n, c in chains.items() if n not in searched for s in c[0][1]}
        picker = partial(supernet.picker, self.drop_errors, allowed, self.sizes)
        with ExitStack() as stack:
            judge = cache(partial(self._judge, stack, teaching, picker(searched)))

            def score(sets: Iterable[Dropped]) -> list[torch.Tensor]:
                sets = list(sets)
                if new := [dropped for dropped in sets if self.journal.get("set", dropped) is None]:
                    for dropped, each in zip(new, judge()(new), strict=True):
                        self.journal.put_tensor(each, "set", dropped)
                found = (self.journal.tensor("set", dropped) for dropped in sets)
                return [each for each in found if each is not None]

            for n in searched:
                first = self._known_sets(n, cheapest[n])
                draw = picker([n], seed=1)
                sets = max(1, self.settings.supernet_sets // len(searched))
                ranked = supernet.search(score, n, first, draw, spans, self.sizes, sets, self.progress)
                self.scores += [SetScore(dropped=d, distance=e.median().item()) for d, e in ranked]
                self.set_errors[n] = ranked
                made = (detection.spans_of_dropped(d, self.sizes) or {} for d, _ in ranked)
                best = next((m for m in made if m and all(self.starts.get(s, b) == b for s, b in m.items())), None)
                if best:
                    self.starts |= best
                    chains[n] = [(chains[n][0][0], sorted(best))]
        return chains

    def _judge(self, stack: ExitStack, teaching: Taught, pick: Callable[[], Dropped]) -> supernet.Score:
        """What scores sets of blocks: a supernet, trained now."""
        net = supernet.Supernet(self.whole, self.source.family, teaching().learning_rate)
        net.train(teaching().taught[: self.settings.supernet_steps], pick, self.progress)
        return stack.enter_context(net.judges(teaching().distance))

    def _tried(self, plans: Sequence[CompressionPlan], teaching: Taught) -> CompressionPlan:
        """The plan whose student samples nearest to the teacher after a short training."""
        if (known := self.journal.get("tried")) is None:
            entries = [trials.Trial(plan, self._bank(plan), teaching().learning_rate) for plan in plans]
            taught = teaching().taught[: self.settings.trial_steps]
            ranked = trials.run_trials(self.whole, entries, taught, teaching().distance, self.progress, journal=self.journal)
            known = [[plans.index(t.plan), t.errors] for t in ranked]
            self.journal.put(known, "tried")
        self.trials = [TrialResult(plan=plans[n], errors=errors) for n, errors in known]
        return self.trials[0].plan

    def _try_starts(self, plan: CompressionPlan, teaching: Taught) -> None:
        """Take, of several ways to start the plan's intervals, the one whose student comes to sample nearest to the teacher.

        All start as the search found them, or each from its first, middle or last block. Those with adapters stay.
        """
        plain = [i for i in plan.intervals if i not in plan.adapters]
        keys = {(i.first, i.last): plan.interval_key(i) for i in plain}
        ways = [{span: self.start(*span) for span in keys}]
        for share in (0.0, 0.5, 1.0):
            way = {(u, v): min(self.costs.choices(u, v), key=lambda s: (abs(s - int(u + share * (v - u))), s)) for u, v in keys}
            ways += [way] if way not in ways else []
        if len(ways) == 1:
            return
        found = {}
        if self.trials:  # the first way has been tried, as long, with other plans
            errors = self.trials[0].errors
            found[0] = [errors[0], errors[-1]]
        left = range(len(found), len(ways))
        if (known := self.journal.get("starts")) is None:
            entries = [trials.Trial(plan, self._bank(plan, ways[n]), teaching().learning_rate) for n in left]
            taught, judge = teaching().taught[: self.settings.trial_steps], teaching().distance
            trials.run_trials(self.whole, entries, taught, judge, self.progress, rounds=(1.0,), journal=self.journal, name="ways")
            known = [t.errors for t in entries]
            self.journal.put(known, "starts")
        found |= {n: [(int(step), float(error)) for step, error in errors] for n, errors in zip(left, known, strict=True)}
        ranked = sorted(found, key=lambda n: min(error for _, error in found[n]))
        self.start_trials = [StartResult(starts={keys[s]: b for s, b in ways[n].items()}, errors=found[n]) for n in ranked]
        self.starts |= ways[ranked[0]]

    def _bank(self, plan: CompressionPlan, starts: Mapping[Span, int] | None = None) -> Bank:
        """What an untrained student of the plan is made from: closed forms, and the blocks that intervals start from, as the search has it or as told."""
        bank = closed_form_bank(self.costs.stats, self.settings.ridge, plan)
        for i in plan.intervals:
            start = (starts or {}).get((i.first, i.last), self.start_in(plan, i))
            adapters = interval_adapters(self.costs.stats, self.settings.ridge, i.first, start) if i in plan.adapters else {}
            bank[plan.interval_key(i)] = self.costs.teacher.block_tensors(start) | adapters
        return bank

    @cached_property
    def options(self) -> Options:
        """All that the recipe leaves free, with its costs."""
        wanted = self.wanted
        free_text = wanted.text_stream == "auto" and self.budget is not None
        return Options(
            **layout(self.source),
            ranks=self._rank_choices(),
            text_runs=self._text_choices() if free_text else [(0.0, 0)],
            text_blocks=None if free_text else (wanted.text_stream if isinstance(wanted.text_stream, list) else []),
            chains=self._chains(),
            fixed_intervals=wanted.intervals != "auto",
            adapters=None if self.adapted is None else frozenset(self.adapted),
            ffns=self._ffn_choices(),
            fixed_ffns=[] if self.budget is None and wanted.ffn == "auto" else by_hand(wanted),
            dead_code=wanted.dead_code,
            protect=frozenset(wanted.protect),
            text_reach=self.longest,
        )

    def _rank_choices(self) -> list[tuple[float, int | None]]:
        wanted = self.wanted.modulation_rank
        if wanted == "none" or (wanted == "auto" and self.budget is None):
            return [(0.0, None)]
        self.measure_ranks()
        if isinstance(wanted, int):
            if wanted > self.width:
                raise RecipeError(f"plan.modulation_rank = {wanted}: wanted at most the width, {self.width}")
            self._check_rank(wanted)
            return [(0.0, wanted)]
        fit = [r for r, c in self.rank_costs.items() if c <= (self.wanted.modulation_error or RANK_TOLERANCE)]
        return [(0.0, None), *([(self.rank_costs[min(fit)], min(fit))] if fit else [])]

    def _check_rank(self, rank: int) -> None:
        """Raise RecipeError for a rank by hand that costs more than the recipe allows."""
        limit = self.wanted.modulation_error
        if limit is None:
            return
        if rank not in self.rank_costs:
            self.rank_costs |= self._student_costs({rank: self._wide(rank=rank)}, "modulation rank")
        cost = self.rank_costs[rank]
        if cost > limit:
            enough = min((r for r, c in self.rank_costs.items() if c <= limit), default=None)
            way_out = f"a rank of {enough} or more, or a larger limit" if enough else "a larger limit, or none"
            raise RecipeError(
                f"plan.modulation_rank = {rank}: costs {cost:.3g} of the velocity's energy, plan.modulation_error = {limit:g}: wanted {way_out}"
            )

    def _text_choices(self) -> list[tuple[float, int]]:
        self.measure_text()
        return [(0.0, 0), *((c, k) for k, c in self.text_costs.items())]

    def _ffn_choices(self) -> list[tuple[float, str, int]]:
        if self.wanted.ffn != "auto" or self.budget is None:
            return []
        family, config = self.source.family, self.source.config
        free = [b for b in range(self.length) if b not in self.wanted.protect]
        networks = [(b, stream) for stream in STREAMS for b in free if stream in family.ffn_streams(config, b)]
        errors = self.costs.ffns(networks, self._told("linear networks"))
        self.ffn_costs = [(self.costs.share(e), stream, b) for (b, stream), e in zip(networks, errors, strict=True)]
        return sorted(self.ffn_costs)

    def _chains(self) -> dict[Removed, list[Chain]]:
        """Intervals by the number of blocks they remove, as the strategy picks them."""
        wanted = self.wanted.intervals
        if isinstance(wanted, list):
            spans = [(a, b) for a, b in wanted]
            return {detection.removed_by(spans, self.sizes): [(0.0, spans)]}
        if wanted == "none":
            return {(0,) * len(self.sizes): [(0.0, [])]}
        if self.settings.strategy == "output_error":
            self.measure_intervals()
            count = max(1, self.settings.trials)
            found = selection.best_chains(self.sizes, self.interval_costs, SEVERAL * count)
            return {removed: self._distinct(chains)[:count] for removed, chains in found.items()}
        return self._rival_chains()

    def _known_sets(self, removed: Removed, cheapest: Sequence[Chain]) -> list[Dropped]:
        """Sets of blocks that other rules would drop and the supernet can leave out, the cheapest by output error first.

        Where there are none, the cheapest with its intervals' first blocks kept, which is always one.
        """
        sets = [supernet.dropped_by({s: self.kept[s] for s in spans}) for _, spans in cheapest]
        for strategy in ("even", "block_influence", "laptop", "ppcl"):
            picked = self._picked(strategy, sum(removed))
            sets += [supernet.dropped_by(picked)] if picked else []
        fitting = [d for d in dict.fromkeys(sets) if supernet.fits(d, self.spans, self.sizes) and supernet.counts(d, self.sizes) == removed]
        return fitting or [supernet.dropped_by({s: s[0] for s in cheapest[0][1]})]

    def _distinct(self, chains: Sequence[Chain]) -> list[Chain]:
        """Chains that drop different blocks: of those that drop the same, the cheapest."""
        by_dropped: dict[Dropped, Chain] = {}
        for cost, spans in chains:
            by_dropped.setdefault(supernet.dropped_by({s: self.kept[s] for s in spans}), (cost, spans))
        return list(by_dropped.values())

    def _rival_chains(self) -> dict[Removed, list[Chain]]:
        """What another rule picks for every number of removed blocks, at the velocity error of that cut with nothing in its place."""
        chains: dict[Removed, list[Chain]] = {(0,) * len(self.sizes): [(0.0, [])]}
        worst = 0.0
        picked = [self._picked(self.settings.strategy, n) for n in range(1, self.length - len(self.sizes) + 1)]
        cuts = [p for p in picked if p is not None and all(allows(self.wanted, *s) for s in p)]
        errors = self.costs.cuts(cuts, linear=False, progress=self._told(self.settings.strategy))
        for cut, each in zip(cuts, errors, strict=True):
            # Not below that of fewer blocks: the rule itself says which blocks go, the budget how many.
            worst = max(worst, self.costs.share(each))
            chains[detection.removed_by(cut, self.sizes)] = [(worst, sorted(cut))]
            self.kept |= {s: stays for s, stays in cut.items() if s not in self.kept}
        return chains

    def _picked(self, strategy: Strategy, removed: int) -> dict[Span, int] | None:
        """A rule's intervals, each with the block that it would keep: PPCL's first one, or the one that is not dropped."""
        if strategy in ("ppcl", "even"):
            spans = detection.trimmed(self.ppcl, self.cka, removed) if strategy == "ppcl" else even_intervals(self.sizes, removed)
            return None if spans is None else {s: s[0] for s in spans}
        scores = self.influences if strategy == "block_influence" else self.drop_errors
        dropped = detection.lowest(scores, removed, [b not in self.wanted.protect for b in range(self.length)])
        return detection.spans_of_dropped(dropped, self.sizes) if dropped else None

    def start(self, u: int, v: int) -> int:
        """The teacher block that the student block of an interval starts from."""
        if (u, v) not in self.starts and (u, v) not in self.kept:
            if v - u < self.longest:
                self.hand_errors[u, v], self.kept[u, v] = self.costs.intervals([(u, v)])[u, v]
            else:
                self.kept[u, v] = u
        return self.starts.get((u, v), self.kept.get((u, v), u))

    def start_in(self, plan: CompressionPlan, interval: Interval) -> int:
        """The teacher block that an interval's student block starts from in a plan: with adapters, the one that they serve best."""
        span = (interval.first, interval.last)
        if interval not in plan.adapters:
            return self.start(*span)
        if span not in self.adapted_starts:
            self.adapted_starts[span] = self.costs.adapted(*span)[1]
        return self.adapted_starts[span]

    def all_starts(self, plan: CompressionPlan) -> dict[str, int]:
        """By key, the start of every interval of the plan and of every other one that was considered."""
        chosen = {plan.interval_key(i): self.start_in(plan, i) for i in plan.intervals}
        return {Interval(first=u, last=v).key: self.start(u, v) for u, v in sorted(self.kept)} | chosen

    @cached_property
    def drop_errors(self) -> list[float]:
        """Velocity error with each block left out on its own. Source: arXiv 2404.11098, section 3.2."""
        return [self.costs.share(errors) for errors in self.costs.dropped(range(self.length))]

    @cached_property
    def influences(self) -> list[float]:
        """Block influence of every block."""
        return self.costs.influences()

    def candidates(self) -> list[Candidate]:
        """Everything that was measured, intervals by hand included, with the parameters that each edit saves on its own."""
        family, config = self.source.family, self.source.config
        whole = predicted_parameters(family, config, self.options.plan([]))
        by_length: dict[Removed, int] = {}
        rows = []
        by_hand = {span: self.costs.share(errors) for span, errors in self.hand_errors.items()}
        for (u, v), cost in (self.interval_costs | by_hand).items():
            removed = detection.removed_by([(u, v)], self.sizes)
            if removed not in by_length:
                by_length[removed] = whole - predicted_parameters(family, config, self.options.plan([(u, v)]))
            rows.append(Candidate(kind="interval", first=u, last=v, cost=cost, parameters=by_length[removed]))
        for k, cost in self.text_costs.items():
            blocks = list(family.text_blocks(config)[-k:])
            saved = whole - predicted_parameters(family, config, self.options.plan([], blocks))
            rows.append(Candidate(kind="text_stream", first=blocks[0], last=blocks[-1], cost=cost, parameters=saved))
        for cost, stream, block in sorted(self.ffn_costs, key=lambda f: (f[1], f[2])):
            if stream == "image" or family.text_end == "read" or block < self.length - 1:  # else the last block's text network is dead code
                saved = whole - predicted_parameters(family, config, self.options.plan([], ffn=[(block, stream)]))
                rows.append(Candidate(kind=f"{stream}_ffn", first=block, last=block, cost=cost, parameters=saved))
        return rows

    def work(self) -> dict[str, float]:
        """Forwards of one sample through the teacher: allowed for intervals, spent on them, spent in all; intervals considered, of those possible."""
        intervals = self.costs.count + sum(self.costs.interval_price(*s) for s in self.interval_errors) if self.interval_errors else 0.0
        found = {"budget": float(self.settings.budget), "intervals": intervals, "spent": self.costs.spent}
        return found | ({"considered": float(len(self.spans)), "possible": float(self.possible)} if self.interval_errors else {})

    def stability(self, plan: CompressionPlan) -> dict[str, Agreement]:
        """How far the intervals chosen for as many removed blocks agree on resampled probe samples and on single timestep bands.

        By cost alone, and by the supernet on resampled samples where it was asked.
        """
        removed = self._removed(plan)
        if not self.interval_errors or not any(removed) or isinstance(self.wanted.intervals, list):
            return {}
        spans = list(self.interval_errors)
        errors = torch.stack([self.interval_errors[s] for s in spans])
        chosen = selection.cheapest_chains(self.sizes, self.interval_costs)[removed][1]

        def pick(weights: torch.Tensor) -> list[Span]:
            costs = (errors @ weights / (self.costs.energy @ weights)).tolist()
            return selection.cheapest_chains(self.sizes, dict(zip(spans, costs, strict=True)))[removed][1]

        generator = torch.Generator().manual_seed(0)
        draws = [torch.randint(self.costs.count, (self.costs.count,), generator=generator) for _ in range(RESAMPLES)]
        resampled = [pick(torch.bincount(d, minlength=self.costs.count).double()) for d in draws]
        band = (self.costs.timesteps * BANDS).long().clamp(max=BANDS - 1)
        banded = [pick((band == b).double()) for b in range(BANDS) if bool((band == b).any())]
        found = {"selection.resamples": agreement(chosen, resampled), "selection.bands": agreement(chosen, banded)}
        if removed in self.set_errors:
            sets = [sorted(detection.spans_of_dropped(d, self.sizes) or {}) for d, _ in self.set_errors[removed]]
            errors = torch.stack([e for _, e in self.set_errors[removed]])
            rows = [torch.randint(errors.shape[1], (errors.shape[1],), generator=generator) for _ in range(RESAMPLES)]
            best = [sets[int(errors[:, r].median(1).values.argmin())] for r in rows]
            found["supernet.resamples"] = agreement([(i.first, i.last) for i in plan.intervals], best)
        return found


def agreement(chosen: Sequence[Span], others: Sequence[Sequence[Span]]) -> Agreement:
    """Jaccard index of the chosen intervals with those of every other run: mean, lowest and highest."""
    values = []
    for other in others:
        both, either = set(chosen) & set(other), set(chosen) | set(other)
        values.append(len(both) / len(either) if either else 1.0)
    return Agreement(jaccard=sum(values) / len(values), lowest=min(values), highest=max(values), runs=len(values))
