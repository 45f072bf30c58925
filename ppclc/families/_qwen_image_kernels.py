"""Qwen-Image's blocks, stock and pruned, through kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0, QwenImageTransformerBlock

from ppclc.kernels.fused import Heads, KernelChains, in_place_of, joined, modulated, takes_chains, takes_heads
from ppclc.kernels.modulation import gated_residual
from ppclc.students.qwen_image import JointAttention, PrunedQwenImageTransformerBlock


@in_place_of(QwenImageTransformerBlock)
class FusedBlock(QwenImageTransformerBlock):  # type: ignore[misc]
    """A stock block; with two timesteps, where modulation differs by token, it is run as it was."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None,
        temb: torch.Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = hidden_states, encoder_hidden_states
        if self.zero_cond_t or modulate_index is not None or not takes_chains(image):
            stock: tuple[torch.Tensor, torch.Tensor] = super().forward(
                image, text, encoder_hidden_states_mask, temb, image_rotary_emb, joint_attention_kwargs, modulate_index
            )
            return stock
        image_1, image_2 = self.img_mod(temb)[:, None].chunk(2, dim=-1)
        text_1, text_2 = self.txt_mod(temb)[:, None].chunk(2, dim=-1)
        image_in, image_gate = _chunk(self.img_norm1, image, image_1)
        text_in, text_gate = _chunk(self.txt_norm1, text, text_1)
        image_attended, text_attended = self.attn(
            hidden_states=image_in,
            encoder_hidden_states=text_in,
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        image = gated_residual(image, image_gate, image_attended)
        text = gated_residual(text, text_gate, text_attended)
        image_in, image_gate = _chunk(self.img_norm2, image, image_2)
        image = gated_residual(image, image_gate, self.img_mlp(image_in))
        text_in, text_gate = _chunk(self.txt_norm2, text, text_2)
        text = gated_residual(text, text_gate, self.txt_mlp(text_in))
        if text.dtype == torch.float16:
            text = text.clip(-65504, 65504)
        if image.dtype == torch.float16:
            image = image.clip(-65504, 65504)
        return text, image


def _chunk(norm: Any, x: torch.Tensor, mod: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A state, normed and modulated by shift, scale and gate (B, 1, 3 D), and the gate."""
    shift, scale, gate = mod.chunk(3, dim=-1)
    return modulated(norm, x, scale, shift), gate


@in_place_of(PrunedQwenImageTransformerBlock)
class FusedPrunedBlock(KernelChains, PrunedQwenImageTransformerBlock):
    """A student's block."""


class _FusedAttention:
    """Joint attention, text before image, whose queries and keys are normed, rotated and joined at once."""

    def __call__(
        self: Any,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
        norms = [getattr(attn, name) for name in names if hasattr(attn, name)]
        known = image_rotary_emb is not None and attention_mask is None and all(type(norm) is RMSNorm for norm in norms)
        if not (known and encoder_hidden_states is not None and takes_heads(hidden_states, *norms)):
            stock: tuple[torch.Tensor, torch.Tensor | None] = super().__call__(  # type: ignore[misc]
                attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
            )
            return stock
        image_turn, text_turn = (_cos_sin(freqs) for freqs in image_rotary_emb)
        queries_text = hasattr(attn, "add_q_proj")
        size = attn.inner_dim // attn.heads

        def heads(linear: Any, x: torch.Tensor) -> torch.Tensor:
            return linear(x).unflatten(-1, (-1, size))  # type: ignore[no-any-return]

        text_query = [Heads(heads(attn.add_q_proj, encoder_hidden_states), attn.norm_added_q, *text_turn)] if queries_text else []
        query = joined([*text_query, Heads(heads(attn.to_q, hidden_states), attn.norm_q, *image_turn)])
        text_key = Heads(heads(attn.add_k_proj, encoder_hidden_states), attn.norm_added_k, *text_turn)
        key = joined([text_key, Heads(heads(attn.to_k, hidden_states), attn.norm_k, *image_turn)])
        value = torch.cat([heads(attn.add_v_proj, encoder_hidden_states), heads(attn.to_v, hidden_states)], dim=1)
        mask = None
        if encoder_hidden_states_mask is not None:
            image_mask = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
            mask = torch.cat([encoder_hidden_states_mask.bool(), image_mask], dim=1)[:, None, None, :]
        result = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        result = result.flatten(2, 3).to(query.dtype)
        text_length = encoder_hidden_states.shape[1] if queries_text else 0
        image = attn.to_out[0](result[:, text_length:].contiguous())
        if len(attn.to_out) > 1:
            image = attn.to_out[1](image)
        return image, attn.to_add_out(result[:, :text_length].contiguous()) if queries_text else None


def _cos_sin(freqs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (S, P) of complex frequencies, views of them, or of a pair of them."""
    return (freqs.real, freqs.imag) if isinstance(freqs, torch.Tensor) else (freqs[0], freqs[1])


@in_place_of(QwenDoubleStreamAttnProcessor2_0)
class FusedAttention(_FusedAttention, QwenDoubleStreamAttnProcessor2_0):  # type: ignore[misc]
    """The attention of stock blocks."""


@in_place_of(JointAttention)
class FusedJointAttention(_FusedAttention, JointAttention):
    """The attention of a student's blocks."""


FUSED: Mapping[type, type] = {
    QwenImageTransformerBlock: FusedBlock,
    PrunedQwenImageTransformerBlock: FusedPrunedBlock,
    QwenDoubleStreamAttnProcessor2_0: FusedAttention,
    JointAttention: FusedJointAttention,
}
