"""FLUX.1 (dev, schnell, Kontext, Fill): blocks of two streams, then blocks that join them; modulation by time, guidance and pooled text.

Shape suffixes: B batch, S image token, T text token, D width, C channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ppclc.families import Encoders, Family, Group, Lowered, Modulation, _bfl, _kl, fused_by, lowered_as_it_is

GUIDANCE = 3.5
"""What a distilled model is asked for where nobody says otherwise. Source: the default of diffusers' FluxPipeline."""


def text_input(block: Any, text_BTD: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
    """The modulated text state of a stock block, which feeds its text keys and values."""
    modulated: torch.Tensor = block.norm1_context(text_BTD, emb=given["temb"])[0]
    return modulated


def example_inputs(
    config: Mapping[str, Any], batch: int = 1, height: int = 4, width: int = 8, text: int = 5, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Keyword arguments of forward: random latents of a `height` x `width` grid of tokens, random text, random timesteps."""
    return {
        "hidden_states": torch.randn(batch, height * width, config["in_channels"], generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"], generator=generator),
        **grid_inputs(config, batch, height, width, text),
    }


def grid_inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text: int) -> dict[str, Any]:
    """Positions of image (S, 3) and text (T, 3), and guidance (B,) where the model was distilled with it."""
    given: dict[str, Any] = {"img_ids": image_ids(height, width), "txt_ids": torch.zeros(text, 3)}
    return given | ({"guidance": torch.full((batch,), GUIDANCE)} if config.get("guidance_embeds") else {})


def image_ids(height: int, width: int) -> torch.Tensor:
    """Positions (S, 3) of a grid of tokens: 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def encode_prompts(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
    """Text states (B, T, E) of the pipeline's T5, padded and unmasked as it was trained, and pooled ones (B, P) of its CLIP."""
    longest = text_tokens({"tokenizer_2": int(pipeline.tokenizer_2.model_max_length)})
    states, pooled, _ = pipeline.encode_prompt(prompts, None, max_sequence_length=longest)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def text_tokens(longest: Mapping[str, int]) -> int:
    """Of T5, by the longest text that its tokenizer takes."""
    return min(512, longest.get("tokenizer_2", 512))


def encode_images(pipeline: Any, images: torch.Tensor) -> torch.Tensor:
    """Packed latents (B, S, C) of images (B, 3, H, W) in -1..1."""
    latents = _kl.encoded(pipeline.vae, images)
    packed: torch.Tensor = pipeline._pack_latents(latents, *latents.shape)
    return packed


def decode(pipeline: Any, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Images (B, 3, H, W) in 0..1 of packed latents."""
    height, width = (2 * side * pipeline.vae_scale_factor for side in grid)
    return _kl.decoded(pipeline.vae, pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor))


ORIGINAL_BLOCKS: Mapping[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
"""Black Forest Labs' names of a block's maps. Source: diffusers' `convert_flux_transformer_checkpoint_to_diffusers`."""
ORIGINAL_SINGLE_BLOCKS: Mapping[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear1_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),  # ComfyUI's name of the first rows of linear1
    "linear2": ("proj_out",),
}


def lowered(model: Any) -> Lowered:
    """The model ready for torch.export, with dynamic batch, image and text lengths."""
    return lowered_as_it_is(model, example_inputs)


PLUGIN = Family(
    name="flux",
    class_name="FluxTransformer2DModel",
    groups=(
        Group(
            name="transformer_blocks",
            path="transformer_blocks",
            count_key="num_layers",
            ffn_inputs={"image": "norm2", "text": "norm2_context"},
            ffn_modules={"image": "img_ffn", "text": "txt_ffn"},
            text_modules=("text_in", "text_out"),
            text_input=text_input,
            original_path="double_blocks",
            original=ORIGINAL_BLOCKS,
        ),
        Group(
            name="single_transformer_blocks",
            path="single_transformer_blocks",
            count_key="num_single_layers",
            original_path="single_blocks",
            original=ORIGINAL_SINGLE_BLOCKS,
        ),
    ),
    student_class="ppclc.students.flux:PrunedFluxTransformer2DModel",
    text_end="read",
    time_embedding="time_text_embed",
    basis_module="time_text_embed.modulation_basis",
    modulations={"norm1.linear": Modulation("image"), "norm1_context.linear": Modulation("text"), "norm.linear": Modulation("both")},
    original={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",  # rows in another order, which goes with the name
    },
    example_inputs=example_inputs,
    grid_inputs=grid_inputs,
    lowered=lowered,
    published={"black-forest-labs/FLUX.1-dev": {"guidance_embeds": True}, "black-forest-labs/FLUX.1-schnell": {}},
    tiny_config={
        "in_channels": 8,
        "num_layers": 4,
        "num_single_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 12,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
    text_tensors=("encoder_hidden_states", "pooled_projections"),
    encoders=Encoders(
        pipeline_classes=("FluxPipeline",),
        text_parts=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        image_parts=("vae",),
        encode_prompts=encode_prompts,
        encode_images=encode_images,
        decode=decode,
        pixels_per_token=_kl.pixels_per_token,
        text_tokens=text_tokens,
    ),
    single_file=_bfl.SINGLE_FILE,
    fused=fused_by("_flux_kernels"),
)
