"""The distillation loss, the kernel itself, under Triton's interpreter: TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ppclc import kernels
from ppclc.kernels import distillation_loss
from ppclc.kernels.distillation_loss import one, reference, state_loss

if not kernels.interpreted():
    pytest.skip("TRITON_INTERPRET=1 runs it", allow_module_level=True)

from ppclc.kernels import distillation_loss_triton

ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 2e-6}
"""Of a gradient that is rounded once, or twice; the interpreter cuts off what a GPU rounds."""
dtypes = pytest.mark.parametrize("dtype", list(ROUNDING))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are taken, and what they write into holds NaN first."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", filled)
    monkeypatch.setattr(kernels, "_chosen", "triton")


def both(
    student: torch.Tensor, teacher: torch.Tensor, magnitude: float, mask: torch.Tensor | None = None, upstream: float = 1.0
) -> tuple[torch.Tensor, ...]:
    """Loss and gradient, of the kernel and of the reference in float64."""
    found, wanted = student.clone().requires_grad_(), student.double().requires_grad_()
    loss, exact = state_loss(found, teacher, magnitude, mask), reference(wanted, teacher.double(), magnitude, mask)
    (upstream * loss).backward()
    (upstream * exact).backward()
    assert found.grad is not None
    assert wanted.grad is not None
    return loss.detach(), exact.detach(), found.grad, wanted.grad


def states(batch: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(width)
    teacher = torch.randn(batch, tokens, width)
    return (teacher + 0.3 * torch.randn(batch, tokens, width)).to(dtype), teacher.to(dtype)


@dtypes
@pytest.mark.parametrize("masked", [False, True])
def test_a_weight_is_in_the_loss_and_in_its_gradient(masked: bool, dtype: torch.dtype) -> None:
    student, teacher = states(2, 5, 100, dtype)
    mask = (torch.arange(10) % 3 != 1).view(2, 5) if masked else None
    found, wanted = student.clone().requires_grad_(), student.double().requires_grad_()
    loss, exact = state_loss(found, teacher, 0.3, mask, 0.37), 0.37 * reference(wanted, teacher.double(), 0.3, mask)
    loss.backward()
    exact.backward()
    assert found.grad is not None
    assert wanted.grad is not None
    assert loss.item() == pytest.approx(exact.item(), rel=2e-6)
    assert distance(found.grad, wanted.grad) < ROUNDING[dtype]


@pytest.mark.parametrize("count", [1, 4095, 4097, 70_000])
def test_totals(count: int) -> None:
    """Of whole blocks and of a part, by one program and, of more than that is for, by PyTorch."""
    _total = distillation_loss_triton._total
    values = torch.rand(count, generator=torch.Generator().manual_seed(count)) - 0.3
    assert _total(values).item() == pytest.approx(values.double().sum().item(), rel=1e-5)
    assert _total(values > 0, share=True).item() == pytest.approx(1 / max(1, int((values > 0).sum())), rel=1e-6)
    assert _total(values > 2, share=True).item() == 1.0  # none counts


def test_a_backward_from_one_does_not_look_at_the_gradient_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one through a sum of such losses; any other upstream is looked at, and float16 has its share still to get."""
    looked: list[float] = []
    scale = distillation_loss._scale
    monkeypatch.setattr(distillation_loss, "_scale", lambda g, factor, share: (looked.append(float(factor)), scale(g, factor, share)))
    student, teacher = states(1, 5, 64, torch.float32)
    gradients = {}
    for name, upstream in (("one", one(student.device, torch.float32)), ("ones", torch.ones(())), ("two", torch.tensor(2.0))):
        (gradients[name],) = torch.autograd.grad(state_loss(student.requires_grad_(), teacher, 0.1), student, upstream)
    assert looked == [1.0, 2.0]
    assert torch.equal(gradients["one"], gradients["ones"])
    assert torch.equal(2 * gradients["one"], gradients["two"])
    both_of_them = torch.stack([state_loss(student, teacher, 0.1), state_loss(student, 2 * teacher, 0.1)]).sum()
    torch.autograd.grad(both_of_them, student, one(student.device, torch.float32))
    assert looked == [1.0, 2.0]
    half = student.detach().half().requires_grad_()
    torch.autograd.grad(state_loss(half, teacher.half(), 0.1), half, one(student.device, torch.float32))
    assert looked == [1.0, 2.0, 1.0]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@dtypes
@pytest.mark.parametrize("upstream", [1.0, 3.0, -0.25])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 7, 64), (2, 5, 100), (3, 1, 3000)])
def test_loss_and_gradient(batch: int, tokens: int, width: int, masked: bool, upstream: float, dtype: torch.dtype) -> None:
    student, teacher = states(batch, tokens, width, dtype)
    mask = (torch.arange(batch * tokens) % 3 != 1).view(batch, tokens) if masked else None
    if mask is not None:
        student[~mask] = torch.nan  # what they hold does not matter
        teacher[~mask] = torch.inf
    loss, exact, gradient, wanted = both(student, teacher, 0.3, mask, upstream)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-6)
    assert distance(gradient, wanted) < ROUNDING[dtype]
    if mask is not None:
        assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_what_lies_behind_the_losses_adds_nothing(rows: int, masked: bool) -> None:
    """Their memory is longer than they are."""
    student, teacher = states(1, rows, 64, torch.bfloat16)
    mask = (torch.arange(rows) % 3 != 1)[None] if masked else None
    loss, exact, _, _ = both(student, teacher, 0.3, mask)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_a_row_s_three_sums_may_be_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are on a GPU; the interpreter adds numbers up one after the other there, and slowly."""
    student, teacher = states(1, 3, 100, torch.float32)
    monkeypatch.setattr(distillation_loss_triton, "interpreted", lambda: False)
    loss, exact, gradient, wanted = both(student, teacher, 0.3)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert distance(gradient, wanted) < 1e-5


def test_rows_of_zeros_and_equal_rows() -> None:
    student, teacher = states(1, 6, 64, torch.float32)
    student[0, 0] = 0
    teacher[0, 1] = 0
    student[0, 2], teacher[0, 2] = 0, 0
    student[0, 3] = teacher[0, 3]
    student[0, 4] = -2 * teacher[0, 4]
    loss, exact, gradient, wanted = both(student, teacher, 0.1)
    assert loss.item() == pytest.approx(exact.item(), rel=2e-6)
    assert torch.isfinite(gradient).all()
    for row in (0, 2, 4, 5):
        assert torch.allclose(gradient[0, row].double(), wanted[0, row], rtol=1e-5, atol=1e-7)
    assert gradient[0, 3].abs().max() < 1e-7  # least where both are equal


@dtypes
def test_extreme_values(dtype: torch.dtype) -> None:
    student, teacher = states(1, 4, 64, dtype)
    largest = {torch.float16: 1.6e4, torch.bfloat16: 1e17, torch.float32: 1e17}[dtype]
    student[0, 0] *= largest / 4
    teacher[0, 1] *= largest / 4
    student[0, 2] *= 2.0**-10
    teacher[0, 3] *= 2.0**-10
    loss, exact, gradient, wanted = both(student, teacher, 0.0)
    assert loss.item() == pytest.approx(exact.item(), rel=2e-5)
    for row in range(4):
        assert distance(gradient[0, row], wanted[0, row]) < ROUNDING[dtype] or wanted[0, row].abs().max() < torch.finfo(dtype).tiny


def test_a_row_that_is_not_a_number_shows_in_the_loss_and_in_its_own_gradient_alone() -> None:
    student, teacher = states(1, 4, 64, torch.float32)
    student[0, 1, 5] = torch.nan
    loss, _, gradient, _ = both(student, teacher, 0.1)
    assert loss.isnan()
    assert gradient[0, 1].isnan().all()
    assert torch.isfinite(gradient[0, [0, 2, 3]]).all()


def test_float16_keeps_gradients_that_a_row_s_share_would_push_below_the_least_number() -> None:
    """A loss that is scaled up, as training in float16 does, must find them."""
    student, teacher = states(1, 40, 256, torch.float16)
    _, _, gradient, wanted = both(student * 16, teacher * 16, 0.1, None, 2.0**16)
    assert distance(gradient, wanted) < ROUNDING[torch.float16]


def test_views() -> None:
    student, teacher = states(1, 6, 128, torch.float32)
    loss, exact, gradient, wanted = both(student[:, 1:, 32:96], teacher[:, :-1, :64], 0.1)
    assert loss.item() == pytest.approx(exact.item(), rel=2e-6)
    assert distance(gradient, wanted) < 2e-6


def test_one_backward_a_forward() -> None:
    student, teacher = states(1, 3, 64, torch.float32)
    loss = state_loss(student.requires_grad_(), teacher, 0.1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward a forward"):
        loss.backward()


def test_compiled_code_sees_the_operator() -> None:
    """The same bits, any number of backwards."""
    student, teacher = states(2, 5, 64, torch.float32)
    mask = torch.rand(2, 5) > 0.3
    compiled = torch.compile(distillation_loss.state_loss, backend="aot_eager", fullgraph=True)
    found = compiled(student.requires_grad_(), teacher, 0.1, mask)
    wanted = state_loss(student, teacher, 0.1, mask)
    assert torch.equal(found, wanted)
    (exact,) = torch.autograd.grad(3 * wanted, student)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(3 * found, student, retain_graph=True)
        assert torch.equal(gradient, exact)
