"""CUDA tensors where there is no GPU: operators find shapes, dtypes and devices and no values, and what a GPU would have to do is counted.

PyTorch's fake tensors go through the code that a GPU would go through, at any size and in no memory. A build of PyTorch without CUDA asks
for a guard of the current device all the same: one that does nothing is compiled for it, which takes a C++ compiler and a second.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import compiled
from ppclc import kernels
from ppclc.analysis.device_sums import HostCopies, Place, Taken
from ppclc.data.samples import Sample
from ppclc.teachers import ResidentTeacher

DEVICE = torch.device("cuda", 0)
GUARD = """
#include <c10/core/impl/FakeGuardImpl.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>) }
"""
TRIANGLE_TILE = 128
"""Side of the tiles in which the moments' kernel makes a triangle: half of those on the diagonal is made for nothing."""


@cache
def lacks() -> str:
    """Why there can be no fake CUDA here; empty where the guard stands from now on."""
    if reason := compiled.lacks():
        return reason
    try:
        ctypes.CDLL(str(compiled.library("fake_cuda", GUARD, ["c10"])))
    except RuntimeError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def fake_cuda(free_bytes: int) -> Iterator[FakeTensorMode]:
    """A block in which tensors on `DEVICE` can be made, with so much memory free there, and kernels are taken for what lies there.

    Raises:
        RuntimeError: there can be none here.
    """
    if reason := lacks():
        raise RuntimeError(reason)
    with contextlib.ExitStack() as stack:
        told = {"mem_get_info": (free_bytes, free_bytes), "memory_reserved": 0, "memory_allocated": 0, "current_device": 0}
        for name, value in told.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=value))
        stack.enter_context(mock.patch.object(kernels, "_lacks", return_value=""))
        stack.enter_context(mock.patch.object(HostCopies, "bring", _brought_at_once))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def _brought_at_once(_: HostCopies, sums: Iterable[tuple[Place, Taken]], take: Callable[[Place, torch.Tensor], None]) -> None:
    """As `HostCopies.bring`, without its thread, in which tensors would not be fake."""
    for place, taken in sums:
        take(place, taken.whole().cpu())


def put(teacher: ResidentTeacher, dtype: torch.dtype) -> None:
    """Put a teacher of meta tensors, made before, on the fake device; within a block of `fake_cuda`."""

    def made(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device=DEVICE)

    for module in (teacher.model, teacher.skeleton.model):
        module._apply(made)
    teacher.device, teacher.dtype = DEVICE, dtype


def fake_sample(sample: Sample) -> Sample:
    """A sample on the CPU as fake tensors; within a block of `fake_cuda`."""
    return sample[0].clone(), sample[1].clone(), {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in sample[2].items()}


@dataclass
class Calls:
    """What operators of one kind have done: how often, bytes read and written, operations of matrix products by dtype."""

    count: int = 0
    nbytes: int = 0
    flops: dict[torch.dtype, int] = field(default_factory=dict)

    def add(self, other: Calls, times: int = 1) -> None:
        """Add so many times another's."""
        self.count += times * other.count
        self.nbytes += times * other.nbytes
        for dtype, n in other.flops.items():
            self.flops[dtype] = self.flops.get(dtype, 0) + times * n


class Counted(TorchDispatchMode):
    """Operators on a GPU, counted by name and shape. to_host: those that bring something to the CPU, which waits for the GPU; from_host: the other way."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.calls: dict[tuple[str, tuple[int, ...]], Calls] = {}
        self.to_host: list[tuple[str, int]] = []
        self.from_host: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":  # questions about a tensor
            return out
        ins, outs = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out))
        name = f"{func.namespace}.{func._opname}"
        if any(t.is_cuda for t in ins) and any(not t.is_cuda for t in outs):
            self.to_host.append((name, sum(t.nbytes for t in outs)))
        elif any(t.is_cuda for t in outs) and ins and not any(t.is_cuda for t in ins):
            self.from_host.append((name, sum(t.nbytes for t in outs)))
        elif any(t.is_cuda for t in [*ins, *outs]) and not _is_view(func, ins, outs):
            self._count(name, func, args, kwargs, ins, outs, out)
        return out

    def _count(self, name: str, func: Any, args: Any, kwargs: Any, ins: list[torch.Tensor], outs: list[torch.Tensor], out: Any) -> None:
        largest = max((tuple(t.shape) for t in [*ins, *outs]), key=lambda shape: torch.Size(shape).numel())
        calls = self.calls.setdefault((name, largest), Calls())
        calls.count += 1
        dtype = ins[-1].dtype if ins else None
        if name == "ppclc.add_moments":
            (flops, nbytes), dtype = _moments(*args[:4]), args[2].dtype
        else:
            operations = flop_registry.get(func._overloadpacket)
            flops = operations(*args, **kwargs, out_val=out) if operations else 0
            nbytes = sum(t.nbytes for t in [*ins, *outs])
        calls.nbytes += nbytes
        if flops and dtype is not None:
            calls.flops[dtype] = calls.flops.get(dtype, 0) + flops

    def less(self, other: Counted, times: int = 1) -> Counted:
        """What is left without so many times another."""
        left = Counted()
        left.to_host, left.from_host = self.to_host, self.from_host
        for key, calls in self.calls.items():
            left.calls[key] = Calls()
            left.calls[key].add(calls)
            left.calls[key].add(other.calls.get(key, Calls()), -times)
        return left


def _is_view(func: Any, ins: list[torch.Tensor], outs: list[torch.Tensor]) -> bool:
    """Whether an operator does no work: what comes back lies where it was, and nothing was written."""
    if func.is_view:
        return True
    there = {t.untyped_storage()._cdata for t in ins}
    return not func._schema.is_mutable and bool(outs) and all(t.untyped_storage()._cdata in there for t in outs)


def _moments(second: Any, cross: Any, x_ND: torch.Tensor, y_NE: torch.Tensor | None) -> tuple[int, int]:
    """Operations and bytes of the moments' kernel: of the second moment the tiles of a triangle; sums are read and written."""
    rows, width = x_ND.shape
    flops, nbytes = 0, x_ND.nbytes
    if second is not None:
        flops += rows * width * (width + TRIANGLE_TILE)
        nbytes += 4 * width * (width + TRIANGLE_TILE)  # half of it, twice
    if cross is not None and y_NE is not None:
        flops += 2 * rows * width * y_NE.shape[1]
        nbytes += 8 * width * y_NE.shape[1] + y_NE.nbytes
    return flops, nbytes
