"""LongCat-Image's blocks through kernels: they are made as FLUX.1's are."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers.models.transformers.transformer_longcat_image import (
    LongCatImageAttnProcessor,
    LongCatImageSingleTransformerBlock,
    LongCatImageTransformerBlock,
)

from ppclc.families._flux_kernels import JoinedStreams, TwoStreams
from ppclc.families._fused_attention import TextFirst
from ppclc.kernels.fused import in_place_of


@in_place_of(LongCatImageTransformerBlock)
class FusedBlock(TwoStreams, LongCatImageTransformerBlock):  # type: ignore[misc]
    """A block of two streams."""


@in_place_of(LongCatImageSingleTransformerBlock)
class FusedSingleBlock(JoinedStreams, LongCatImageSingleTransformerBlock):  # type: ignore[misc]
    """A block of joined streams."""


@in_place_of(LongCatImageAttnProcessor)
class FusedAttention(TextFirst, LongCatImageAttnProcessor):  # type: ignore[misc]
    """The attention of both."""

    dense = False


FUSED: Mapping[type, type] = {
    LongCatImageTransformerBlock: FusedBlock,
    LongCatImageSingleTransformerBlock: FusedSingleBlock,
    LongCatImageAttnProcessor: FusedAttention,
}
