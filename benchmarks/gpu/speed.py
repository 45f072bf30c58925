"""Every kernel beside what there is otherwise: eager PyTorch, `torch.compile`, cuBLAS; and beside the bandwidth or matrix ceiling of the same run.

`share` counts the least that has to be done: each input read once and each output written once, and of a symmetric product half.
Ratios are made on `graph_us`, in which the host has no part, where there is one.

Shape suffixes: B batch, T or S token, N row, D width, H head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.correctness import DTYPES, EPS, MAGNITUDE, kernel_module
from benchmarks.gpu.measuring import (
    Call,
    Captured,
    Proof,
    Row,
    alive,
    best_us,
    ceiling,
    kernels,
    measure_ceilings,
    not_captured,
    reclaim,
    replayed_us,
    rows_of,
    sets_for,
    short,
    shown,
    timed,
)
from ppclc.kernels import lacks
from ppclc.passes.bench import ratio

TOKENS, WIDTH, HEADS, HEAD = 7401, 3072, 24, 128
"""Of Qwen-Image at 1328 x 1328 pixels with 512 text tokens: 6,889 + 512."""
TINY = (48, 32, 2, 16)
KERNEL = "kernel"
ROUNDS = 31
"""Replays of each formulation, in turn with the others'."""


@dataclass(frozen=True)
class Contest:
    """Formulations of the same thing. make: inputs of one set; runs: by name a function of a set. bytes or flops: the least work of one call.

    compiled: the name of the formulation that `torch.compile` is given.
    """

    kernel: str
    what: str
    dtype: str
    shape: Sequence[int]
    make: Callable[[], tuple[Any, ...]]
    runs: dict[str, Callable[..., Any]]
    bytes: int = 0
    flops: int = 0
    compiled: str = ""
    repeats: int = 30

    def rows(self, proof: Proof) -> list[Row]:
        """A row for each formulation that runs here."""
        one = self.make()
        count = sets_for(sum(t.nbytes for t in one if isinstance(t, torch.Tensor)), proof)
        sets = [one, *(self.make() for _ in range(count - 1))]
        found, graphs = dict[str, Row](), dict[str, Captured]()
        for name, run in self._formulations(proof).items():
            found[name] = self._row(proof, name, [partial(run, *given) for given in sets], graphs)
        times = {name: np.array(us) for name, us in replayed_us(graphs, ROUNDS).items()}
        for name, us in times.items():
            middle = float(np.median(us))
            found[name] |= {"graph_us": middle, "spread": float(np.percentile(us, 75) - np.percentile(us, 25)) / middle}
        for name, row in found.items():
            row |= self._share(proof, row)
            proof.say(
                f"{self.kernel} {self.what} {self.dtype}: {name} {shown(row.get('graph_us') or row.get('event_us') or row['not_run'])}"
            )
        for graph in graphs.values():
            graph.graph.reset()
        del sets, graphs
        reclaim()
        return [{"formulation": name, **row} for name, row in with_ratios(found, times).items()]

    def _formulations(self, proof: Proof) -> dict[str, Callable[..., Any]]:
        runs = dict(self.runs)
        if self.compiled and proof.is_cuda:
            torch._dynamo.reset()
            runs["torch.compile"] = torch.compile(self.runs[self.compiled])
        return runs

    def _row(self, proof: Proof, name: str, calls: list[Call], graphs: dict[str, Captured]) -> Row:
        """What a formulation takes by events; on a GPU its graph joins the others."""
        reason = lacks() if name == KERNEL else ""
        if reason:
            return {"not_run": reason}
        try:
            with kernels("triton" if name == KERNEL else "torch"), torch.set_grad_enabled("backward" in self.what):
                row = timed(calls, proof, self.repeats, captured=0)
                if proof.is_cuda:
                    try:
                        graphs[name] = Captured.of(calls)
                    except Exception as error:
                        row["graph_note"] = not_captured(error)
        except Exception as error:
            if proof.is_cuda and not alive():
                raise
            return {"not_run": f"{type(error).__name__}: {short(error)}", "broke": True}
        return row

    def _share(self, proof: Proof, row: Row) -> Row:
        """What share of the device's best a formulation reaches."""
        if "not_run" in row:
            return {}
        seconds = best_us(row) / 1e6
        if self.bytes:
            return {"share": self.bytes / seconds / ceiling(proof, "copy"), "of": "bandwidth"}
        return {"share": self.flops / seconds / ceiling(proof, f"matrix {self.dtype}"), "of": f"{self.dtype} products"}


def with_ratios(rows: Mapping[str, Row], times: Mapping[str, Any]) -> dict[str, Row]:
    """Each row with how many times its time the kernel's goes into: in graphs, with a 95 % interval over rounds, or else both by events."""
    kernel = rows.get(KERNEL, {"not_run": ""})
    if "not_run" in kernel:
        return dict(rows)
    found = {}
    for name, row in rows.items():
        if "not_run" in row:
            found[name] = row
        elif name in times and KERNEL in times:
            faster, interval = ratio(times[name], times[KERNEL])
            found[name] = row | {"kernel_is_faster": faster, "ci95": interval}
        else:
            found[name] = row | {"kernel_is_faster": row["event_us"] / kernel["event_us"]}
    return found


def speed(proof: Proof) -> list[Row]:
    """The ceilings, then a row for each kernel, dtype and formulation."""
    rows: list[Row] = measure_ceilings(proof)
    contests = [
        ({"kernel": name, "dtype": dtype}, partial(_contest, proof, contest, dtype))
        for name, contest in CONTESTS
        for dtype in (("bfloat16", "float32") if name == "moments" else ("bfloat16",))
    ]
    return rows + rows_of(proof, contests)


def _contest(proof: Proof, build: Callable[..., Contest], dtype: str) -> list[Row]:
    proof.needs(12)
    contest = build(proof, dtype)
    return [{"what": contest.what, "shape": list(contest.shape), **row} for row in contest.rows(proof)]


def _sizes(proof: Proof) -> tuple[int, int, int, int]:
    return TINY if proof.tiny else (TOKENS, WIDTH, HEADS, HEAD)


def _random(proof: Proof, dtype: str, *shape: int, grad: bool = False) -> torch.Tensor:
    made = torch.randn(*shape, device=proof.device).to(DTYPES[dtype])
    return made.requires_grad_() if grad else made


def moments(proof: Proof, dtype: str) -> Contest:
    """`S += X'X`, `C += X'Y`, float32 sums, of 7,401 rows: the pair that each block's near moments are."""
    module = kernel_module("moments")
    rows, width, *_ = _sizes(proof)
    second, cross = (torch.zeros(width, width, device=proof.device) for _ in range(2))

    def cublas(x_ND: torch.Tensor, y_ND: torch.Tensor) -> None:
        torch.addmm(second, x_ND.T, x_ND, out_dtype=torch.float32, out=second)
        torch.addmm(cross, x_ND.T, y_ND, out_dtype=torch.float32, out=cross)

    def cublas_then_add(x_ND: torch.Tensor, y_ND: torch.Tensor) -> None:
        second.add_(torch.mm(x_ND.T, x_ND, out_dtype=torch.float32))
        cross.add_(torch.mm(x_ND.T, y_ND, out_dtype=torch.float32))

    def in_float32(x_ND: torch.Tensor, y_ND: torch.Tensor) -> None:
        x, y = x_ND.float(), y_ND.float()
        second.addmm_(x.T, x)
        cross.addmm_(x.T, y)

    def in_tf32(x_ND: torch.Tensor, y_ND: torch.Tensor) -> None:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            in_float32(x_ND, y_ND)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    runs: dict[str, Callable[..., Any]] = {KERNEL: partial(module.add_moments, second, cross)}
    if dtype != "float32" and proof.is_cuda:
        runs |= {"cuBLAS, float32 sums": cublas, "cuBLAS, then added": cublas_then_add}
    runs["eager, cast to float32" if dtype != "float32" else "cuBLAS"] = in_float32
    if proof.is_cuda:
        runs["cuBLAS, TF32"] = in_tf32
    return Contest(
        "moments",
        "S and C",
        dtype,
        [rows, width],
        lambda: (_random(proof, dtype, rows, width), _random(proof, dtype, rows, width)),
        runs,
        flops=3 * rows * width**2,
        compiled="eager, cast to float32" if dtype != "float32" else "",
        repeats=12 if dtype == "float32" else 20,
    )


def difference(proof: Proof, dtype: str) -> Contest:
    """A step, the sum of the state's rows and the step's energy: two states are read and one written."""
    module = kernel_module("moments")
    rows, width, *_ = _sizes(proof)
    return Contest(
        "difference",
        "forward",
        dtype,
        [rows, width],
        lambda: (_random(proof, dtype, rows, width), _random(proof, dtype, rows, width)),
        {KERNEL: module.difference, "eager": module.difference_reference},
        bytes=3 * rows * width * DTYPES[dtype].itemsize,
        compiled="eager",
    )


def _backward(run: Callable[..., torch.Tensor], *given: torch.Tensor) -> Any:
    """Gradients of a function's sum, or of the function with a pull that is given last."""
    *given_, pull = given
    wanted = [t for t in given_ if t.requires_grad]
    return torch.autograd.grad(run(*given_), wanted, pull)


def distillation_loss(proof: Proof, dtype: str, known: bool = False) -> Contest:
    """The loss and its gradient; at least both states are read and one gradient written: 6 bytes an element in 16 bits.

    known: every way is given the one that its backward begins with, as a training does, and none makes it.
    """
    module = kernel_module("distillation_loss")
    rows, width, *_ = _sizes(proof)

    def both(loss: Callable[..., torch.Tensor], student: torch.Tensor, teacher: torch.Tensor) -> Any:
        return torch.autograd.grad(loss(student, teacher, MAGNITUDE), student, module.one(student.device, torch.float32) if known else None)

    return Contest(
        "distillation_loss",
        "forward and backward of a training" if known else "forward and backward",
        dtype,
        [1, rows, width],
        lambda: (_random(proof, dtype, 1, rows, width, grad=True), _random(proof, dtype, 1, rows, width)),
        {KERNEL: partial(both, module.state_loss), "eager": partial(both, module.reference)} | _compiled(proof, both, module.reference),
        bytes=3 * rows * width * DTYPES[dtype].itemsize,
    )


def _compiled(proof: Proof, wrap: Callable[..., Any], reference: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The reference compiled, within a wrapper that takes gradients and is not compiled itself; nothing on a CPU."""
    return {"torch.compile": partial(wrap, torch.compile(reference))} if proof.is_cuda else {}


def layer_norm_modulate(proof: Proof, dtype: str, gradient: bool = False) -> Contest:
    """The modulated norm: a state is read and one written; with its gradient five are: one in and one out, then two in and one out."""
    module = kernel_module("modulation")
    rows, width, *_ = _sizes(proof)
    run = lambda x, scale, shift: module.layer_norm_modulate(x, scale, shift, EPS)  # noqa: E731
    plain = lambda x, scale, shift: module.layer_norm_modulate_reference(x, scale, shift, EPS)  # noqa: E731

    def make() -> tuple[torch.Tensor, ...]:
        state = _random(proof, dtype, 1, rows, width, grad=gradient)
        chunks = (_random(proof, dtype, 1, width), _random(proof, dtype, 1, width))
        return (state, *chunks, _random(proof, dtype, 1, rows, width)) if gradient else (state, *chunks)

    runs: dict[str, Callable[..., Any]] = {KERNEL: run, "eager": plain} | ({"torch.compile": torch.compile(plain)} if proof.is_cuda else {})
    return Contest(
        "layer_norm_modulate",
        "forward and backward" if gradient else "forward",
        dtype,
        [1, rows, width],
        make,
        {name: partial(_backward, r) for name, r in runs.items()} if gradient else runs,
        bytes=(5 if gradient else 2) * rows * width * DTYPES[dtype].itemsize,
    )


def gated_residual(proof: Proof, dtype: str) -> Contest:
    """The gated sum: two states are read and one written."""
    module = kernel_module("modulation")
    rows, width, *_ = _sizes(proof)
    return Contest(
        "gated_residual",
        "forward",
        dtype,
        [1, rows, width],
        lambda: (_random(proof, dtype, 1, rows, width), _random(proof, dtype, 1, width), _random(proof, dtype, 1, rows, width)),
        {KERNEL: module.gated_residual, "eager": module.gated_residual_reference},
        bytes=3 * rows * width * DTYPES[dtype].itemsize,
        compiled="eager",
    )


def qk_norm_rope(proof: Proof, dtype: str) -> Contest:
    """Queries or keys of both streams, normed and turned: read once and written once."""
    module = kernel_module("qk_norm_rope")
    rows, _, heads, head = _sizes(proof)
    angles = torch.rand(rows, head // 2, device=proof.device)
    cos, sin, weight = angles.cos(), angles.sin(), torch.ones(head, device=proof.device, dtype=DTYPES[dtype])
    return Contest(
        "qk_norm_rope",
        "forward",
        dtype,
        [1, rows, heads, head],
        lambda: (_random(proof, dtype, 1, rows, heads, head),),
        {
            KERNEL: lambda x: module.qk_norm_rope(x, weight, cos, sin, EPS),
            "eager": lambda x: module.qk_norm_rope_reference(x, weight, cos, sin, EPS),
        },
        bytes=2 * rows * heads * head * DTYPES[dtype].itemsize,
        compiled="eager",
    )


CONTESTS: tuple[tuple[str, Callable[..., Contest]], ...] = (
    ("moments", moments),
    ("difference", difference),
    ("distillation_loss", distillation_loss),
    ("distillation_loss", partial(distillation_loss, known=True)),
    ("layer_norm_modulate", layer_norm_modulate),
    ("layer_norm_modulate", partial(layer_norm_modulate, gradient=True)),
    ("gated_residual", gated_residual),
    ("qk_norm_rope", qk_norm_rope),
)
