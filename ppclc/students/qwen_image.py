"""Qwen-Image's transformer with narrower parts, as ppclc's plans cut it. Needs torch and diffusers only.

Five edits beside a smaller `num_layers`, all told by the configuration:

- `modulation_rank`: the modulation of all blocks reads `p = B'(SiLU(temb) - mean)`, of `modulation_rank`
  numbers, instead of `SiLU(temb)`. `B` is shared; `p` travels behind `temb` in one tensor.
- `mapped_text_blocks`: runs of blocks whose text stream is gone but for keys and values, which are fed by
  `text_in(z)`, `z` being the modulated text state of the last full block before the run. A run that is
  followed by a full block ends with `text_out(h)`, `h` being that full block's text output.
  Source: arXiv 2511.16156, width pruning of the text stream.
- `linear_ffn_image_blocks`, `linear_ffn_text_blocks`: blocks whose feed-forward network of that stream is one
  linear map of the state after the attention residual, `h + (W h + b)`. Its norm, its half of the modulation
  and its gate are gone with it. Source: arXiv 2511.16156, width pruning of the feed-forward networks.
- `adapted_blocks`: blocks whose incoming image and text states go through a linear map each, `image_adapter` and
  `text_adapter`, before anything else reads them. A block whose text is mapped reads no text state of its own
  and has the first alone. Source: ours.
- `dead_code`: parts whose result nothing reads are left out: of the last block that computes text, the
  text query, the text output projection, the text feed-forward network, and all of the text modulation
  but the first shift and scale.

Shape suffixes: B batch, S token, D width, H head.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_qwenimage import (
    QwenImageTransformerBlock,
    QwenTimestepProjEmbeddings,
    apply_rotary_emb_qwen,
)
from torch import nn

from ppclc.students.parts import Chains, LastFeatures, TextRole, Travelling, check_adapted, check_linear_ffn, text_roles


class ProjectedTimeEmbeddings(QwenTimestepProjEmbeddings):
    """`temb` (B, D) with its `rank` modulation coordinates behind it, (B, D + rank)."""

    def __init__(self, embedding_dim: int, rank: int, use_additional_t_cond: bool = False) -> None:
        super().__init__(embedding_dim, use_additional_t_cond)
        self.modulation_basis = nn.Linear(embedding_dim, rank)

    def forward(self, timestep: torch.Tensor, hidden_states: torch.Tensor, addition_t_cond: Any = None) -> torch.Tensor:
        temb = super().forward(timestep, hidden_states, addition_t_cond)
        return torch.cat([temb, self.modulation_basis(nn.functional.silu(temb))], dim=-1)


class FirstFeaturesNormOut(AdaLayerNormContinuous):
    """The output norm, which reads `temb` alone."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, elementwise_affine=False, eps=1e-6)
        self.dim = dim

    def forward(self, x: torch.Tensor, conditioning_embedding: torch.Tensor) -> torch.Tensor:
        return super().forward(x, conditioning_embedding[..., : self.dim])


def rotate(x_BSHD: torch.Tensor, freqs: Any) -> torch.Tensor:
    """Rotary embedding of neighbouring pairs; `freqs` is complex (S, D/2) or a pair cos, sin of that shape."""
    if isinstance(freqs, torch.Tensor):
        return apply_rotary_emb_qwen(x_BSHD, freqs, use_real=False)
    cos, sin = (f[:, None] for f in freqs)
    a, b = x_BSHD.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(3)
    return rotated if rotated.dtype == x_BSHD.dtype else rotated.to(x_BSHD.dtype)


def joint(text_freqs: Any, image_freqs: Any) -> Any:
    """Rotary frequencies of text and image, text first."""
    if isinstance(text_freqs, torch.Tensor):
        return torch.cat([text_freqs, image_freqs])
    return tuple(torch.cat(pair) for pair in zip(text_freqs, image_freqs, strict=True))


class JointAttention:
    """Attention of image over text and image, and of text over both where text queries are left.

    Text stands before image. Returns the image's result and the text's, or None.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        image_freqs, text_freqs = image_rotary_emb
        queries_text = hasattr(attn, "add_q_proj")

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (-1, attn.inner_dim // attn.heads))

        query = attn.norm_q(heads(attn.to_q(hidden_states)))
        key = attn.norm_k(heads(attn.to_k(hidden_states)))
        text_key = attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))
        value = torch.cat([attn.add_v_proj(encoder_hidden_states), attn.to_v(hidden_states)], dim=1)
        freqs = joint(text_freqs, image_freqs)
        if queries_text:
            query = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states))), query], dim=1)
        mask = None
        if encoder_hidden_states_mask is not None:
            image_mask = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
            mask = torch.cat([encoder_hidden_states_mask.bool(), image_mask], dim=1)[:, None, None, :]
        result = dispatch_attention_fn(
            rotate(query, freqs if queries_text else image_freqs),
            rotate(torch.cat([text_key, key], dim=1), freqs),
            heads(value),
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        result = result.flatten(2, 3).to(query.dtype)
        text_length = encoder_hidden_states.shape[1] if queries_text else 0
        image = attn.to_out[1](attn.to_out[0](result[:, text_length:].contiguous()))
        return image, attn.to_add_out(result[:, :text_length].contiguous()) if queries_text else None


class PrunedQwenImageTransformerBlock(Chains, QwenImageTransformerBlock):
    """One block with the parts that its role needs. `encoder_hidden_states` carries what roles emit.

    linear_ffn: streams whose feed-forward network is a linear map, `img_ffn` or `txt_ffn`. adapted: whether
    linear maps of the incoming states stand in front, `image_adapter` and, unless text is mapped, `text_adapter`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        role: TextRole,
        rank: int | None,
        zero_cond_t: bool,
        linear_ffn: tuple[str, ...] = (),
        adapted: bool = False,
    ) -> None:
        super().__init__(dim, heads, head_dim, zero_cond_t=zero_cond_t)
        self.role, self.linear_ffn = role, linear_ffn
        self.attn.set_processor(JointAttention())
        if adapted:
            self.image_adapter = nn.Linear(dim, dim)
            if not role.mapped:
                self.text_adapter = nn.Linear(dim, dim)
        self.img_mod = self._modulation(rank, 3 if "image" in linear_ffn else 6)
        if "image" in linear_ffn:
            self.img_ffn = nn.Linear(dim, dim)
            del self.img_norm2, self.img_mlp
        if role.mapped:
            self.text_in = nn.Linear(dim, dim)
            if role.emits_text:
                self.text_out = nn.Linear(dim, dim)
            del self.txt_mod, self.txt_norm1  # type: ignore[has-type]
        else:
            chunks = 3 if "text" in linear_ffn else 6
            self.txt_mod = self._modulation(rank, chunks if role.emits_text else 2)
        if "text" in linear_ffn:
            self.txt_ffn = nn.Linear(dim, dim)
            del self.txt_norm2, self.txt_mlp
        if role.mapped or not role.emits_text:
            del self.txt_norm2, self.txt_mlp
            del self.attn.add_q_proj, self.attn.norm_added_q, self.attn.to_add_out

    def _modulation(self, rank: int | None, chunks: int) -> nn.Sequential:
        if rank is None:
            return nn.Sequential(nn.SiLU(), nn.Linear(self.dim, chunks * self.dim))
        return nn.Sequential(LastFeatures(rank), nn.Linear(rank, chunks * self.dim))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None,
        temb: torch.Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if hasattr(self, "image_adapter"):
            hidden_states = self.image_adapter(hidden_states)
        if hasattr(self, "text_adapter"):
            encoder_hidden_states = self.text_adapter(encoder_hidden_states)
        mod = self.img_mod(temb)
        text_temb = temb.chunk(2, dim=0)[0] if self.zero_cond_t else temb
        text_input, text_mod = self._text_input(encoder_hidden_states, text_temb)
        modulated, gate = self._chunk(self.img_norm1, hidden_states, mod[..., : 3 * self.dim], modulate_index)
        attended, text_attended = self.attn(
            hidden_states=modulated,
            encoder_hidden_states=text_input,
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        hidden_states = self.gated(hidden_states, gate, attended)
        if "image" in self.linear_ffn:
            hidden_states = hidden_states + self.img_ffn(hidden_states)
        else:
            modulated, gate = self._chunk(self.img_norm2, hidden_states, mod[..., 3 * self.dim :], modulate_index)
            hidden_states = self.gated(hidden_states, gate, self.img_mlp(modulated))
        emitted = self._text_output(encoder_hidden_states, text_input, text_attended, text_mod)
        if hidden_states.dtype == torch.float16:
            hidden_states, emitted = hidden_states.clip(-65504, 65504), emitted.clip(-65504, 65504)
        return emitted, hidden_states

    def _text_input(self, carried: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The modulated text state that feeds keys and values, and the modulation that is left to apply."""
        if self.role.mapped:
            return self.text_in(carried[..., -self.dim :]), None
        if self.role.emits_text:
            mod = self.txt_mod(temb)
            return self._chunk(self.txt_norm1, carried, mod[..., : 3 * self.dim])[0], mod
        shift, scale = self.txt_mod(temb).chunk(2, dim=-1)
        return self.modulated(self.txt_norm1, carried, scale[:, None], shift[:, None]), None

    def _chunk(self, norm: Any, x: torch.Tensor, mod: torch.Tensor, index: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A state, normed and modulated by shift, scale and gate, and the gate."""
        if index is not None:
            return self._modulate(norm(x), mod, index)
        shift, scale, gate = mod[:, None].chunk(3, dim=-1)
        return self.modulated(norm, x, scale, shift), gate

    def _text_output(
        self, carried: torch.Tensor, text_input: torch.Tensor, attended: torch.Tensor | None, mod: torch.Tensor | None
    ) -> torch.Tensor:
        """What the next block gets: text state, modulated state, or both."""
        if self.role.mapped:
            return self.text_out(carried[..., : self.dim]) if self.role.emits_text else carried
        if attended is None or mod is None:
            return text_input
        text = self.gated(carried, mod[:, None, 2 * self.dim : 3 * self.dim], attended)
        if "text" in self.linear_ffn:
            text = text + self.txt_ffn(text)
        else:
            modulated, gate = self._chunk(self.txt_norm2, text, mod[..., 3 * self.dim :])
            text = self.gated(text, gate, self.txt_mlp(modulated))
        return torch.cat([text, text_input], dim=-1) if self.role.emits_input else text


class PrunedQwenImageTransformer2DModel(Travelling, QwenImageTransformer2DModel):
    """`QwenImageTransformer2DModel` with the edits that its configuration names."""

    _no_split_modules = ["PrunedQwenImageTransformerBlock"]
    _repeated_blocks = ["PrunedQwenImageTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        zero_cond_t: bool = False,
        use_additional_t_cond: bool = False,
        use_layer3d_rope: bool = False,
        modulation_rank: int | None = None,
        mapped_text_blocks: list[int] | None = None,
        dead_code: bool = False,
        linear_ffn_image_blocks: list[int] | None = None,
        linear_ffn_text_blocks: list[int] | None = None,
        adapted_blocks: list[int] | None = None,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=0,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
            zero_cond_t=zero_cond_t,
            use_additional_t_cond=use_additional_t_cond,
            use_layer3d_rope=use_layer3d_rope,
        )
        self.register_to_config(num_layers=num_layers)
        heads, head_dim = num_attention_heads, attention_head_dim
        roles = text_roles(num_layers, mapped_text_blocks, not dead_code)
        check_linear_ffn(linear_ffn_image_blocks, linear_ffn_text_blocks, roles)
        check_adapted(adapted_blocks, num_layers)
        linear = {"image": linear_ffn_image_blocks or [], "text": linear_ffn_text_blocks or []}
        self.transformer_blocks = nn.ModuleList(
            PrunedQwenImageTransformerBlock(
                self.inner_dim,
                heads,
                head_dim,
                role,
                modulation_rank,
                zero_cond_t,
                linear_ffn=tuple(s for s, blocks in linear.items() if i in blocks),
                adapted=i in (adapted_blocks or []),
            )
            for i, role in enumerate(roles)
        )
        if modulation_rank is not None:
            self.time_text_embed = ProjectedTimeEmbeddings(self.inner_dim, modulation_rank, use_additional_t_cond)
            self.norm_out = FirstFeaturesNormOut(self.inner_dim)
