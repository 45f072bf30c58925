"""FLUX.2's transformer with narrower parts, as ppclc's plans cut it. Needs torch and diffusers only.

Edits beside fewer blocks, all told by the configuration, as for FLUX.1 (arXiv 2511.16156 for text streams and feed-forward
networks): `mapped_text_blocks`, `linear_ffn_image_blocks`, `linear_ffn_text_blocks`, `adapted_blocks`. Blocks of a kind share
one modulation, which `modulation_rank` has read the few coordinates that travel behind `temb`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_flux2 import Flux2TransformerBlock
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


class PrunedFlux2TransformerBlock(EditedBlock, Flux2TransformerBlock):
    """One block of two streams with the parts that its role needs."""

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        mlp_ratio: float,
        eps: float,
        role: TextRole,
        linear_ffn: tuple[str, ...],
        has_adapters: bool,
    ) -> None:
        super().__init__(dim, heads, head_dim, mlp_ratio=mlp_ratio, eps=eps, bias=False)
        self.edit(dim, role, linear_ffn, has_adapters)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb_mod_img: torch.Tensor,
        temb_mod_txt: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text, image = self.joint_forward(
            hidden_states,
            encoder_hidden_states,
            self._modulated(temb_mod_img),
            None if self.role.mapped else self._modulated(temb_mod_txt),
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        if text.dtype == torch.float16:
            text = text.clip(-65504, 65504)
        return text, image

    def _modulated(self, mod: torch.Tensor) -> Modulated:
        chunks = (mod[:, None] if mod.dim() == 2 else mod).chunk(6, dim=-1)
        return Modulated(Chunks(*chunks[:3]), Chunks(*chunks[3:]))


class PrunedFlux2Transformer2DModel(Travelling, Flux2Transformer2DModel):
    """`Flux2Transformer2DModel` with the edits that its configuration names."""

    _no_split_modules = ["PrunedFlux2TransformerBlock", "Flux2SingleTransformerBlock"]
    _repeated_blocks = ["PrunedFlux2TransformerBlock", "Flux2SingleTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 128,
        out_channels: int | None = None,
        num_layers: int = 8,
        num_single_layers: int = 48,
        attention_head_dim: int = 128,
        num_attention_heads: int = 48,
        joint_attention_dim: int = 15360,
        timestep_guidance_channels: int = 256,
        mlp_ratio: float = 3.0,
        axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32),
        rope_theta: int = 2000,
        eps: float = 1e-6,
        guidance_embeds: bool = True,
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
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            timestep_guidance_channels=timestep_guidance_channels,
            mlp_ratio=mlp_ratio,
            axes_dims_rope=axes_dims_rope,
            rope_theta=rope_theta,
            eps=eps,
            guidance_embeds=guidance_embeds,
        )
        self.register_to_config(num_layers=num_layers)
        edits = edits_of_blocks(
            num_layers, num_layers, True, mapped_text_blocks, linear_ffn_image_blocks, linear_ffn_text_blocks, adapted_blocks
        )
        shape = (self.inner_dim, num_attention_heads, attention_head_dim, mlp_ratio, eps)
        self.transformer_blocks = nn.ModuleList(
            PrunedFlux2TransformerBlock(*shape, role, linear, has_adapters) for role, linear, has_adapters in edits
        )
        if modulation_rank is not None:
            project_modulation(self.time_guidance_embed, self.norm_out, self.inner_dim, modulation_rank)
            for mod, chunks in (
                (self.double_stream_modulation_img, 6),
                (self.double_stream_modulation_txt, 6),
                (self.single_stream_modulation, 3),
            ):
                narrow_modulation(mod, "act_fn", modulation_rank, self.inner_dim, chunks)
