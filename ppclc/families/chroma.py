"""Chroma: FLUX.1's blocks; one small network makes every block's modulation from the time and the block's number.

Blocks read their own part of that modulation, so fewer blocks need the class that knows which they were; and there is no map from the
time embedding in a block that a modulation rank would make smaller.

Shape suffixes: B batch, S image token, T text token, D width, C channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_chroma import ChromaCombinedTimestepTextProjEmbeddings

from ppclc.families import Family, Group, Lowered, exportable_copy, fused_by, lowered_as_it_is
from ppclc.families.flux import ORIGINAL_BLOCKS, ORIGINAL_SINGLE_BLOCKS, image_ids
from ppclc.plan import CompressionPlan


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
    """Positions of image (S, 3) and text (T, 3)."""
    return {"img_ids": image_ids(height, width), "txt_ids": torch.zeros(text, 3)}


def renumbered(config: Mapping[str, Any], plan: CompressionPlan) -> dict[str, Any]:
    """Which blocks the student's are, where some are gone."""
    if not plan.intervals:
        return {}
    return {"teacher_blocks": [int(config["num_layers"]), int(config["num_single_layers"])], "kept_blocks": list(plan.kept)}


class TimeEmbedding(ChromaCombinedTimestepTextProjEmbeddings):  # type: ignore[misc]
    """The stock one but for the batch, which that counts with a list: torch.export would take it for a constant."""

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        both = [self.time_proj(timestep), self.guidance_proj(torch.zeros_like(timestep))]
        time = torch.cat([p.to(timestep.dtype) for p in both], dim=1)[:, None].expand(-1, self.mod_proj.shape[0], -1)
        numbers = self.mod_proj.to(timestep)[None].expand(timestep.shape[0], -1, -1)
        return torch.cat([time, numbers], dim=-1)


def exportable(model: Any) -> Any:
    """A copy that shares all tensors, with an embedding of time for any batch."""
    copied = exportable_copy(model)
    copied.time_text_embed.__class__ = TimeEmbedding
    return copied


def lowered(model: Any) -> Lowered:
    """The model ready for torch.export, with dynamic batch, image and text lengths."""
    return lowered_as_it_is(model, example_inputs, exportable=exportable(model))


PLUGIN = Family(
    name="chroma",
    class_name="ChromaTransformer2DModel",
    groups=(
        Group(
            name="transformer_blocks",
            path="transformer_blocks",
            count_key="num_layers",
            original_path="double_blocks",
            original=ORIGINAL_BLOCKS,
        ),
        Group(
            name="single_transformer_blocks",
            path="single_transformer_blocks",
            count_key="num_single_layers",
            joined="hidden_states",
            adapters=False,
            original_path="single_blocks",
            original=ORIGINAL_SINGLE_BLOCKS,
        ),
    ),
    depth_class="ppclc.students.chroma:PrunedChromaTransformer2DModel",
    renumbered=renumbered,
    original={"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"},
    example_inputs=example_inputs,
    grid_inputs=grid_inputs,
    lowered=lowered,
    published={"lodestones/Chroma1-HD": {}},
    tiny_config={
        "in_channels": 8,
        "num_layers": 4,
        "num_single_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 16,
        "approximator_layers": 2,
    },
    fused=fused_by("_chroma_kernels"),
)
