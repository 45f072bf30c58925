"""Triton kernels, each beside its plain PyTorch reference, and the one switch between them.

A kernel is two files: `<name>.py` has what is called, the reference and the operator that PyTorch knows it by; `<name>_triton.py` has the
Triton code, and is imported only where it is run. `docs/decisions/015-triton-kernels.md` tells why Triton.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

from ppclc.errors import UnavailableError

Kernels = Literal["auto", "triton", "torch"]
"""What is taken: kernels where they were measured to be faster, kernels wherever they can run, or plain PyTorch."""
NAMES = ("moments", "distillation_loss", "layer_norm_modulate", "gated_residual", "qk_norm_rope")
AUTO = frozenset({"moments", "distillation_loss", "layer_norm_modulate", "qk_norm_rope"})
"""What `auto` takes: those that were measured faster than `torch.compile` of the same formula. Source: ours, `benchmarks/results`."""
LEAST = 2**19
"""Numbers of a tensor from which `auto` takes a kernel: calling one takes the host longer than PyTorch needs for fewer. Source: ours."""
OLDEST = (8, 0)
"""Compute capability from which the kernels are compiled and tested."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_NORM = 1e-8
"""Norms of states below it count as it."""
_chosen: Kernels = "auto"


def chosen() -> Kernels:
    """The switch as it stands."""
    return _chosen


def check(kernels: Kernels) -> None:
    """Raise UnavailableError for `triton` where kernels cannot run at all."""
    if kernels == "triton" and (reason := lacks()):
        raise UnavailableError(f"kernels = 'triton': {reason}; wanted auto or torch here")


@contextmanager
def switched(kernels: Kernels) -> Iterator[None]:
    """A block in which the switch is set, for all threads. Raises as `check`."""
    global _chosen
    check(kernels)
    before, _chosen = _chosen, kernels
    try:
        yield
    finally:
        _chosen = before


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, on the CPU, because `TRITON_INTERPRET=1` is set."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def lacks() -> str:
    """Why no kernel can run here; empty where they can."""
    return _lacks(interpreted())


@cache
def _lacks(here: bool) -> str:
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if here:
        return ""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    return "" if capability >= OLDEST else f"{torch.cuda.get_device_name()} has compute capability {capability}, wanted {OLDEST} or newer"


def takes(name: str, *tensors: torch.Tensor) -> bool:
    """Whether a kernel is taken for these tensors. Never while a model is exported: what leaves PyTorch is the plain formulation."""
    if _chosen == "torch" or (_chosen == "auto" and (name not in AUTO or tensors[0].numel() < LEAST)) or torch.compiler.is_exporting():
        return False
    return all(t.dtype in DTYPES and (t.is_cuda or interpreted()) for t in tensors) and not lacks()


def dispatched(*tensors: torch.Tensor) -> bool:
    """Whether a kernel is to be called as an operator of PyTorch's: where code is compiled, or tensors only stand for others.

    Elsewhere it is called as it is, or by a function of autograd's, which takes the host a fraction of the time.
    """
    return torch.compiler.is_compiling() or not all(map(plain, tensors))


def learns(*tensors: torch.Tensor) -> bool:
    """Whether a gradient is wanted of any of these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def runs(tensor: torch.Tensor) -> bool:
    """Whether a kernel's Triton code runs where this tensor lies; elsewhere its twin in plain PyTorch stands for it."""
    return tensor.is_cuda or interpreted()


def plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds numbers itself, and stands for no other."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)
