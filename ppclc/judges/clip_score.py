"""CLIP score: a hundred times the cosine of an image's and its prompt's embeddings, at least 0.

Source: arXiv 2104.08718, equation 1 with w = 1, in percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from ppclc.errors import UnavailableError, first_line
from ppclc.judges import Fits, Judge


def open_clip(weights: str) -> Fits:
    """CLIP of transformers, from a folder or the hub's cache."""
    transformers: Any = import_module("transformers")  # which takes seconds
    try:
        model = transformers.CLIPModel.from_pretrained(weights, local_files_only=True, use_safetensors=True).eval().requires_grad_(False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(weights, local_files_only=True)
        images = transformers.AutoImageProcessor.from_pretrained(weights, local_files_only=True)
    except Exception as error:  # of many kinds; all mean that the weights cannot be had
        raise UnavailableError(f"no weights of {weights} at hand ({first_line(error)}); fetch them first: hf download {weights}") from None
    size, mean, std = model.config.vision_config.image_size, images.image_mean, images.image_std

    @torch.no_grad()
    def fits(images_BCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        words = tokenizer(
            list(prompts), padding=True, truncation=True, max_length=model.config.text_config.max_position_embeddings, return_tensors="pt"
        )
        output = model(**words, pixel_values=prepared(images_BCHW.float(), size, mean, std))
        cosines = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds, dim=-1)
        scores: torch.Tensor = 100 * cosines.clamp(min=0)
        return scores

    return fits


def prepared(images_BCHW: torch.Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Images in 0..1 as CLIP sees them: the shorter side brought to `size`, bicubic, the middle cut out, normalised."""
    height, width = images_BCHW.shape[-2:]
    shape = [max(size, int(side * size / min(height, width))) for side in (height, width)]
    scaled = torch.nn.functional.interpolate(images_BCHW, shape, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = ((side - size) // 2 for side in shape)
    cut = scaled[..., top : top + size, left : left + size]
    return (cut - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


PLUGIN = Judge(weights="openai/clip-vit-large-patch14", unit="CLIP score, 0 to 100", better="higher", open=open_clip)
