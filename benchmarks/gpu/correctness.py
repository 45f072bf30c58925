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
HALF_SUM_LIMIT = 1e-4
"""Of sums over rows that matrix units make of 16 bits: they add in float32, but round towards zero."""
EPS = 1e-6
MAGNITUDE = 0.1
Tensors = Mapping[str, torch.Tensor]
Draw = Callable[..., torch.Tensor]
Found = dict[str, tuple[float, float]]
"""By output its distance, and the limit."""


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


def _checked(proof: Proof, check: Callable[..., Found], dtype: str, size: tuple[int, ...]) -> list[Row]:
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


def check_moments(draw: Draw, dtype: str, rows: int, width: int, other: int, kind: str) -> Found:
    """Both sums, added to what stood there before: plain, of some of the rows, around means, or the first alone."""
    module = kernel_module("moments")
    x, y = draw(rows, width), draw(rows, other)
    if kind in ("mask", "centres"):
        x = x + 2 * draw(1, width)  # as states have means; without them TF32 would not show
    mask = draw(rows) > 0.3 if kind == "mask" else None
    centres = (x.float().mean(0), y.float().mean(0)) if kind == "centres" else ()
    start = draw(width, width).float()
    second, cross = (start + start.T).contiguous(), draw(width, other).float()
    # Around means, half precision is rounded once more before the product, which is what is asked for.
    a, b = ((z.float() - c).to(z.dtype).double() for z, c in zip((x, y), centres, strict=True)) if centres else (x.double(), y.double())
    if mask is not None:
        a, b = a[mask], b[mask]
    wanted = {"second": second.double() + a.T @ a, "cross": cross.double() + a.T @ b}
    limit = LIMITS["float32"] if dtype == "float32" else HALF_SUM_LIMIT
    if kind == "alone":
        module.add_moments(second, None, x)
        return {"second": (distance(module.symmetric(second), wanted["second"]), limit)}
    if mask is not None:
        x[~mask] = torch.nan  # rows that do not count may hold anything
    module.add_moments(second, cross, x, y, mask, centres)
    return {"second": (distance(module.symmetric(second), wanted["second"]), limit), "cross": (distance(cross, wanted["cross"]), limit)}


def check_difference(draw: Draw, dtype: str, rows: int, width: int) -> Found:
    """A step between two states, the sum of the later one's rows, and the step's energy."""
    module = kernel_module("moments")
    if not hasattr(module, "difference"):
        raise NotRun("ppclc.kernels.moments.difference is not there")
    x, before = draw(rows, width) + draw(1, width), draw(rows, width)
    step, total, energy = module.difference(x, before)
    exact = x.double() - before.double()
    return {
        "step": (distance(step, exact), LIMITS[dtype]),
        "sum": (distance(total, x.double().sum(0)), LIMITS["float32"]),
        "energy": (distance(energy, exact.square().sum()), LIMITS[dtype]),
    }


def check_distillation_loss(draw: Draw, dtype: str, batch: int, tokens: int, width: int, kind: str) -> Found:
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
    # A mean's gradient lies below float16's least number, for which training in it scales losses up.
    upstream = 3.0 * (2**14 if dtype == "float16" else 1)
    (upstream * wanted).backward()
    (upstream * got).backward()
    found = {"loss": (distance(got, wanted), SUM_LIMIT), "gradient": _gradient(student, exact, dtype)}
    # As a training has it: weighted, and begun with a one that is known. The gradient of the loss alone lies below float16's least number.
    weight = 0.37 * upstream
    again = student.detach().clone().requires_grad_()
    weighted = module.state_loss(again, teacher, MAGNITUDE, mask, weight)
    (again.grad,) = torch.autograd.grad(weighted, again, module.one(weighted.device, weighted.dtype))
    exact.grad *= 0.37
    found |= {"weighted loss": (distance(weighted, weight * wanted), SUM_LIMIT), "weighted gradient": _gradient(again, exact, dtype)}
    return found


def check_layer_norm_modulate(draw: Draw, dtype: str, batch: int, tokens: int, width: int) -> Found:
    """The modulated norm, and its gradients to state, scale and shift."""
    module = kernel_module("modulation")
    given = {"x": draw(batch, tokens, width) + 1, "scale": draw(batch, width, scale=0.5), "shift": draw(batch, width)}

    def exactly(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt()
        return normed * (1 + scale[:, None]) + shift[:, None]

    return _compared(given, dtype, lambda x, scale, shift: module.layer_norm_modulate(x, scale, shift, EPS), exactly, draw)


def check_gated_residual(draw: Draw, dtype: str, batch: int, tokens: int, width: int) -> Found:
    """The sum, and its gradients to all three."""
    module = kernel_module("modulation")
    given = {"x": draw(batch, tokens, width), "gate": draw(batch, width), "y": draw(batch, tokens, width)}
    return _compared(given, dtype, module.gated_residual, lambda x, gate, y: x + gate[:, None] * y, draw)


def check_qk_norm_rope(draw: Draw, dtype: str, batch: int, tokens: int, heads: int, width: int) -> Found:
    """Normed and turned queries or keys; neighbouring features are a pair. The kernel has no gradients, and is taken where none are wanted."""
    module = kernel_module("qk_norm_rope")
    angles = 3 * draw(tokens, width // 2).float()
    cos, sin = angles.cos(), angles.sin()
    given = {"x": draw(batch, tokens, heads, width), "weight": 1 + 0.3 * draw(width)}

    def exactly(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        a, b = normed[..., ::2], normed[..., 1::2]
        c, s = cos.double()[:, None], sin.double()[:, None]
        return torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2)

    with torch.no_grad():
        got, wanted = module.qk_norm_rope(*given.values(), cos, sin, EPS), exactly(*(v.double() for v in given.values()))
    return {"output": (distance(got, wanted), LIMITS[dtype])}


def _compared(given: Tensors, dtype: str, run: Callable[..., Any], exactly: Callable[..., Any], draw: Draw) -> Found:
    """The distance of an output, and of its gradients to all that was given."""
    held = {name: value.detach().requires_grad_() for name, value in given.items()}
    exact = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    got, wanted = run(*held.values()), exactly(*exact.values())
    found = {"output": (distance(got, wanted.detach()), LIMITS[dtype])}
    pull = draw(*got.shape)
    got.backward(pull)
    wanted.backward(pull.double())
    return found | {f"gradient of {name}": _gradient(held[name], exact[name], dtype) for name in given}


def _gradient(held: torch.Tensor, exact: torch.Tensor, dtype: str) -> tuple[float, float]:
    assert held.grad is not None
    assert exact.grad is not None
    return distance(held.grad, exact.grad), GRADIENT_LIMITS[dtype]


CHECKS: dict[str, Callable[..., Found]] = {
    "moments": check_moments,
    "difference": check_difference,
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
        "difference": [(7401, 3072), (77, 1000)],
        "distillation_loss": [(1, 7401, 3072, "plain"), (2, 513, 3072, "mask"), (3, 77, 1000, "mask")],
        "layer_norm_modulate": [(1, 7401, 3072), (2, 513, 3072), (3, 77, 1000)],
        "gated_residual": [(1, 7401, 3072), (2, 513, 3072), (3, 77, 1000)],
        "qk_norm_rope": [(1, 7401, 24, 128), (2, 77, 5, 64)],
    },
    True: {
        "moments": [(40, 16, 24, "plain"), (40, 16, 16, "mask"), (40, 16, 16, "centres"), (24, 16, 0, "alone")],
        "difference": [(24, 16)],
        "distillation_loss": [(1, 9, 32, "plain"), (2, 5, 32, "mask")],
        "layer_norm_modulate": [(2, 9, 32)],
        "gated_residual": [(2, 9, 32)],
        "qk_norm_rope": [(2, 9, 3, 16)],
    },
}
