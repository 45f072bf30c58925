"""HunyuanImage's blocks through kernels. Image stands before text, which has no positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_hunyuanimage import (
    HunyuanImageAttnProcessor,
    HunyuanImageSingleTransformerBlock,
    HunyuanImageTransformerBlock,
)

from ppclc.families._flux_kernels import chunks, two_streams
from ppclc.families._fused_attention import heads_of, takes_normed, unturned
from ppclc.kernels.fused import Heads, hooked, in_place_of, joined, modulated, takes_chains
from ppclc.kernels.modulation import gated_residual


@in_place_of(HunyuanImageTransformerBlock)
class FusedBlock(HunyuanImageTransformerBlock):  # type: ignore[misc]
    """A block of two streams."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = hidden_states, encoder_hidden_states
        if hooked(self.norm1) or hooked(self.norm1_context) or not takes_chains(image):
            stock: tuple[torch.Tensor, torch.Tensor] = super().forward(image, text, temb, attention_mask, image_rotary_emb, *args, **kwargs)
            return stock
        mods, norms = (chunks(self.norm1, temb, 6), chunks(self.norm1_context, temb, 6)), (self.norm1.norm, self.norm1_context.norm)
        return two_streams(self, norms, (image, text), mods, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb)


@in_place_of(HunyuanImageSingleTransformerBlock)
class FusedSingleBlock(HunyuanImageSingleTransformerBlock):  # type: ignore[misc]
    """A block of joined streams."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        image, text = hidden_states, encoder_hidden_states
        if hooked(self.norm) or not takes_chains(image):
            return super().forward(image, text, temb, attention_mask, image_rotary_emb, *args, **kwargs)
        both, length = torch.cat([image, text], dim=1), image.shape[1]
        shift, scale, gate = chunks(self.norm, temb, 3)
        normed = modulated(self.norm.norm, both, scale, shift)
        network = self.act_mlp(self.proj_mlp(normed))
        attended = self.attn(
            hidden_states=normed[:, :length],
            encoder_hidden_states=normed[:, length:],
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        both = gated_residual(both, gate, self.proj_out(torch.cat([torch.cat(attended, dim=1), network], dim=2)))
        return both[:, :length], both[:, length:]


@in_place_of(HunyuanImageAttnProcessor)
class FusedAttention(HunyuanImageAttnProcessor):  # type: ignore[misc]
    """The attention of both; what refines the text beforehand has no norms, and is run as it was."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        image, text = hidden_states, encoder_hidden_states
        apart = attn.add_q_proj is not None
        norms = [attn.norm_q, attn.norm_k, *((attn.norm_added_q, attn.norm_added_k) if apart else ())]
        if text is None or image_rotary_emb is None or not takes_normed(image, *norms):
            return super().__call__(attn, image, text, attention_mask, image_rotary_emb)
        length, (cos, sin) = image.shape[1], (f[:, ::2] for f in image_rotary_emb)  # each stands there twice, once for either of a pair
        own = (attn.to_q, attn.to_k, attn.to_v)
        if apart:
            of_text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            query, key, value = ([heads_of(attn, a, image), heads_of(attn, b, text)] for a, b in zip(own, of_text, strict=True))
        else:
            both, norms = torch.cat([image, text], dim=1), norms * 2
            query, key, value = ([*heads_of(attn, a, both).tensor_split([length], dim=1)] for a in own)
        nothing = unturned(attn, text)
        result = dispatch_attention_fn(
            joined([Heads(query[0], norms[0], cos, sin), Heads(query[1], norms[2], *nothing)]),
            joined([Heads(key[0], norms[1], cos, sin), Heads(key[1], norms[3], *nothing)]),
            torch.cat(value, dim=1),
            attn_mask=attention_mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        attended, text_attended = result.flatten(2, 3).to(image.dtype).tensor_split([length], dim=1)
        if getattr(attn, "to_out", None) is not None:
            attended = attn.to_out[1](attn.to_out[0](attended))
        if getattr(attn, "to_add_out", None) is not None:
            text_attended = attn.to_add_out(text_attended)
        return attended, text_attended


FUSED: Mapping[type, type] = {
    HunyuanImageTransformerBlock: FusedBlock,
    HunyuanImageSingleTransformerBlock: FusedSingleBlock,
    HunyuanImageAttnProcessor: FusedAttention,
}
