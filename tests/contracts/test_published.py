"""Published configurations, counted without weights: what is predicted of teachers and students is what the classes hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ppclc import commands
from ppclc.errors import ModelError
from ppclc.loading.classes import count_parameters, empty_model, model_outline, predicted_parameters
from ppclc.loading.published import published, published_config
from ppclc.models import blocks_of
from ppclc.plan import CompressionPlan

PUBLISHED = published()
EDITED = [name for name, family in PUBLISHED.items() if family.student_class and "schnell" not in name]
COUNTS = {"Qwen/Qwen-Image": 20_430_401_088, "black-forest-labs/FLUX.1-dev": 11_901_408_320}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_at_published_configurations_are_exact(name: str) -> None:
    """The teacher, the teacher less one block of each group, and that less what its edits save, each counted in two ways."""
    family, config = published_config(name)
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
    family, config = published_config("Qwen/Qwen-Image")
    block = blocks_of(empty_model(family, config | {"num_layers": 1}), family)[0]
    assert count_parameters(block) == 339_831_296
    assert count_parameters(block.img_mod) + count_parameters(block.txt_mod) == 113_283_072


def width(config: dict[str, Any]) -> int:
    return int(config["attention_head_dim"]) * int(config["num_attention_heads"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen-Image",
        "black-forest-labs/FLUX.1-dev",
        "black-forest-labs/FLUX.2-dev",
        "stabilityai/stable-diffusion-3.5-medium",
        "stabilityai/stable-diffusion-3.5-large",
    ],
)
def test_edits_save_what_their_parts_hold(name: str) -> None:
    """A modulation rank and a linear network at the published widths, worked out by hand."""
    family, config = published_config(name)
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


@pytest.mark.slow
def test_a_published_model_is_planned_by_its_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched; a folder of that name goes before."""
    monkeypatch.setattr("ppclc.loading.hub.fetch", None)
    monkeypatch.chdir(tmp_path)
    document = commands.plan("qwen_image_12b", [], None)
    assert (document["teacher"]["parameters"], document["student"]["parameters"]) == (20_430_401_088, 11_934_618_688)
    assert document["basis"] == "config"
    (tmp_path / "Qwen" / "Qwen-Image").mkdir(parents=True)
    with pytest.raises(ModelError, match="holds no transformer"):
        commands.plan("qwen_image_12b", [], None)
