"""What a student's modules take of a LoRA on its teacher's: which are left, under which name, which rows and which directions.

Shape suffixes: r rank of the LoRA, O rows of a module, D its inputs (the width, of a modulation), R modulation rank, K rows of a fused map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ppclc.errors import ModelError
from ppclc.families import Family
from ppclc.loading.classes import model_outline, student_config
from ppclc.plan import CompressionPlan
from ppclc.student_tensors import chunks_left, student_sizes

Shapes = Mapping[str, tuple[int, ...]]

KEPT = "kept as it is"
CUT = "kept in part: the chunks of a modulation that are left"
PROJECTED = "kept in the basis of a modulation rank"
REMOVED = "block removed"
UNREAD = "text that nothing reads"
MAPPED = "text stream mapped"
LINEAR = "feed-forward network linear"
NO_BASIS = "modulation whose basis lies not beside the plan"
STAYS = (KEPT, CUT, PROJECTED)


@dataclass(frozen=True)
class Basis:
    """The map `p = P s + c` that a student's modulation reads, s (D,) being `SiLU(temb)`, and how s is had back from it.

    Taken back, `s = Q p + rest`, Q (D, R) being P's pseudo-inverse: exact for the teacher's mean of s where P is its principal
    directions, and then `rest` is that mean. All in float64. Source: ours.
    """

    project_RD: torch.Tensor
    back_DR: torch.Tensor
    rest_D: torch.Tensor

    @classmethod
    def of(cls, weight_RD: torch.Tensor, bias_R: torch.Tensor, mean_D: torch.Tensor | None) -> Basis:
        """From the module's tensors and the mean of s; without a mean, the shortest s whose p is 0."""
        weight, bias = weight_RD.double(), bias_R.double()
        back = torch.linalg.pinv(weight)
        mean = -(back @ bias) if mean_D is None else mean_D.double()
        return cls(weight, back, mean - back @ (weight @ mean + bias))


@dataclass(frozen=True)
class Fate:
    """What became of the change to one of the teacher's modules: squared Frobenius norms of all of it and of what is kept.

    merged: whether it is kept on a block that stands for an interval.
    """

    module: str
    outcome: str
    whole: float
    kept: float
    merged: bool = False


@dataclass(frozen=True)
class Fitted:
    """Factors (r, D or R), (rows, r) and change of the bias (rows,) for a student's module; its block's number; None where nothing is left."""

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    number: int


@dataclass(frozen=True)
class Modules:
    """Linear maps of a teacher and of its student by name, with the shapes of their weights.

    stages: outcomes, each with the modules of the student that some of the plan's edits make; the first that lacks one tells why it is gone.
    certain: whether shapes are known: of all blocks, of those that are left, or of none.
    """

    family: Family
    config: Mapping[str, Any]
    plan: CompressionPlan
    teacher: Shapes
    student: Shapes
    stages: Sequence[tuple[str, Shapes]]
    certain: str

    @classmethod
    def of(cls, family: Family, config: Mapping[str, Any], plan: CompressionPlan, certain: str) -> Modules:
        """Of the teacher with this configuration. Raises PlanError when the plan is of another model or cannot be."""
        made: dict[CompressionPlan, Shapes] = {}  # most plans have few kinds of edits, and a model takes a moment to be made

        def student(some: CompressionPlan) -> Shapes:
            if some not in made:
                made[some] = shapes_of(family, student_config(family, config, some))
            return made[some]

        spans = [(i.first, i.last) for i in plan.intervals]
        text = [e.block for e in plan.text_stream]
        stages: list[tuple[str, Shapes]] = []
        parts: tuple[tuple[str, list[int], list[tuple[int, str]]], ...] = (
            (UNREAD, [], []),
            (MAPPED, text, []),
            (LINEAR, text, [(e.block, e.stream) for e in plan.ffn]),
        )
        for outcome, mapped, ffn in parts:
            stages.append((outcome, student(CompressionPlan.of(plan.family, plan.num_blocks, spans, mapped, ffn=ffn))))
        return cls(family, config, plan, shapes_of(family, config), student(plan), [*stages, (UNREAD, student(plan))], certain)

    def place(self, module: str) -> tuple[str, int, str]:
        """What the student calls a module of the teacher, its block's number there, and the outcome, one of STAYS where it is left."""
        place = self.family.block_of(self.config, module)
        if place is None:
            return module, 0, KEPT if module in self.student else UNREAD
        block, part = place
        if block not in self.plan.kept:
            return "", 0, REMOVED
        number = self.plan.student_block(block)
        sizes = student_sizes(self.family, self.config, self.plan)
        name = self.family.prefix(sizes, number) + part
        gone = next((outcome for outcome, there in self.stages if name not in there), None)
        return name, self.family.place(sizes, number)[1], gone or KEPT

    def merged(self, module: str) -> bool:
        """Whether a module that is left is of a block that stands for an interval."""
        place = self.family.block_of(self.config, module)
        return place is not None and self.plan.interval_at(place[0]) is not None

    def rows(self, modules: Sequence[str], count: int) -> list[slice]:
        """Which of a factor's `count` rows are of each module."""
        ends = list(accumulate(self.teacher[m][0] for m in modules[:-1]))
        return [slice(a, b) for a, b in zip([0, *ends], [*ends, count], strict=True)]

    def check(self, modules: Sequence[str], down: torch.Tensor, up: torch.Tensor, key: str) -> None:
        """Raise ModelError for factors whose shapes are not those of the teacher's modules, as far as these are known."""
        place = self.family.block_of(self.config, modules[0])
        gone = place is not None and place[0] not in self.plan.kept
        if self.certain == "none" or (self.certain == "left" and gone):
            return
        shapes = [self.teacher[m] for m in modules]
        inputs = torch.Size(shapes[0][1:]).numel()
        got, wanted = [len(up), down.flatten(1).shape[1]], [sum(s[0] for s in shapes), inputs]
        if got != wanted:
            raise ModelError(
                f"{key}: changes a weight of {got}, wanted {wanted}, which {' and '.join(modules)} have; is it another model's LoRA?"
            )

    def modulation(self, module: str) -> tuple[str, int | None] | None:
        """A module's path among the family's modulations and its block, where it is one."""
        place = self.family.block_of(self.config, module)
        path = module if place is None else place[1]
        if path not in self.family.modulations or (place is None) != self.family.modulated_outside:
            return None
        return path, None if place is None else place[0]

    def fit(
        self, modules: Sequence[str], down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None, scale: float, basis: Basis | None
    ) -> tuple[Fitted | None, list[Fate]]:
        """The change for the student, and what became of it module by module. `bias` is the file's own change of a bias."""
        places = [self.place(m) for m in modules]
        if len(modules) == 1 and places[0][2] in STAYS and (modulation := self.modulation(modules[0])):
            return self._fit_modulation(modules[0], *modulation, down, up, bias, scale, basis)
        slices = self.rows(modules, len(up))
        fates, number = [], 0
        gone: list[slice] = []
        for module, rows, (_, place, outcome) in zip(modules, slices, places, strict=True):
            whole = squared_norm(down, up[rows], scale)
            stays = outcome in STAYS
            fates.append(Fate(module, outcome, whole, whole if stays else 0.0, stays and self.merged(module)))
            if stays:
                number = place
            else:
                gone.append(rows)
        if len(gone) == len(modules):
            return None, fates
        if gone:
            up, bias = up.clone(), None if bias is None else bias.clone()
            for rows in gone:
                up[rows] = 0
                if bias is not None:
                    bias[rows] = 0
        return Fitted(down, up, bias, number), fates

    def _fit_modulation(
        self,
        module: str,
        path: str,
        block: int | None,
        down: torch.Tensor,
        up: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        basis: Basis | None,
    ) -> tuple[Fitted | None, list[Fate]]:
        """The chunks that are left, in the plan's rank."""
        _, number, outcome = self.place(module)
        whole, width = squared_norm(down, up, scale), down.shape[1]
        if len(up) % width:
            raise ModelError(f"{module}: changes a modulation of {len(up)} rows, wanted whole chunks of the width, {width}")
        count = len(up) // width
        left = list(range(count))
        if block is not None:
            left = list(chunks_left(self.family, self.config, self.plan, block, self.family.modulations[path])(count))
        if left != list(range(count)):
            up = torch.cat([up[n * width : (n + 1) * width] for n in left])
            bias = None if bias is None else torch.cat([bias[n * width : (n + 1) * width] for n in left])
            outcome = CUT
        if self.plan.modulation_rank is None:
            return Fitted(down, up, bias, number), [Fate(module, outcome, whole, squared_norm(down, up, scale), self.merged(module))]
        if basis is None:
            return None, [Fate(module, NO_BASIS, whole, 0.0)]
        narrow = down.double() @ basis.back_DR
        gram = narrow @ (basis.project_RD @ down.double().T)
        shift = up.double() @ (down.double() @ basis.rest_D)
        shift = shift if bias is None else shift + bias.double()
        kept = scale * scale * float((_gram(up.double()) * gram.T).sum())
        fitted = Fitted(narrow.to(down.dtype), up.contiguous(), shift.to(up.dtype), number)
        return fitted, [Fate(module, PROJECTED, whole, max(0.0, kept), self.merged(module))]


def squared_norm(down: torch.Tensor, up: torch.Tensor, scale: float) -> float:
    """`|scale * up @ down|^2` (Frobenius) of factors (r, ...) and (O, r, ...), in float64 from two products of r by r."""
    a, b = down.flatten(1).double(), up.flatten(1).double()
    return scale * scale * float((_gram(b) * _gram(a.T)).sum())


def _gram(x: torch.Tensor) -> torch.Tensor:
    """`x' x`."""
    return x.T @ x


def shapes_of(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights, of two axes or more, of a model's modules by name. Takes no memory of theirs."""
    weights = {n: getattr(m, "weight", None) for n, m in model_outline(family, config).named_modules()}
    return {n: tuple(w.shape) for n, w in weights.items() if isinstance(w, torch.Tensor) and w.ndim > 1}
