"""Eager: the PyTorch model itself. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
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
        """The model's output; a device has finished when it is returned."""
        with torch.no_grad():
            output = self.subject.reference(inputs)
        if output.is_cuda:
            torch.cuda.synchronize(output.device)
        return output

    def outputs(self, inputs: Tensors) -> list[torch.Tensor]:
        """The model's output alone."""
        return [self.run(inputs)]


def load(folder: Path, subject: Subject) -> EagerSession:
    """A session of the eager model; the folder is not read."""
    return EagerSession(subject)


PLUGIN = Backend(name="eager", load=load, dtypes=DTYPES)
