"""FLUX.2 (dev, klein): blocks of two streams, then blocks of one joined sequence; modulation by time and guidance, shared by all blocks of a kind.

Shape suffixes: B batch, S image token, T text token, D width, C channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2Modulation

from ppclc.families import Encoders, Family, Group, Lowered, Modulation, _kl, fused_by, lowered_as_it_is

GUIDANCE = 4.0
"""What a distilled model is asked for where nobody says otherwise. Source: the default of diffusers' Flux2Pipeline."""


def text_input(block: Any, text_BTD: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
    """The modulated text state of a stock block, which feeds its text keys and values."""
    shift, scale, _ = Flux2Modulation.split(given["temb_mod_txt"], 2)[0]
    modulated: torch.Tensor = block.norm1_context(text_BTD) * (1 + scale) + shift
    return modulated


def example_inputs(
    config: Mapping[str, Any], batch: int = 1, height: int = 4, width: int = 8, text: int = 5, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Keyword arguments of forward: random latents of a `height` x `width` grid of tokens, random text, random timesteps."""
    return {
        "hidden_states": torch.randn(batch, height * width, config["in_channels"], generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"], generator=generator),
        **grid_inputs(config, batch, height, width, text),
    }


def grid_inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text: int) -> dict[str, Any]:
    """Positions (tokens, 4) by time, row, column and place in the text, and guidance (B,) where the model was distilled with it."""
    one = torch.arange(1)
    given: dict[str, Any] = {
        "img_ids": torch.cartesian_prod(one, torch.arange(height), torch.arange(width), one).float(),
        "txt_ids": torch.cartesian_prod(one, one, one, torch.arange(text)).float(),
    }
    return given | ({"guidance": torch.full((batch,), GUIDANCE)} if config.get("guidance_embeds") else {})


def encode_prompts(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
    """Text states (B, T, E) of three layers of the pipeline's language model beside each other, padded and unmasked as the model was trained."""
    longest = min(512, int(getattr(pipeline.tokenizer, "model_max_length", 512)))
    states, _ = pipeline.encode_prompt(prompts, max_sequence_length=longest)
    return {"encoder_hidden_states": states}


def encode_images(pipeline: Any, images: torch.Tensor) -> torch.Tensor:
    """Packed latents (B, S, C) of images (B, 3, H, W) in -1..1: patches of the VAE's mode, normalised by its batch norm's statistics."""
    packed: torch.Tensor = pipeline._pack_latents(pipeline._encode_vae_image(images.to(pipeline.vae.dtype), None))
    return packed


def decode(pipeline: Any, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Images (B, 3, H, W) in 0..1 of packed latents. Source: diffusers' `Flux2Pipeline`, at its end."""
    vae = pipeline.vae
    patches = latents.to(vae.dtype).transpose(1, 2).unflatten(2, grid)
    scale = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    patches = patches * scale.to(patches) + vae.bn.running_mean.view(1, -1, 1, 1).to(patches)
    images: torch.Tensor = vae.decode(pipeline._unpatchify_latents(patches), return_dict=False)[0]
    return (images.float() / 2 + 0.5).clamp(0, 1)


def lowered(model: Any) -> Lowered:
    """The model ready for torch.export, with dynamic batch, image and text lengths."""
    return lowered_as_it_is(model, example_inputs)


PLUGIN = Family(
    name="flux2",
    class_name="Flux2Transformer2DModel",
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
            original={
                "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "img_attn.proj": ("attn.to_out.0",),
                "txt_attn.proj": ("attn.to_add_out",),
                "img_mlp.0": ("ff.linear_in",),
                "img_mlp.2": ("ff.linear_out",),
                "txt_mlp.0": ("ff_context.linear_in",),
                "txt_mlp.2": ("ff_context.linear_out",),
            },
        ),
        Group(
            name="single_transformer_blocks",
            path="single_transformer_blocks",
            count_key="num_single_layers",
            joined="hidden_states",
            adapters=False,
            original_path="single_blocks",
            original={"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
        ),
    ),
    student_class="ppclc.students.flux2:PrunedFlux2Transformer2DModel",
    text_end="read",
    time_embedding="time_guidance_embed",
    basis_module="time_guidance_embed.modulation_basis",
    modulations={
        "double_stream_modulation_img.linear": Modulation("image"),
        "double_stream_modulation_txt.linear": Modulation("text"),
        "single_stream_modulation.linear": Modulation("both"),
    },
    modulated_outside=True,
    original={  # Source: diffusers' `_convert_non_diffusers_flux2_lora_to_diffusers`
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",  # rows in another order, which goes with the name
    },
    example_inputs=example_inputs,
    grid_inputs=grid_inputs,
    lowered=lowered,
    published={"black-forest-labs/FLUX.2-dev": {}},
    tiny_config={
        "in_channels": 8,
        "num_layers": 4,
        "num_single_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    encoders=Encoders(
        pipeline_classes=("Flux2Pipeline", "Flux2KleinPipeline"),
        text_parts=("text_encoder", "tokenizer"),
        image_parts=("vae",),
        encode_prompts=encode_prompts,
        encode_images=encode_images,
        decode=decode,
        pixels_per_token=_kl.pixels_per_token,
    ),
    fused=fused_by("_flux2_kernels"),
)
