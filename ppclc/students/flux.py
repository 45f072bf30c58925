"""FLUX.1's transformer with narrower parts, as ppclc's plans cut it. Needs torch and diffusers only.

Edits beside fewer blocks, all told by the configuration; those of text streams and feed-forward networks are of blocks with two
streams, whose numbers come first:

- `modulation_rank`: the modulation of all blocks reads `p = B'(SiLU(temb) - mean)`, of `modulation_rank`
  numbers, instead of `SiLU(temb)`. `B` is shared; `p` travels behind `temb` in one tensor.
- `mapped_text_blocks`: runs of blocks whose text stream is gone but for keys and values, which are fed by
  `text_in(z)`, `z` being the modulated text state of the last full block before the run. A run ends with `text_out(h)`, `h`
  being that full block's text output. Source: arXiv 2511.16156, width pruning of the text stream.
- `linear_ffn_image_blocks`, `linear_ffn_text_blocks`: blocks whose feed-forward network of that stream is one
  linear map of the state after the attention residual, `h + (W h + b)`. Source: arXiv 2511.16156, width pruning of the
  feed-forward networks.
- `adapted_blocks`: blocks of either kind whose incoming image and text states go through a linear map each. Source: ours.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import nn

from ppclc.students.parts import (
    Chunks,
    EditedBlock,
    Modulated,
    TextRole,
    Travelling,
    adapted,
    add_adapters,
    edits_of_blocks,
    narrow_modulation,
    project_modulation,
)


class PrunedFluxTransformerBlock(EditedBlock, FluxTransformerBlock):
    """One block of two streams with the parts that its role needs."""

    def __init__(
        self, dim: int, heads: int, head_dim: int, role: TextRole, rank: int | None, linear_ffn: tuple[str, ...], has_adapters: bool
    ) -> None:
        super().__init__(dim, heads, head_dim)
        self.edit(dim, role, linear_ffn, has_adapters)
        narrow_modulation(self.norm1, "silu", rank, dim, 3 if "image" in linear_ffn else 6)
        if not role.mapped:
            narrow_modulation(self.norm1_context, "silu", rank, dim, 3 if "text" in linear_ffn else 6)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text_mod = None if self.role.mapped else self._modulated(self.norm1_context, temb)
        text, image = self.joint_forward(
            hidden_states,
            encoder_hidden_states,
            self._modulated(self.norm1, temb),
            text_mod,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        if text.dtype == torch.float16:
            text = text.clip(-65504, 65504)
        return text, image

    def _modulated(self, norm: Any, temb: torch.Tensor) -> Modulated:
        chunks = norm.linear(norm.silu(temb))[:, None].split(self.dim, dim=-1)
        return Modulated(Chunks(*chunks[:3]), Chunks(*chunks[3:]) if len(chunks) > 3 else None)


class PrunedFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    """One block of joined streams, with adapters and a modulation of a rank."""

    def __init__(self, dim: int, heads: int, head_dim: int, rank: int | None, has_adapters: bool) -> None:
        super().__init__(dim, heads, head_dim)
        if has_adapters:
            add_adapters(self, dim, text=True)
        narrow_modulation(self.norm, "silu", rank, dim, 3)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*adapted(self, hidden_states, encoder_hidden_states), *args, **kwargs)


class PrunedFluxTransformer2DModel(Travelling, FluxTransformer2DModel):
    """`FluxTransformer2DModel` with the edits that its configuration names."""

    _no_split_modules = ["PrunedFluxTransformerBlock", "PrunedFluxSingleTransformerBlock"]
    _repeated_blocks = ["PrunedFluxTransformerBlock", "PrunedFluxSingleTransformerBlock"]

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
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        modulation_rank: int | None = None,
        mapped_text_blocks: list[int] | None = None,
        linear_ffn_image_blocks: list[int] | None = None,
        linear_ffn_text_blocks: list[int] | None = None,
        adapted_blocks: list[int] | None = None,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=0,
            num_single_layers=0,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )
        self.register_to_config(num_layers=num_layers, num_single_layers=num_single_layers)
        shape = (self.inner_dim, num_attention_heads, attention_head_dim)
        edits = edits_of_blocks(
            num_layers + num_single_layers,
            num_layers,
            True,
            mapped_text_blocks,
            linear_ffn_image_blocks,
            linear_ffn_text_blocks,
            adapted_blocks,
        )
        self.transformer_blocks = nn.ModuleList(
            PrunedFluxTransformerBlock(*shape, role, modulation_rank, linear, has_adapters) for role, linear, has_adapters in edits
        )
        self.single_transformer_blocks = nn.ModuleList(
            PrunedFluxSingleTransformerBlock(*shape, modulation_rank, num_layers + i in (adapted_blocks or []))
            for i in range(num_single_layers)
        )
        if modulation_rank is not None:
            project_modulation(self.time_text_embed, self.norm_out, self.inner_dim, modulation_rank)
