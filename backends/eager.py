"""Eager: the PyTorch model itself. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ppclc.backends import DTYPES, Backend, Subject, Tensors


@dataclass(frozen=True)
class EagerSession:
    """The eager model without gradients."""

    subject: Subject

    @property
    def options(self) -> dict[str, Any]:
        """The count of threads."""
        return {"threads": torch.get_num_threads()}

    def run(self, inputs: Tensors) -> torch.Tensor:
        """The model's output."""
        with torch.no_grad():
            return self.subject.reference(inputs)

    def outputs(self, inputs: Tensors) -> list[torch.Tensor]:
        """The model's output alone."""
        return [self.run(inputs)]

    def bound(self, inputs: Tensors) -> Callable[[], torch.Tensor]:
        """The model on these inputs."""
        return partial(self.run, inputs)


def load(folder: Path, subject: Subject) -> EagerSession:
    """A session of the eager model; the folder is not read."""
    return EagerSession(subject)


PLUGIN = Backend(name="eager", load=load, dtypes=DTYPES, graphs="captured")
