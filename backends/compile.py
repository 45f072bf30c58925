"""torch.compile: the baseline that a PyTorch user has for the asking. Nothing is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppclc.backends import DTYPES, Backend, Subject, Tensors


@dataclass(frozen=True)
class CompiledSession:
    """A module with compiled blocks."""

    module: nn.Module
    options: dict[str, Any]

    def run(self, inputs: Tensors) -> torch.Tensor:
        """The output."""
        with torch.no_grad():
            output: torch.Tensor = self.module(**inputs)
        return output

    def outputs(self, inputs: Tensors) -> list[torch.Tensor]:
        """The model's output alone."""
        return [self.run(inputs)]

    def bound(self, inputs: Tensors) -> Callable[[], torch.Tensor]:
        """The compiled module on these inputs."""
        return partial(self.run, inputs)


def load(folder: Path, subject: Subject) -> CompiledSession:
    """The module that back ends export, its repeated blocks compiled one by one as like ones share their code; tensors are the model's own.

    The folder is not read. Shapes are taken as they come: others are compiled anew.
    """
    # A copy of the modules, not of their tensors: what is compiled must not run where eager is wanted.
    tensors = {id(t): t for t in [*subject.module.parameters(), *subject.module.buffers()]}
    module = copy.deepcopy(subject.module, memo=dict(tensors))
    count = 0
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and len(part) > 0 and _heavy(part):
            for block in part:
                block.compile(dynamic=False)
                count += 1
    _no_kind_left_out(count)
    return CompiledSession(module, {"compiled": f"{count} blocks", "mode": "default", "threads": torch.get_num_threads()})


def _no_kind_left_out(count: int) -> None:
    """So many kinds of blocks more may be compiled: beyond its limit PyTorch runs a block as it is, and says nothing."""
    config: Any = torch._dynamo.config
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, name, getattr(config, name) + count)


def _heavy(blocks: nn.ModuleList) -> bool:
    """Whether a list holds transformer blocks, which have attention; a network's layers are lists too."""
    return all(hasattr(block, "attn") for block in blocks)


PLUGIN = Backend(name="compile", load=load, dtypes=DTYPES, graphs="captured")
