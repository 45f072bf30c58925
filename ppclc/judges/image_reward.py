"""ImageReward: how well people would like an image for its prompt. Source: arXiv 2304.05977."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ppclc.errors import UnavailableError
from ppclc.judges import Fits, Judge

CACHE = Path("~/.cache/ImageReward")


def open_reward(weights: str) -> Fits:
    """The library `ImageReward`, from weights that it has fetched before."""
    try:
        library: Any = import_module("ImageReward")
    except ImportError:
        raise UnavailableError("ImageReward is not installed here: pip install image-reward") from None
    file = Path(weights).expanduser() if weights.endswith(".pt") else CACHE.expanduser() / f"{weights.split('-')[0]}.pt"
    if not file.is_file():
        raise UnavailableError(
            f"no weights of {weights} at hand, wanted {file}; run ImageReward.load({weights!r}) once where there is a connection"
        )
    model = library.load(weights)

    def fits(images_BCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        from PIL import Image

        scores = []
        with tempfile.TemporaryDirectory() as folder:
            for n, (image, prompt) in enumerate(zip(images_BCHW, prompts, strict=True)):
                path = Path(folder) / f"{n}.png"
                Image.fromarray((255 * image.float().clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()).save(path)
                scores.append(float(model.score(prompt, str(path))))
        return torch.tensor(scores)

    return fits


PLUGIN = Judge(weights="ImageReward-v1.0", unit="ImageReward", better="higher", open=open_reward, relative=False)
