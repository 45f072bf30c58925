"""Closed forms from second moments: probes, CKA, stand-ins for intervals, adapters, text maps, the modulation basis.

With centred moments `S = X' X` and `R = X' D` of a block's input and step (rows are tokens), the block's
linear probe is `A = I + (S + ridge)^-1 R`, and for linear CKA `cka(X, X A) = |S A|^2 / (|S| |A' S A|)`,
Frobenius norms. All arithmetic is in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ppclc.analysis.detection import Span
from ppclc.analysis.ffn_maps import ffn_map
from ppclc.analysis.moments import CPU, Far, Near, ridge_solution, symmetric_eigenvectors
from ppclc.errors import PlanError
from ppclc.plan import CompressionPlan
from ppclc.records import CalibrationStats

Bank = dict[str, dict[str, torch.Tensor]]
_bases: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Bases by the sums that they were found from: for a wide model one takes seconds, and every plan that is looked at asks for it."""
ADAPTED_STREAMS = ("image", "text")
FIXED = "of a plan that is fixed by hand only what its own edits need is calibrated; wanted this edit in the recipe's plan"
KEPT_PROBES = 16
"""Matrices that probes keep at least: CKA goes over each of them as often as an interval may have blocks."""


@dataclass(frozen=True)
class Probes:
    """The linear probes of one stream. Source: arXiv 2511.16156, equation 1; the ridge is ours."""

    near: Near
    ridge: float
    kept: dict[int, torch.Tensor] = field(default_factory=dict)

    def step(self, i: int, keep: int = 0) -> torch.Tensor:
        """`A - I` (D, D) of block i's probe; the last KEPT_PROBES of them are kept, or `keep` where that is more."""
        if i not in self.kept:
            self.kept[i] = ridge_solution(self.near.second(i), self.near.residual(i), self.ridge)
            for oldest in list(self.kept)[: -max(keep, KEPT_PROBES)]:
                del self.kept[oldest]
        return self.kept[i]

    def error(self, i: int) -> float:
        """Share of block i's centred step that its probe leaves; 0 for a block whose step is constant."""
        whole, w, r = self.near.step(i), self.step(i), self.near.residual(i)
        left = whole - 2 * (w * r).sum().item() + (w * (self.near.second(i) @ w)).sum().item()
        scale = self.near.second(i).trace().item()
        return max(0.0, left) / whole if whole > 1e-12 * scale else 0.0

    def chain(self, u: int, last: int) -> list[torch.Tensor]:
        """`A` (D, D) of the probes u+1..k one after the other, for k = u..last; the identity first."""
        made = [torch.eye(len(self.near.mean(0)), dtype=torch.float64, device=self.near.device)]
        for k in range(u + 1, last + 1):
            made.append(made[-1] + made[-1] @ self.step(k, last - u))
        return made


def cka_map(probes: Probes, longest: int, far: Far | None = None) -> torch.Tensor:
    """`cka[u, k]` (L, L) for `u <= k < u + longest`, NaN elsewhere.

    Block u's true output, pushed through the probes of blocks u+1..k, is compared with that output itself,
    or, given the far moments, with block k's true output.
    Source: arXiv 2511.16156, equation 3, and the caption of its figure 3.
    """
    length = probes.near.num_blocks
    table = torch.full((length, length), float("nan"), dtype=torch.float64)
    for u in range(length):
        last = min(u + longest, length) - 1
        own = far.cross(u + 1, u + 1) if far else probes.near.second(u + 1)
        row = []
        for k, a in enumerate(probes.chain(u, last), start=u):
            through = own @ a
            if far is None:
                joint, other = through, own
            else:
                joint, other = far.cross(k + 1, u + 1) @ a, far.cross(k + 1, k + 1)
            norm = other.norm() * (a.T @ through).norm()
            row.append(torch.where(norm > 0, joint.square().sum() / norm, 1.0))
        table[u, u : last + 1] = torch.stack(row).to(table)
    return table


def linear_map(far: Far, i: int, j: int, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`A` (D, D) and `b` (D,) with `X_i A + b ~ X_j`, fitted on the difference so that the ridge pulls towards the identity."""
    own = far.cross(i, i)
    a = torch.eye(len(own), dtype=own.dtype, device=own.device) + ridge_solution(own, far.cross(i, j) - own, ridge)
    return a, far.mean(j) - far.mean(i) @ a


def far_of(stats: CalibrationStats, stream: str, device: torch.device = CPU) -> Far:
    """The far moments of a stream: `image`, `text`, or `text_input`."""
    return Far(stats.tensors, stream, stats.rows.get(f"far.{stream}", 0), device)


def text_maps(stats: CalibrationStats, ridge: float, block: Span, reference: Span) -> dict[str, torch.Tensor]:
    """Closed-form maps of a text-stream edit: `text_in` between modulated inputs, `text_out` between text outputs.

    `block` and `reference` are (first, last) of the student block's teacher blocks. Ridge least squares.

    Raises:
        PlanError: the two are farther apart than the moments reach, or there are none of them.
    """
    _check_text(stats, block, reference)
    maps = {}
    for name, (stream, i, j) in _text_pairs(block, reference).items():
        a, b = linear_map(far_of(stats, stream), i, j, ridge)
        maps[f"{name}.weight"] = a.T.float().contiguous()
        maps[f"{name}.bias"] = b.float()
    return maps


def _text_pairs(block: Span, reference: Span) -> dict[str, tuple[str, int, int]]:
    """By map the kind of states that it is between, and their numbers."""
    return {"text_in": ("text_input", reference[0], block[0]), "text_out": ("text", reference[1] + 1, block[1] + 1)}


def _ends(plan: CompressionPlan, block: int) -> Span:
    """First and last of the teacher blocks that a kept block stands for."""
    interval = plan.interval_at(block)
    return block, interval.last if interval else block


def check_calibrated(plan: CompressionPlan, stats: CalibrationStats) -> None:
    """Raise PlanError for text streams and networks of a plan that the calibration has no moments of."""
    for edit in plan.text_stream:
        _check_text(stats, _ends(plan, edit.block), _ends(plan, edit.reference))
    for ffn in plan.ffn:
        if f"ffn.{ffn.stream}.square.{ffn.block}" not in stats.tensors:
            raise PlanError(f"plan.ffn: block {ffn.block}, stream {ffn.stream}: it has no moments: {FIXED}")


def _check_text(stats: CalibrationStats, block: Span, reference: Span) -> None:
    for stream, i, j in _text_pairs(block, reference).values():
        if not far_of(stats, stream).has(i, j):
            raise PlanError(_unrelated(stats, f"plan.text_stream: block {block[0]} is {{}} blocks from its reference {reference[0]}", i, j))


def _unrelated(stats: CalibrationStats, what: str, i: int, j: int) -> str:
    """Why there are no moments of two states: they are too far apart, or the calibration was of a plan that had no use for them."""
    told = f"{what.format(j - i)}; calibrate.longest = {stats.longest}"
    if j - i > stats.longest:
        return f"{told}: wanted at least that"
    return f"{told}, but {FIXED}"


def check_reach(plan: CompressionPlan, longest: int) -> None:
    """Raise PlanError for a text stream whose reference is farther away than moments of so many blocks reach."""
    for edit in plan.text_stream:
        own, other = (plan.interval_at(b) for b in (edit.block, edit.reference))
        ends = (own.last if own else edit.block) - (other.last if other else edit.reference)
        if max(edit.block - edit.reference, ends) > longest:
            raise PlanError(
                f"plan.text_stream: block {edit.block} is {max(edit.block - edit.reference, ends)} blocks from its reference "
                f"{edit.reference}; calibrate.longest = {longest}: wanted at least that"
            )


def interval_adapters(stats: CalibrationStats, ridge: float, first: int, start: int) -> dict[str, torch.Tensor]:
    """Adapters of an interval's student block as the bank holds them: maps from the teacher's states at block `first` to those at `start`.

    `start` is the block that the student block is a copy of. Weight (D, D) and bias (D,) a stream, float32. Ridge
    least squares that pulls towards the identity, which is the map where `start` is `first`. Source: ours.

    Raises:
        PlanError: the two are farther apart than the moments reach.
    """
    maps = {}
    for stream in ADAPTED_STREAMS:
        far = far_of(stats, stream)
        if not far.has(first, start):
            raise PlanError(
                _unrelated(stats, f"plan.adapters: block {start} is {{}} blocks from the interval's first, {first}", first, start)
            )
        a, b = linear_map(far, first, start, ridge)
        maps[f"{stream}_adapter.weight"] = a.T.float().contiguous()
        maps[f"{stream}_adapter.bias"] = b.float()
    return maps


def modulation_basis(stats: CalibrationStats) -> dict[str, torch.Tensor]:
    """`basis` (D, D), principal directions of `SiLU(temb)` by falling variance, and `mean` (D,); found once for a record's sums. Source: ours."""
    sums = stats.tensors["temb.second"]
    if sums not in _bases:
        moments = Near(stats.tensors, "temb", stats.rows["temb"], 0)
        _bases[sums] = {"basis": symmetric_eigenvectors(moments.second(0)).float().contiguous(), "mean": moments.mean(0).float()}
    return dict(_bases[sums])


def closed_form_bank(stats: CalibrationStats, ridge: float, plan: CompressionPlan) -> Bank:
    """Everything in the bank that needs no training: modulation basis, text maps and linear FFNs of a plan.

    Raises:
        PlanError: edits that the calibration has no moments of.
    """
    check_calibrated(plan, stats)
    bank = {"modulation": modulation_basis(stats)} if "temb" in stats.rows else {}
    for edit in plan.text_stream:
        bank[plan.text_key(edit.block)] = text_maps(stats, ridge, _ends(plan, edit.block), _ends(plan, edit.reference))
    for ffn in plan.ffn:
        bank[plan.ffn_key(ffn.block, ffn.stream)] = ffn_map(stats.tensors, stats.rows, ffn.block, ffn.stream, ridge)
    return bank
