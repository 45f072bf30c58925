"""Attention whose queries and keys are normed, rotated where positions are given, and joined at once: what families of MMDiTs share.

Shape suffixes: B batch, S token, H head, P pair.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import RMSNorm
from torch import nn

from ppclc.kernels.fused import Heads, in_place_of, joined, takes_heads
from ppclc.students.parts import JointTextAttention

Turn = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of tokens (S, P), in float32."""


def takes_normed(x: torch.Tensor, *norms: Any) -> bool:
    """Whether a kernel may be taken for queries and keys of a state x with these norms, of diffusers' kind or PyTorch's."""
    return all(type(norm) in (nn.RMSNorm, RMSNorm) for norm in norms) and takes_heads(x, *norms)


def width_of_head(attn: Any) -> int:
    """The width of each head."""
    return int(attn.head_dim if hasattr(attn, "head_dim") else attn.inner_dim // attn.heads)


def heads_of(attn: Any, linear: Any, x: torch.Tensor) -> torch.Tensor:
    """What a layer makes of a state, by heads (B, S, H, width of a head)."""
    heads: torch.Tensor = linear(x).unflatten(-1, (-1, width_of_head(attn)))
    return heads


def normed(attn: Any, linear: Any, norm: Any, x: torch.Tensor, turn: Turn) -> Heads:
    """Queries or keys of a state, to be normed and turned."""
    return Heads(heads_of(attn, linear, x), norm, *turn)


def unturned(attn: Any, x: torch.Tensor) -> Turn:
    """Of a state's tokens without positions."""
    zero_and_one = torch.arange(2, dtype=torch.float32, device=x.device)
    shape = x.shape[1], width_of_head(attn) // 2
    return zero_and_one[1:].expand(shape), zero_and_one[:1].expand(shape)


class TextFirst:
    """In front of a processor: attention of image over text and image, text before image, and of text where its queries are there.

    `dense`: whether the processor makes each stream's result contiguous before its last layer, which may round otherwise then.
    """

    dense = True

    def __call__(
        self: Any,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        image, text = hidden_states, encoder_hidden_states
        names = ("norm_q", "norm_k", *(() if text is None else ("norm_added_q", "norm_added_k")))
        norms = [getattr(attn, name) for name in names if hasattr(attn, name)]
        if getattr(attn, "fused_projections", False) or not takes_normed(image, *norms):
            return super().__call__(attn, image, text, attention_mask, image_rotary_emb)  # type: ignore[misc]
        length = 0 if text is None else text.shape[1]
        if image_rotary_emb is None:
            turn, text_turn = unturned(attn, image), unturned(attn, image if text is None else text)
        else:
            cos, sin = (f[:, ::2] for f in image_rotary_emb)  # each stands there twice, once for either of a pair
            turn, text_turn = (cos[length:], sin[length:]), (cos[:length], sin[:length])
        queries_text = text is not None and hasattr(attn, "add_q_proj")
        query = [normed(attn, attn.to_q, attn.norm_q, image, turn)]
        key = [normed(attn, attn.to_k, attn.norm_k, image, turn)]
        value = heads_of(attn, attn.to_v, image)
        if text is not None:
            key.insert(0, normed(attn, attn.add_k_proj, attn.norm_added_k, text, text_turn))
            value = torch.cat([heads_of(attn, attn.add_v_proj, text), value], dim=1)
        if queries_text:
            query.insert(0, normed(attn, attn.add_q_proj, attn.norm_added_q, text, text_turn))
        result = dispatch_attention_fn(
            joined(query),
            joined(key),
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        result = result.flatten(2, 3).to(image.dtype)
        if text is None:
            return result
        own = length if queries_text else 0
        of_text, of_image = (x.contiguous() if self.dense else x for x in result.tensor_split([own], dim=1))
        attended = attn.to_out[1](attn.to_out[0](of_image))
        return attended, attn.to_add_out(of_text) if queries_text and hasattr(attn, "to_add_out") else None


@in_place_of(JointTextAttention)
class FusedJointAttention(TextFirst, JointTextAttention):
    """The attention of a student's blocks of two streams."""
