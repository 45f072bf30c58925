"""What a recipe's `target` and `plan` ask for: the budget that a student must meet, the edits that are allowed, a plan without weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from ppclc.analysis import selection
from ppclc.analysis.closed_forms import check_reach
from ppclc.analysis.detection import even_intervals, group_ranges
from ppclc.analysis.selection import Budget
from ppclc.costs.blocks import require_block_costs
from ppclc.costs.predictions import vram_bytes, weight_bytes
from ppclc.errors import RecipeError
from ppclc.loading.classes import model_outline, predicted_parameters, student_config
from ppclc.loading.sources import Source
from ppclc.plan import CompressionPlan
from ppclc.records import digest_of

Auto = Literal["auto", "none"]


def _two(value: Any) -> Any:
    if isinstance(value, list) and len(value) != 2:
        raise ValueError("pairs of blocks, the first and the last that become one")
    return value


Pair = Annotated[list[int], BeforeValidator(_two)]


LEAST_NUMBER = 1000
"""Parameters and bytes from which a number counts them: what lies between it and a share is a percentage by mistake."""


class TargetSettings(BaseModel):
    """Section `target` of a recipe: what remains, one of the four.

    parameters, bytes (of the weight files): a share of the teacher's up to 1, else a number. vram_gb (10^9
    bytes: weights, and activations at bench's size) and latency_ms (of one forward on this machine): numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    parameters: Annotated[float, Field(gt=0)] | Annotated[int, Field(gt=0)] | None = None
    bytes: Annotated[float, Field(gt=0)] | Annotated[int, Field(gt=0)] | None = None
    vram_gb: Annotated[float, Field(gt=0)] | Annotated[int, Field(gt=0)] | None = None
    latency_ms: Annotated[float, Field(gt=0)] | Annotated[int, Field(gt=0)] | None = None

    @field_validator("parameters", "bytes")
    @classmethod
    def _share_or_number(cls, value: float | None) -> float | None:
        if value is not None and 1 < value < LEAST_NUMBER:
            raise ValueError(f"a share of the teacher's up to 1, or a number of at least {LEAST_NUMBER:,}")
        return 1.0 if value == 1 else value  # no model has one parameter

    @property
    def is_given(self) -> bool:
        """Whether there is a target at all."""
        return any(value is not None for value in self.model_dump().values())


RANK_TOLERANCE = 1e-3
"""Largest squared relative velocity error that an automatic modulation rank may cost, where the recipe does not say."""
SHARES = ("parameters", "bytes")
"""Targets that may be a share of the teacher's."""


class FfnChoice(BaseModel):
    """One entry of `plan.ffn`: a block whose feed-forward network of one stream becomes a linear map."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    block: Annotated[int, Field(ge=0)]
    stream: Literal["image", "text"]


class PlanSettings(BaseModel):
    """Section `plan` of a recipe: what is fixed by hand; `auto` leaves it to the selection, `none` forbids it.

    modulation_error: largest squared relative velocity error that a modulation rank may cost; one by hand that costs more is
    refused where this is given, an automatic one is kept below RANK_TOLERANCE otherwise.
    adapters: linear maps in front of the student blocks that stand for intervals; `auto` is every interval of the
    plan, a list those of `intervals` that have them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    intervals: Auto | list[Pair] = "auto"
    text_stream: Auto | list[int] = "auto"
    ffn: Auto | list[FfnChoice] = "auto"
    modulation_rank: Auto | Annotated[int, Field(ge=1)] = "auto"
    modulation_error: Annotated[float, Field(gt=0)] | None = None
    adapters: Auto | list[Pair] = "none"
    dead_code: bool = True
    protect: list[int] = []

    @property
    def is_fixed(self) -> bool:
        """Whether nothing is left to be chosen."""
        return "auto" not in (self.intervals, self.text_stream, self.ffn, self.modulation_rank)


def layout(source: Source) -> dict[str, Any]:
    """What `selection.Options` wants to know of a model's blocks."""
    family, config = source.family, source.config
    return {
        "family": family.name,
        "groups": family.sizes(config),
        "texted": family.text_blocks(config),
        "text_ends": family.text_end != "read",
        "dead_text": family.has_dead_code,
        "adaptable": [r for r, g in zip(group_ranges(family.sizes(config)), family.groups, strict=True) if g.adapters],
    }


def budget_of(source: Source, target: TargetSettings, dtype: str) -> Budget | None:
    """What the target allows, None when the recipe names none.

    Raises:
        RecipeError: two targets, or one that is not below the teacher.
    """
    given = {k: v for k, v in target.model_dump().items() if v is not None}
    if len(given) > 1:
        raise RecipeError(f"target: got {' and '.join(given)}, wanted one of them")
    if not given:
        return None
    ((name, wanted),) = given.items()
    value = _cached(source, _valuer(source, name, dtype))
    teacher = value(CompressionPlan.of(source.family.name, source.family.num_blocks(source.config)))
    limit = wanted * teacher if name in SHARES and isinstance(wanted, float) and wanted <= 1 else wanted
    if limit > teacher:
        raise RecipeError(f"target.{name} = {wanted}: wanted at most the teacher's {selection.figure(teacher)}")
    return Budget(name, limit, value)


def _valuer(source: Source, name: str, dtype: str) -> Callable[[CompressionPlan], float]:
    """What a target counts of a plan's student."""
    family, config = source.family, source.config
    if name == "parameters":
        return lambda plan: predicted_parameters(family, config, plan)
    if name == "bytes":
        return lambda plan: weight_bytes(model_outline(family, student_config(family, config, plan)), dtype)
    if name == "vram_gb":
        return lambda plan: vram_bytes(family, config, plan, dtype) / 1e9
    costs = require_block_costs(source, dtype)
    return lambda plan: costs.latency_ms(plan, config)


def _cached(source: Source, value: Callable[[CompressionPlan], float]) -> Callable[[CompressionPlan], float]:
    """The same function, called once for every configuration of a student."""
    known: dict[str, float] = {}

    def cached(plan: CompressionPlan) -> float:
        key = digest_of(student_config(source.family, source.config, plan))
        if key not in known:
            known[key] = value(plan)
        return known[key]

    return cached


def even_plan(source: Source, target: TargetSettings, wanted: PlanSettings, dtype: str) -> CompressionPlan:
    """A plan that needs no weights: hand-made edits as they are, free intervals spaced evenly until the target is met.

    A free modulation rank is an eighth of the width; a free text stream and free feed-forward networks stay whole.

    Raises:
        RecipeError: the target cannot be met so.
    """
    family, length = source.family, source.family.num_blocks(source.config)
    width = int(source.config["attention_head_dim"]) * int(source.config["num_attention_heads"])
    text = wanted.text_stream if isinstance(wanted.text_stream, list) else []
    ffn, adapted = by_hand(wanted) or [], adapted_spans(wanted)
    budget = budget_of(source, target, dtype)
    fixed = [(a, b) for a, b in wanted.intervals] if isinstance(wanted.intervals, list) else None
    ranks: list[int | None] = [wanted.modulation_rank] if isinstance(wanted.modulation_rank, int) else [None]
    if wanted.modulation_rank == "auto" and budget is not None:
        ranks += [max(1, width // 8)] if family.modulations else []
    sizes = family.sizes(source.config)
    most = length - len(sizes) if wanted.intervals == "auto" else 0
    choices = [fixed] if fixed is not None else [even_intervals(sizes, n) for n in range(most + 1)]
    if fixed is None:
        choices = [[span for span in spans if allows(wanted, *span)] for spans in choices]
    for rank, spans in itertools.product(reversed(ranks), choices):
        adapters = [s for s in spans if adaptable(source, s)] if adapted is None else adapted
        dead = wanted.dead_code and family.has_dead_code and bool(text or ffn or rank is not None or adapters)
        plan = CompressionPlan.of(family.name, length, spans, text, rank, dead, ffn, adapters)
        if budget is None or budget.met(plan):
            return plan
    assert budget is not None
    if wanted.is_fixed:
        raise RecipeError(
            f"target.{budget.name}: {selection.figure(budget.limit)} is not reached by the plan that the recipe fixes, which leaves "
            f"{selection.figure(budget.value(plan))}; wanted a larger target or none, or something that is left free (auto)"
        )
    raise RecipeError(
        f"target.{budget.name}: {selection.figure(budget.limit)} cannot be reached by the edits that the recipe allows without an analysis; "
        "wanted a larger target, or run: ppclc compress RECIPE --until analyze"
    )


def adaptable(source: Source, span: tuple[int, int]) -> bool:
    """Whether blocks of an interval's group take adapters; an interval that is not there takes any, and is refused elsewhere."""
    ranges = zip(group_ranges(source.family.sizes(source.config)), source.family.groups, strict=True)
    return all(group.adapters for (first, end), group in ranges if first <= span[0] < end)


def check_by_hand(source: Source, wanted: PlanSettings, longest: int) -> None:
    """Refuse what can be known to be wrong with edits by hand before anything is computed.

    Raises:
        RecipeError: blocks that are not there, protected blocks in an interval by hand.
        PlanError: edits that contradict each other or that this model cannot take.
    """
    length = source.family.num_blocks(source.config)
    if any(not 0 <= b < length for b in wanted.protect):
        raise RecipeError(f"plan.protect = {wanted.protect}: wanted blocks within 0..{length - 1}")
    spans = [(a, b) for a, b in wanted.intervals] if isinstance(wanted.intervals, list) else []
    for first, last in spans:
        if not 0 <= first < last < length:
            raise RecipeError(
                f"plan.intervals: got {[first, last]}, wanted at least two blocks within 0..{length - 1}, the first before the last"
            )
        if inside := [b for b in wanted.protect if first <= b <= last]:
            raise RecipeError(f"plan.protect = {wanted.protect}: block {inside[0]} is in the interval {[first, last]} of plan.intervals")
    text = wanted.text_stream if isinstance(wanted.text_stream, list) else []
    rank = wanted.modulation_rank if isinstance(wanted.modulation_rank, int) else None
    ffn, adapted = by_hand(wanted) or [], adapted_spans(wanted)
    adapters = [s for s in spans if adaptable(source, s)] if adapted is None else adapted
    dead = wanted.dead_code and source.family.has_dead_code and bool(text or ffn or rank is not None or adapters)
    plan = CompressionPlan.of(source.family.name, length, spans, text, rank, dead, ffn, adapters)
    student_config(source.family, source.config, plan)
    if isinstance(wanted.intervals, list):
        check_reach(plan, longest)


def check_target(wanted: PlanSettings, budget: Budget | None) -> None:
    """Raise RecipeError for a recipe that says neither how small the student is to be nor which intervals go."""
    if budget is None and wanted.intervals == "auto":
        raise RecipeError("target: got nothing, wanted parameters, bytes, vram_gb or latency_ms, or plan.intervals as a list or none")


def allows(wanted: PlanSettings, first: int, last: int) -> bool:
    """Whether a free interval touches no protected block and removes none that another edit by hand needs."""
    needed = set(wanted.text_stream) if isinstance(wanted.text_stream, list) else set()
    needed |= {block for block, _ in by_hand(wanted) or []}
    return not any(first <= b <= last for b in wanted.protect) and not any(first < b <= last for b in needed)


def by_hand(wanted: PlanSettings) -> list[tuple[int, str]] | None:
    """FFN edits made by hand, none at all where they are forbidden, None where they are free."""
    if wanted.ffn == "auto":
        return None
    return [] if wanted.ffn == "none" else sorted((f.block, f.stream) for f in wanted.ffn)


def adapted_spans(wanted: PlanSettings) -> list[tuple[int, int]] | None:
    """Intervals whose student block has adapters, none at all where they are forbidden, None for every interval.

    Raises:
        RecipeError: adapters by hand of what `plan.intervals` does not list.
    """
    if wanted.adapters == "auto":
        return None
    spans = [] if wanted.adapters == "none" else [(a, b) for a, b in wanted.adapters]
    listed = [(a, b) for a, b in wanted.intervals] if isinstance(wanted.intervals, list) else []
    for span in spans:
        if span not in listed:
            raise RecipeError(
                f"plan.adapters: got {list(span)}, but plan.intervals = {wanted.intervals}: wanted intervals that it lists, or auto for all"
            )
    return spans
