"""FLUX.1's blocks, stock and pruned, through kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxSingleTransformerBlock, FluxTransformerBlock
from torch import nn

from ppclc.kernels.fused import Heads, KernelChains, hooked, in_place_of, joined, modulated, takes_chains, takes_heads
from ppclc.kernels.modulation import gated_residual
from ppclc.students.flux import PrunedFluxSingleTransformerBlock, PrunedFluxTransformerBlock
from ppclc.students.parts import JointTextAttention


@in_place_of(FluxTransformerBlock)
class FusedBlock(FluxTransformerBlock):  # type: ignore[misc]
    """A stock block of two streams; one that is given more than positions, by an adapter for images, is run as it was."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = hidden_states, encoder_hidden_states
        if joint_attention_kwargs or hooked(self.norm1) or hooked(self.norm1_context) or not takes_chains(image):
            stock: tuple[torch.Tensor, torch.Tensor] = super().forward(image, text, temb, image_rotary_emb, joint_attention_kwargs)
            return stock
        shift, scale, gate, shift_2, scale_2, gate_2 = _chunks(self.norm1, temb, 6)
        text_shift, text_scale, text_gate, text_shift_2, text_scale_2, text_gate_2 = _chunks(self.norm1_context, temb, 6)
        attended, text_attended = self.attn(
            hidden_states=modulated(self.norm1.norm, image, scale, shift),
            encoder_hidden_states=modulated(self.norm1_context.norm, text, text_scale, text_shift),
            image_rotary_emb=image_rotary_emb,
        )
        image = gated_residual(image, gate, attended)
        image = gated_residual(image, gate_2, self.ff(modulated(self.norm2, image, scale_2, shift_2)))
        text = gated_residual(text, text_gate, text_attended)
        text = gated_residual(text, text_gate_2, self.ff_context(modulated(self.norm2_context, text, text_scale_2, text_shift_2)))
        if text.dtype == torch.float16:
            text = text.clip(-65504, 65504)
        return text, image


@in_place_of(FluxSingleTransformerBlock)
class FusedSingleBlock(FluxSingleTransformerBlock):  # type: ignore[misc]
    """A stock block of joined streams."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if joint_attention_kwargs or hooked(self.norm) or not takes_chains(hidden_states):
            stock: tuple[torch.Tensor, torch.Tensor] = super().forward(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
            return stock
        length, both = encoder_hidden_states.shape[1], torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = _chunks(self.norm, temb, 3)
        normed = modulated(self.norm.norm, both, scale, shift)
        network = self.act_mlp(self.proj_mlp(normed))
        attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
        both = gated_residual(both, gate, self.proj_out(torch.cat([attended, network], dim=2)))
        if both.dtype == torch.float16:
            both = both.clip(-65504, 65504)
        return both[:, :length], both[:, length:]


def _chunks(norm: Any, temb: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """What a norm's own map makes of the time embedding, each (B, D)."""
    chunks: tuple[torch.Tensor, ...] = norm.linear(norm.silu(temb)).chunk(count, dim=1)
    return chunks


@in_place_of(PrunedFluxTransformerBlock)
class FusedPrunedBlock(KernelChains, PrunedFluxTransformerBlock):
    """A student's block of two streams."""


@in_place_of(PrunedFluxSingleTransformerBlock)
class FusedPrunedSingleBlock(PrunedFluxSingleTransformerBlock, FusedSingleBlock):
    """A student's block of joined streams: its adapters, then the stock block."""


class _FusedAttention:
    """Attention, text before image, whose queries and keys are normed, rotated and joined at once."""

    def __call__(
        self: Any,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
        norms = [getattr(attn, name) for name in names if hasattr(attn, name)]
        known = image_rotary_emb is not None and not attn.fused_projections and all(type(norm) is nn.RMSNorm for norm in norms)
        if not (known and takes_heads(hidden_states, *norms)):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)  # type: ignore[misc]
        cos, sin = (f[:, ::2] for f in image_rotary_emb)  # each stands there twice, once for either of a pair
        text = encoder_hidden_states
        length = 0 if text is None else text.shape[1]
        queries_text = text is not None and hasattr(attn, "add_q_proj")

        def heads(linear: Any, x: torch.Tensor) -> torch.Tensor:
            return linear(x).unflatten(-1, (-1, attn.head_dim))  # type: ignore[no-any-return]

        turn, text_turn = (cos[length:], sin[length:]), (cos[:length], sin[:length])
        query = [Heads(heads(attn.to_q, hidden_states), attn.norm_q, *turn)]
        key = [Heads(heads(attn.to_k, hidden_states), attn.norm_k, *turn)]
        value = heads(attn.to_v, hidden_states)
        if text is not None:
            key.insert(0, Heads(heads(attn.add_k_proj, text), attn.norm_added_k, *text_turn))
            value = torch.cat([heads(attn.add_v_proj, text), value], dim=1)
        if queries_text:
            query.insert(0, Heads(heads(attn.add_q_proj, text), attn.norm_added_q, *text_turn))
        result = dispatch_attention_fn(
            joined(query),
            joined(key),
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        result = result.flatten(2, 3).to(hidden_states.dtype)
        if text is None:
            return result
        own = length if queries_text else 0
        image = attn.to_out[1](attn.to_out[0](result[:, own:].contiguous()))
        return image, attn.to_add_out(result[:, :own].contiguous()) if queries_text and hasattr(attn, "to_add_out") else None


@in_place_of(FluxAttnProcessor)
class FusedAttention(_FusedAttention, FluxAttnProcessor):  # type: ignore[misc]
    """The attention of stock blocks and of joined streams."""


@in_place_of(JointTextAttention)
class FusedJointAttention(_FusedAttention, JointTextAttention):
    """The attention of a student's blocks of two streams."""


FUSED: Mapping[type, type] = {
    FluxTransformerBlock: FusedBlock,
    FluxSingleTransformerBlock: FusedSingleBlock,
    PrunedFluxTransformerBlock: FusedPrunedBlock,
    PrunedFluxSingleTransformerBlock: FusedPrunedSingleBlock,
    FluxAttnProcessor: FusedAttention,
    JointTextAttention: FusedJointAttention,
}
