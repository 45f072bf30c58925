"""Chroma's transformer with fewer blocks, as ppclc's plans cut it. Needs torch and diffusers only.

Chroma makes the modulation of every block from the block's number. `kept_blocks` gives each block the number that it had among the
`teacher_blocks` of either kind: a model of the stock class would modulate its blocks as the teacher does others.
"""

from __future__ import annotations

import torch
from diffusers import ChromaTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding

from ppclc.students.parts import Travelling


def modulation_numbers(teacher_blocks: tuple[int, int], kept_blocks: list[int]) -> list[int]:
    """Places in the teacher's table of modulations of what the blocks that are left read: single blocks, image, text, output."""
    doubles, singles = teacher_blocks
    kept = ([b for b in kept_blocks if b < doubles], [b - doubles for b in kept_blocks if b >= doubles])
    numbers = [3 * b + i for b in kept[1] for i in range(3)]
    for first in (3 * singles, 3 * singles + 6 * doubles):
        numbers += [first + 6 * b + i for b in kept[0] for i in range(6)]
    end = 3 * singles + 12 * doubles
    return [*numbers, end, end + 1]


class PrunedChromaTransformer2DModel(Travelling, ChromaTransformer2DModel):
    """`ChromaTransformer2DModel` of some of its blocks."""

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
        approximator_num_channels: int = 64,
        approximator_hidden_dim: int = 5120,
        approximator_layers: int = 5,
        teacher_blocks: tuple[int, int] = (19, 38),
        kept_blocks: list[int] | None = None,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            axes_dims_rope=axes_dims_rope,
            approximator_num_channels=approximator_num_channels,
            approximator_hidden_dim=approximator_hidden_dim,
            approximator_layers=approximator_layers,
        )
        numbers = modulation_numbers(tuple(teacher_blocks), kept_blocks or list(range(sum(teacher_blocks))))  # type: ignore[arg-type]
        embedding = get_timestep_embedding(
            torch.tensor(numbers) * 1000, 2 * (approximator_num_channels // 4), flip_sin_to_cos=True, downscale_freq_shift=0
        )
        self.time_text_embed.register_buffer("mod_proj", embedding, persistent=False)
