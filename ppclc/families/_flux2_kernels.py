"""FLUX.2's blocks, stock and pruned, through kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2Modulation,
    Flux2ParallelSelfAttnProcessor,
    Flux2SingleTransformerBlock,
    Flux2TransformerBlock,
)

from ppclc.families._flux_kernels import two_streams
from ppclc.families._fused_attention import FusedJointAttention, TextFirst, takes_normed
from ppclc.kernels.fused import Heads, KernelChains, in_place_of, joined, modulated, takes_chains
from ppclc.kernels.modulation import gated_residual
from ppclc.students.flux2 import PrunedFlux2TransformerBlock
from ppclc.students.parts import JointTextAttention


@in_place_of(Flux2TransformerBlock)
class FusedBlock(Flux2TransformerBlock):  # type: ignore[misc]
    """A stock block of two streams; one that is given more than positions is run as it was."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb_mod_img: torch.Tensor,
        temb_mod_txt: torch.Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = hidden_states, encoder_hidden_states
        if joint_attention_kwargs or not takes_chains(image):
            stock: tuple[torch.Tensor, torch.Tensor] = super().forward(
                image, text, temb_mod_img, temb_mod_txt, image_rotary_emb, joint_attention_kwargs
            )
            return stock
        mods = tuple(sum(Flux2Modulation.split(mod, 2), ()) for mod in (temb_mod_img, temb_mod_txt))
        image, text = two_streams(self, (self.norm1, self.norm1_context), (image, text), mods, image_rotary_emb=image_rotary_emb)
        if text.dtype == torch.float16:
            text = text.clip(-65504, 65504)
        return text, image


@in_place_of(Flux2SingleTransformerBlock)
class FusedSingleBlock(Flux2SingleTransformerBlock):  # type: ignore[misc]
    """A block of joined streams."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        temb_mod: torch.Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        split_hidden_states: bool = False,
        text_seq_len: int | None = None,
    ) -> Any:
        if joint_attention_kwargs or not takes_chains(hidden_states):
            return super().forward(
                hidden_states, encoder_hidden_states, temb_mod, image_rotary_emb, joint_attention_kwargs, split_hidden_states, text_seq_len
            )
        both, length = hidden_states, text_seq_len
        if encoder_hidden_states is not None:
            both, length = torch.cat([encoder_hidden_states, hidden_states], dim=1), encoder_hidden_states.shape[1]
        ((shift, scale, gate),) = Flux2Modulation.split(temb_mod, 1)
        attended = self.attn(hidden_states=modulated(self.norm, both, scale, shift), image_rotary_emb=image_rotary_emb)
        both = gated_residual(both, gate, attended)
        if both.dtype == torch.float16:
            both = both.clip(-65504, 65504)
        return (both[:, :length], both[:, length:]) if split_hidden_states else both


@in_place_of(PrunedFlux2TransformerBlock)
class FusedPrunedBlock(KernelChains, PrunedFlux2TransformerBlock):
    """A student's block of two streams."""


@in_place_of(Flux2AttnProcessor)
class FusedAttention(TextFirst, Flux2AttnProcessor):  # type: ignore[misc]
    """The attention of stock blocks of two streams."""

    dense = False


@in_place_of(Flux2ParallelSelfAttnProcessor)
class FusedParallelAttention(Flux2ParallelSelfAttnProcessor):  # type: ignore[misc]
    """Attention of joined streams beside their network: both begin in one product and end in one."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, image_rotary_emb: Any = None
    ) -> torch.Tensor:
        if image_rotary_emb is None or not takes_normed(hidden_states, attn.norm_q, attn.norm_k):
            stock: torch.Tensor = super().__call__(attn, hidden_states, attention_mask, image_rotary_emb)
            return stock
        cos, sin = (f[:, ::2] for f in image_rotary_emb)  # each stands there twice, once for either of a pair
        made = attn.to_qkv_mlp_proj(hidden_states)
        widths, network = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
        first = made.shape[-1] * widths // (widths + network)  # of a part of the layer too
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in made[..., :first].chunk(3, dim=-1))
        result = dispatch_attention_fn(
            joined([Heads(query, attn.norm_q, cos, sin)]),
            joined([Heads(key, attn.norm_k, cos, sin)]),
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        result = result.flatten(2, 3).to(hidden_states.dtype)
        out: torch.Tensor = attn.to_out(torch.cat([result, attn.mlp_act_fn(made[..., first:])], dim=-1))
        return out


FUSED: Mapping[type, type] = {
    Flux2TransformerBlock: FusedBlock,
    Flux2SingleTransformerBlock: FusedSingleBlock,
    PrunedFlux2TransformerBlock: FusedPrunedBlock,
    Flux2AttnProcessor: FusedAttention,
    Flux2ParallelSelfAttnProcessor: FusedParallelAttention,
    JointTextAttention: FusedJointAttention,
}
