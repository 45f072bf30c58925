"""LongCat-Image: FLUX.1's blocks, modulated by time alone.

Shape suffixes: B batch, S image token, T text token, D width, C channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ppclc.families import Family, Group, Lowered, fused_by, lowered_as_it_is

TEXT_SIDE = 512
"""Image positions start after the longest text. Source: diffusers' LongCatImagePipeline."""


def example_inputs(
    config: Mapping[str, Any], batch: int = 1, height: int = 4, width: int = 8, text: int = 5, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Keyword arguments of forward: random latents of a `height` x `width` grid of tokens, random text, random timesteps."""
    return {
        "hidden_states": torch.randn(batch, height * width, config["in_channels"], generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"], generator=generator),
        **grid_inputs(config, batch, height, width, text),
    }


def grid_inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text: int) -> dict[str, Any]:
    """Positions of image (S, 3) and text (T, 3): modality, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height) + TEXT_SIDE, torch.arange(width) + TEXT_SIDE, indexing="ij")
    places = torch.arange(text)
    return {
        "img_ids": torch.stack([torch.ones_like(rows), rows, columns], dim=-1).reshape(-1, 3).float(),
        "txt_ids": torch.stack([torch.zeros_like(places), places, places], dim=-1).float(),
    }


def lowered(model: Any) -> Lowered:
    """The model ready for torch.export, with dynamic batch, image and text lengths."""
    return lowered_as_it_is(model, example_inputs)


PLUGIN = Family(
    name="longcat_image",
    class_name="LongCatImageTransformer2DModel",
    groups=(
        Group(name="transformer_blocks", path="transformer_blocks", count_key="num_layers"),
        Group(name="single_transformer_blocks", path="single_transformer_blocks", count_key="num_single_layers"),
    ),
    time_embedding="time_embed",
    example_inputs=example_inputs,
    grid_inputs=grid_inputs,
    lowered=lowered,
    published={"meituan-longcat/LongCat-Image": {"num_layers": 10, "num_single_layers": 20}},
    tiny_config={
        "in_channels": 8,
        "num_layers": 4,
        "num_single_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": [4, 6, 6],
    },
    fused=fused_by("_longcat_image_kernels"),
)
