"""What a device can do at best, measured: copies and matrix products; and what a forward asks of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ppclc.benching.timing import stopwatch
from ppclc.families import Family
from ppclc.loading.classes import model_outline

COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
SIDE = {"cpu": 1024, "cuda": 8192}
REPEATS = 7


@dataclass(frozen=True)
class Roofline:
    """Most bytes read and written a second, and most floating-point operations a second in a dtype, of a device with these threads."""

    device: str
    dtype: str
    threads: int
    bytes_per_s: float
    flops_per_s: float

    def floor_s(self, work: Work) -> float:
        """The least time for a forward: that of its arithmetic or of reading its weights, whichever is longer."""
        return max(work.flops / self.flops_per_s, work.bytes / self.bytes_per_s)


@dataclass(frozen=True)
class Work:
    """What a forward is: operations in matrix products and attention, and bytes of the parameters that it reads."""

    flops: int
    bytes: int
    parameters: int


def best_s(run: Callable[[], Any], device: str) -> float:
    """Shortest of several runs, in seconds."""
    watch = stopwatch(device)
    return min(watch.ns(run) for _ in range(REPEATS)) / 1e9


@cache
def measured_roofline(device: str, dtype: torch.dtype, threads: int) -> Roofline:
    """Copies of a tensor beyond every cache, and products of square matrices, the best of several each. `threads`: PyTorch's, which both depend on."""
    kind = "cpu" if device == "cpu" else "cuda"
    source = torch.ones(COPY_BYTES[kind] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied = best_s(partial(target.copy_, source), device)
    side = SIDE[kind]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = best_s(partial(torch.matmul, a, b), device)
    return Roofline(device, str(dtype).removeprefix("torch."), threads, 2 * COPY_BYTES[kind] / copied, 2 * side**3 / product)


def work_of(family: Family, config: Mapping[str, Any], inputs: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Work:
    """What one call of a model on inputs of these shapes is, from its configuration alone: nothing is computed.

    Attention counts in full, as PyTorch's plain formulation of it does; element-wise operations do not count.
    """
    model = model_outline(family, config).to(dtype)
    module = family.lowered(model).module.to("meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(**{name: tensor.to("meta") for name, tensor in inputs.items()})
    parameters = list(model.parameters())
    return Work(
        flops=int(counter.get_total_flops()),
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        parameters=sum(p.numel() for p in parameters),
    )
