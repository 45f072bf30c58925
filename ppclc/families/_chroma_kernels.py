"""Chroma's blocks through kernels: FLUX.1's, but that their modulation comes ready made, and that text may be masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock, ChromaTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from ppclc.families._flux_kernels import FusedAttention, two_streams
from ppclc.kernels.fused import hooked, in_place_of, modulated, takes_chains
from ppclc.kernels.modulation import gated_residual


@in_place_of(ChromaTransformerBlock)
class FusedBlock(ChromaTransformerBlock):  # type: ignore[misc]
    """A block of two streams."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Any = None,
        attention_mask: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = hidden_states, encoder_hidden_states
        if joint_attention_kwargs or hooked(self.norm1) or hooked(self.norm1_context) or not takes_chains(image):
            stock: tuple[torch.Tensor, torch.Tensor] = super().forward(
                image, text, temb, image_rotary_emb, attention_mask, joint_attention_kwargs
            )
            return stock
        norms, mods = (self.norm1.norm, self.norm1_context.norm), (temb[:, :6].unbind(1), temb[:, 6:].unbind(1))
        given = {"image_rotary_emb": image_rotary_emb, "attention_mask": _pairs(attention_mask)}
        image, text = two_streams(self, norms, (image, text), mods, **given)
        if text.dtype == torch.float16:
            text = text.clip(-65504, 65504)
        return text, image


@in_place_of(ChromaSingleTransformerBlock)
class FusedSingleBlock(ChromaSingleTransformerBlock):  # type: ignore[misc]
    """A block of joined streams."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Any = None,
        attention_mask: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        if joint_attention_kwargs or hooked(self.norm) or not takes_chains(hidden_states):
            stock: torch.Tensor = super().forward(hidden_states, temb, image_rotary_emb, attention_mask, joint_attention_kwargs)
            return stock
        shift, scale, gate = temb.unbind(1)
        normed = modulated(self.norm.norm, hidden_states, scale, shift)
        network = self.act_mlp(self.proj_mlp(normed))
        attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, attention_mask=_pairs(attention_mask))
        both = gated_residual(hidden_states, gate, self.proj_out(torch.cat([attended, network], dim=2)))
        return both.clip(-65504, 65504) if both.dtype == torch.float16 else both


def _pairs(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Of a mask of tokens (B, S) that of their pairs (B, 1, S, S)."""
    return None if mask is None else mask[:, None, None, :] * mask[:, None, :, None]


FUSED: Mapping[type, type] = {
    ChromaTransformerBlock: FusedBlock,
    ChromaSingleTransformerBlock: FusedSingleBlock,
    FluxAttnProcessor: FusedAttention,
}
