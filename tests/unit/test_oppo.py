"""Students as OPPO publishes them: read, and equal to a forward pass of their layout written from its description."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ppclc.errors import ModelError
from ppclc.families import Family
from ppclc.loading.checkpoints import WEIGHTS
from ppclc.loading.classes import count_parameters
from ppclc.models import blocks_of, load_model
from ppclc.passes.export import export_model
from tests.tracing import trace

SINGLE, FFN, EHS = [2, 3, 5], [0, 3], [3, 5]


class Reference(nn.Module):
    """A block of theirs, of a stock block: maps in place of the text half, of the networks, or of both."""

    def __init__(self, block: Any, single: bool, ffn: bool, ehs: bool) -> None:
        super().__init__()
        self.block, self.single, self.ffn, d = block, single, ffn, block.dim
        self.txt_proj = nn.Linear(d, d) if single else None
        self.ehs_proj = nn.Linear(d, d) if ehs else None
        self.img_ffn_proj = nn.Linear(d, d) if ffn else None
        self.txt_ffn_proj = nn.Linear(d, d) if ffn and not single else None

    def forward(self, image: torch.Tensor, text: torch.Tensor, fed: torch.Tensor | None, temb: torch.Tensor, rotary: Any) -> Any:
        b, d = self.block, self.block.dim

        def first(mod: torch.Tensor, norm: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            shift, scale, gate = mod[:, : 3 * d].chunk(3, dim=-1)
            return norm(x) * (1 + scale[:, None]) + shift[:, None], gate[:, None]

        def second(mod: torch.Tensor, norm: Any, mlp: Any, x: torch.Tensor) -> torch.Tensor:
            shift, scale, gate = mod[:, 3 * d :].chunk(3, dim=-1)
            return x + gate[:, None] * mlp(norm(x) * (1 + scale[:, None]) + shift[:, None])

        mod = b.img_mod(temb)
        modulated, gate = first(mod, b.img_norm1, image)
        if self.txt_proj is not None:
            assert fed is not None
            fed = self.txt_proj(fed)
            text_gate = None
        else:
            text_mod = b.txt_mod(temb)
            fed, text_gate = first(text_mod, b.txt_norm1, text)
        attended, text_attended = b.attn(
            hidden_states=modulated, encoder_hidden_states=fed, encoder_hidden_states_mask=None, image_rotary_emb=rotary
        )
        image = image + gate * attended
        image = image + self.img_ffn_proj(image) if self.img_ffn_proj else second(mod, b.img_norm2, b.img_mlp, image)
        if text_gate is not None:
            text = text + text_gate * text_attended
            text = text + self.txt_ffn_proj(text) if self.txt_ffn_proj else second(text_mod, b.txt_norm2, b.txt_mlp, text)
        elif self.ehs_proj is not None:
            text = self.ehs_proj(text) + text
        return image, text, fed


@pytest.fixture(scope="module")
def published(make_teacher: Callable[..., Any], family: Family, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder in their layout with random weights, and the model with blocks of theirs."""
    model = make_teacher(7)
    torch.manual_seed(3)
    blocks = [Reference(b, i in SINGLE, i in FFN, i in EHS).eval().requires_grad_(False) for i, b in enumerate(blocks_of(model, family))]
    tensors = {k: v for k, v in model.state_dict().items() if not k.startswith("transformer_blocks.")}
    gone = {True: ("txt_mod.", "txt_mlp."), False: ()}
    for i, block in enumerate(blocks):
        for name, tensor in block.state_dict().items():
            own = name.removeprefix("block.")
            if own.startswith(gone[i in SINGLE]) or (i in FFN and own.startswith(("img_mlp.", "txt_mlp."))):
                continue
            if i in FFN and own.startswith(("img_mod.", "txt_mod.")):
                tensor = tensor[: len(tensor) // 2]
            tensors[f"transformer_blocks.{i}.{own}"] = tensor.contiguous()
    folder: Path = tmp_path_factory.mktemp("oppo")
    config = {"_class_name": family.class_name, **model.config, "single_stream_index": SINGLE, "ffn_proj_index": FFN, "ehs_proj_index": EHS}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder, model, blocks


def test_the_outputs_are_those_of_their_forward(published: Any, family: Family) -> None:
    folder, model, blocks = published
    inputs = family.example_inputs(model.config, batch=2, generator=torch.Generator().manual_seed(1))
    seen = trace(model, family, inputs)
    image, text, fed = seen.states["image"][0], seen.states["text"][0], None
    shared = seen.shared[0]
    with torch.no_grad():
        for block in blocks:
            image, text, fed = block(image, text, fed, shared["temb"], shared["image_rotary_emb"])
        wanted = model.proj_out(model.norm_out(image, shared["temb"]))
        student = load_model(folder)
        got = student(**inputs, return_dict=False)[0]
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert type(student).__name__ == "PrunedQwenImageTransformer2DModel"
    stored = sum(t.numel() for t in load_file(folder / WEIGHTS).values())
    d = model.inner_dim
    # Text queries, their norm and the text output of three blocks are in their files for nothing; one block of a run has no map of its own.
    unread = len(SINGLE) * (2 * (d * d + d) + model.config.attention_head_dim)
    assert count_parameters(student) == stored - unread


@pytest.mark.slow
@pytest.mark.long
def test_it_can_be_exported(published: Any, family: Family, tmp_path: Path) -> None:
    folder, _, _ = published
    export = export_model(load_model(folder), family, "onnx", "float32", tmp_path / "onnx", "digest")
    assert export.parity.max_abs <= 1e-4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"single_stream_index": [2]}, "missing"),
        ({"ffn_proj_index": [0]}, r"transformer_blocks.3.img_mod.1.weight comes out as \[96, 32\], wanted \[192, 32\]"),
        ({"ehs_proj_index": [5]}, "2 tensors are not of this layout, transformer_blocks.3.ehs_proj.bias first"),
    ],
)
def test_lists_that_do_not_fit_the_weights_are_refused(published: Any, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder, _, _ = published
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (tmp_path / WEIGHTS).symlink_to(folder / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(config | changes), "utf-8")
    with pytest.raises(ModelError, match=words):
        load_model(tmp_path)
