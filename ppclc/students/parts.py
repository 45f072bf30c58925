"""What the width-edited classes of several families share. Needs torch and diffusers only: its text travels in front of each class.

Shape suffixes: B batch, S token, D width, H head.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn


class Travelling:
    """A model whose class goes where its weights are saved, as one file, so that they load there and from there again.

    diffusers writes `__module__` of a model into the index of a pipeline that is saved with it, and looks there for a file of that name.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        kind: Any = type(self)
        self.__module__ = travelling_file(kind)[0]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        bring_class(type(self), Path(save_directory))


def bring_class(kind: Any, home: Path) -> None:
    """Put a class beside its weights and name it in `auto_map`."""
    name, text = travelling_file(kind)
    (home / f"{name}.py").write_text(text, "utf-8")
    config = json.loads((home / "config.json").read_text("utf-8")) | {"auto_map": {"AutoModel": f"{name}.{kind.__name__}"}}
    (home / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


@cache
def travelling_file(kind: Any) -> tuple[str, str]:
    """Name, made from the content, and text of the one file that a class travels as: its module with this one in front, or where it came from."""
    home = Path(str(sys.modules[kind.__module__].__file__))
    text = home.read_text("utf-8")
    package = "ppclc.students.parts"
    if f"from {package} import" not in text:
        return home.stem, text
    future = "from __future__ import annotations\n"
    parts, own = (t.split(future, 1) for t in ((home.parent / "parts.py").read_text("utf-8"), text))
    imports = re.compile(rf"^from {re.escape(package)} import (\([^)]*\)|.*)\n", re.MULTILINE)
    whole = own[0] + future + parts[1].rstrip() + "\n\n\n" + imports.sub("", own[1]).lstrip()
    return f"ppclc_{home.stem}_{hashlib.sha256(whole.encode()).hexdigest()[:12]}", whole


@dataclass(frozen=True)
class TextRole:
    """What a block does with text.

    mapped: keys and values come from a map of another block's state. emits_text: the text state is
    computed and passed on. emits_input: the modulated state `z` is passed on, behind the text state.
    """

    mapped: bool
    emits_text: bool
    emits_input: bool


def text_roles(num_layers: int, mapped_text_blocks: list[int] | None, last_emits: bool) -> list[TextRole]:
    """The role of every block that has a text stream; `last_emits` says whether the text after the last of them is computed.

    Raises ValueError when a mapped block has no full block before it.
    """
    mapped = set(mapped_text_blocks or [])
    if mapped and (min(mapped) < 1 or max(mapped) >= num_layers):
        raise ValueError(f"mapped_text_blocks = {sorted(mapped)}: wanted blocks within 1..{num_layers - 1}")
    roles = []
    for i in range(num_layers):
        next_full = next((j for j in range(i + 1, num_layers) if j not in mapped), None)
        followed = i + 1 < num_layers and i + 1 in mapped
        read = next_full is not None or last_emits
        if i in mapped:
            roles.append(TextRole(True, emits_text=read and not followed, emits_input=followed))
        else:
            roles.append(TextRole(False, emits_text=read, emits_input=followed))
    return roles


def check_linear_ffn(image: list[int] | None, text: list[int] | None, roles: list[TextRole]) -> None:
    """Raise ValueError for a block that is not there, or whose text feed-forward network is gone already."""
    for name, blocks in (("image", image or []), ("text", text or [])):
        if any(not 0 <= b < len(roles) for b in blocks):
            raise ValueError(f"linear_ffn_{name}_blocks = {blocks}: wanted blocks within 0..{len(roles) - 1}")
    gone = [b for b in text or [] if roles[b].mapped or not roles[b].emits_text]
    if gone:
        raise ValueError(f"linear_ffn_text_blocks = {text}: blocks {gone} compute no text after attention, wanted blocks that do")


def check_adapted(blocks: list[int] | None, num_layers: int) -> None:
    """Raise ValueError for a block that is not there."""
    if any(not 0 <= b < num_layers for b in blocks or []):
        raise ValueError(f"adapted_blocks = {blocks}: wanted blocks within 0..{num_layers - 1}")


class LastFeatures(nn.Module):
    """The last `count` features of its input."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., -self.count :]


class FirstFeatures(nn.Module):
    """SiLU of the first `count` features of its input."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x[..., : self.count])


def project_modulation(time_embedding: Any, norm_out: Any, dim: int, rank: int) -> None:
    """Have a time embedding put its `rank` modulation coordinates behind `temb` (B, D), and the output norm read `temb` alone.

    The module keeps its names and gets a linear map, `modulation_basis`, beside them.
    """
    kind = type(time_embedding)

    class Projected(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            temb = super().forward(*args, **kwargs)
            return torch.cat([temb, self.modulation_basis(nn.functional.silu(temb))], dim=-1)

    time_embedding.__class__ = Projected
    time_embedding.modulation_basis = nn.Linear(dim, rank)
    norm_out.silu = FirstFeatures(dim)


def narrow_modulation(module: Any, activation: str, rank: int | None, dim: int, chunks: int) -> None:
    """Have a module's `linear` give so many chunks of the width, from the `rank` coordinates where there is a rank."""
    if rank is not None:
        setattr(module, activation, LastFeatures(rank))
    module.linear = nn.Linear(rank or dim, chunks * dim, bias=rank is not None or module.linear.bias is not None)


class JointTextAttention:
    """Attention of image over text and image, and of text over both where text queries are left. Text stands before image.

    Returns the image's result and the text's, or None. `image_rotary_emb`: cos and sin (S, head), or None.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        length, queries_text = encoder_hidden_states.shape[1], hasattr(attn, "add_q_proj")

        def heads(x: torch.Tensor, norm: Any = None) -> torch.Tensor:
            x = x.unflatten(-1, (attn.heads, -1))
            return x if norm is None else norm(x)

        def rotated(x: torch.Tensor, first: int) -> torch.Tensor:
            if image_rotary_emb is None:
                return x
            turned: torch.Tensor = apply_rotary_emb(x, tuple(f[first:] for f in image_rotary_emb), sequence_dim=1)
            return turned

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = torch.cat(
            [heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k), heads(attn.to_k(hidden_states), attn.norm_k)], dim=1
        )
        value = torch.cat([heads(attn.add_v_proj(encoder_hidden_states)), heads(attn.to_v(hidden_states))], dim=1)
        if queries_text:
            query = torch.cat([heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q), query], dim=1)
        result = dispatch_attention_fn(
            rotated(query, 0 if queries_text else length),
            rotated(key, 0),
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        result = result.flatten(2, 3).to(query.dtype)
        own = length if queries_text else 0
        image = attn.to_out[1](attn.to_out[0](result[:, own:].contiguous()))
        return image, attn.to_add_out(result[:, :own].contiguous()) if queries_text and hasattr(attn, "to_add_out") else None


def add_adapters(block: Any, dim: int, text: bool) -> None:
    """Put linear maps of the incoming states in front of a block, for text as well or not."""
    block.image_adapter = nn.Linear(dim, dim)
    if text:
        block.text_adapter = nn.Linear(dim, dim)


def adapted(block: Any, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both states behind the maps that a block has."""
    image = block.image_adapter(image) if hasattr(block, "image_adapter") else image
    return image, block.text_adapter(text) if hasattr(block, "text_adapter") else text


LINEAR_FFN = {"image": "img_ffn", "text": "txt_ffn"}
"""The linear map that stands in a feed-forward network's place, by stream."""


class Chains:
    """The chains of operators around a block's attention and networks, in plain PyTorch. Subclasses may compute them otherwise."""

    def modulated(self, norm: Any, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """A state, normed and modulated."""
        normed: torch.Tensor = norm(x)
        return normed * (1 + scale) + shift

    def gated(self, x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """A state with what is added to it behind its gate."""
        return x + gate * y


@dataclass(frozen=True)
class Chunks:
    """Shift, scale and gate, each (B or 1, 1, D); a gate is not there where nothing is added."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: Any = None

    def of(self, normed: torch.Tensor) -> torch.Tensor:
        """A normed state, modulated."""
        return normed * (1 + self.scale) + self.shift


@dataclass(frozen=True)
class Modulated:
    """What one stream's modulation says: of attention, of the feed-forward network, of a second attention."""

    attention: Chunks
    ffn: Chunks | None = None
    second: Chunks | None = None


class EditedBlock(Chains):
    """For a stock two-stream block, the parts that its role needs, and the forward pass that goes with them.

    `encoder_hidden_states` carries what roles emit. Expects the stock block's `norm1`, `norm2` and `ff` for image, and the same
    with `_context` behind it for text. linear_ffn: streams whose feed-forward network is a linear map, `img_ffn` or `txt_ffn`.
    """

    def edit(self: Any, dim: int, role: TextRole, linear_ffn: tuple[str, ...], has_adapters: bool) -> None:
        """Replace and remove what the edits of a block say; modulation is left to the family."""
        self.dim, self.role, self.linear_ffn = dim, role, linear_ffn
        self.attn.set_processor(JointTextAttention())
        if has_adapters:
            add_adapters(self, dim, text=not role.mapped)
        if "image" in linear_ffn:
            self.img_ffn = nn.Linear(dim, dim)
            _delete(self, "norm2", "ff")
        if role.mapped:
            self.text_in = nn.Linear(dim, dim)
            if role.emits_text:
                self.text_out = nn.Linear(dim, dim)
            _delete(self, "norm1_context")
        if "text" in linear_ffn:
            self.txt_ffn = nn.Linear(dim, dim)
            _delete(self, "norm2_context", "ff_context")
        if role.mapped or not role.emits_text:
            _delete(self, "norm2_context", "ff_context")
            _delete(self.attn, "to_add_out")
        if role.mapped:
            _delete(self.attn, "add_q_proj", "norm_added_q")

    def joint_forward(
        self: Any, image: torch.Tensor, carried: torch.Tensor, image_mod: Modulated, text_mod: Modulated | None, **attention: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is carried on, and the image state. `text_mod` is None where text is mapped."""
        image, carried = adapted(self, image, carried)
        text_input = (
            self.text_in(carried[..., -self.dim :])
            if text_mod is None
            else self._of(text_mod.attention, _norm(self.norm1_context), carried)
        )
        if image_mod.second is None:
            modulated, second = self._of(image_mod.attention, _norm(self.norm1), image), None
        else:
            normed = _norm(self.norm1)(image)
            modulated, second = image_mod.attention.of(normed), image_mod.second.of(normed)
        attended, text_attended = self.attn(hidden_states=modulated, encoder_hidden_states=text_input, **attention)
        image = self.gated(image, image_mod.attention.gate, attended)
        if image_mod.second is not None:
            image = self.gated(image, image_mod.second.gate, self.attn2(hidden_states=second))
        image = self._network(image, image_mod.ffn, "image", "norm2", "ff")
        if self.role.mapped:
            return (self.text_out(carried[..., : self.dim]) if self.role.emits_text else carried), image
        if text_attended is None or text_mod is None:
            return text_input, image
        text = self.gated(carried, text_mod.attention.gate, text_attended)
        text = self._network(text, text_mod.ffn, "text", "norm2_context", "ff_context")
        return torch.cat([text, text_input], dim=-1) if self.role.emits_input else text, image

    def _network(self: Any, x: torch.Tensor, mod: Chunks | None, stream: str, norm: str, network: str) -> torch.Tensor:
        if stream in self.linear_ffn:
            return x + getattr(self, LINEAR_FFN[stream])(x)
        assert mod is not None
        return self.gated(x, mod.gate, getattr(self, network)(self._of(mod, getattr(self, norm), x)))

    def _of(self, chunks: Chunks, norm: Any, x: torch.Tensor) -> torch.Tensor:
        return self.modulated(norm, x, chunks.scale, chunks.shift)


def _norm(module: Any) -> Any:
    """The norm itself of a module that modulates too."""
    return getattr(module, "norm", module)


def _delete(module: Any, *names: str) -> None:
    """Take parts away, those that are there: an attribute that is None would be saved by nothing and read by much."""
    for name in names:
        if hasattr(module, name):
            delattr(module, name)


def edits_of_blocks(
    num_layers: int,
    num_texted: int,
    last_emits: bool,
    mapped_text_blocks: list[int] | None,
    linear_ffn_image_blocks: list[int] | None,
    linear_ffn_text_blocks: list[int] | None,
    adapted_blocks: list[int] | None,
) -> list[tuple[TextRole, tuple[str, ...], bool]]:
    """Role, linear networks and whether it has adapters of each of the first `num_texted` blocks, which have a text stream of their own.

    Raises ValueError for edits of blocks that are not there or cannot take them.
    """
    roles = text_roles(num_texted, mapped_text_blocks, last_emits)
    check_linear_ffn(linear_ffn_image_blocks, linear_ffn_text_blocks, roles)
    check_adapted(adapted_blocks, num_layers)
    linear = {"image": linear_ffn_image_blocks or [], "text": linear_ffn_text_blocks or []}
    rows = []
    for i, role in enumerate(roles):
        rows.append((role, tuple(s for s, blocks in linear.items() if i in blocks), i in (adapted_blocks or [])))
    return rows
