"""Tensors of which each rank holds a shard (FSDP2), and the checkpoints that are made of them: a file a rank and step.

A shard is told by what it can be asked for; `torch.distributed`, slow to import and not in every build, is not imported.

<work>/checkpoint-<step>-<rank>-of-<world>.safetensors      whole when all ranks' files of a step are there
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from ppclc.errors import UnavailableError
from ppclc.machine.devices import Ranks

SHARD = re.compile(r"checkpoint-(\d+)-(\d+)-of-(\d+)\.safetensors")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, sharing its memory; all of it where it is not sharded."""
    to_local: Callable[[], torch.Tensor] | None = getattr(tensor.detach(), "to_local", None)
    return to_local() if to_local else tensor.detach()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; of a sharded one every rank has to ask at the same time."""
    full_tensor: Callable[[], torch.Tensor] | None = getattr(tensor.detach(), "full_tensor", None)
    return full_tensor() if full_tensor else tensor.detach()


def like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a shard, or of a number, as it stands beside a parameter: sharded like it, on its device."""
    if value.dim() and hasattr(parameter, "to_local"):
        made = torch.zeros_like(parameter, dtype=value.dtype)
        local(made).copy_(value)
        return made
    return value.to(parameter.device, copy=True)


def shard_file(work: Path, step: int, ranks: Ranks) -> Path:
    """Where this rank's shard of a step's checkpoint stands."""
    return work / f"checkpoint-{step}-{ranks.rank}-of-{ranks.world}.safetensors"


def forget_older(work: Path, step: int, ranks: Ranks) -> None:
    """Remove this rank's shards of other steps, once every rank has that of this step."""
    ranks.wait()
    for file in work.glob(f"checkpoint-*-{ranks.rank}-of-{ranks.world}.safetensors"):
        if file != shard_file(work, step, ranks):
            file.unlink(missing_ok=True)


def newest_step(work: Path, ranks: Ranks) -> int | None:
    """The last step of which all ranks' shards are there, None where there is none.

    Raises:
        UnavailableError: the checkpoint is that of another number of processes.
    """
    found: dict[tuple[int, int], set[int]] = {}
    for file in work.glob("checkpoint-*.safetensors"):
        if named := SHARD.fullmatch(file.name):
            step, rank, world = (int(n) for n in named.groups())
            found.setdefault((step, world), set()).add(rank)
    complete = [key for key, held in found.items() if held == set(range(key[1]))]
    if not complete:
        return None
    step, world = max(complete)
    if not ranks.sharded or world != ranks.world:
        raise UnavailableError(
            f"{work}: holds step {step}, sharded over {world} processes; start as many with --use_fsdp, or remove that folder to begin anew"
        )
    return step
