"""SD3's and SD3.5's blocks, stock and pruned, through kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch.nn import functional

from ppclc.families._fused_attention import FusedJointAttention, heads_of, normed, takes_normed, unturned
from ppclc.kernels.fused import KernelChains, hooked, in_place_of, joined, modulated, takes_chains
from ppclc.kernels.modulation import gated_residual
from ppclc.students.parts import JointTextAttention
from ppclc.students.sd3 import PrunedJointTransformerBlock


@in_place_of(JointTransformerBlock)
class FusedBlock(JointTransformerBlock):  # type: ignore[misc]
    """A stock block; one that is given more than states, or runs its networks in pieces, is run as it was."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Any, torch.Tensor]:
        image, text = hidden_states, encoder_hidden_states
        more = joint_attention_kwargs or self._chunk_size is not None
        # With a second attention the norm is called for each.
        listened = hooked(self.norm1) or hooked(self.norm1_context) or (self.use_dual_attention and hooked(self.norm1.norm))
        if more or listened or not takes_chains(image):
            stock: tuple[Any, torch.Tensor] = super().forward(image, text, temb, joint_attention_kwargs)
            return stock
        shift, scale, gate, shift_2, scale_2, gate_2, *second = _chunks(self.norm1, temb)
        text_chunks = _chunks(self.norm1_context, temb)
        if self.context_pre_only:
            text_scale, text_shift = text_chunks
        else:
            text_shift, text_scale, text_gate, text_shift_2, text_scale_2, text_gate_2 = text_chunks
        attended, text_attended = self.attn(
            hidden_states=modulated(self.norm1.norm, image, scale, shift),
            encoder_hidden_states=modulated(self.norm1_context.norm, text, text_scale, text_shift),
        )
        beside = self.attn2(hidden_states=modulated(self.norm1.norm, image, second[1], second[0])) if second else None
        image = gated_residual(image, gate, attended)
        if beside is not None:
            image = gated_residual(image, second[2], beside)
        image = gated_residual(image, gate_2, self.ff(modulated(self.norm2, image, scale_2, shift_2)))
        if self.context_pre_only:
            return None, image
        text = gated_residual(text, text_gate, text_attended)
        return gated_residual(text, text_gate_2, self.ff_context(modulated(self.norm2_context, text, text_scale_2, text_shift_2))), image


def _chunks(norm: Any, temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a norm's own map makes of the time embedding, each (B, D)."""
    chunks: tuple[torch.Tensor, ...] = norm.linear(norm.silu(temb)).split(norm.norm.normalized_shape[0], dim=1)
    return chunks


@in_place_of(PrunedJointTransformerBlock)
class FusedPrunedBlock(KernelChains, PrunedJointTransformerBlock):
    """A student's block."""


@in_place_of(JointAttnProcessor2_0)
class FusedAttention(JointAttnProcessor2_0):  # type: ignore[misc]
    """Attention of stock blocks, image before text, and the second one of those that have two, of image alone. Without norms it is run as it was."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        image, text = hidden_states, encoder_hidden_states
        norms = [attn.norm_q, attn.norm_k, *([] if text is None else [attn.norm_added_q, attn.norm_added_k])]
        if not takes_normed(image, *norms):
            return super().__call__(attn, image, text, attention_mask, *args, **kwargs)
        streams = [(image, attn.to_q, attn.norm_q, attn.to_k, attn.norm_k, attn.to_v)]
        if text is not None:
            streams.append((text, attn.add_q_proj, attn.norm_added_q, attn.add_k_proj, attn.norm_added_k, attn.add_v_proj))
        turns = [unturned(attn, x) for x, *_ in streams]
        query = joined([normed(attn, q, norm, x, turn) for (x, q, norm, *_), turn in zip(streams, turns, strict=True)])
        key = joined([normed(attn, k, norm, x, turn) for (x, _, _, k, norm, _), turn in zip(streams, turns, strict=True)])
        value = torch.cat([heads_of(attn, v, x) for x, *_, v in streams], dim=1)
        result = functional.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        result = result.transpose(1, 2).flatten(2).to(image.dtype)
        length = image.shape[1]
        attended = attn.to_out[1](attn.to_out[0](result[:, :length]))
        if text is None:
            return attended
        return attended, result[:, length:] if attn.context_pre_only else attn.to_add_out(result[:, length:])


FUSED: Mapping[type, type] = {
    JointTransformerBlock: FusedBlock,
    PrunedJointTransformerBlock: FusedPrunedBlock,
    JointAttnProcessor2_0: FusedAttention,
    JointTextAttention: FusedJointAttention,
}
