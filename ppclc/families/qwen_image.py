"""Qwen-Image: `QwenImageTransformer2DModel`, one group of two-stream blocks, modulation by the timestep alone.

Shape suffixes: B batch, S image token, T text token, D width, C channel, P rotary pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ppclc.errors import VerificationError
from ppclc.families import (
    Encoders,
    Family,
    Group,
    Lowered,
    Modulation,
    Shapes,
    SingleFile,
    _oppo,
    counted,
    exportable_copy,
    fused_by,
    rotary_axes,
    typed,
)
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
    config: Mapping[str, Any],
    batch: int = 1,
    height: int = 4,
    width: int = 8,
    text: int = 5,
    generator: torch.Generator | None = None,
    references: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of forward: random latents of a `height` x `width` grid of tokens, random text, random timesteps.

    `references`: images of the same size beside it, as editing has them.
    """
    tokens = height * width * (1 + references)
    return {
        "hidden_states": torch.randn(batch, tokens, config["in_channels"], generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"], generator=generator),
        **grid_inputs(config, batch, height, width, text),
        "img_shapes": [[(1, height, width)] * (1 + references)] * batch,
    }


def grid_inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text: int) -> dict[str, Any]:
    """The grid of every sample: one frame of `height` x `width` tokens; and the condition beside the timestep that layered models take."""
    given: dict[str, Any] = {"img_shapes": [[(1, height, width)]] * batch}
    return given | ({"additional_t_cond": torch.zeros(batch, dtype=torch.int64)} if config.get("use_additional_t_cond") else {})


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


def position_ids(images: Sequence[tuple[int, int, int]], text: int, layered: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (S, 3) of image tokens and (T, 3) of text tokens, as the class's own rotary embeddings count them.

    `images`: frames, rows and columns of each. Images count on the first axis, where a layered model has -1 for the last;
    height and width count from the middle; text goes on, on all three axes, after the larger half.
    """
    found, start = [], (len(images) - 1) if layered else 0
    for number, (frames, height, width) in enumerate(images):
        first = torch.arange(frames) + number if not (layered and number == len(images) - 1) else torch.full((frames,), -1)
        rows = torch.arange(height) - (height - height // 2)
        columns = torch.arange(width) - (width - width // 2)
        found.append(torch.cartesian_prod(first, rows, columns))
        start = max(start, height // 2, width // 2)
    return torch.cat(found).float(), (torch.arange(text) + start)[:, None].expand(-1, 3).float().contiguous()


def images_of(ids: torch.Tensor) -> list[tuple[int, int, int]]:
    """Frames, rows and columns of the images that positions (S, 3) are of, each a frame of its own."""
    shapes = []
    for number in dict.fromkeys(ids[:, 0].tolist()):
        own = ids[ids[:, 0] == number, 1:]
        height, width = ((own.amax(0) - own.amin(0)).int() + 1).tolist()
        shapes.append((1, height, width))
    return shapes


class _Seen:
    """`images_of` the positions that were last asked about: to read them waits for a device, which no call that is timed or captured may."""

    def __init__(self) -> None:
        self.ids: torch.Tensor | None = None
        self.version, self.images = -1, list[tuple[int, int, int]]()

    def of(self, ids: torch.Tensor) -> list[tuple[int, int, int]]:
        """Frames, rows and columns."""
        if ids.is_inference():  # has no version that would tell of a change
            return images_of(ids)
        if ids is not self.ids or ids._version != self.version:
            self.ids, self.version, self.images = ids, ids._version, images_of(ids)
        return self.images


class ExportableQwenImage(nn.Module):
    """The transformer with positions as tensors and real-valued rotary embeddings, sharing the model's tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = exportable_copy(model)
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
        modulate_index: torch.Tensor | None = None,
        additional_t_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        m = self.model
        image = m.img_in(hidden_states)
        text = m.txt_in(m.txt_norm(encoder_hidden_states))
        timestep = timestep.to(image.dtype)
        if modulate_index is not None:
            timestep = torch.cat([timestep, timestep * 0])
        temb = m.time_text_embed(timestep, image, additional_t_cond)
        own = temb if modulate_index is None else temb.chunk(2)[0]
        rotary = (self.rotary(img_ids), self.rotary(txt_ids))
        for block in m.transformer_blocks:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=None,
                temb=temb,
                image_rotary_emb=rotary,
                modulate_index=modulate_index,
            )
        out: torch.Tensor = m.proj_out(m.norm_out(image, own))
        return out


def _one_operator(norm: Any) -> nn.RMSNorm:
    """diffusers' RMSNorm as PyTorch's, which lowers to one operator; the weight is shared."""
    single = nn.RMSNorm(norm.dim, eps=norm.eps, elementwise_affine=norm.weight is not None)
    if norm.weight is not None:
        single.weight = norm.weight
    return single


def lowered(model: Any) -> Lowered:
    """The model ready for torch.export, with dynamic batch, image and text lengths.

    What it takes beside positions: with `zero_cond_t`, by which of two timesteps each image token (B, S) is modulated.
    """
    config, images = dict(model.config), _Seen()
    zero, layered = bool(config.get("zero_cond_t")), bool(config.get("use_layer3d_rope"))

    def inputs(batch: int, height: int, width: int, text: int, references: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(batch + 10 * height + 100 * width + 1000 * text)
        example = example_inputs(config, batch, height, width, text, generator, references)
        image_ids, text_ids = position_ids(example.pop("img_shapes")[0], text, layered)
        names = ("hidden_states", "encoder_hidden_states", "timestep")
        given = {n: example.pop(n) for n in names} | {"img_ids": image_ids, "txt_ids": text_ids}
        if zero:
            given["modulate_index"] = (torch.arange(len(image_ids)) >= height * width).int().expand(batch, -1).contiguous()
        return typed(given | example, model.dtype)

    def reference(given: dict[str, Any]) -> torch.Tensor:
        kwargs = typed({k: v for k, v in given.items() if k not in ("img_ids", "txt_ids", "modulate_index")}, model.dtype)
        kwargs["img_shapes"] = [images.of(given["img_ids"])] * len(given["hidden_states"])
        out: torch.Tensor = model(**kwargs, return_dict=False)[0]
        return out

    dynamic: dict[str, dict[int, str]] = {
        "hidden_states": {0: "batch", 1: "image_tokens"},
        "encoder_hidden_states": {0: "batch", 1: "text_tokens"},
        "timestep": {0: "batch"},
        "img_ids": {0: "image_tokens"},
        "txt_ids": {0: "text_tokens"},
        "modulate_index": {0: "batch", 1: "image_tokens"},
        "additional_t_cond": {0: "batch"},
    }
    more = {"references": 1} if zero or layered else {}
    return Lowered(
        module=ExportableQwenImage(model).eval(),
        inputs=inputs,
        dynamic={name: axes for name, axes in dynamic.items() if name in inputs(1, 2, 2, 2)},
        ranges={"batch": (1, 1024), "image_tokens": (1, 65536), "text_tokens": (1, 4096)},
        sizes=(
            {"batch": 2, "height": 4, "width": 8, "text": 5, **more},
            {"batch": 1, "height": 6, "width": 10, "text": 9},
            {"batch": 3, "height": 8, "width": 4, "text": 3, **more},
        ),
        reference=reference,
    )


def exported_inputs(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Positions as tensors for the shapes that a pipeline gives, and by which timestep each image token is modulated.

    Raises:
        VerificationError: samples of different shapes, or text that is masked: the exported module has one set of positions and no mask.
    """
    shapes = given["img_shapes"]
    shapes = [s if isinstance(s, list) else [s] for s in shapes]
    if any(list(map(tuple, s)) != list(map(tuple, shapes[0])) for s in shapes):
        raise VerificationError(f"img_shapes = {shapes}: an exported Qwen-Image takes samples of one shape; run them one by one")
    mask = given.get("encoder_hidden_states_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise VerificationError("encoder_hidden_states_mask leaves out text: an exported Qwen-Image takes no mask; run prompts one by one")
    hidden, text = given["hidden_states"], given["encoder_hidden_states"]
    img_ids, txt_ids = position_ids(shapes[0], text.shape[1], bool(config.get("use_layer3d_rope")))
    found: dict[str, Any] = {"img_ids": img_ids.to(hidden.device), "txt_ids": txt_ids.to(hidden.device)}
    if config.get("zero_cond_t"):
        first = math.prod(shapes[0][0])
        index = (torch.arange(hidden.shape[1], device=hidden.device) >= first).int()
        found["modulate_index"] = index.expand(hidden.shape[0], -1).contiguous()
    return found


EDITS_AT_ZERO = "__index_timestep_zero__"
"""What ComfyUI knows Qwen-Image-Edit-2511 by, whose references are modulated at timestep 0: an empty tensor of this name."""


def file_config(shapes: Shapes) -> dict[str, Any]:
    """What names and shapes of a single file tell, whose names are diffusers' own. Raises KeyError for a file that lacks what tells it."""
    width, channels = shapes["img_in.weight"]
    head_dim, side = shapes["transformer_blocks.0.attn.norm_q.weight"][0], 2
    found: dict[str, Any] = {
        "num_layers": counted(shapes, "transformer_blocks"),
        "patch_size": side,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // side**2,
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": rotary_axes(head_dim),
    }
    if "time_text_embed.addition_t_embedding.weight" in shapes:
        found |= {"use_additional_t_cond": True, "use_layer3d_rope": True}
    return found | ({"zero_cond_t": True} if EDITS_AT_ZERO in shapes else {})


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
    published={"Qwen/Qwen-Image": {}, "Qwen/Qwen-Image-Edit-2511": {"zero_cond_t": True}},
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
        pipeline_classes=("QwenImagePipeline",),
        text_parts=("text_encoder", "tokenizer"),
        image_parts=("vae",),
        encode_prompts=encode_prompts,
        encode_images=encode_images,
        decode=decode,
        pixels_per_token=pixels_per_token,
    ),
    layouts=(_oppo.LAYOUT,),
    exported_inputs=exported_inputs,
    float16_overflow="NaN on real weights: github.com/Comfy-Org/ComfyUI/issues/10751",
    single_file=SingleFile(
        applies=lambda shapes: {"txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"} <= shapes.keys(),
        config=file_config,
        markers=lambda config: (EDITS_AT_ZERO,) if config.get("zero_cond_t") else (),
    ),
    fused=fused_by("_qwen_image_kernels"),
)
