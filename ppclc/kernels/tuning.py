"""Kernels with the configuration that is fastest for what they are given: tried at the first call, and from then on called without a detour."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton

from ppclc.kernels import interpreted


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """A block whose kernels run where a tensor lies: Triton launches on the current device, whatever it is given."""
    if not tensor.is_cuda or torch.cuda.current_device() == tensor.device.index:
        return nullcontext()
    return torch.cuda.device(tensor.device)


@cache
def early(device: torch.device) -> dict[str, bool]:
    """Options of a launch that may begin while the kernel before it ends, whose results it is to wait for by itself; empty where there is no such thing.

    Source: CUDA C++ programming guide, programmatic dependent launch: from compute capability 9.0.
    """
    able = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"launch_pdl": True} if able else {}


_found: dict[tuple[int, Hashable, int], Any] = {}


def launch(
    kernel: Any,
    configs: Sequence[tuple[Mapping[str, int], int]],
    grid: Callable[[Mapping[str, int]], tuple[int, ...]],
    key: Hashable,
    args: Sequence[Any],
    constants: Mapping[str, Any],
    zeroed: Sequence[str] = (),
) -> None:
    """Run a kernel.

    configs: what is set, and a number of warps; under the interpreter the first is taken. grid: the programs, by what a configuration sets.
    key: of what the fastest depends on, beside the device. zeroed: arguments that are set to zero before each try.
    """
    if interpreted():
        values, _ = configs[0]
        kernel[grid(values)](*args, **constants, **values)
        return
    place = (id(kernel), key, args[0].device.index)
    with on_device_of(args[0]):
        if place not in _found:
            tried = [triton.Config(dict(values), num_warps=warps) for values, warps in configs]
            tuner = triton.autotune(tried, key=[], reset_to_zero=list(zeroed) or None)(kernel)
            tuner[grid](*args, **constants)
            _found[place] = tuner.best_config
        else:
            best = _found[place]
            kernel[grid(best.kwargs)](*args, **constants, **best.kwargs, num_warps=best.num_warps)
