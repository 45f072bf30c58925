"""analyze: probes, CKA, first differences, candidates with their costs, and the plan that meets the target.

PPCL's detection (arXiv 2511.16156) follows from second moments alone. With centred moments
`S_i = X_i' X_i` and `C_ij = X_i' X_j` of block inputs (rows are tokens), the probe of block i is
`A_i = I + (S_i + ridge)^-1 (C_i,i+1 - S_i)`, and for linear CKA
`cka(X, X A) = |S A|^2 / (|S| |A' S A|)`, Frobenius norms.

Selection is ours: a candidate's cost is the velocity error with a closed-form stand-in swapped in,
and dynamic programming picks the cheapest set of edits that meets the target.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from ppclc import flow
from ppclc.errors import PlanError, RecipeError
from ppclc.models import Source, StandIn, apply_plan, predicted_parameters, replaced, student_config
from ppclc.plan import CompressionPlan, kept_blocks
from ppclc.records import Analysis, CalibrationStats, Candidate, digest_of
from ppclc.samples import Sample, Samples

VERSION = 1
Auto = Literal["auto", "none"]
Pair = Annotated[list[int], Field(min_length=2, max_length=2)]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_TEXT_BLOCKS = 8
RANK_TOLERANCE = 1e-3
"""Largest squared relative velocity error that an automatic modulation rank may cost."""


class AnalyzeSettings(BaseModel):
    """Section `analyze` of a recipe. `probes`: samples on which candidates are swapped in."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    reading: Literal["equation", "caption"] = "equation"
    ridge: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    strategy: Literal["output_error", "ppcl"] = "output_error"
    probes: Annotated[int, Field(ge=16)] = 128


class TargetSettings(BaseModel):
    """Section `target` of a recipe: what remains, one of a share or count of parameters, or bytes of weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    parameters: Annotated[float, Field(gt=0)] | Annotated[int, Field(gt=0)] | None = None
    bytes: Annotated[float, Field(gt=0)] | Annotated[int, Field(gt=0)] | None = None


class PlanSettings(BaseModel):
    """Section `plan` of a recipe: what is fixed by hand; `auto` leaves it to the selection, `none` forbids it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    intervals: Auto | list[Pair] = "auto"
    text_stream: Auto | list[int] = "auto"
    ffn: Auto | list[dict[str, Any]] = "auto"
    modulation_rank: Auto | Annotated[int, Field(ge=1)] = "auto"
    dead_code: bool = True
    protect: list[int] = []


@dataclass(frozen=True)
class Probes:
    """Linear probes of one stream, from its moments. `ridge` is relative to the mean of `S`'s diagonal."""

    stats: CalibrationStats
    stream: str
    ridge: float

    def cross(self, i: int, j: int) -> torch.Tensor:
        """Centred cross moment (D, D) of states i and j."""
        a, b = min(i, j), max(i, j)
        t, n = self.stats.tensors, self.stats.rows[self.stream]
        raw = t[f"{self.stream}.cross.{a}.{b}"] - torch.outer(t[f"{self.stream}.sum.{a}"], t[f"{self.stream}.sum.{b}"]) / n
        return raw if i <= j else raw.T  # type: ignore[no-any-return]

    def mean(self, i: int) -> torch.Tensor:
        """Mean (D,) of state i."""
        return self.stats.tensors[f"{self.stream}.sum.{i}"] / self.stats.rows[self.stream]  # type: ignore[no-any-return]

    def linear_map(self, i: int, j: int) -> torch.Tensor:
        """`A` (D, D) with `X_i A ~ X_j`, fitted on the residual so that the ridge pulls towards the identity."""
        s = self.cross(i, i)
        penalty = self.ridge * s.diagonal().mean().clamp(min=1e-30)
        eye = torch.eye(len(s), dtype=s.dtype)
        solved: torch.Tensor = torch.linalg.solve(s + penalty * eye, self.cross(i, j) - s)
        return eye + solved

    def error(self, i: int) -> float:
        """Share of block i's residual `X_i+1 - X_i` that its probe leaves."""
        before, between, after = self.cross(i, i), self.cross(i, i + 1), self.cross(i + 1, i + 1)
        a = self.linear_map(i, i + 1)
        left = after.trace() - 2 * (a.T @ between).trace() + (a.T @ before @ a).trace()
        whole = (after + before - between - between.T).trace()
        return (left.clamp(min=0) / whole).item() if whole > 0 else 0.0

    @cached_property
    def maps(self) -> list[torch.Tensor]:
        """The probe of every block."""
        return [self.linear_map(i, i + 1) for i in range(self.stats.num_blocks)]

    def cka(self, u: int, k: int, reading: str) -> float:
        """CKA of block u's true output pushed through probes u+1..k, with itself or with block k's true output.

        Source: arXiv 2511.16156, equation 3 (`equation`) and the caption of its figure 3 (`caption`).
        """
        a = torch.linalg.multi_dot([torch.eye(len(self.maps[0]), dtype=torch.float64), *self.maps[u + 1 : k + 1]]) if k > u else None
        s = self.cross(u + 1, u + 1)
        through = s if a is None else a.T @ s @ a
        if reading == "equation":
            joint, other = (s if a is None else s @ a), s
        else:
            other = self.cross(k + 1, k + 1)
            joint = self.cross(k + 1, u + 1) if a is None else self.cross(k + 1, u + 1) @ a
        norm = other.norm() * through.norm()
        return (joint.square().sum() / norm).item() if norm > 0 else 1.0


def cka_map(probes: Probes, reading: str) -> torch.Tensor:
    """`cka[u, k]` (L, L) for `u <= k < u + longest`, NaN elsewhere."""
    length = probes.stats.num_blocks
    table = torch.full((length, length), float("nan"), dtype=torch.float64)
    for u in range(length):
        for k in range(u, min(u + probes.stats.longest, length)):
            table[u, k] = probes.cka(u, k, reading)
    return table


def first_difference_intervals(cka: torch.Tensor) -> tuple[list[tuple[int, int]], list[float | None]]:
    """PPCL's intervals of two or more blocks, and the difference `delta(u, k)` seen at each block k.

    From block u on, the interval grows while the drop of CKA shrinks, and is cut before the first k
    whose drop is larger than the one before. Source: arXiv 2511.16156, equations 4 and 5, with
    `k in [u+2, M]`.
    """
    length = len(cka)
    intervals: list[tuple[int, int]] = []
    deltas: list[float | None] = [None] * length
    u = 0
    while u < length:
        k = u + 1
        previous: float | None = None
        while k < length and not torch.isnan(cka[u, k]):
            delta = (cka[u, k - 1] - cka[u, k]).item()
            if previous is not None and delta > previous:
                break
            deltas[k] = delta
            previous = delta
            k += 1
        if k - u >= 2:
            intervals.append((u, k - 1))
        u = k
    return intervals, deltas


def text_maps(stats: CalibrationStats, ridge: float, block: tuple[int, int], reference: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Closed-form maps of a text-stream edit: `text_in` between modulated inputs, `text_out` between text outputs.

    `block` and `reference` are (first, last) of the student block's teacher blocks. Ridge least squares.
    """
    pairs = {"text_in": ("text_input", reference[0], block[0]), "text_out": ("text", reference[1] + 1, block[1] + 1)}
    maps = {}
    for name, (stream, i, j) in pairs.items():
        if f"{stream}.cross.{i}.{j}" not in stats.tensors:
            raise PlanError(
                f"plan.text_stream: block {block[0]} is {j - i} blocks from its reference {reference[0]}; "
                f"calibrate.longest = {stats.longest}: wanted at least that"
            )
        probes = Probes(stats, stream, ridge)
        a = probes.linear_map(i, j)
        maps[f"{name}.weight"] = a.T.float().contiguous()
        maps[f"{name}.bias"] = (probes.mean(j) - probes.mean(i) @ a).float()
    return maps


def modulation_basis(stats: CalibrationStats) -> dict[str, torch.Tensor]:
    """`basis` (D, D), principal directions of `SiLU(temb)` by falling variance, and `mean` (D,)."""
    moments = Probes(stats, "temb", 0)
    _, vectors = torch.linalg.eigh(moments.cross(0, 0))
    return {"basis": vectors.flip(1).float().contiguous(), "mean": moments.mean(0).float()}


def closed_form_bank(
    stats: CalibrationStats, ridge: float, plan: CompressionPlan, key: Callable[[CompressionPlan, int], str]
) -> dict[str, dict[str, torch.Tensor]]:
    """Everything in the bank that needs no training: modulation basis and text maps of a plan."""
    bank = {"modulation": modulation_basis(stats)}
    for edit in plan.text_stream:
        spans = [(b, i.last if (i := plan.interval_at(b)) else b) for b in (edit.block, edit.reference)]
        bank[key(plan, edit.block)] = text_maps(stats, ridge, spans[0], spans[1])
    return bank


def analyze(
    model: Any,
    source: Source,
    stats: CalibrationStats,
    samples: Samples,
    settings: AnalyzeSettings,
    target: TargetSettings,
    wanted: PlanSettings,
    dtype: str,
    progress: Callable[[float, str], None],
) -> Analysis:
    """The analysis and the plan.

    Raises:
        RecipeError: a target that no allowed set of edits reaches.
        PlanError: edits fixed by hand that this model cannot take.
    """
    family = source.family
    streams = list(family.groups[0].streams)
    probes = {s: Probes(stats, s, settings.ridge) for s in streams}
    maps = {s: cka_map(p, settings.reading) for s, p in probes.items()}
    detected = {s: first_difference_intervals(m) for s, m in maps.items()}
    search = Search(model, source, stats, probes, probe_set(samples, settings.probes), settings, wanted, progress)
    plan = search.plan(parameter_limit(search.teacher_parameters, target, dtype), detected[streams[0]][0])
    return Analysis(
        reading=settings.reading,
        strategy=settings.strategy,
        streams=streams,
        probe_error={s: [p.error(i) for i in range(stats.num_blocks)] for s, p in probes.items()},
        first_differences={s: d[1] for s, d in detected.items()},
        ppcl_intervals=detected[streams[0]][0],
        candidates=search.candidates(),
        modulation_error=search.rank_costs,
        plan=plan,
        tensors={"cka": torch.stack([maps[s] for s in streams]), **{f"modulation.{k}": v for k, v in modulation_basis(stats).items()}},
    )


def probe_set(samples: Samples, count: int) -> list[Sample]:
    """The samples on which candidates are swapped in, in batches of at most 64."""
    generator = torch.Generator().manual_seed(20)
    return [samples.draw(min(64, count - i), generator) for i in range(0, count, 64)]


def parameter_limit(teacher_parameters: int, target: TargetSettings, dtype: str) -> int | None:
    """Most parameters that the student may have, None when the plan is fixed without a target.

    Raises:
        RecipeError: two targets, or one that is not below the teacher.
    """
    given = {k: v for k, v in target.model_dump().items() if v is not None}
    if len(given) > 1:
        raise RecipeError(f"target: got {' and '.join(given)}, wanted one of them")
    if not given:
        return None
    ((name, value),) = given.items()
    teacher = teacher_parameters * (1 if name == "parameters" else BYTES[dtype])
    limit = value * teacher if isinstance(value, float) and value <= 1 else value
    if limit > teacher:
        raise RecipeError(f"target.{name} = {value}: wanted at most the teacher's {teacher}")
    return int(limit if name == "parameters" else limit / BYTES[dtype])


def even_plan(source: Source, target: TargetSettings, wanted: PlanSettings, dtype: str) -> CompressionPlan:
    """A plan that needs no weights: hand-made edits as they are, free intervals spaced evenly until the target is met.

    A free modulation rank is an eighth of the width; a free text stream stays whole.

    Raises:
        RecipeError: the target cannot be met so.
    """
    family, length = source.family, source.family.num_blocks(source.config)
    width = int(source.config["attention_head_dim"]) * int(source.config["num_attention_heads"])
    text = wanted.text_stream if isinstance(wanted.text_stream, list) else []
    teacher = predicted_parameters(family, source.config, CompressionPlan.of(family.name, length))
    limit = parameter_limit(teacher, target, dtype)
    fixed = [(a, b) for a, b in wanted.intervals] if isinstance(wanted.intervals, list) else None
    ranks: list[int | None] = [wanted.modulation_rank] if isinstance(wanted.modulation_rank, int) else [None]
    if wanted.modulation_rank == "auto" and limit is not None:
        ranks.append(max(1, width // 8))
    choices = [fixed] if fixed is not None else [even_intervals(length, n) for n in range(length if wanted.intervals == "auto" else 1)]
    if fixed is None:
        choices = [[span for span in spans if allows(wanted, *span)] for spans in choices]
    for rank, spans in itertools.product(reversed(ranks), choices):
        dead = wanted.dead_code and bool(text or rank is not None)
        plan = CompressionPlan.of(family.name, length, spans, text, rank, dead)
        if limit is None or predicted_parameters(family, source.config, plan) <= limit:
            return plan
    raise RecipeError(f"target: {limit} parameters cannot be reached by the edits that the recipe allows; wanted a larger target")


def allows(wanted: PlanSettings, first: int, last: int) -> bool:
    """Whether a free interval touches no protected block and removes none whose text stream is mapped by hand."""
    text = wanted.text_stream if isinstance(wanted.text_stream, list) else []
    return not any(first <= b <= last for b in wanted.protect) and not any(first < b <= last for b in text)


def even_intervals(length: int, removed: int) -> list[tuple[int, int]]:
    """Intervals that remove `removed` of `length` blocks, evenly spaced: pairs while they fit, longer runs beyond."""
    kept = length - removed
    edges = [round(i * length / kept) for i in range(kept + 1)]
    return [(a, b - 1) for a, b in itertools.pairwise(edges) if b - a > 1]


class Search:
    """Costs of candidate edits, measured as they are needed, and the search over sets of them."""

    def __init__(
        self,
        model: Any,
        source: Source,
        stats: CalibrationStats,
        probes: Mapping[str, Probes],
        samples: Sequence[Sample],
        settings: AnalyzeSettings,
        wanted: PlanSettings,
        progress: Callable[[float, str], None],
    ) -> None:
        self.model, self.source, self.family = model, source, source.family
        self.stats, self.probes, self.samples = stats, probes, samples
        self.settings, self.wanted, self.progress = settings, wanted, progress
        self.length = stats.num_blocks
        bad = [b for b in wanted.protect if not 0 <= b < self.length]
        if bad:
            raise RecipeError(f"plan.protect = {wanted.protect}: wanted blocks within 0..{self.length - 1}")
        if wanted.ffn not in ("auto", "none", []):
            raise RecipeError(f"plan.ffn = {wanted.ffn}: feed-forward edits are not supported by this version; wanted auto or none")
        # Now, while the model is whole: `measure_intervals` swaps its blocks.
        self._teacher_outputs = [flow.predict(model, *sample) for sample in samples]
        self._counts: dict[str, int] = {}
        self.interval_costs: dict[tuple[int, int], float] = {}
        self.text_costs: dict[int, float] = {}
        self.rank_costs: dict[int, float] = {}

    @cached_property
    def teacher_parameters(self) -> int:
        """Parameters of the teacher."""
        return self.count(self.make([], [], None))

    def make(self, intervals: Sequence[tuple[int, int]], text: Sequence[int], rank: int | None) -> CompressionPlan:
        """The plan with these edits, dead code removed where the recipe allows and the class changes anyway."""
        dead = self.wanted.dead_code and bool(text or rank is not None)
        return CompressionPlan.of(self.family.name, self.length, list(intervals), list(text), rank, dead)

    def count(self, plan: CompressionPlan) -> int:
        """Exact parameters of the student; plans with the same configuration are counted once."""
        key = digest_of(student_config(self.family, self.source.config, plan))
        if key not in self._counts:
            self._counts[key] = predicted_parameters(self.family, self.source.config, plan)
        return self._counts[key]

    def measure_intervals(self, longest: int) -> None:
        """Velocity error with each candidate interval replaced by the best linear map of its input to its output."""
        spans = [(u, v) for u, v in itertools.combinations(range(self.length), 2) if v - u < longest and allows(self.wanted, u, v)]
        for n, (u, v) in enumerate(spans):
            stand_in = StandIn(self.family, self._linear(u, v))
            with replaced(self.model, self.family, {u: stand_in, **dict.fromkeys(range(u + 1, v + 1))}):
                self.interval_costs[u, v] = self._error(self.model)
            self.progress((n + 1) / len(spans), "intervals")

    def _error(self, student: Any) -> float:
        outputs = [flow.predict(student, *sample) for sample in self.samples]
        distance = sum((a - b).double().square().sum().item() for a, b in zip(outputs, self._teacher_outputs, strict=True))
        return distance / sum(b.double().square().sum().item() for b in self._teacher_outputs)

    def _linear(self, u: int, v: int) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        maps = {}
        for stream, probes in self.probes.items():
            a = probes.linear_map(u, v + 1)
            maps[stream] = (a.float(), (probes.mean(v + 1) - probes.mean(u) @ a).float())
        return lambda states: {s: x @ maps[s][0].to(x.dtype) + maps[s][1].to(x.dtype) for s, x in states.items()}

    def measure_text(self) -> None:
        """Velocity error with the text stream of the last k blocks mapped, for each k."""
        for k in range(1, min(MAX_TEXT_BLOCKS, self.stats.longest - 1, self.length - 1) + 1):
            blocks = list(range(self.length - k, self.length))
            if not any(b in self.wanted.protect for b in blocks):
                self.text_costs[k] = self._student_error(self.make([], blocks, None))
            self.progress(k / MAX_TEXT_BLOCKS, "text stream")

    def measure_ranks(self) -> None:
        """Velocity error by modulation rank: 4, 8, 16, ... below the width."""
        width = len(self.stats.tensors["temb.sum.0"])
        ranks = [r for r in (2**i for i in range(2, 16)) if r < width]
        for n, rank in enumerate(ranks):
            self.rank_costs[rank] = self._student_error(self.make([], [], rank))
            self.progress((n + 1) / len(ranks), "modulation rank")

    def _student_error(self, plan: CompressionPlan) -> float:
        bank = closed_form_bank(self.stats, self.settings.ridge, plan, self.family.text_key)
        return self._error(apply_plan(self.model, plan, bank))

    def candidates(self) -> list[Candidate]:
        """Everything that was measured, with the parameters that each edit saves on its own."""
        rows: list[tuple[str, int, int, float, CompressionPlan]]
        whole = self.teacher_parameters
        rows = [("interval", u, v, c, self.make([(u, v)], [], None)) for (u, v), c in self.interval_costs.items()]
        for k, cost in self.text_costs.items():
            rows.append(("text_stream", self.length - k, self.length - 1, cost, self.make([], range(self.length - k, self.length), None)))
        one_each = {v - u: plan for kind, u, v, _, plan in rows if kind == "interval"}
        by_length = {length: self.count(plan) for length, plan in one_each.items()}
        return [
            Candidate(kind=kind, first=u, last=v, cost=c, parameters=whole - (by_length[v - u] if kind == "interval" else self.count(plan)))
            for kind, u, v, c, plan in rows
        ]

    def plan(self, limit: int | None, ppcl: list[tuple[int, int]]) -> CompressionPlan:
        """The plan that meets the limit at the least cost, hand-made edits kept as they are."""
        ranks = self._rank_choices()
        texts = self._text_choices()
        chains = self._interval_choices(ppcl)
        if limit is None:
            if not isinstance(self.wanted.intervals, list):
                raise RecipeError("target: got nothing, wanted parameters or bytes, or plan.intervals as a list")
            limit = self.teacher_parameters
            return self.make(next(iter(chains.values()))[1], texts[0][1], ranks[0][1])
        best: tuple[float, CompressionPlan] | None = None
        for (rank_cost, rank), (text_cost, text) in itertools.product(ranks, texts):
            for cost, intervals in chains.values():
                blocks = self._suffix(len(text), intervals) if self.wanted.text_stream == "auto" else text
                if blocks is None or (best and cost + text_cost + rank_cost >= best[0]):
                    continue
                plan = self.make(intervals, blocks, rank)
                if self.count(plan) <= limit:
                    best = (cost + text_cost + rank_cost, plan)
        if best is None:
            raise RecipeError(f"target: {limit} parameters cannot be reached by the edits that the recipe allows; wanted a larger target")
        return self._put_back(best[1], limit)

    def _rank_choices(self) -> list[tuple[float, int | None]]:
        wanted = self.wanted.modulation_rank
        if wanted == "none":
            return [(0.0, None)]
        self.measure_ranks()
        if isinstance(wanted, int):
            width = len(self.stats.tensors["temb.sum.0"])
            if wanted > width:
                raise RecipeError(f"plan.modulation_rank = {wanted}: wanted at most the width, {width}")
            return [(0.0, wanted)]
        fit = [r for r, c in self.rank_costs.items() if c <= RANK_TOLERANCE]
        return [(0.0, None), *([(self.rank_costs[min(fit)], min(fit))] if fit else [])]

    def _text_choices(self) -> list[tuple[float, list[int]]]:
        wanted = self.wanted.text_stream
        if isinstance(wanted, list):
            return [(0.0, wanted)]
        if wanted == "none":
            return [(0.0, [])]
        self.measure_text()
        return [(0.0, []), *((c, list(range(self.length - k, self.length))) for k, c in self.text_costs.items())]

    def _suffix(self, k: int, intervals: Sequence[tuple[int, int]]) -> list[int] | None:
        """The last k student blocks, as teacher numbers, when their maps are within reach of the moments."""
        kept = kept_blocks(self.length, list(intervals))
        if k >= len(kept) or self.length - kept[len(kept) - k - 1] > self.stats.longest:
            return [] if k == 0 else None
        blocks = list(kept[len(kept) - k :])
        return None if any(b in self.wanted.protect for b in blocks) else blocks

    def _interval_choices(self, ppcl: list[tuple[int, int]]) -> dict[int, tuple[float, list[tuple[int, int]]]]:
        """Least-cost disjoint intervals by the number of blocks they remove."""
        wanted = self.wanted.intervals
        if isinstance(wanted, list):
            return {0: (0.0, [(a, b) for a, b in wanted])}
        if wanted == "none":
            return {0: (0.0, [])}
        self.measure_intervals(self.stats.longest)
        if self.settings.strategy == "ppcl":
            usable = [i for i in ppcl if i in self.interval_costs]
            return _trimmed(usable, self.interval_costs)
        return cheapest_chains(self.length, self.interval_costs)

    def _put_back(self, plan: CompressionPlan, limit: int) -> CompressionPlan:
        """The plan without any edit that the target does not need; intervals are put back first, then text streams."""
        fixed = self.wanted
        while True:
            for edit in plan.edits():
                hand_made = (
                    (edit == "modulation_rank" and fixed.modulation_rank != "auto")
                    or (hasattr(edit, "first") and fixed.intervals != "auto")
                    or (hasattr(edit, "reference") and fixed.text_stream != "auto")
                )
                if not hand_made and self.count(smaller := plan.without(edit)) <= limit:
                    plan = smaller
                    break
            else:
                return plan


def cheapest_chains(length: int, costs: Mapping[tuple[int, int], float]) -> dict[int, tuple[float, list[tuple[int, int]]]]:
    """For every number of removed blocks, the disjoint intervals of least total cost. Dynamic programming over blocks."""
    best: list[dict[int, tuple[float, list[tuple[int, int]]]]] = [{0: (0.0, [])}]
    for end in range(1, length + 1):
        here = dict(best[end - 1])
        for (u, v), cost in costs.items():
            if v != end - 1:
                continue
            for removed, (total, chain) in best[u].items():
                key = removed + v - u
                if key not in here or total + cost < here[key][0]:
                    here[key] = (total + cost, [*chain, (u, v)])
        best.append(here)
    return best[length]


def _trimmed(intervals: list[tuple[int, int]], costs: Mapping[tuple[int, int], float]) -> dict[int, tuple[float, list[tuple[int, int]]]]:
    """PPCL's own intervals, then ever fewer of them, the dearest put back first."""
    table: dict[int, tuple[float, list[tuple[int, int]]]] = {}
    left = sorted(intervals)
    while True:
        table[sum(v - u for u, v in left)] = (sum(costs[i] for i in left), list(left))
        if not left:
            return table
        left.remove(max(left, key=lambda i: costs[i]))
