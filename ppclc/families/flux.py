"""FLUX.1 (dev, schnell, Kontext, Fill): blocks of two streams, then blocks that join them; modulation by time, guidance and pooled text.

Shape suffixes: B batch, S image token, T text token, D width, C channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ppclc.families import Family, Group, Lowered, Modulation, lowered_as_it_is

GUIDANCE = 3.5
"""What a distilled model is asked for where nobody says otherwise. Source: the default of diffusers' FluxPipeline."""


def text_input(block: Any, text_BTD: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
    """The modulated text state of a stock block, which feeds its text keys and values."""
    modulated: torch.Tensor = block.norm1_context(text_BTD, emb=given["temb"])[0]
    return modulated


def example_inputs(
    config: Mapping[str, Any], batch: int = 1, height: int = 4, width: int = 8, text: int = 5, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Keyword arguments of forward: random latents of a `height` x `width` grid of tokens, random text, random timesteps."""
    return {
        "hidden_states": torch.randn(batch, height * width, config["in_channels"], generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"], generator=generator),
        **grid_inputs(config, batch, height, width, text),
    }


def grid_inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text: int) -> dict[str, Any]:
    """Positions of image (S, 3) and text (T, 3), and guidance (B,) where the model was distilled with it."""
    given: dict[str, Any] = {"img_ids": image_ids(height, width), "txt_ids": torch.zeros(text, 3)}
    return given | ({"guidance": torch.full((batch,), GUIDANCE)} if config.get("guidance_embeds") else {})


def image_ids(height: int, width: int) -> torch.Tensor:
    """Positions (S, 3) of a grid of tokens: 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def lowered(model: Any) -> Lowered:
    """The model ready for torch.export, with dynamic batch, image and text lengths."""
    return lowered_as_it_is(model, example_inputs)


PLUGIN = Family(
    name="flux",
    class_name="FluxTransformer2DModel",
    groups=(
        Group(
            name="transformer_blocks",
            path="transformer_blocks",
            count_key="num_layers",
            ffn_inputs={"image": "norm2", "text": "norm2_context"},
            ffn_modules={"image": "img_ffn", "text": "txt_ffn"},
            text_modules=("text_in", "text_out"),
            text_input=text_input,
        ),
        Group(name="single_transformer_blocks", path="single_transformer_blocks", count_key="num_single_layers"),
    ),
    student_class="ppclc.students.flux:PrunedFluxTransformer2DModel",
    text_end="read",
    time_embedding="time_text_embed",
    basis_module="time_text_embed.modulation_basis",
    modulations={"norm1.linear": Modulation("image"), "norm1_context.linear": Modulation("text"), "norm.linear": Modulation("both")},
    example_inputs=example_inputs,
    grid_inputs=grid_inputs,
    lowered=lowered,
    tiny_config={
        "in_channels": 8,
        "num_layers": 4,
        "num_single_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 12,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
    text_tensors=("encoder_hidden_states", "pooled_projections"),
)
