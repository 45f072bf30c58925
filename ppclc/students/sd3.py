"""Stable Diffusion 3's transformer with narrower parts, as ppclc's plans cut it. Needs torch and diffusers only.

Edits beside fewer blocks, all told by the configuration (arXiv 2511.16156 for text streams and feed-forward networks):

- `modulation_rank`: the modulation of all blocks reads `p = B'(SiLU(temb) - mean)`, of `modulation_rank`
  numbers, instead of `SiLU(temb)`. `B` is shared; `p` travels behind `temb` in one tensor.
- `mapped_text_blocks`: runs of blocks whose text stream is gone but for keys and values, which are fed by
  `text_in(z)`, `z` being the modulated text state of the last full block before the run. A run that is
  followed by a full block ends with `text_out(h)`, `h` being that full block's text output.
- `linear_ffn_image_blocks`, `linear_ffn_text_blocks`: blocks whose feed-forward network of that stream is one
  linear map of the state after the attention residual, `h + (W h + b)`.
- `adapted_blocks`: blocks whose incoming image and text states go through a linear map each. Source: ours.
- `dead_code`: the last block that reads text does without the text query, whose result the stock class computes and drops.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import JointTransformerBlock
from torch import nn

from ppclc.students.parts import (
    Chunks,
    EditedBlock,
    Modulated,
    TextRole,
    Travelling,
    edits_of_blocks,
    narrow_modulation,
    project_modulation,
)


class PrunedJointTransformerBlock(EditedBlock, JointTransformerBlock):
    """One block with the parts that its role needs; the last one reads text and computes none."""

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        qk_norm: str | None,
        dual: bool,
        role: TextRole,
        rank: int | None,
        linear_ffn: tuple[str, ...],
        has_adapters: bool,
        last: bool,
        dead_code: bool,
    ) -> None:
        super().__init__(dim, heads, head_dim, context_pre_only=last, qk_norm=qk_norm, use_dual_attention=dual)
        self.edit(dim, role, linear_ffn, has_adapters)
        if self.attn2 is None:
            del self.attn2
        if dead_code and not role.mapped and not role.emits_text:
            del self.attn.add_q_proj, self.attn.norm_added_q
        narrow_modulation(self.norm1, "silu", rank, dim, (9 if dual else 6) - (3 if "image" in linear_ffn else 0))
        if not role.mapped:
            narrow_modulation(self.norm1_context, "silu", rank, dim, 3 if "text" in linear_ffn else 6 if role.emits_text else 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chunks = self._chunks(self.norm1, temb)
        second = Chunks(*chunks[-3:]) if self.use_dual_attention else None
        image_mod = Modulated(Chunks(*chunks[:3]), None if "image" in self.linear_ffn else Chunks(*chunks[3:6]), second)
        return self.joint_forward(hidden_states, encoder_hidden_states, image_mod, self._text_mod(temb), **(joint_attention_kwargs or {}))

    def _text_mod(self, temb: torch.Tensor) -> Modulated | None:
        if self.role.mapped:
            return None
        chunks = self._chunks(self.norm1_context, temb)
        if not self.role.emits_text:  # scale before shift, as the stock class has it in its last block
            return Modulated(Chunks(chunks[1], chunks[0]))
        return Modulated(Chunks(*chunks[:3]), Chunks(*chunks[3:]) if len(chunks) > 3 else None)

    def _chunks(self, norm: Any, temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
        split: tuple[torch.Tensor, ...] = norm.linear(norm.silu(temb))[:, None].split(self.dim, dim=-1)
        return split


class PrunedSD3Transformer2DModel(Travelling, SD3Transformer2DModel):
    """`SD3Transformer2DModel` with the edits that its configuration names."""

    _no_split_modules = ["PrunedJointTransformerBlock"]
    _repeated_blocks = ["PrunedJointTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        modulation_rank: int | None = None,
        mapped_text_blocks: list[int] | None = None,
        dead_code: bool = False,
        linear_ffn_image_blocks: list[int] | None = None,
        linear_ffn_text_blocks: list[int] | None = None,
        adapted_blocks: list[int] | None = None,
    ) -> None:
        super().__init__(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=0,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            caption_projection_dim=caption_projection_dim,
            pooled_projection_dim=pooled_projection_dim,
            out_channels=out_channels,
            pos_embed_max_size=pos_embed_max_size,
            dual_attention_layers=(),
            qk_norm=qk_norm,
        )
        self.register_to_config(num_layers=num_layers, dual_attention_layers=dual_attention_layers)
        edits = edits_of_blocks(
            num_layers, num_layers, False, mapped_text_blocks, linear_ffn_image_blocks, linear_ffn_text_blocks, adapted_blocks
        )
        self.transformer_blocks = nn.ModuleList(
            PrunedJointTransformerBlock(
                self.inner_dim,
                num_attention_heads,
                attention_head_dim,
                qk_norm,
                i in dual_attention_layers,
                role,
                modulation_rank,
                linear,
                has_adapters,
                last=i == num_layers - 1,
                dead_code=dead_code,
            )
            for i, (role, linear, has_adapters) in enumerate(edits)
        )
        if modulation_rank is not None:
            project_modulation(self.time_text_embed, self.norm_out, self.inner_dim, modulation_rank)
