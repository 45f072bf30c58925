"""Model cards: the teacher's licence and name as they stand, the figures as measured, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from ppclc.loading.sources import BUILTIN, Source, open_source
from ppclc.plan import CompressionPlan
from ppclc.publishing.cards import Card, base_model, card_text, front_matter, write_card
from ppclc.records import Gate, Quality, Verdict

CONFIG = {"_class_name": "QwenImageTransformer2DModel", "num_layers": 6}
PLAN = CompressionPlan.of("qwen_image", 6, [(1, 2)])
SIZE = {"parameters": 1000, "bytes": 4000, "blocks": 6}
SMALL = {"parameters": 750, "bytes": 3000, "blocks": 5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "teacher"


def source(folder: Path, card: str | None = None) -> Source:
    if card is not None:
        (folder / "README.md").write_text(card, "utf-8")
    return open_source(str(folder))


def text_of(folder: Path, card: str | None = None, verdict: Verdict | None = None, plan: CompressionPlan = PLAN, **more: Any) -> str:
    (folder / "transformer").mkdir(exist_ok=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "config.json").unlink(missing_ok=True)
    return card_text(Card(source(folder, card), plan, SIZE, SMALL, "bfloat16", verdict=verdict, **more), folder)


def verdict() -> Verdict:
    told = Quality(
        teacher=0.9, student=0.8, drop_percent=11.1111, ci95=(9.5, 12.25), n=2048, seeds=[0, 1], noise=0.0, unit="share", better="higher"
    )
    other = told.model_copy(update={"ci95": None, "seeds": [], "n": 24, "better": "lower"})
    near = told.model_copy(
        update={"teacher": 100.0, "student": 49.91, "drop_percent": 50.09, "unit": "dB, 100 for the teacher's own image"}
    )
    gates = [Gate(name="scene_accuracy_g1.drop_percent", value=11.1111, limit=1.5, passed=False)]
    return Verdict(quality={"scene_accuracy_g1": told, "velocity_error": other, "psnr": near}, gates=gates, prompts=[])


def test_the_figures_are_those_of_the_verdict(folder: Path) -> None:
    text = text_of(folder, verdict=verdict())
    assert "| scene accuracy, guidance 1 (higher is better) | 0.9 | 0.8 | 11.11 | 9.50 to 12.25 | 2,048 | 0, 1 |" in text
    assert "| velocity error (lower is better) | 0.9 | 0.8 | 11.11 | – | 24 | – |" in text
    assert "| psnr (higher is better) | – | 49.91 dB from the teacher's images | – | – | 2,048 | 0, 1 |" in text
    assert "- scene_accuracy_g1.drop_percent: 11.11, limit 1.5: failed" in text
    assert "with 25.00 % of its parameters removed" in text
    assert "| parameters | 1,000 | 750 |" in text
    assert "- Blocks 1–2 became one, student block 1." in text


def test_without_a_verdict_nothing_is_claimed(folder: Path) -> None:
    text = text_of(folder)
    assert "Not measured." in text
    assert "metric" not in text


def test_a_teacher_without_a_card_leaves_licence_and_base_out(folder: Path) -> None:
    data = ModelCard(text_of(folder)).data.to_dict()
    assert data == {"library_name": "diffusers", "tags": ["ppclc", "pruning", "distillation"]}


@pytest.mark.parametrize("card", ["# nothing", "---\n- a\n---\n", "---\na: [\n---\n", "---\nlicense: mit", "\x00"])
def test_cards_that_cannot_be_read_tell_nothing(folder: Path, card: str) -> None:
    assert front_matter(source(folder, card)) == {}


@pytest.mark.parametrize(
    ("card", "base"),
    [
        ("---\nbase_model: a/b\n---\n", "a/b"),
        ("---\nbase_model:\n- a/b\n- c/d\n---\n", "a/b"),
        ("---\nmodel_name: org/name\n---\n", "org/name"),
        ("---\nname: Just a name\n---\n", None),
        ("---\nbase_model: /home/me/models/x\n---\n", None),
        ("---\nbase_model: 3\n---\n", None),
        ("---\nlicense: mit\n---\n", None),
    ],
)
def test_the_base_is_what_the_teachers_card_says(folder: Path, card: str, base: str | None) -> None:
    found = source(folder, card)
    assert base_model(found, front_matter(found)) == base
    data = ModelCard(text_of(folder, card)).data.to_dict()
    assert (data.get("base_model"), data.get("base_model_relation")) == (base, "finetune" if base else None)


def test_a_hub_id_goes_before_the_card(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ppclc.loading.hub.fetch", lambda *_: folder)
    (folder / "README.md").write_text("---\nbase_model: other/one\nlicense: apache-2.0\n---\n")
    found = open_source("Qwen/Qwen-Image")
    assert base_model(found, front_matter(found)) == "Qwen/Qwen-Image"
    assert front_matter(found)["license"] == "apache-2.0"


def test_the_hubs_cache_tells_its_id(tmp_path: Path) -> None:
    folder = tmp_path / "models--black-forest-labs--FLUX.1-dev" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert base_model(source(folder), {}) == "black-forest-labs/FLUX.1-dev"


def test_a_builtin_has_no_base() -> None:
    assert base_model(open_source(BUILTIN + "two-digits"), {"base_model": "a/b"}) is None


def test_how_it_loads_is_how_it_lies(folder: Path) -> None:
    assert 'QwenImageTransformer2DModel.from_pretrained("PATH_OR_ID", subfolder="transformer", torch_dtype=torch.bfloat16)' in text_of(
        folder
    )
    edited = CompressionPlan.of("qwen_image", 6, ffn=[(2, "image")])
    assert "trust_remote_code=True)" in text_of(folder, plan=edited)
    (folder / "model_index.json").write_text("{}")
    assert 'DiffusionPipeline.from_pretrained("PATH_OR_ID", torch_dtype=torch.bfloat16)' in text_of(folder)


def test_what_is_so_already_is_not_written_again(folder: Path) -> None:
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(CONFIG))
    card = Card(source(folder), PLAN, SIZE, SMALL, "float32", recipe=True)
    write_card(card, folder, "model: {path: x}\n")
    before = [(folder / name).stat().st_mtime_ns for name in ("README.md", "recipe.yaml")]
    write_card(card, folder, "model: {path: x}\n")
    assert [(folder / name).stat().st_mtime_ns for name in ("README.md", "recipe.yaml")] == before
    assert str(folder) not in (folder / "README.md").read_text("utf-8")
