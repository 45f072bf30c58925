"""Stable Diffusion 3 and 3.5 (medium, large): blocks of two streams, some with a second attention of image alone; modulation by time and pooled text.

The last block reads text and computes none (`context_pre_only`), which another block becomes when the last one goes.

Shape suffixes: B batch, S image token, T text token, D width, C channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ppclc.families import AXES, Encoders, Family, Group, Lowered, Modulation, _kl, fused_by, lowered_as_it_is
from ppclc.plan import CompressionPlan


def text_input(block: Any, text_BTD: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
    """The modulated text state of a stock block, which feeds its text keys and values."""
    norm, temb = block.norm1_context, given["temb"]
    modulated: torch.Tensor = norm(text_BTD, temb) if block.context_pre_only else norm(text_BTD, emb=temb)[0]
    return modulated


def example_inputs(
    config: Mapping[str, Any], batch: int = 1, height: int = 4, width: int = 8, text: int = 5, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Keyword arguments of forward: random latents of a `height` x `width` grid of tokens, random text, random timesteps."""
    return {
        "hidden_states": torch.randn(batch, *latents(config, height, width), generator=generator),
        "timestep": 1000 * torch.rand(batch, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"], generator=generator),
    }


def latents(config: Mapping[str, Any], height: int, width: int) -> tuple[int, ...]:
    """Channels, rows and columns: a token is a square of patches."""
    side = int(config["patch_size"])
    return (int(config["in_channels"]), side * height, side * width)


def encode_prompts(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
    """Text states (B, T, E) of both CLIPs beside each other, T5's behind them, unmasked as it was trained, and the CLIPs' pooled ones (B, P)."""
    longest = _t5_tokens({"tokenizer_3": int(pipeline.tokenizer_3.model_max_length)})
    states, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=longest)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def text_tokens(longest: Mapping[str, int]) -> int:
    """Those of the CLIPs, T5's behind them, by the longest text that each tokenizer takes."""
    return longest.get("tokenizer", 77) + _t5_tokens(longest)


def _t5_tokens(longest: Mapping[str, int]) -> int:
    return min(256, longest.get("tokenizer_3", 256))


def encode_images(pipeline: Any, images: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) of images (B, 3, H, W) in -1..1."""
    return _kl.encoded(pipeline.vae, images)


def decode(pipeline: Any, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Images (B, 3, H, W) in 0..1 of latents; the grid is theirs."""
    return _kl.decoded(pipeline.vae, latents)


def renumbered(config: Mapping[str, Any], plan: CompressionPlan) -> dict[str, Any]:
    """The student's numbers of the blocks with a second attention."""
    dual = set(config.get("dual_attention_layers") or ())
    return {"dual_attention_layers": [n for n, block in enumerate(plan.kept) if block in dual]}


def restored(config: Mapping[str, Any], plan: CompressionPlan) -> dict[str, Any]:
    """The teacher's numbers of the blocks with a second attention; where nothing tells, as of blocks that are gone, a block may have one, and counts as if it had."""
    if "dual_attention_layers" not in config:
        return {"dual_attention_layers": list(range(plan.num_blocks))}
    kept = {plan.kept[n] for n in config.get("dual_attention_layers") or () if n < len(plan.kept)}
    return {"dual_attention_layers": [b for b in range(plan.num_blocks) if b in kept or b not in plan.kept]}


def may_start(config: Mapping[str, Any], first: int, last: int, start: int) -> bool:
    """A student block has the attentions of its interval's first block, and text unless it is the last of all."""
    dual, end = set(config.get("dual_attention_layers") or ()), int(config["num_layers"]) - 1
    return (first in dual) == (start in dual) and (start != end or last == end)


def lowered(model: Any) -> Lowered:
    """The model ready for torch.export, with dynamic batch, height, width and text length."""
    side = model.config.patch_size
    axes = {**AXES, "hidden_states": {0: "batch", 2: f"{side}*height", 3: f"{side}*width"}}
    return lowered_as_it_is(model, example_inputs, axes, sides=True, largest=int(model.config.pos_embed_max_size))


MEDIUM: Mapping[str, Any] = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}

PLUGIN = Family(
    name="sd3",
    class_name="SD3Transformer2DModel",
    groups=(
        Group(
            name="transformer_blocks",
            path="transformer_blocks",
            count_key="num_layers",
            ffn_inputs={"image": "norm2", "text": "norm2_context"},
            ffn_modules={"image": "img_ffn", "text": "txt_ffn"},
            text_modules=("text_in", "text_out"),
            text_input=text_input,
        ),
    ),
    student_class="ppclc.students.sd3:PrunedSD3Transformer2DModel",
    text_end="none",
    has_dead_code=True,
    renumbered=renumbered,
    restored=restored,
    may_start=may_start,
    time_embedding="time_text_embed",
    basis_module="time_text_embed.modulation_basis",
    modulations={"norm1.linear": Modulation("image"), "norm1_context.linear": Modulation("text", input=(1, 0))},
    example_inputs=example_inputs,
    latents=latents,
    timestep_scale=1000.0,
    lowered=lowered,
    published={
        "stabilityai/stable-diffusion-3-medium-diffusers": MEDIUM,
        "stabilityai/stable-diffusion-3.5-medium": {
            **MEDIUM,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": list(range(13)),
        },
        "stabilityai/stable-diffusion-3.5-large": {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    },
    tiny_config={
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 5,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 12,
        "pos_embed_max_size": 24,
        "dual_attention_layers": (0, 1, 2),
        "qk_norm": "rms_norm",
    },
    text_tensors=("encoder_hidden_states", "pooled_projections"),
    encoders=Encoders(
        pipeline_classes=("StableDiffusion3Pipeline",),
        text_parts=("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
        image_parts=("vae",),
        encode_prompts=encode_prompts,
        encode_images=encode_images,
        decode=decode,
        pixels_per_token=_kl.pixels_per_token,
        text_tokens=text_tokens,
    ),
    fused=fused_by("_sd3_kernels"),
)
