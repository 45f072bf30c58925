"""Every kernel against float64, in every dtype, on data drawn anew, with memory that is poisoned before it is handed out.

The float64 formulas stand here, apart from the kernels and from their references. Where no kernel can run, the plain formulations are checked.

Shape suffixes: B batch, T or S token, N row, D and E width, H head.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch

from benchmarks.gpu.measuring import NotRun, Proof, Row, kernels, kernels_here, reclaim, rows_of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LIMITS = {"bfloat16": 6e-3, "float16": 8e-4, "float32": 2e-5}
"""Largest relative distance of an output that is rounded to its dtype. float32 is to be float32: TF32 lies near 3e-4."""
GRADIENT_LIMITS = {"bfloat16": 1.2e-2, "float16": 1.6e-3, "float32": 5e-5}
SUM_LIMIT = 2e-5
"""Of what is summed up in float32 whatever the inputs are in."""
EPS = 1e-6
MAGNITUDE = 0.1
Tensors = Mapping[str, torch.Tensor]


def correctness(proof: Proof) -> list[Row]:
    """A row for each kernel, dtype, size and output: its distance from float64, and whether that is within the limit."""
    cases: list[tuple[Row, Callable[[], Sequence[Row]]]] = []
    for kernel, check in CHECKS.items():
        for dtype in DTYPES:
            for size in SIZES[proof.tiny][kernel]:
                same = {"kernel": kernel, "kernels": kernels_here(), "dtype": dtype, "size": list(size)}
                cases.append((same, partial(_checked, proof, check, dtype, size)))
    rows = rows_of(proof, cases)
    if all("not_run" in row for row in rows):
        raise NotRun("; ".join(dict.fromkeys(row["not_run"] for row in rows)))
    return rows


def _checked(proof: Proof, check: Callable[..., dict[str, tuple[float, float]]], dtype: str, size: tuple[int, ...]) -> list[Row]:
    proof.needs(2)
    generator = torch.Generator(proof.device).manual_seed(torch.seed() % 2**31)
    draw = partial(_drawn, generator, DTYPES[dtype], proof.device)
    with kernels(kernels_here()), poisoned():
        found = check(draw, dtype, *size)
    reclaim()
    return [
        {"output": name, "rel_l2": error, "limit": limit, "passed": error <= limit}  # NaN is not
        for name, (error, limit) in found.items()
    ]


def _drawn(generator: torch.Generator, dtype: torch.dtype, device: str, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)


@contextmanager
def poisoned() -> Iterator[None]:
    """A block in which memory that is asked for comes full of NaN, so that what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """`|got - wanted| / |wanted|` in float64; NaN where anything is."""
    return float((got.detach().double() - wanted).norm() / wanted.norm())


def kernel_module(name: str) -> Any:
    """A module of `ppclc.kernels`. Raises NotRun where it is not there."""
    try:
        return import_module(f"ppclc.kernels.{name}")
    except ModuleNotFoundError as error:
        raise NotRun(f"{error.name} is not there") from None


def check_moments(
    draw: Callable[..., torch.Tensor], dtype: str, rows: int, width: int, other: int, kind: str
) -> dict[str, tuple[float, float]]:
    """Both sums, added to what stood there before: plain, of some of the rows, around means, or the first alone."""
    module = kernel_module("moments")
    x, y = draw(rows, width), draw(rows, other)
    x = x + 2 * draw(1, width)  # states have means
    mask = draw(rows) > 0.3 if kind == "mask" else None
    centres = (x.float().mean(0), y.float().mean(0)) if kind == "centres" else None
    start = draw(width, width).float()
    second, cross = (start + start.T).contiguous(), draw(width, other).float()
    a, b = x.double(), y.double()
    if centres is not None:
        a, b = a - centres[0].double(), b - centres[1].double()
    if mask is not None:
        a, b = a[mask], b[mask]
    wanted = {"second": second.double() + a.T @ a, "cross": cross.double() + a.T @ b}
    alone = kind == "alone"
    module.add_moments(second, None if alone else cross, x, None if alone else y, rows=mask, centres=None if alone else centres)
    found = {"second": (distance(module.symmetric(second), wanted["second"]), SUM_LIMIT)}
    return found if alone else found | {"cross": (distance(cross, wanted["cross"]), SUM_LIMIT)}


def check_distillation_loss(draw: Callable[..., torch.Tensor], dtype: str, batch: int, tokens: int, width: int, kind: str) -> Any:
    """The loss, and its gradient to the student."""
    module = kernel_module("distillation_loss")
    teacher = draw(batch, tokens, width)
    student = (teacher + 0.5 * draw(batch, tokens, width)).detach().requires_grad_()
    mask = (draw(batch, tokens) > -0.5) if kind == "mask" else None
    exact = student.detach().double().requires_grad_()
    norm_s, norm_t = exact.norm(dim=-1), teacher.double().norm(dim=-1)
    each = 2 - 2 * (exact * teacher.double()).sum(-1) / (norm_s * norm_t) + MAGNITUDE * (norm_s / norm_t - 1) ** 2
    wanted = each.mean() if mask is None else each[mask].mean()
    got = module.state_loss(student, teacher, MAGNITUDE, mask)
    (3 * wanted).backward()
    (3 * got).backward()
    return {"loss": (distance(got, wanted), SUM_LIMIT), "gradient": _gradient(student, exact, dtype)}


def check_layer_norm_modulate(draw: Callable[..., torch.Tensor], dtype: str, batch: int, tokens: int, width: int) -> Any:
    """The modulated norm, and its gradients to state, scale and shift."""
    module = kernel_module("modulation")
    given = {"x": draw(batch, tokens, width) + 1, "scale": draw(batch, width, scale=0.5), "shift": draw(batch, width)}

    def exactly(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt()
        return normed * (1 + scale[:, None]) + shift[:, None]

    return _compared(given, dtype, lambda x, scale, shift: module.layer_norm_modulate(x, scale, shift, EPS), exactly, draw)


def check_gated_residual(draw: Callable[..., torch.Tensor], dtype: str, batch: int, tokens: int, width: int) -> Any:
    """The sum, and its gradients to all three."""
    module = kernel_module("modulation")
    given = {"x": draw(batch, tokens, width), "gate": draw(batch, width), "y": draw(batch, tokens, width)}
    return _compared(given, dtype, module.gated_residual, lambda x, gate, y: x + gate[:, None] * y, draw)


def check_qk_norm_rope(draw: Callable[..., torch.Tensor], dtype: str, batch: int, tokens: int, heads: int, width: int) -> Any:
    """Normed and turned queries or keys; neighbouring features are a pair. Gradients where the kernel has them."""
    module = kernel_module("qk_norm_rope")
    angles = 3 * draw(tokens, width // 2).float()
    cos, sin = angles.cos(), angles.sin()
    given = {"x": draw(batch, tokens, heads, width), "weight": 1 + 0.3 * draw(width)}

    def exactly(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        a, b = normed[..., ::2], normed[..., 1::2]
        c, s = cos.double()[:, None], sin.double()[:, None]
        return torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2)

    return _compared(given, dtype, lambda x, weight: module.qk_norm_rope(x, weight, cos, sin, EPS), exactly, draw)


def _compared(given: Tensors, dtype: str, run: Callable[..., Any], exactly: Callable[..., Any], draw: Callable[..., torch.Tensor]) -> Any:
    """The distance of an output, and of its gradients to all that was given, where it has any."""
    held = {name: value.detach().requires_grad_() for name, value in given.items()}
    exact = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    got, wanted = run(**held), exactly(**exact)
    found = {"output": (distance(got, wanted.detach()), LIMITS[dtype])}
    if got.requires_grad:
        pull = draw(*got.shape)
        got.backward(pull)
        wanted.backward(pull.double())
        found |= {f"gradient of {n}": _gradient(held[n], exact[n], dtype) for n in given if held[n].grad is not None}
    return found


def _gradient(held: torch.Tensor, exact: torch.Tensor, dtype: str) -> tuple[float, float]:
    assert held.grad is not None
    assert exact.grad is not None
    return distance(held.grad, exact.grad), GRADIENT_LIMITS[dtype]


CHECKS: dict[str, Callable[..., Any]] = {
    "moments": check_moments,
    "distillation_loss": check_distillation_loss,
    "layer_norm_modulate": check_layer_norm_modulate,
    "gated_residual": check_gated_residual,
    "qk_norm_rope": check_qk_norm_rope,
}
SIZES: dict[bool, dict[str, list[tuple[Any, ...]]]] = {
    False: {
        "moments": [
            (7401, 3072, 3072, "plain"),
            (7401, 3072, 3072, "mask"),
            (2048, 3072, 3072, "centres"),
            (777, 1000, 520, "plain"),
            (512, 3072, 0, "alone"),
        ],
        "distillation_loss": [(1, 7401, 3072, "plain"), (2, 513, 3072, "mask"), (3, 77, 1000, "mask")],
        "layer_norm_modulate": [(1, 7401, 3072), (2, 513, 3072), (3, 77, 1000)],
        "gated_residual": [(1, 7401, 3072), (2, 513, 3072), (3, 77, 1000)],
        "qk_norm_rope": [(1, 7401, 24, 128), (2, 77, 5, 64)],
    },
    True: {
        "moments": [(40, 16, 24, "plain"), (40, 16, 16, "mask"), (40, 16, 16, "centres"), (24, 16, 0, "alone")],
        "distillation_loss": [(1, 9, 32, "plain"), (2, 5, 32, "mask")],
        "layer_norm_modulate": [(2, 9, 32)],
        "gated_residual": [(2, 9, 32)],
        "qk_norm_rope": [(2, 9, 3, 16)],
    },
}
