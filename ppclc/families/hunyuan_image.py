"""HunyuanImage 2.1: blocks of two streams, then blocks that join them; modulation by time, and by guidance where it was distilled with it.

Shape suffixes: B batch, T text token, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuanimage import HunyuanImageAttnProcessor

from ppclc.families import AXES, Family, Group, Lowered, exportable_copy, fused_by, lowered_as_it_is

GUIDANCE = 3.25
"""What a distilled model is asked for where nobody says otherwise. Source: the default of diffusers' HunyuanImagePipeline."""
CALL: dict[str, Any] = {"outputs": ("image", "text"), "positional": ("hidden_states", "encoder_hidden_states", "temb")}


def example_inputs(
    config: Mapping[str, Any], batch: int = 1, height: int = 4, width: int = 8, text: int = 5, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Keyword arguments of forward: random latents of a `height` x `width` grid of tokens, random text, random timesteps."""
    return {
        "hidden_states": torch.randn(batch, *latents(config, height, width), generator=generator),
        "timestep": 1000 * torch.rand(batch, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, config["text_embed_dim"], generator=generator),
        **grid_inputs(config, batch, height, width, text),
    }


def grid_inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text: int) -> dict[str, Any]:
    """The text's mask (B, T), which forward insists on, and guidance (B,) where the model was distilled with it."""
    given: dict[str, Any] = {"encoder_attention_mask": torch.ones(batch, text, dtype=torch.int64)}
    return given | ({"guidance": torch.full((batch,), 1000 * GUIDANCE)} if config.get("guidance_embeds") else {})


def latents(config: Mapping[str, Any], height: int, width: int) -> tuple[int, ...]:
    """Channels, rows and columns: a token is a patch."""
    rows, columns = (int(p) for p in config["patch_size"][-2:])
    return (int(config["in_channels"]), rows * height, columns * width)


class ExpandedMask(HunyuanImageAttnProcessor):  # type: ignore[misc]
    """The stock attention with its mask (B, 1, 1, N) spelt out for every query, which ONNX Runtime insists on."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: Any = None,
    ) -> Any:
        queries = hidden_states.shape[1] + encoder_hidden_states.shape[1]
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask.expand(-1, -1, queries, -1), image_rotary_emb)


def exportable(model: Any) -> Any:
    """A copy that shares all tensors, with masks as other runtimes take them."""
    copied = exportable_copy(model)
    for block in [*copied.transformer_blocks, *copied.single_transformer_blocks]:
        block.attn.set_processor(ExpandedMask())
    return copied


def lowered(model: Any) -> Lowered:
    """The model ready for torch.export, with dynamic batch, height, width and text length."""
    rows, columns = model.config.patch_size[-2:]
    axes = {**AXES, "hidden_states": {0: "batch", 2: f"{rows}*height", 3: f"{columns}*width"}}
    # Its time embedding computes in the timestep's own dtype, so that the pipeline's, which is the model's, is what it takes.
    return lowered_as_it_is(model, example_inputs, axes, sides=True, exportable=exportable(model), full=())


PLUGIN = Family(
    name="hunyuan_image",
    class_name="HunyuanImageTransformer2DModel",
    groups=(
        Group(name="transformer_blocks", path="transformer_blocks", count_key="num_layers", **CALL),
        Group(name="single_transformer_blocks", path="single_transformer_blocks", count_key="num_single_layers", **CALL),
    ),
    time_embedding="time_guidance_embed",
    example_inputs=example_inputs,
    grid_inputs=grid_inputs,
    latents=latents,
    timestep_scale=1000.0,
    text_mask="encoder_attention_mask",
    lowered=lowered,
    published={"hunyuanvideo-community/HunyuanImage-2.1-Diffusers": {"text_embed_2_dim": 1472}},
    tiny_config={
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 4,
        "num_single_layers": 4,
        "num_refiner_layers": 1,
        "text_embed_dim": 16,
        "rope_axes_dim": (8, 8),
    },
    fused=fused_by("_hunyuan_image_kernels"),
)
