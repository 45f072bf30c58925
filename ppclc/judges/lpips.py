"""LPIPS: how far the student's image lies from the teacher's from the same noise, in features of a network. Source: arXiv 1801.03924."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ppclc.errors import UnavailableError
from ppclc.judges import Apart, Judge


def open_lpips(weights: str) -> Apart:
    """The library `lpips` with one of its networks, `alex`, `vgg` or `squeeze`, whose weights torchvision has fetched before."""
    try:
        library: Any = import_module("lpips")
    except ImportError:
        raise UnavailableError("lpips is not installed here: pip install lpips") from None
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not any(folder.glob(f"{weights}*.pth")):  # the library would fetch them
        raise UnavailableError(
            f"no weights of {weights} at hand in {folder}; run lpips.LPIPS(net={weights!r}) once where there is a connection"
        )
    model = library.LPIPS(net=weights, verbose=False).eval()

    @torch.no_grad()
    def apart(images_BCHW: torch.Tensor, others_BCHW: torch.Tensor) -> torch.Tensor:
        distance: torch.Tensor = model(2 * images_BCHW.float() - 1, 2 * others_BCHW.float() - 1)
        return distance.flatten()

    return apart


PLUGIN = Judge(weights="alex", unit="LPIPS, 0 for the teacher's own image", better="lower", open=open_lpips, paired=True, relative=False)
