"""AuraFlow: blocks of two streams, then blocks of one joined sequence; modulation by time alone. Eight learnt tokens stand before the text.

Shape suffixes: B batch, T text token, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ppclc.families import AXES, Family, Group, Lowered, lowered_as_it_is

REGISTERS = 8
"""Learnt tokens in front of the text."""


def example_inputs(
    config: Mapping[str, Any], batch: int = 1, height: int = 4, width: int = 8, text: int = 5, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Keyword arguments of forward: random latents of a `height` x `width` grid of tokens, random text, random timesteps."""
    return {
        "hidden_states": torch.randn(batch, *latents(config, height, width), generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"], generator=generator),
    }


def latents(config: Mapping[str, Any], height: int, width: int) -> tuple[int, ...]:
    """Channels, rows and columns: a token is a square of patches."""
    side = int(config["patch_size"])
    return (int(config["in_channels"]), side * height, side * width)


def lowered(model: Any) -> Lowered:
    """The model ready for torch.export, with dynamic batch, height, width and text length."""
    side = model.config.patch_size
    axes = {**AXES, "hidden_states": {0: "batch", 2: f"{side}*height", 3: f"{side}*width"}}
    return lowered_as_it_is(model, example_inputs, axes, sides=True, largest=math.isqrt(int(model.config.pos_embed_max_size)))


PLUGIN = Family(
    name="aura_flow",
    class_name="AuraFlowTransformer2DModel",
    groups=(
        Group(name="joint_transformer_blocks", path="joint_transformer_blocks", count_key="num_mmdit_layers"),
        Group(
            name="single_transformer_blocks",
            path="single_transformer_blocks",
            count_key="num_single_dit_layers",
            joined="hidden_states",
            adapters=False,
        ),
    ),
    time_embedding="time_step_proj",
    example_inputs=example_inputs,
    latents=latents,
    text_tokens=lambda inputs: int(inputs["encoder_hidden_states"].shape[1]) + REGISTERS,
    lowered=lowered,
    published={"fal/AuraFlow": {}},
    tiny_config={
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "num_mmdit_layers": 4,
        "num_single_dit_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 32,
        "pos_embed_max_size": 256,
    },
)
