"""Published configurations, counted without weights: what is predicted of teachers and students is what the classes hold."""

from __future__ import annotations

from typing import Any

import pytest

from ppclc import plugins
from ppclc.classes import count_parameters, empty_model, model_outline, predicted_parameters
from ppclc.families import Family
from ppclc.models import blocks_of
from ppclc.plan import CompressionPlan

# Sources: config.json of each model's transformer on the hub, as far as it differs from the class's defaults.
SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
SD35_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": list(range(13)),
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen-Image": ("qwen_image", {}),
    "Qwen-Image-Edit-2511": ("qwen_image", {"zero_cond_t": True}),
    "FLUX.1-dev": ("flux", {"guidance_embeds": True}),
    "FLUX.1-schnell": ("flux", {}),
    "FLUX.2-dev": ("flux2", {}),
    "SD3-medium": ("sd3", {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}),
    "SD3.5-medium": ("sd3", SD35_MEDIUM),
    "SD3.5-large": ("sd3", SD35_LARGE),
    "HunyuanImage-2.1": ("hunyuan_image", {"text_embed_2_dim": 1472}),
    "Chroma1-HD": ("chroma", {}),
    "LongCat-Image": ("longcat_image", {"num_layers": 10, "num_single_layers": 20}),
    "AuraFlow": ("aura_flow", {}),
}
COUNTS = {"Qwen-Image": 20_430_401_088, "FLUX.1-dev": 11_901_408_320}


def configuration(name: str) -> tuple[Family, dict[str, Any]]:
    family: Family = plugins.load("families", PUBLISHED[name][0])
    like = model_outline(family, {"_class_name": family.class_name, **PUBLISHED[name][1], **{g.count_key: 1 for g in family.groups}})
    counts = {g.count_key: PUBLISHED[name][1].get(g.count_key) for g in family.groups}
    import inspect

    import diffusers

    defaults = inspect.signature(getattr(diffusers, family.class_name).__init__).parameters
    counts = {k: v if v is not None else defaults[k].default for k, v in counts.items()}
    return family, {"_class_name": family.class_name, **like.config, **counts}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_at_published_configurations_are_exact(name: str) -> None:
    """The teacher, the teacher less one block of each group, and that less what its edits save, each counted in two ways."""
    family, config = configuration(name)
    teacher = model_outline(family, config)
    total = count_parameters(teacher)
    assert total == COUNTS.get(name, total)
    sizes = family.sizes(config)
    plan = CompressionPlan.of(family.name, sum(sizes))
    assert predicted_parameters(family, config, plan) == total
    first, spans = 0, []
    for size in sizes:
        spans.append((first, first + 2))
        first += size
    gone = sum(count_parameters(blocks_of(teacher, family)[b]) for u, v in spans for b in range(u + 1, v + 1))
    assert predicted_parameters(family, config, CompressionPlan.of(family.name, sum(sizes), spans)) == total - gone


def test_a_block_of_qwen_image_and_its_modulation() -> None:
    family, config = configuration("Qwen-Image")
    block = blocks_of(empty_model(family, config | {"num_layers": 1}), family)[0]
    assert count_parameters(block) == 339_831_296
    assert count_parameters(block.img_mod) + count_parameters(block.txt_mod) == 113_283_072


def width(config: dict[str, Any]) -> int:
    return int(config["attention_head_dim"]) * int(config["num_attention_heads"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen-Image", "FLUX.1-dev", "FLUX.2-dev", "SD3.5-medium", "SD3.5-large"])
def test_edits_save_what_their_parts_hold(name: str) -> None:
    """A modulation rank and a linear network at the published widths, worked out by hand."""
    family, config = configuration(name)
    length, d, rank = family.num_blocks(config), width(config), 64
    teacher = model_outline(family, config)
    total = count_parameters(teacher)
    maps = dict(teacher.named_modules())
    linears = [m for n, m in maps.items() if any(n == p or n.endswith(f".{p}") for p in family.modulations)]
    assert len(linears) >= 3
    saved = sum(m.in_features * m.out_features - rank * m.out_features - (m.out_features if m.bias is None else 0) for m in linears)
    plan = CompressionPlan.of(family.name, length, modulation_rank=rank)
    assert predicted_parameters(family, config, plan) == total - saved + (d + 1) * rank
    block = blocks_of(teacher, family)[0]
    network = count_parameters(getattr(block, "ff", None) or block.img_mlp)
    modulation = 0 if family.modulated_outside else 3 * d * (d + 1)
    plan = CompressionPlan.of(family.name, length, ffn=[(0, "image")])
    assert predicted_parameters(family, config, plan) == total - network - modulation + d * (d + 1)
