"""FLUX.1 in one file under the names of its authors, as ComfyUI loads it.

Source: the names are those of github.com/black-forest-labs/flux (`src/flux/model.py`, `modules/layers.py`); queries, keys and
values are one linear map there, in a single block with the network's first. The last modulation gives shift, then scale, where
diffusers has scale, then shift.
"""

from __future__ import annotations

from typing import Any

from ppclc.families import Shapes, SingleFile, counted, rotary_axes

OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
SINGLE = {"norm.linear": "modulation.lin", "attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm", "proj_out": "linear2"}
STACKED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
"""What is one map there, in the order of its rows."""
GROUPS = {
    "transformer_blocks": ("double_blocks", DOUBLE, ("img_attn.qkv", "txt_attn.qkv")),
    "single_transformer_blocks": ("single_blocks", SINGLE, ("linear1",)),
}
"""Name of a list of blocks there, of the modules in a block, and which of them are stacked."""


def applies(shapes: Shapes) -> bool:
    """Whether a file is FLUX.1: Chroma has its blocks and no pooled text, FLUX.2 one modulation for all blocks."""
    return {
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "double_blocks.0.img_mod.lin.weight",
        "vector_in.in_layer.weight",
    } <= shapes.keys()


def config(shapes: Shapes) -> dict[str, Any]:
    """What names and shapes tell. Raises KeyError for a file that lacks what tells it."""
    width, channels = shapes["img_in.weight"]
    head_dim, out = shapes["double_blocks.0.img_attn.norm.key_norm.scale"][0], shapes["final_layer.linear.weight"][0]
    return {
        "num_layers": counted(shapes, "double_blocks"),
        "num_single_layers": counted(shapes, "single_blocks"),
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": rotary_axes(head_dim),
    }


def place(name: str) -> tuple[str, int]:
    """The name there of a tensor of ours, and its number in the stack."""
    module, _, kind = name.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{kind}", 0
    path, number, part = module.split(".", 2)
    theirs, names, stacks = GROUPS[path]
    for stack in stacks:
        if part in STACKED[stack]:
            return f"{theirs}.{number}.{stack}.{kind}", STACKED[stack].index(part)
    return f"{theirs}.{number}.{names[part]}.{'scale' if '_norm' in names[part] else kind}", 0


SINGLE_FILE = SingleFile(applies, config, place, swapped=("final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias"))
