"""The compression plan: what becomes of every block of a teacher. Frozen data; no torch.

Blocks carry the teacher's numbers, counted through all groups in forward order. The JSON form is
`plan.json`, made to be read and edited by people.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ppclc.errors import PlanError

Block = Annotated[int, Field(ge=0, strict=True)]


class Interval(BaseModel):
    """Contiguous teacher blocks `first..last`, both inclusive, for which one student block stands."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    first: Block
    last: Block

    def __len__(self) -> int:
        return max(0, self.last - self.first + 1)

    def __contains__(self, block: int) -> bool:
        return self.first <= block <= self.last

    @property
    def key(self) -> str:
        """Name of the edit, e.g. `interval-3-4`; in the bank it is `CompressionPlan.interval_key`."""
        return f"interval-{self.first}-{self.last}"


class TextStreamEdit(BaseModel):
    """Block whose text keys and values are fed by a linear map of `reference`'s modulated text state."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    block: Block
    reference: Block


class FfnEdit(BaseModel):
    """Block and stream whose feed-forward network becomes one linear map."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    block: Block
    stream: Literal["image", "text"]


Edit = Interval | TextStreamEdit | FfnEdit | Literal["modulation_rank"]
"""One item of a plan, which can be put back alone."""


class CompressionPlan(BaseModel):
    """Every edit that turns one teacher into one student.

    `CompressionPlan.of` fills in what follows from the edits (`kept`, references). `adapters` are those
    of `intervals` whose student block has a linear map of each stream in front. Raises PlanError from
    `check` for a plan that contradicts itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    family: str
    num_blocks: Annotated[int, Field(ge=1, strict=True)]
    intervals: tuple[Interval, ...] = ()
    text_stream: tuple[TextStreamEdit, ...] = ()
    ffn: tuple[FfnEdit, ...] = ()
    modulation_rank: Annotated[int, Field(ge=1, strict=True)] | None = None
    adapters: tuple[Interval, ...] = ()
    dead_code: Annotated[bool, Field(strict=True)] = False
    kept: tuple[Block, ...]

    @staticmethod
    def of(
        family: str,
        num_blocks: int,
        intervals: list[tuple[int, int]] | tuple[tuple[int, int], ...] = (),
        text_stream: list[int] | tuple[int, ...] = (),
        modulation_rank: int | None = None,
        dead_code: bool = False,
        ffn: Iterable[tuple[int, str]] = (),
        adapters: Iterable[tuple[int, int]] = (),
    ) -> CompressionPlan:
        """The plan with these edits; blocks are teacher numbers, references are found.

        `ffn`: pairs (block, stream). `adapters`: those of the intervals that have them.

        Raises:
            PlanError: intervals out of order, overlapping or out of range; a text-stream block that
                is not kept, or has no full block before it; a feed-forward network that is not there;
                adapters of what is no interval.
        """
        spans = sorted(intervals)
        kept = kept_blocks(num_blocks, spans)
        mapped = sorted(set(text_stream))
        edits = []
        for block in mapped:
            full = [k for k in kept if k < block and k not in mapped]
            if block not in kept or not full:
                raise PlanError(f"plan.text_stream: block {block}: wanted a kept block after the first, one of {list(kept[1:])}")
            edits.append({"block": block, "reference": full[-1]})
        try:
            plan = CompressionPlan(
                family=family,
                num_blocks=num_blocks,
                intervals=tuple(Interval(first=a, last=b) for a, b in spans),
                text_stream=tuple(TextStreamEdit(**e) for e in edits),
                ffn=tuple(sorted({FfnEdit.model_validate({"block": b, "stream": s}) for b, s in ffn}, key=_place)),
                modulation_rank=modulation_rank,
                adapters=tuple(Interval(first=a, last=b) for a, b in sorted(set(adapters))),
                dead_code=dead_code,
                kept=kept,
            )
        except ValidationError as error:
            raise PlanError(f"plan: {_first_fault(error)}") from None
        plan.check()
        return plan

    def check(self, where: str = "plan") -> None:
        """Raise PlanError unless the plan is consistent with itself."""
        end = -1
        for interval in self.intervals:
            if len(interval) < 2 or interval.first <= end or interval.last >= self.num_blocks:
                raise PlanError(
                    f"{where}: intervals: got [{interval.first}, {interval.last}], wanted at least two blocks within 0..{self.num_blocks - 1}, "
                    "in order and without overlap"
                )
            end = interval.last
        kept = kept_blocks(self.num_blocks, [(i.first, i.last) for i in self.intervals])
        if self.kept != kept:
            raise PlanError(f"{where}: kept: got {list(self.kept)}, wanted {list(kept)}, which is what the intervals leave")
        mapped = [e.block for e in self.text_stream]
        if mapped != sorted(set(mapped)):
            raise PlanError(f"{where}: text_stream: got blocks {mapped}, wanted each once, in order")
        for edit in self.text_stream:
            full = [k for k in kept if k < edit.block and k not in mapped]
            if edit.block not in kept or not full or full[-1] != edit.reference:
                wanted = f"reference {full[-1]}" if full and edit.block in kept else f"a block of {list(kept[1:])}"
                raise PlanError(f"{where}: text_stream: got block {edit.block} with reference {edit.reference}, wanted {wanted}")
        self._check_ffn(where, kept, mapped)
        self._check_adapters(where)
        if self.dead_code and not self.has_width_edits:
            raise PlanError(
                f"{where}: dead_code: got true in a plan without width edits, wanted false: such a student stays the stock class"
            )

    def _check_ffn(self, where: str, kept: tuple[int, ...], mapped: list[int]) -> None:
        places = [_place(e) for e in self.ffn]
        if places != sorted(set(places)):
            raise PlanError(f"{where}: ffn: got {[list(p) for p in places]}, wanted each block and stream once, in order")
        for block, stream in places:
            if block not in kept:
                raise PlanError(f"{where}: ffn: got block {block}, {stream}: wanted a kept block, one of {list(kept)}")
            if stream == "text" and block in mapped:
                raise PlanError(
                    f"{where}: ffn: got block {block}, text: its text stream is mapped and has no feed-forward network left; "
                    "wanted this edit left out of ffn, or the block left out of text_stream"
                )

    def _check_adapters(self, where: str) -> None:
        spans = [[i.first, i.last] for i in self.intervals]
        adapted = [[i.first, i.last] for i in self.adapters]
        for span in adapted:
            if span not in spans:
                raise PlanError(
                    f"{where}: adapters: got {span}, wanted one of the intervals {spans}: adapters stand before an interval's block"
                )
        if adapted != [s for s in spans if s in adapted]:
            raise PlanError(f"{where}: adapters: got {adapted}, wanted each interval once, in order")

    @property
    def has_width_edits(self) -> bool:
        """Whether the student needs a class of its own."""
        return bool(self.text_stream or self.ffn or self.modulation_rank is not None or self.adapters)

    @property
    def is_empty(self) -> bool:
        """Whether the student is the teacher."""
        return not self.intervals and not self.has_width_edits

    @property
    def ends(self) -> tuple[int, ...]:
        """Teacher block after the last one that each student block stands for: the number of the state that it should give."""
        return tuple((i.last if (i := self.interval_at(block)) else block) + 1 for block in self.kept)

    def student_block(self, block: int) -> int:
        """Student number of a kept teacher block."""
        return self.kept.index(block)

    def interval_at(self, block: int) -> Interval | None:
        """The interval that starts at this kept block, if one does."""
        return next((i for i in self.intervals if i.first == block), None)

    def interval_key(self, interval: Interval) -> str:
        """Name in the bank of an interval's student block: `interval-3-4`, or `interval-3-4-adapted` with its adapters.

        A block is distilled with its adapters in front, so neither serves in the place of the other.
        """
        return f"{interval.key}-adapted" if interval in self.adapters else interval.key

    def ffn_key(self, block: int, stream: str) -> str:
        """Name in the bank of a linear feed-forward network: its block, or both ends of the interval that starts there."""
        return f"ffn-{block}-{self.end_name(block)}-{stream}" if self.interval_at(block) else f"ffn-{block}-{stream}"

    def text_key(self, block: int) -> str:
        """Name in the bank of a text-stream edit's maps: block and reference with the ends of their intervals."""
        reference = next(e.reference for e in self.text_stream if e.block == block)
        return f"text-{block}-{self.end_name(block)}-{reference}-{self.end_name(reference)}"

    def end_name(self, block: int) -> str:
        """How a name in the bank tells where a student block ends: the interval's last block, with `a` behind it for adapters."""
        span = self.interval_at(block)
        return f"{span.last}{'a' if span in self.adapters else ''}" if span else str(block)

    def without(self, edit: Edit) -> CompressionPlan:
        """The same plan with one edit put back; text-stream references follow, and adapters go with their interval."""
        spans = [(i.first, i.last) for i in self.intervals if i != edit]
        mapped = [e.block for e in self.text_stream if e != edit]
        rank = None if edit == "modulation_rank" else self.modulation_rank
        ffn = [(e.block, e.stream) for e in self.ffn if e != edit]
        adapters = [(i.first, i.last) for i in self.adapters if i != edit]
        dead = self.dead_code and bool(mapped or ffn or rank is not None or adapters)
        return CompressionPlan.of(self.family, self.num_blocks, spans, mapped, rank, dead, ffn, adapters)

    def edits(self) -> list[Edit]:
        """All edits that can be put back one by one; adapters follow their interval."""
        rank: list[Literal["modulation_rank"]] = ["modulation_rank"] if self.modulation_rank is not None else []
        return [*self.intervals, *self.text_stream, *self.ffn, *rank]

    def to_json(self, files: Mapping[str, str] | None = None) -> str:
        """`plan.json`, one edit a line; beside a student's weights with the SHA-256 of the `files` there by name."""
        fields = self.model_dump(mode="json") | ({"files": dict(files)} if files else {})
        rows = [f"  {json.dumps(k)}: {_compact(v)}" for k, v in fields.items()]
        return "{\n" + ",\n".join(rows) + "\n}\n"

    @staticmethod
    def from_json(text: str, where: str = "plan.json") -> CompressionPlan:
        """The plan in a JSON text. Raises PlanError for anything else."""
        try:
            data: Any = json.loads(text, object_pairs_hook=partial(_once, where))
            told = isinstance(data, dict) and "kept" in data
            if isinstance(data, dict):
                data = {"kept": ()} | data
                data.pop("files", None)  # of what lies beside it, no part of the plan
            plan = CompressionPlan.model_validate(data)
            if not told:  # one that was written by hand need not tell what its intervals say already
                plan = plan.model_copy(update={"kept": kept_blocks(plan.num_blocks, [(i.first, i.last) for i in plan.intervals])})
        except json.JSONDecodeError as error:
            raise PlanError(f"{where}: line {error.lineno}: {error.msg}, wanted JSON") from None
        except RecursionError:
            raise PlanError(f"{where}: nested too deep, wanted a plan.json") from None
        except ValidationError as error:
            raise PlanError(f"{where}: {_first_fault(error)}") from None
        plan.check(where)
        return plan

    @staticmethod
    def read(path: Path) -> CompressionPlan:
        """The plan in a file. Raises PlanError when it is missing or malformed."""
        try:
            return CompressionPlan.from_json(path.read_text("utf-8"), str(path))
        except FileNotFoundError:
            raise PlanError(f"{path}: no such file; wanted a plan.json") from None
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: {error}; wanted a plan.json") from None


def _once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values. Raises PlanError for a key that stands there twice, of which one would be lost."""
    names = [name for name, _ in pairs]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise PlanError(f"{where}: {twice} stands there twice; wanted each key once")
    return dict(pairs)


def kept_blocks(num_blocks: int, intervals: list[tuple[int, int]]) -> tuple[int, ...]:
    """Teacher blocks that have a student block: all but those after the first of each interval."""
    gone = {b for first, last in intervals for b in range(first + 1, min(last + 1, num_blocks))}
    return tuple(b for b in range(num_blocks) if b not in gone)


def _place(edit: FfnEdit) -> tuple[int, str]:
    return edit.block, edit.stream


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    if fault["type"] == "missing":
        return f"{'.'.join(map(str, fault['loc']))} is missing"
    return f"{'.'.join(map(str, fault['loc'])) or 'document'} = {fault['input']!r}: {fault['msg']}"


def _compact(value: Any) -> str:
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n  }"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"    {json.dumps(v)}" for v in value) + "\n  ]"
    return json.dumps(value)
