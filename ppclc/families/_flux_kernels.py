"""FLUX.1's blocks, stock and pruned, through kernels; and how blocks that are made as its are run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxSingleTransformerBlock, FluxTransformerBlock

from ppclc.families._fused_attention import FusedJointAttention, TextFirst
from ppclc.kernels.fused import KernelChains, hooked, in_place_of, modulated, takes_chains
from ppclc.kernels.modulation import gated_residual
from ppclc.students.flux import PrunedFluxSingleTransformerBlock, PrunedFluxTransformerBlock
from ppclc.students.parts import JointTextAttention

Pair = tuple[torch.Tensor, torch.Tensor]


def two_streams(block: Any, norms: tuple[Any, Any], states: Pair, mods: tuple[Sequence[torch.Tensor], ...], **attention: Any) -> Pair:
    """Image and text (B, tokens, D) behind a block's attention and networks.

    norms: those before attention. mods: of image and of text shift, scale and gate of attention, then of the network, each a row a sample.
    """
    (image, text), (norm, text_norm) = states, norms
    shift, scale, gate, shift_2, scale_2, gate_2 = mods[0]
    text_shift, text_scale, text_gate, text_shift_2, text_scale_2, text_gate_2 = mods[1]
    attended, text_attended = block.attn(
        hidden_states=modulated(norm, image, scale, shift),
        encoder_hidden_states=modulated(text_norm, text, text_scale, text_shift),
        **attention,
    )
    image = gated_residual(image, gate, attended)
    image = gated_residual(image, gate_2, block.ff(modulated(block.norm2, image, scale_2, shift_2)))
    text = gated_residual(text, text_gate, text_attended)
    return image, gated_residual(text, text_gate_2, block.ff_context(modulated(block.norm2_context, text, text_scale_2, text_shift_2)))


class TwoStreams:
    """In front of a stock block of two streams; one that is given more than positions, by an adapter for images, is run as it was."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = hidden_states, encoder_hidden_states
        if joint_attention_kwargs or hooked(self.norm1) or hooked(self.norm1_context) or not takes_chains(image):
            stock: tuple[torch.Tensor, torch.Tensor] = super().forward(  # type: ignore[misc]
                image, text, temb, image_rotary_emb, joint_attention_kwargs
            )
            return stock
        mods = chunks(self.norm1, temb, 6), chunks(self.norm1_context, temb, 6)
        image, text = two_streams(self, (self.norm1.norm, self.norm1_context.norm), (image, text), mods, image_rotary_emb=image_rotary_emb)
        if text.dtype == torch.float16:
            text = text.clip(-65504, 65504)
        return text, image


class JoinedStreams:
    """In front of a stock block of joined streams."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if joint_attention_kwargs or hooked(self.norm) or not takes_chains(hidden_states):
            stock: tuple[torch.Tensor, torch.Tensor] = super().forward(  # type: ignore[misc]
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
            return stock
        length, both = encoder_hidden_states.shape[1], torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = chunks(self.norm, temb, 3)
        normed = modulated(self.norm.norm, both, scale, shift)
        network = self.act_mlp(self.proj_mlp(normed))
        attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
        both = gated_residual(both, gate, self.proj_out(torch.cat([attended, network], dim=2)))
        if both.dtype == torch.float16:
            both = both.clip(-65504, 65504)
        return both[:, :length], both[:, length:]


def chunks(norm: Any, temb: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """What a norm's own map makes of the time embedding, each (B, D)."""
    made: tuple[torch.Tensor, ...] = norm.linear(norm.silu(temb)).chunk(count, dim=1)
    return made


@in_place_of(FluxTransformerBlock)
class FusedBlock(TwoStreams, FluxTransformerBlock):  # type: ignore[misc]
    """A block of two streams."""


@in_place_of(FluxSingleTransformerBlock)
class FusedSingleBlock(JoinedStreams, FluxSingleTransformerBlock):  # type: ignore[misc]
    """A block of joined streams."""


@in_place_of(PrunedFluxTransformerBlock)
class FusedPrunedBlock(KernelChains, PrunedFluxTransformerBlock):
    """A student's block of two streams."""


@in_place_of(PrunedFluxSingleTransformerBlock)
class FusedPrunedSingleBlock(PrunedFluxSingleTransformerBlock, FusedSingleBlock):
    """A student's block of joined streams: its adapters, then the stock block."""


@in_place_of(FluxAttnProcessor)
class FusedAttention(TextFirst, FluxAttnProcessor):  # type: ignore[misc]
    """The attention of stock blocks and of joined streams."""


FUSED: Mapping[type, type] = {
    FluxTransformerBlock: FusedBlock,
    FluxSingleTransformerBlock: FusedSingleBlock,
    PrunedFluxTransformerBlock: FusedPrunedBlock,
    PrunedFluxSingleTransformerBlock: FusedPrunedSingleBlock,
    FluxAttnProcessor: FusedAttention,
    JointTextAttention: FusedJointAttention,
}
