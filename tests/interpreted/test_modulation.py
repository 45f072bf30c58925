"""LayerNorm with modulation and gated residuals, the kernels themselves, under Triton's interpreter: TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from ppclc import kernels
from ppclc.kernels import modulation

if not kernels.interpreted():
    pytest.skip("TRITON_INTERPRET=1 runs it", allow_module_level=True)

EPS = 1e-6
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-11, torch.float32: 2**-22}
"""Half a unit in the last place of a result that is rounded once; of float32, what sums of a row lose besides.

Of bfloat16 a whole one: the interpreter cuts off what a GPU rounds.
"""
dtypes = pytest.mark.parametrize("dtype", list(ROUNDING))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are taken, and what they write into holds NaN first."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", filled)
    monkeypatch.setattr(kernels, "_chosen", "triton")


def _drawn(shape: tuple[int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """x, scale, shift and y."""
    generator, (B, T, D) = torch.Generator().manual_seed(sum(shape)), shape
    return [torch.randn(s, generator=generator).to(dtype) for s in ((B, T, D), (B, D), (B, D), (B, T, D))]


def _assert_rounded(got: torch.Tensor, wanted: torch.Tensor, terms: torch.Tensor) -> None:
    """Equal to a float64 result but for one rounding, and for float32's of the terms that it is a sum of."""
    allowed = ROUNDING[got.dtype] * wanted.abs() + 2**-21 * terms.abs() + torch.finfo(got.dtype).tiny
    far = (got.double() - wanted).abs() > allowed
    assert not far.any(), (got.double() - wanted).abs()[far].max()


def _normed(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)


@dtypes
@pytest.mark.parametrize("shape", [(2, 5, 64), (1, 3, 72), (2, 1, 96), (1, 2, 3000)])
def test_layer_norm_modulate_is_rounded_once(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, scale, shift, _ = _drawn(shape, dtype)
    got = modulation.layer_norm_modulate(x, scale, shift, EPS)
    wanted = modulation.layer_norm_modulate_reference(x.double(), scale.double(), shift.double(), EPS)
    assert got.dtype == dtype
    _assert_rounded(got, wanted, 4 * (1 + scale.double().abs()[:, None]) + shift.double().abs()[:, None])


@dtypes
@pytest.mark.parametrize("shape", [(2, 5, 64), (1, 9, 72), (1, 2, 1500)])
def test_gated_residual_is_rounded_once(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, gate, _, y = _drawn(shape, dtype)
    wanted = x.double() + gate.double()[:, None] * y.double()
    _assert_rounded(modulation.gated_residual(x, gate, y), wanted, x.double().abs() + wanted.abs())


def test_views_are_read_where_they_lie() -> None:
    wide = torch.randn(2, 7, 200)
    mod = torch.randn(2, 6 * 72)
    shift, scale, gate = mod.chunk(6, dim=-1)[:3]
    x, y = wide[:, 2:5, 10:82], wide[:, 1:4, 100:172]
    normed = modulation.layer_norm_modulate_reference(x, scale, shift, EPS)
    torch.testing.assert_close(modulation.layer_norm_modulate(x, scale[:, None], shift[:, None], EPS), normed, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(modulation.gated_residual(x, gate, y), x + gate[:, None] * y, rtol=1e-6, atol=1e-6)
    turned = torch.randn(2, 72, 3).transpose(1, 2)  # its last axis is not contiguous
    wanted = modulation.layer_norm_modulate_reference(turned, scale, shift, EPS)
    torch.testing.assert_close(modulation.layer_norm_modulate(turned, scale, shift, EPS), wanted, rtol=2e-6, atol=2e-6)
    shared = torch.randn(1, 1, 72)  # one row for all samples
    torch.testing.assert_close(modulation.gated_residual(turned, shared, y), turned + shared * y, rtol=1e-6, atol=1e-6)


@dtypes
def test_extreme_rows_stay_finite(dtype: torch.dtype) -> None:
    rows = torch.stack([torch.linspace(-1e4, 1e4, 72), 3 + 1e-5 * torch.randn(72), torch.zeros(72), torch.full((72,), 1e4)])[None]
    x, (_, scale, shift, _) = rows.to(dtype), _drawn((1, 1, 72), dtype)
    got = modulation.layer_norm_modulate(x, scale, shift, EPS)
    assert got.isfinite().all()
    _assert_rounded(got[:, 2], shift.double(), shift.double())
    wanted = _normed(x) * (1 + scale.double()[:, None]) + shift.double()[:, None]
    _assert_rounded(got[:, :1], wanted[:, :1], 4 * (1 + scale.double().abs()) + shift.double().abs())
    # Of a row that hardly varies, float32's mean is off by some of its last places, and so is what is left of the row.
    off = 4 * 2**-23 * x.double().abs().amax(-1, keepdim=True) / torch.sqrt(x.double().var(-1, unbiased=False, keepdim=True) + EPS)
    allowed = off * (1 + scale.double().abs()) + 2 * ROUNDING[dtype] * wanted.abs() + 2**-20
    assert ((got.double() - wanted).abs() <= allowed)[:, 1:].all()


def test_a_row_of_nan_is_alone() -> None:
    x, scale, shift, y = _drawn((2, 5, 64), torch.float32)
    x[1, 2, 7] = torch.nan
    normed, added = modulation.layer_norm_modulate(x, scale, shift, EPS), modulation.gated_residual(x, scale, y)
    assert normed[1, 2].isnan().all()
    assert normed.isnan().sum() == 64
    assert added.isnan().sum() == 1


Chain = Callable[..., torch.Tensor]


def _gradients(chain: Chain, tensors: Sequence[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(chain(*leaves), leaves, grad)


@dtypes
@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 19, 72), (1, 1, 1500)])
def test_gradients_are_those_of_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, scale, shift, y = _drawn(shape, dtype)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    chains: list[tuple[Chain, Chain, list[torch.Tensor]]] = [
        (modulation.layer_norm_modulate, modulation.layer_norm_modulate_reference, [x, scale, shift]),
        (modulation.gated_residual, modulation.gated_residual_reference, [x, scale, y]),
    ]
    for chain, reference, given in chains:
        got = _gradients(chain, given, grad)
        wanted = _gradients(reference, [t.double() for t in given], grad.double())
        for ours, exact in zip(got, wanted, strict=True):
            assert ours.dtype == dtype
            _assert_rounded(ours, exact, 8 * exact.abs().amax().expand_as(exact))


def test_gradients_of_strided_gradients_and_without_sums() -> None:
    x, scale, shift, y = _drawn((2, 3, 64), torch.float32)
    grad = torch.randn(2, 64, 3).transpose(1, 2)
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(modulation.layer_norm_modulate(leaf, scale, shift, EPS), leaf, grad)
    (wanted,) = torch.autograd.grad(modulation.layer_norm_modulate_reference(leaf, scale, shift, EPS), leaf, grad)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    other = y.clone().requires_grad_()
    (got,) = torch.autograd.grad(modulation.gated_residual(x, scale, other), other, grad)
    torch.testing.assert_close(got, grad * scale[:, None], rtol=1e-6, atol=1e-6)


def test_sums_over_tokens_are_the_same_every_time() -> None:
    x, scale, shift, y = _drawn((1, 35, 64), torch.bfloat16)
    runs = []
    for _ in range(2):
        found = _gradients(modulation.layer_norm_modulate, [x, scale, shift], y)
        runs.append([*found, *_gradients(modulation.gated_residual, [x, scale, y], y)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
