"""The emulated GPU: what it must have of a real one for the tests that stand on it to mean anything."""

from __future__ import annotations

import gc

import pytest
import torch

from benchmarks import emulated_cuda

pytestmark = pytest.mark.skipif(
    not emulated_cuda.started(), reason="pytest -p tests.emulated.plugin runs it, where there is a C++ compiler"
)


@pytest.fixture
def device() -> emulated_cuda.Device:
    return emulated_cuda.start()


def test_gradients_are_those_of_the_cpu() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    found = []
    for device in ("cpu", "cuda"):
        a, w = (t.clone().to(device).requires_grad_() for t in (x, weight))
        q = (a @ w).relu().view(1, 2, 2, 8)
        torch.nn.functional.scaled_dot_product_attention(q, q, q).square().mean().backward()
        found.append((a.grad, w.grad))
    for cpu, cuda in zip(*found, strict=True):
        assert cpu is not None
        assert cuda is not None
        assert cuda.device == torch.device("cuda", 0)
        torch.testing.assert_close(cuda.cpu(), cpu)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda a, b: a + b,
        lambda a, b: a @ b,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: torch.nn.functional.linear(a, b),
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: torch.stack([a, b]),
        lambda a, b: a.index_select(0, b[0].long()),
        lambda a, b: a.add_(b),
    ],
)
def test_an_operator_refuses_tensors_in_two_places(mixed: object) -> None:
    assert callable(mixed)
    with pytest.raises(RuntimeError, match="same device"):
        mixed(torch.ones(4, 4, device="cuda"), torch.ones(4, 4))


def test_numbers_and_indices_may_come_from_the_cpu() -> None:
    x = torch.arange(12.0, device="cuda").view(4, 3)
    assert (x * torch.tensor(2.0)).sum().item() == 132
    assert x[torch.tensor([1, 3])].tolist() == [[3, 4, 5], [9, 10, 11]]


def test_views_share_their_memory_and_outputs_can_grow() -> None:
    x = torch.ones(6, 2, device="cuda")
    x[2:4].t().mul_(3)
    x.view(3, 4)[0, 0] = 7
    assert x.cpu().tolist() == [[7, 1], [1, 1], [3, 3], [3, 3], [1, 1], [1, 1]]
    grown = torch.empty(0, device="cuda")
    torch.add(x, 1, out=grown.resize_(6, 2))
    assert torch.equal(grown.cpu(), x.cpu() + 1)


def test_memory_is_counted_and_runs_out(device: emulated_cuda.Device) -> None:
    gc.collect()
    before = device.held()
    x = torch.zeros(1000, device="cuda")
    y = x[:10]
    assert device.held() - before == 4000
    del x
    assert device.held() - before == 4000  # a view holds all of it
    del y
    assert device.held() == before
    device.limit(before + 10_000)
    try:
        assert torch.cuda.mem_get_info() == (10_000, before + 10_000)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(3000, device="cuda")
        torch.zeros(2000, device="cuda")
    finally:
        device.limit(emulated_cuda.MEMORY)
    assert device.held() == before


def test_what_the_host_waits_for_is_counted(device: emulated_cuda.Device) -> None:
    x = torch.ones(3, device="cuda")
    before = device.copies_to_host()
    y = (x * 2).sum()
    assert device.copies_to_host() == before
    y.item()
    x.cpu()
    x.tolist()
    assert device.copies_to_host() == before + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_attention_is_that_of_the_cpu_and_keeps_no_matrix_of_pairs(dtype: torch.dtype, mask: str, device: emulated_cuda.Device) -> None:
    given = [torch.randn(2, 4, 300, 32).to(dtype) for _ in range(3)]
    kept = None if mask == "none" else torch.rand(2, 1, 1, 300) > 0.3
    if kept is not None and mask == "float":
        kept = torch.zeros(kept.shape, dtype=dtype).masked_fill(~kept, -1e4)
    found = []
    for where in ("cpu", "cuda"):
        qkv = [t.clone().to(where).requires_grad_() for t in given]
        device.reset_peak()
        before = device.held()
        out = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=None if kept is None else kept.to(where))
        out.square().mean().backward()
        assert device.peak() - before < 6 * given[0].nbytes
        found.append([out.detach().cpu(), *(t.grad.cpu() for t in qkv if t.grad is not None)])
    assert len(found[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
