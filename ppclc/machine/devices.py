"""The processes of one run and the device of each: which rank this is, how ranks agree, wait, and share a model.

One process needs nothing of this: `Ranks()` is alone, and all that it is asked is answered on the spot. Several
are started by `accelerate launch` or `torchrun`; they share a file system.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from ppclc.errors import UnavailableError, first_line

T = TypeVar("T")
PATIENCE = timedelta(days=365)
"""How long a rank waits for another: analysis takes hours, and a process that dies is noticed by its closed connection."""
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "FSDP_OFFLOAD_PARAMS": "parameters on the CPU (fsdp_offload_params)",
}


@dataclass(frozen=True)
class Ranks:
    """This process among the `world` processes of a run.

    device: where this process trains. sharded: each rank holds a share of a trained model (FSDP2) instead of a copy (DDP).
    group: the process group for flags and numbers, on the CPU; None for a process that is alone.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    sharded: bool = False
    group: Any = field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that speaks, writes, and does what is not shared."""
        return self.rank == 0

    def wait(self) -> None:
        """Return once all ranks are here.

        Raises:
            UnavailableError: another process has ended.
        """
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank; the same answer on all. Raises UnavailableError as `wait`."""
        return sum(self.mean([float(flag)])) > 0

    def mean(self, values: Sequence[float]) -> list[float]:
        """Each value's mean over the ranks, the same bits on all. Raises UnavailableError as `wait`."""
        if self.world == 1:
            return list(values)
        import torch

        sums = torch.tensor(list(values), dtype=torch.float64)
        with _lost_rank_told():
            torch.distributed.all_reduce(sums, group=self.group)
        means: list[float] = (sums / self.world).tolist()
        return means

    def told(self, value: T) -> T:
        """The main rank's value, on all ranks; plain data alone. Raises UnavailableError as `wait`."""
        if self.world == 1:
            return value
        import torch

        box = [value]
        with _lost_rank_told():
            torch.distributed.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block on the main rank, then on the others. If it fails on the main rank, the others end in `wait`."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def mine(self, items: Sequence[T]) -> list[T]:
        """This rank's share of some work: every `world`-th item."""
        return list(items[self.rank :: self.world])

    def leave(self) -> Ranks:
        """This process alone, once all ranks are here; they part for good."""
        if self.world > 1:
            import torch

            self.wait()
            torch.distributed.destroy_process_group()
        return Ranks(device=self.device)

    def prepared(self, module: Any, blocks: Sequence[Any]) -> Any:
        """What is called in the place of a module that all ranks train: itself alone, as DDP, or sharded in place by its blocks.

        Gradients are then means over the ranks. Its optimizer has to be made afterwards.
        """
        if self.world == 1:
            return module
        if self.sharded:
            return _sharded(module, blocks, self)
        from torch.nn.parallel import DistributedDataParallel

        ids = None if self.device.startswith("cpu") else [self.device]
        # The last block's text stream is computed and read by nobody: its parameters get no gradient.
        return DistributedDataParallel(module, device_ids=ids, find_unused_parameters=True, gradient_as_bucket_view=True)


def gradients_settle(module: Any, last: bool) -> AbstractContextManager[None]:
    """Around forward and backward of a batch: ranks exchange gradients in the last one of a step.

    Sharded modules do so every time, which keeps the memory that whole gradients would take.
    """
    no_sync: Callable[[], AbstractContextManager[None]] | None = getattr(module, "no_sync", None)
    return no_sync() if no_sync and not last else nullcontext()


def alone_here() -> Ranks:
    """One process on its own, on the device that it trains on."""
    return Ranks(device=_own_device())


def open_ranks() -> Ranks:
    """This process's rank and device, as the launcher's environment says; joins the others.

    Raises:
        UnavailableError: the launcher asks for what is not done here.
    """
    for variable, name in REFUSED.items():
        if _is_set(variable):
            raise UnavailableError(f"the launcher asks for {name}, which distillation does not do; wanted plain processes or --use_fsdp")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return alone_here()
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    device = "cpu" if accelerator.device.type == "cpu" else str(accelerator.device)
    return Ranks(accelerator.process_index, accelerator.num_processes, device, _is_set("ACCELERATE_USE_FSDP"), group)


def launcher_warning() -> str | None:
    """What to tell a user whose launcher has started one process where several may have been meant."""
    if _is_set("ACCELERATE_USE_CPU") and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        return (
            "warning: accelerate launch --cpu starts one process, whatever --num_processes says; for several on the CPU: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m ppclc ..."
        )
    return None


def device_here() -> str:
    """What models run on unless a recipe says otherwise: a GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


PLACED_SHARE = 0.85
"""Of the memory that is free on a GPU, what a model's weights may take there: the rest is for what it computes."""


@contextmanager
def placed(model: Any, device: str) -> Iterator[str]:
    """A block in which a model is on a device, if that has room for its weights, and on the CPU again after it; where it is.

    What is no module, as a teacher that is read block by block, stays where it is.
    """
    import torch

    if device == "cpu" or not isinstance(model, torch.nn.Module):
        yield device
        return
    if sum(p.nbytes for p in model.parameters()) > PLACED_SHARE * free_bytes(device):
        yield "cpu"
        return
    model.to(device)
    try:
        yield device
    finally:
        model.to("cpu")
        give_back()


def give_back() -> None:
    """Memory of what nobody needs any more goes back: Python's, and what PyTorch keeps of a GPU's for later."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def total_bytes(device: Any) -> int:
    """All memory of the host, or of a GPU."""
    import psutil
    import torch

    where = torch.device(device)
    return int(psutil.virtual_memory().total if where.type == "cpu" else torch.cuda.get_device_properties(where).total_memory)


def free_bytes(device: Any) -> int:
    """Memory that is free: the host's, or a GPU's with what PyTorch keeps there for later."""
    import psutil
    import torch

    where = torch.device(device)
    if where.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(where)[0] + torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where))


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_world() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def has_spare_core(device: str) -> bool:
    """Whether batches can be made ready beside the training on a device without taking its time."""
    return device != "cpu" or cores() > local_world()


def _own_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and not _is_set("ACCELERATE_USE_CPU") else "cpu"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def _sharded(module: Any, blocks: Sequence[Any], ranks: Ranks) -> Any:
    """The module, its parameters sharded over the ranks in place: each block a unit, and the rest of it one.

    By torch's `fully_shard` and not by Accelerate's wrapper of it, which knows no CPU: one way for all devices.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # A caution against changing a module's output in place, which nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(ranks.device.split(":")[0], (ranks.world,))
    for unit in [*blocks, module]:
        fully_shard(unit, mesh=mesh)
        if ranks.device == "cpu":  # gloo knows no averages
            unit.set_force_sum_reduction_for_comms(True)
    return module


@contextmanager
def _lost_rank_told() -> Iterator[None]:
    """Turn what the process group says when a connection is closed into a message."""
    try:
        yield
    except RuntimeError as error:
        raise UnavailableError(f"another process of this run has ended; what it said tells why ({first_line(error)})") from None
