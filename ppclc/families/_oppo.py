"""Qwen-Image students as OPPO publishes them (Qwen-Image-12B and -10B), read as students of ours.

Their configuration is the stock one with three lists of blocks beside it. What their blocks hold, a fact of their code
(github.com/OPPO-Mente-Lab/Qwen-Image-Pruning):

- `single_stream_index`: blocks whose text stream is gone. `txt_proj` maps the modulated text state that the block before fed to its
  own text keys and values, so that maps follow each other along a run; the state itself passes by.
- `ehs_proj_index`: of those, the ones that add `ehs_proj(h)` to the text state, at the end of a run.
- `ffn_proj_index`: blocks whose networks are one linear map a stream, `h + (W h + b)`, and whose modulation has its first half alone.

Text queries and outputs of a block without a text stream are in their files and are never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ppclc.families import Layout, Tensors

BLOCKS = "transformer_blocks"
KEYS = ("single_stream_index", "ffn_proj_index", "ehs_proj_index")
FFN = {"img_ffn": "img_ffn_proj", "txt_ffn": "txt_ffn_proj"}
UNREAD = ("attn.add_q_proj.", "attn.norm_added_q.", "attn.to_add_out.")


def applies(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of this layout."""
    return any(key in config for key in KEYS)


def config(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The same student's configuration of ours."""
    mapped, linear = ([int(b) for b in stored.get(key) or []] for key in KEYS[:2])
    own = {k: v for k, v in stored.items() if k not in KEYS}
    return own | {
        "_class_name": "PrunedQwenImageTransformer2DModel",
        "modulation_rank": None,
        "mapped_text_blocks": sorted(mapped),
        "dead_code": False,
        "linear_ffn_image_blocks": sorted(linear),
        "linear_ffn_text_blocks": sorted(set(linear) - set(mapped)),
        "adapted_blocks": None,
    }


def tensor(name: str, stored: Mapping[str, Any], tensors: Tensors) -> torch.Tensor:
    """One tensor of ours, from theirs."""
    if not name.startswith(f"{BLOCKS}."):
        return tensors[name]  # type: ignore[no-any-return]
    _, number, part = name.split(".", 2)
    block, kind = int(number), part.rpartition(".")[2]
    module = part.split(".")[0]
    if module == "text_in":
        weight, bias = _text_in(block, stored, tensors)
        return weight if kind == "weight" else bias
    if module == "text_out":
        weight, bias = _text_out(block, stored, tensors)
        return weight if kind == "weight" else bias
    if module in FFN:
        return tensors[f"{BLOCKS}.{block}.{FFN[module]}.{kind}"]  # type: ignore[no-any-return]
    return tensors[name]  # type: ignore[no-any-return]


def unread(name: str, stored: Mapping[str, Any]) -> bool:
    """Whether a tensor of theirs has no part in the result."""
    if not name.startswith(f"{BLOCKS}."):
        return False
    _, number, part = name.split(".", 2)
    return int(number) in (stored.get("single_stream_index") or []) and part.startswith(UNREAD)


def _run(block: int, stored: Mapping[str, Any]) -> range:
    """The run of blocks without text that a block stands in, from its first to itself."""
    mapped, first = set(stored.get("single_stream_index") or []), block
    while first - 1 in mapped:
        first -= 1
    return range(first, block + 1)


def _text_in(block: int, stored: Mapping[str, Any], tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps of a run up to a block as one, made in float64: theirs follow each other, ours all start at the last full block."""
    whole: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    for b in _run(block, stored):
        weight, bias = (tensors[f"{BLOCKS}.{b}.txt_proj.{kind}"] for kind in ("weight", "bias"))
        dtype = weight.dtype
        weight, bias = weight.double(), bias.double()
        whole, shift = (weight, bias) if whole is None or shift is None else (weight @ whole, weight @ shift + bias)
    assert whole is not None
    assert shift is not None
    return whole.to(dtype), shift.to(dtype)


def _text_out(block: int, stored: Mapping[str, Any], tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """What a run does to the text state as one map, made in float64: the identity but for the maps that are added."""
    like = tensors[f"{BLOCKS}.{block}.txt_proj.weight"]
    whole = torch.eye(len(like), dtype=torch.float64)
    shift = torch.zeros(len(like), dtype=torch.float64)
    for b in _run(block, stored):
        if b in (stored.get("ehs_proj_index") or []):
            weight, bias = (tensors[f"{BLOCKS}.{b}.ehs_proj.{kind}"].double() for kind in ("weight", "bias"))
            whole, shift = whole + weight @ whole, shift + weight @ shift + bias
    return whole.to(like.dtype), shift.to(like.dtype)


LAYOUT = Layout(applies, config, tensor, unread)
