"""Qwen-Image: `QwenImageTransformer2DModel`, one group of two-stream blocks, modulation by the timestep alone.

Shape suffixes: B batch, S image token, T text token, D width, C channel, P rotary pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ppclc.errors import PlanError
from ppclc.families import Encoders, Family, Group, Lowered, Modulation, _oppo
from ppclc.students.qwen_image import JointAttention


def text_input(block: Any, text_BTD: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
    """The modulated text state of a stock block, which feeds its text keys and values."""
    temb_BD = given["temb"].chunk(2, dim=0)[0] if block.zero_cond_t else given["temb"]
    modulated: torch.Tensor = block._modulate(block.txt_norm1(text_BTD), block.txt_mod(temb_BD).chunk(2, dim=-1)[0])[0]
    return modulated


BLOCKS = Group(
    name="transformer_blocks",
    path="transformer_blocks",
    count_key="num_layers",
    ffn_inputs={"image": "img_norm2", "text": "txt_norm2"},
    ffn_modules={"image": "img_ffn", "text": "txt_ffn"},
    text_modules=("text_in", "text_out"),
    text_input=text_input,
)


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
    """The grid of every sample: one frame of `height` x `width` tokens."""
    return {"img_shapes": [[(1, height, width)]] * batch}


def encode_prompts(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
    """Text states (B, T, E) of the pipeline's own text encoder, and their mask (B, T) where prompts differ in length."""
    states, mask = pipeline.encode_prompt(prompts)
    return {"encoder_hidden_states": states} | ({} if mask is None else {"encoder_hidden_states_mask": mask})


def encode_images(pipeline: Any, images: torch.Tensor) -> torch.Tensor:
    """Packed latents (B, S, C) of images (B, 3, H, W) in -1..1: the VAE's mode, normalised by its own mean and deviation.

    The sampler undoes just that: it multiplies by `latents_std` and adds `latents_mean` before it decodes.
    """
    vae = pipeline.vae
    latents = vae.encode(images[:, :, None].to(vae.dtype)).latent_dist.mode()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1).to(latents) for v in (vae.config.latents_mean, vae.config.latents_std))
    latents = ((latents - mean) / std)[:, :, 0]
    packed: torch.Tensor = pipeline._pack_latents(latents, *latents.shape)
    return packed


def decode(pipeline: Any, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Images (B, 3, H, W) in 0..1 of packed latents, as the pipeline does at its end."""
    vae = pipeline.vae
    height, width = (2 * side * pipeline.vae_scale_factor for side in grid)
    z = pipeline._unpack_latents(latents.to(vae.dtype), height, width, pipeline.vae_scale_factor)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1).to(z) for v in (vae.config.latents_mean, vae.config.latents_std))
    images: torch.Tensor = vae.decode(z * std + mean, return_dict=False)[0][:, :, 0]
    return (images.float() / 2 + 0.5).clamp(0, 1)


def pixels_per_token(vae_config: Mapping[str, Any]) -> int:
    """Side of the square of pixels that one token stands for: the VAE halves once a stage, packing once more."""
    return int(2 ** (len(vae_config.get("temperal_downsample", (False, True, True))) + 1))


def position_ids(height: int, width: int, text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (S, 3) of image tokens and (T, 3) of text tokens, as the class's own rotary embedding counts them.

    Height and width count from the middle; text goes on, on all three axes, after the larger half.
    """
    rows = torch.arange(height) - (height - height // 2)
    columns = torch.arange(width) - (width - width // 2)
    image = torch.stack([torch.zeros(height, width, dtype=torch.int64), *torch.meshgrid(rows, columns, indexing="ij")], -1)
    start = max(height // 2, width // 2)
    return image.reshape(-1, 3).float(), (torch.arange(text) + start)[:, None].expand(-1, 3).float().contiguous()


class ExportableQwenImage(nn.Module):
    """The transformer with positions as tensors and real-valued rotary embeddings, sharing the model's tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        self.model = copy.deepcopy(model, memo=dict(shared))
        for block in self.model.transformer_blocks:
            block.attn.set_processor(JointAttention())
            for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                if hasattr(block.attn, name):
                    setattr(block.attn, name, _one_operator(getattr(block.attn, name)))
        frequencies = [10000 ** -(torch.arange(0, d, 2).float() / d) for d in model.config.axes_dims_rope]
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", torch.cat(frequencies), persistent=False)
        self.axes = [d // 2 for d in model.config.axes_dims_rope]

    def rotary(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (S, P) of positions (S, 3)."""
        spread = torch.cat([ids[:, i : i + 1].expand(-1, n) for i, n in enumerate(self.axes)], dim=1)
        angles = spread * self.frequencies
        return angles.cos(), angles.sin()

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
    ) -> torch.Tensor:
        m = self.model
        image = m.img_in(hidden_states)
        text = m.txt_in(m.txt_norm(encoder_hidden_states))
        temb = m.time_text_embed(timestep.to(image.dtype), image)
        rotary = (self.rotary(img_ids), self.rotary(txt_ids))
        for block in m.transformer_blocks:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=None,
                temb=temb,
                image_rotary_emb=rotary,
            )
        out: torch.Tensor = m.proj_out(m.norm_out(image, temb))
        return out


def _one_operator(norm: Any) -> nn.RMSNorm:
    """diffusers' RMSNorm as PyTorch's, which lowers to one operator; the weight is shared."""
    single = nn.RMSNorm(norm.dim, eps=norm.eps, elementwise_affine=norm.weight is not None)
    if norm.weight is not None:
        single.weight = norm.weight
    return single


def lowered(model: Any) -> Lowered:
    """The model ready for torch.export, with dynamic batch, image and text lengths.

    Raises:
        PlanError: a configuration whose forward needs more inputs than the exported one has.
    """
    for key in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
        if model.config.get(key):
            raise PlanError(f"config.json: {key} = true: export of this variant is not supported; wanted false")
    config = dict(model.config)

    def inputs(batch: int, height: int, width: int, text: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(batch + 10 * height + 100 * width + 1000 * text)
        example = example_inputs(config, batch, height, width, text, generator)
        image_ids, text_ids = position_ids(height, width, text)
        names = ("hidden_states", "encoder_hidden_states", "timestep")
        return {n: example[n] for n in names} | {"img_ids": image_ids, "txt_ids": text_ids}

    def reference(given: dict[str, Any]) -> torch.Tensor:
        ids = given["img_ids"][:, 1:]
        height, width = ((ids.amax(0) - ids.amin(0)).int() + 1).tolist()
        kwargs = {k: v.to(model.dtype) for k, v in given.items() if not k.endswith("_ids")}
        kwargs["img_shapes"] = [[(1, height, width)]] * len(given["hidden_states"])
        out: torch.Tensor = model(**kwargs, return_dict=False)[0]
        return out

    return Lowered(
        module=ExportableQwenImage(model).eval(),
        inputs=inputs,
        dynamic={
            "hidden_states": {0: "batch", 1: "image_tokens"},
            "encoder_hidden_states": {0: "batch", 1: "text_tokens"},
            "timestep": {0: "batch"},
            "img_ids": {0: "image_tokens"},
            "txt_ids": {0: "text_tokens"},
        },
        ranges={"batch": (1, 1024), "image_tokens": (1, 65536), "text_tokens": (1, 4096)},
        sizes=(
            {"batch": 2, "height": 4, "width": 8, "text": 5},
            {"batch": 1, "height": 6, "width": 10, "text": 9},
            {"batch": 3, "height": 8, "width": 4, "text": 3},
        ),
        reference=reference,
    )


PLUGIN = Family(
    name="qwen_image",
    class_name="QwenImageTransformer2DModel",
    groups=(BLOCKS,),
    student_class="ppclc.students.qwen_image:PrunedQwenImageTransformer2DModel",
    text_end="dead",
    has_dead_code=True,
    time_embedding="time_text_embed",
    basis_module="time_text_embed.modulation_basis",
    modulations={"img_mod.1": Modulation("image"), "txt_mod.1": Modulation("text")},
    example_inputs=example_inputs,
    lowered=lowered,
    tiny_config={
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 3,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
    grid_inputs=grid_inputs,
    encoders=Encoders(
        pipeline_class="QwenImagePipeline",
        text_parts=("text_encoder", "tokenizer"),
        image_parts=("vae",),
        encode_prompts=encode_prompts,
        encode_images=encode_images,
        decode=decode,
        pixels_per_token=pixels_per_token,
    ),
    layouts=(_oppo.LAYOUT,),
)
