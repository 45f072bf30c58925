"""A GPU for tests where there is none: tensors on `cuda:0` with values, on a CPU build of PyTorch.

Every tensor that a run puts there is one of CUDA's to PyTorch and to us: its device, its memory, which is counted and can run out, the
engine's thread for its gradients, and the refusal of two tensors on two devices. What operators do is done on the CPU, in the same
memory. So whole chains go the way that they go on a GPU, and to the values that they reach on a CPU. Streams are none: what is waited for
too late, a race and every time stay a GPU's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.compiled import lacks, library

CODE = Path(__file__).with_name("cuda.cpp")
LINKS = ("c10", "torch_cpu", "torch")
MEMORY = 8 * 2**30
CAPABILITY = (9, 0)


class Device:
    """The device, from `start` until the process ends."""

    def __init__(self, library: Path) -> None:
        self._code = ctypes.CDLL(str(library))
        for name in ("memory_held", "memory_peak", "memory_limit", "copies_to_host"):
            getattr(self._code, name).restype = ctypes.c_int64
        self._code.set_limit.argtypes = [ctypes.c_int64]
        self._code.emulate()
        self.limit(MEMORY)

    def limit(self, nbytes: int) -> None:
        """How much memory there is from now on: more is `torch.OutOfMemoryError`."""
        self._code.set_limit(nbytes)

    def held(self, *_: Any) -> int:
        """Bytes of tensors that are there."""
        return int(self._code.memory_held())

    def peak(self, *_: Any) -> int:
        """The most bytes since `reset_peak`."""
        return int(self._code.memory_peak())

    def reset_peak(self, *_: Any) -> None:
        """Begin with the peak anew."""
        self._code.reset_peak()

    def copies_to_host(self) -> int:
        """How often something was brought to the CPU so far, each of which a GPU is waited for."""
        return int(self._code.copies_to_host())

    def free(self, *_: Any) -> tuple[int, int]:
        """Bytes that are free, and all."""
        total = int(self._code.memory_limit())
        return total - self.held(), total


class Event:
    """A moment of the host's clock."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = time.perf_counter()

    def record(self, *_: Any) -> None:
        """Now."""
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds until another."""
        return (other.at - self.at) * 1000

    def synchronize(self) -> None:
        """Everything is done already."""

    wait = query = synchronize


class Stream:
    """Everything is done in the order in which it is asked for."""

    device, cuda_stream = torch.device("cuda", 0), 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record_event(self, *_: Any) -> Event:
        """A moment."""
        return Event()

    def wait_event(self, *_: Any) -> None:
        """Everything is done already."""

    wait_stream = synchronize = wait_event


class About(SimpleNamespace):
    """What PyTorch tells of a device."""

    @property
    def total_memory(self) -> int:
        """All of its memory, in bytes."""
        return start().free()[1]


def _copied(tensor: torch.Tensor, memo: dict[int, Any], plain: Any = torch.Tensor.__deepcopy__) -> Any:
    """`copy.deepcopy` of a tensor, whose storage a CPU build does not know how to copy."""
    if not tensor.is_cuda or type(tensor) is not torch.Tensor:
        return plain(tensor, memo)
    return memo.setdefault(id(tensor), tensor.detach().clone().requires_grad_(tensor.requires_grad))


def _stand_in() -> None:
    """Kernels are taken for what lies on the device, and their twins in PyTorch run; the roofline is measured with little."""
    from ppclc import kernels
    from ppclc.benching import roofline
    from ppclc.kernels import distillation_loss, modulation, moments, qk_norm_rope

    kernels._lacks = lambda _: ""  # type: ignore[assignment]
    for module in (distillation_loss, modulation, moments, qk_norm_rope):
        module.runs = lambda _: False  # type: ignore[attr-defined]
    roofline.COPY_BYTES["cuda"], roofline.SIDE["cuda"] = 2**22, 128


def started() -> bool:
    """Whether it is there, in this process."""
    return start.cache_info().currsize > 0


@cache
def start() -> Device:
    """Put the device into this process, before its first backward, for good.

    Raises:
        RuntimeError: it cannot be built here.
    """
    if reason := lacks():
        raise RuntimeError(reason)
    device = Device(library("emulated_cuda", CODE.read_text("utf-8"), LINKS))
    about = About(
        name="Emulated GPU", multi_processor_count=4, major=CAPABILITY[0], minor=CAPABILITY[1], uuid="emulated",
        gcnArchName="", L2_cache_size=2**20, warp_size=32, regs_per_multiprocessor=2**16, max_threads_per_multi_processor=2048,
    )  # fmt: skip
    cuda: Any = torch.cuda
    told: dict[str, Any] = {
        "_initialized": True,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "get_device_name": lambda *_: about.name,
        "get_device_capability": lambda *_: CAPABILITY,
        "get_device_properties": lambda *_: about,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": device.free,
        "memory_allocated": device.held,
        "memory_reserved": device.held,
        "max_memory_allocated": device.peak,
        "reset_peak_memory_stats": device.reset_peak,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed": lambda *_: None,
        "manual_seed_all": lambda *_: None,
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda *_: Stream(),
        "stream": lambda *_: contextlib.nullcontext(),
        "device": lambda *_: contextlib.nullcontext(),
    }
    for name, value in told.items():
        setattr(cuda, name, value)
    torch.Tensor.__deepcopy__ = _copied  # type: ignore[method-assign,assignment]
    _stand_in()
    return device
