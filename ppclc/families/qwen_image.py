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
from ppclc.families import Bank, Encoders, Family, Group, Lowered, Part, Tensors
from ppclc.plan import CompressionPlan
from ppclc.students.qwen_image import JointAttention, TextRole, text_roles

BLOCKS = Group(
    name="transformer_blocks",
    path="transformer_blocks",
    count_key="num_layers",
    streams={"image": "hidden_states", "text": "encoder_hidden_states"},
    outputs=("text", "image"),
)


FFN_MAPS = {"img_ffn": "image", "txt_ffn": "text"}
"""Streams of the modules that stand where a feed-forward network was made linear."""
ADAPTERS = ("image_adapter", "text_adapter")
"""Modules in front of a block, named by their stream."""
MODULATED = {"img_mod": "image", "txt_mod": "text"}


def student_config(config: Mapping[str, Any], plan: CompressionPlan) -> dict[str, Any]:
    """Constructor arguments of the student.

    Raises:
        PlanError: a text feed-forward network to be made linear that dead-code removal leaves out; a modulation rank above the width.
    """
    width = int(config["attention_head_dim"]) * int(config["num_attention_heads"])
    if (plan.modulation_rank or 0) > width:
        raise PlanError(f"plan.modulation_rank = {plan.modulation_rank}: wanted at most the width, {width}")
    edited = {k: v for k, v in config.items() if not k.startswith("_")} | {"num_layers": len(plan.kept)}
    if plan.has_width_edits:
        edited["modulation_rank"] = plan.modulation_rank
        edited["mapped_text_blocks"] = [plan.student_block(e.block) for e in plan.text_stream]
        edited["dead_code"] = plan.dead_code
    if plan.ffn:
        for edit in plan.ffn:
            if edit.stream == "text" and not _role(plan, edit.block).emits_text:
                raise PlanError(
                    f"plan.ffn: block {edit.block}, text: this is the last block that reads text, so dead_code removes its feed-forward "
                    "network already; wanted this edit left out, or dead_code: false"
                )
        for stream in FFN_MAPS.values():
            edited[f"linear_ffn_{stream}_blocks"] = [plan.student_block(e.block) for e in plan.ffn if e.stream == stream]
    if plan.adapters:
        edited["adapted_blocks"] = [plan.student_block(i.first) for i in plan.adapters]
    return edited


def _role(plan: CompressionPlan, block: int) -> TextRole:
    mapped = [plan.student_block(e.block) for e in plan.text_stream]
    return text_roles(len(plan.kept), mapped, plan.dead_code)[plan.student_block(block)]


def student_tensor(name: str, plan: CompressionPlan, teacher: Tensors, bank: Bank) -> torch.Tensor:
    """One tensor of the student, from the teacher's tensors and the bank.

    Raises:
        PlanError: the bank lacks the maps or the basis that the plan needs.

    A distilled block's tensors of a feed-forward network that is linear in the student are not read, nor a text
    adapter where text is mapped. Adapters that the bank lacks are the identity.
    """
    if name.startswith("time_text_embed.modulation_basis."):
        basis, mean = _basis(plan, bank)
        return basis.T.contiguous() if name.endswith("weight") else -(basis.T @ mean)
    if not name.startswith(BLOCKS.path + "."):
        return teacher[name]  # type: ignore[no-any-return]
    _, number, part = name.split(".", 2)
    block = plan.kept[int(number)]
    if part.startswith(("text_in.", "text_out.")):
        return _from_bank(bank, text_key(plan, block))[part]  # type: ignore[no-any-return]
    if (module := part.split(".")[0]) in FFN_MAPS:
        return _from_bank(bank, plan.ffn_key(block, FFN_MAPS[module]))[part.removeprefix(f"{module}.")]  # type: ignore[no-any-return]
    interval = plan.interval_at(block)
    source = bank.get(plan.interval_key(interval)) if interval else None
    if source is None:
        if module in ADAPTERS:
            width = len(teacher["img_in.bias"])
            return torch.eye(width) if part.endswith("weight") else torch.zeros(width)
        source = Part(teacher, f"{BLOCKS.path}.{block}.")
    if part.startswith(("img_mod.", "txt_mod.")):
        return _modulation(part, plan, source, bank, block)
    return source[part]  # type: ignore[no-any-return]


def text_key(plan: CompressionPlan, block: int) -> str:
    """Name in the bank of a text-stream edit's maps: block and reference with the ends of their intervals."""
    reference = next(e.reference for e in plan.text_stream if e.block == block)
    return f"text-{block}-{plan.end_name(block)}-{reference}-{plan.end_name(reference)}"


def _modulation(part: str, plan: CompressionPlan, source: Tensors, bank: Bank, block: int) -> torch.Tensor:
    mod = part.split(".")[0]
    weight, bias = source[f"{mod}.1.weight"], source[f"{mod}.1.bias"]
    if mod == "txt_mod" and plan.has_width_edits and not _role(plan, block).emits_text:
        # The first two of six chunks: shift and scale before attention.
        weight, bias = weight[: len(weight) // 3], bias[: len(bias) // 3]
    elif any(e.block == block and e.stream == MODULATED[mod] for e in plan.ffn):
        # The first three: shift and scale before attention, and its gate.
        weight, bias = weight[: len(weight) // 2], bias[: len(bias) // 2]
    if plan.modulation_rank is None:
        return weight if part.endswith("weight") else bias  # type: ignore[no-any-return]
    basis, mean = _basis(plan, bank)
    weight, bias = weight.to(basis.dtype), bias.to(basis.dtype)
    return (weight @ basis) if part.endswith("weight") else weight @ mean + bias  # type: ignore[no-any-return]


def _basis(plan: CompressionPlan, bank: Bank) -> tuple[torch.Tensor, torch.Tensor]:
    parts = _from_bank(bank, "modulation")
    if plan.modulation_rank is None or plan.modulation_rank > len(parts["mean"]):
        raise PlanError(f"plan.modulation_rank = {plan.modulation_rank}: wanted at most the width, {len(parts['mean'])}")
    return parts["basis"][:, : plan.modulation_rank], parts["mean"]


def _from_bank(bank: Bank, key: str) -> Tensors:
    if key not in bank:
        raise PlanError(f"the bank holds no {key!r}, which this plan needs; it has {', '.join(sorted(bank)) or 'nothing'}")
    return bank[key]


def text_input(block: Any, text_BTD: torch.Tensor, temb_BD: torch.Tensor) -> torch.Tensor:
    """The modulated text state of a stock block, which feeds its text keys and values."""
    modulated: torch.Tensor = block._modulate(block.txt_norm1(text_BTD), block.txt_mod(temb_BD).chunk(2, dim=-1)[0])[0]
    return modulated


def example_inputs(
    config: Mapping[str, Any], batch: int = 1, height: int = 4, width: int = 8, text: int = 5, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Keyword arguments of forward: random latents of a `height` x `width` grid of tokens, random text, random timesteps."""
    return {
        "hidden_states": torch.randn(batch, height * width, config["in_channels"], generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"], generator=generator),
        **grid_inputs(batch, height, width, text),
    }


def grid_inputs(batch: int, height: int, width: int, text: int) -> dict[str, Any]:
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
    student_config=student_config,
    student_tensor=student_tensor,
    time_embedding="time_text_embed",
    text_input=text_input,
    text_key=text_key,
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
    ffn_inputs={"image": "img_norm2", "text": "txt_norm2"},
    ffn_modules={stream: module for module, stream in FFN_MAPS.items()},
    text_modules=("text_in", "text_out"),
    grid_inputs=grid_inputs,
    encoders=Encoders(
        pipeline_class="QwenImagePipeline",
        text_parts=("text_encoder", "tokenizer"),
        image_parts=("vae",),
        encode_prompts=encode_prompts,
        encode_images=encode_images,
        pixels_per_token=pixels_per_token,
    ),
)
