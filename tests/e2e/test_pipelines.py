"""Whole pipelines, compress to bench: encoders, VAE, transformer and scheduler of a few thousand parameters, real classes, nothing from a hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ppclc.compiler import compress
from ppclc.data.encoding import decoder
from ppclc.errors import PlanError
from ppclc.loading.sources import open_source
from ppclc.models import load_model
from ppclc.recipe import parse_recipe, read_recipe
from ppclc.screens.display import Display
from ppclc.screens.words import label, number, percent
from ppclc.sizes import slice_size
from tests.contracts.test_families import subject_of
from tests.pipelines import flux2_pipeline, flux_pipeline, qwen_pipeline, sd3_pipeline

pytestmark = pytest.mark.slow
PROMPTS = ["a cat", "a very long red dog on a blue mat", "two green birds", "rain", "a house by the sea", "snow", "a ship", "tea"]
SIZE = [16, 32]
PIPELINES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "flux": ("FluxPipeline", flux_pipeline),
    "qwen_image": ("QwenImagePipeline", qwen_pipeline),
    "sd3": ("StableDiffusion3Pipeline", sd3_pipeline),
    "flux2": ("Flux2KleinPipeline", flux2_pipeline),
}
CHANGES: dict[str, dict[str, Any]] = {
    "flux": {"num_single_layers": 2},
    "flux2": {"guidance_embeds": False, "joint_attention_dim": 24},
}
"""What a pipeline's transformer differs in from the family's tiny one: what its parts need, and fewer blocks to be lowered."""
DEPTH: dict[str, Any] = {"plan": {"text_stream": "none", "ffn": "none", "modulation_rank": "none"}, "export": []}
WIDTH: dict[str, Any] = {"plan": {"intervals": [[0, 1]], "text_stream": [2], "ffn": "none", "modulation_rank": "none"}, "export": []}
CARD = """\
---
license: other
license_name: tiny-license
license_link: LICENSE.md
pipeline_tag: text-to-image
base_model: someone/tiny
tags:
- art
---
# Tiny
"""


@pytest.fixture(scope="module", params=[p if p != "flux" else pytest.param(p, marks=pytest.mark.long) for p in PIPELINES])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where: Path = tmp_path_factory.mktemp("family") / request.param  # tests tell the family by the folder's name
    where.mkdir()
    return with_images(request.param, where)


def with_images(name: str, where: Path) -> Path:
    """A folder with a family's pipeline and captioned images."""
    PIPELINES[name][1](subject_of(name, **CHANGES.get(name, {})).model).save_pretrained(where / "pipeline")
    images = where / "images"
    images.mkdir()
    for i, prompt in enumerate(PROMPTS):
        values = np.random.default_rng(i).integers(0, 256, (16, 32, 3), dtype=np.uint8)
        Image.fromarray(values).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(prompt, "utf-8")
    return where


def recipe(folder: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(folder / "pipeline")},
        "calibrate": {"source": "images", "path": str(folder / "images"), "resolution": SIZE, "samples": 48, "longest": 3},
        "analyze": {"probes": 16, "supernet_steps": 0, "trials": 0},
        "target": {"parameters": 0.75},
        "distill": {"steps": 3, "width_steps": 3, "finetune_steps": 6, "batch": 8, "data_weight": 0.5},
        "verify": {"samples": 24, "images": 3, "steps": 2, "gates": {"ssim": {"drop_percent": 100}}},
        "export": [{"backend": "onnx", "dtype": "float32"}],
        "bench": {"runs": 3, "steps": 1},
    }


def test_a_whole_pipeline_is_compressed_judged_exported_and_benched(folder: Path, tmp_path: Path) -> None:
    lowered = {} if folder.name == "flux" else {"export": []}  # other families' lowering is held by the contracts
    run = compress(parse_recipe(recipe(folder) | lowered, "pipeline"), "pipeline", tmp_path, Display(0, -1))
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    quality = report["quality"]
    assert {"velocity_error", "flow_loss", "ssim", "psnr"} <= quality.keys()
    assert {f"velocity_error_t{b}" for b in (1, 2, 3, 4)} & quality.keys()
    assert 0 < quality["ssim"]["student"] < quality["ssim"]["teacher"] == 1
    assert quality["psnr"]["student"] < quality["psnr"]["teacher"] == 100
    assert quality["flow_loss"]["n"] == 24
    assert report["student"]["parameters"] <= 0.75 * report["teacher"]["parameters"]
    assert [row["target"] for row in report["bench"]][:2] == ["teacher", "student"]
    assert all(e["parity"]["max_abs"] <= 1e-4 for e in report["exports"])
    assert run.verdict is not None
    assert run.verdict.prompts == PROMPTS[:3]
    page = (tmp_path / "report.html").read_text("utf-8")
    assert all(prompt in page for prompt in PROMPTS[:3])


def test_images_are_those_that_the_pipeline_itself_would_draw(folder: Path) -> None:
    """Latents decoded here are the pipeline's own images."""
    import diffusers

    name = folder.name
    pipeline = getattr(diffusers, PIPELINES[name][0]).from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    source = open_source(str(folder / "pipeline"))
    given = {"num_inference_steps": 2, "height": SIZE[0], "width": SIZE[1]}
    if name != "qwen_image":
        given |= {"max_sequence_length": 48}
    drawn = {
        kind: pipeline(prompt="a cat", generator=torch.Generator().manual_seed(0), output_type=kind, **given).images
        for kind in ("latent", "pt")
    }
    with decoder(source, (4, 8), "float32") as decode:
        assert decode is not None
        assert torch.allclose(decode(packed(pipeline, drawn["latent"])), drawn["pt"].float(), atol=1e-5)


def packed(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the transformer gives them: those that FLUX.2 klein's pipeline gives are ready for its VAE."""
    if type(pipeline).__name__ != "Flux2KleinPipeline":
        return latents
    norm, config = pipeline.vae.bn, pipeline.vae.config
    patches = pipeline._patchify_latents(latents)
    scale = (norm.running_var + config.batch_norm_eps).sqrt()
    rows: torch.Tensor = pipeline._pack_latents((patches - norm.running_mean.view(1, -1, 1, 1)) / scale.view(1, -1, 1, 1))
    return rows


@pytest.fixture(scope="module", params=[f"{edits}-{name}" for name in ("flux", "qwen_image") for edits in ("depth", "width")])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bool]:
    """The folder of a teacher with card and licence, the output folder of its student, and whether that brings its class."""
    root: Path = tmp_path_factory.mktemp("whole")
    edits, _, name = request.param.partition("-")
    (root / "data").mkdir()
    with_images(name, root / "data")
    (root / "data" / "pipeline" / "README.md").write_text(CARD, "utf-8")
    (root / "data" / "pipeline" / "LICENSE.md").write_text("Do as you like.", "utf-8")
    settings = (
        recipe(root / "data") | {"depth": DEPTH, "width": WIDTH}[edits] | {"target": {"parameters": {"depth": 0.75, "width": 0.99}[edits]}}
    )
    compress(parse_recipe(settings, "r"), "r", root / "out", Display(0, -1), until="verify")
    return root / "data" / "pipeline", root / "out", edits == "width"


def drawn(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 1, "height": SIZE[0], "width": SIZE[1], "output_type": "pt"}
    images: torch.Tensor = pipeline("tea", generator=torch.Generator().manual_seed(0), **given).images
    return images


def test_a_student_of_a_pipeline_is_a_whole_pipeline(whole: tuple[Path, Path, bool], tmp_path: Path) -> None:
    """diffusers loads it by its folder alone, a class that travels with trust, and draws as with the transformer put in by hand."""
    import diffusers

    teacher, out, edited = whole
    model = out / "model"
    trust = {"trust_remote_code": True} if edited else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model, **trust)
    student = load_model(model)
    assert type(pipeline.transformer).__name__ == type(student).__name__
    assert type(student).__name__.startswith("Pruned") == edited
    assert all(torch.equal(v, pipeline.transformer.state_dict()[k]) for k, v in student.state_dict().items())
    by_hand = type(pipeline).from_pretrained(teacher, transformer=student)
    # Tensors equal to the bit lie at other places in memory, by which some processors' products differ in the last one.
    assert (drawn(pipeline) - drawn(by_hand)).abs().max() <= 1e-4
    assert type(type(pipeline).from_pretrained(model, **trust)) is type(pipeline)
    kind = diffusers.AutoModel if edited else type(student)
    alone = kind.from_pretrained(str(model / "transformer"), **trust)
    assert all(torch.equal(v, alone.state_dict()[k]) for k, v in student.state_dict().items())
    if edited:
        with pytest.raises(ValueError, match="trust_remote_code"):
            diffusers.DiffusionPipeline.from_pretrained(model)


def test_its_other_parts_are_the_teachers_files(whole: tuple[Path, Path, bool]) -> None:
    teacher, out, _ = whole
    model = out / "model"
    listed = json.loads((teacher / "model_index.json").read_text("utf-8"))
    parts = [n for n, v in listed.items() if isinstance(v, list) and n != "transformer" and None not in v]
    assert len(parts) >= 4
    for part in parts:
        theirs = {p.relative_to(teacher) for p in (teacher / part).rglob("*") if p.is_file()}
        assert theirs == {p.relative_to(model) for p in (model / part).rglob("*") if p.is_file()} != set()
        assert all((model / p).samefile(teacher / p) for p in theirs)
    assert (model / "LICENSE.md").samefile(teacher / "LICENSE.md")
    assert not (model / "transformer" / "config.json").samefile(teacher / "transformer" / "config.json")
    ours = json.loads((model / "model_index.json").read_text("utf-8"))
    assert ours | {"transformer": 0} == listed | {"transformer": 0}
    assert sorted(p.name for p in model.iterdir()) == sorted(
        [*parts, "LICENSE.md", "README.md", "model_index.json", "recipe.yaml", "transformer"]
    )


def test_the_card_has_the_figures_and_the_licence_and_no_path_of_this_machine(whole: tuple[Path, Path, bool]) -> None:
    from huggingface_hub import ModelCard

    _, out, edited = whole
    text = (out / "model" / "README.md").read_text("utf-8")
    data = ModelCard(text).data.to_dict()
    assert data == {
        "base_model": "someone/tiny",
        "base_model_relation": "finetune",
        "library_name": "diffusers",
        "license": "other",
        "license_name": "tiny-license",
        "license_link": "LICENSE.md",
        "pipeline_tag": "text-to-image",
        "tags": ["art", "ppclc", "pruning", "distillation"],
    }
    [record] = [json.loads(p.read_text("utf-8")) for p in (out / "records").glob("verify-*/record.json")]
    assert len(record["quality"]) >= 4
    for name, q in record["quality"].items():
        [row] = [line for line in text.splitlines() if line.startswith(f"| {label(name)} (")]
        cells = [c.strip() for c in row.strip("|").split("|")]
        interval = f"{percent(q['ci95'][0])} to {percent(q['ci95'][1])}" if q["ci95"] else "–"
        figures = [number(q["teacher"]), number(q["student"]), percent(q["drop_percent"]), interval]
        near = [
            "–",
            f"{number(q['student'])} dB from the teacher's images",
            "–",
            "–",
        ]  # of which the teacher's own have as many as are told at most
        assert cells[1:5] == (near if name == "psnr" else figures)
        assert cells[5:] == [f"{q['n']:,}", ", ".join(map(str, q["seeds"])) or "–"]
    student = load_model(out / "model")
    assert f"| {sum(p.numel() for p in student.parameters()):,} |" in text
    assert ("trust_remote_code=True" in text) == edited
    assert str(out) not in text
    assert "/tmp" not in text
    assert (out / "model" / "recipe.yaml").read_text("utf-8") == (out / "recipe.yaml").read_text("utf-8")


def test_what_is_lost_comes_back_with_the_next_run(whole: tuple[Path, Path, bool]) -> None:
    teacher, out, _ = whole
    model = out / "model"
    weights = (model / "transformer" / "config.json").stat()
    shutil.rmtree(model / "vae")
    (model / "model_index.json").unlink()
    stored = read_recipe(out / "recipe.yaml")
    compress(stored, "r", out, Display(0, -1), until="slice")
    assert (model / "vae" / "config.json").samefile(teacher / "vae" / "config.json")
    assert (model / "model_index.json").is_file()
    assert (model / "transformer" / "config.json").stat() == weights


def test_a_size_is_a_whole_pipeline_too_with_a_file_for_comfyui(whole: tuple[Path, Path, bool], tmp_path: Path) -> None:
    import diffusers

    teacher, out, edited = whole
    home = tmp_path / "size"
    arguments = (out, None, out / "plan.json", home, [], -1)
    if edited:
        with pytest.raises(PlanError, match="--comfyui: the plan has edits that change the class"):
            slice_size(*arguments, True)
        assert not home.exists()
        slice_size(*arguments)
    else:
        slice_size(*arguments, True)
        file = home / "comfyui" / "size.safetensors"
        read, student = load_model(file).state_dict(), load_model(home).state_dict()
        assert read.keys() == student.keys()
        assert all(torch.equal(v, read[k]) for k, v in student.items())
    assert (home / "vae" / "config.json").samefile(teacher / "vae" / "config.json")
    text = (home / "README.md").read_text("utf-8")
    assert "not fine-tuned end to end" in text
    assert "Not measured." in text
    pipeline = diffusers.DiffusionPipeline.from_pretrained(home, **({"trust_remote_code": True} if edited else {}))
    assert torch.isfinite(drawn(pipeline)).all()
    before = sorted(p.name for p in home.rglob("*"))
    slice_size(*arguments)  # what is there is taken for a size, and stays
    assert sorted(p.name for p in home.rglob("*")) == before


def test_what_is_saved_again_loads_again(whole: tuple[Path, Path, bool], tmp_path: Path) -> None:
    """By diffusers alone, with trust where the class travels: a student read by ppclc, a pipeline, and one that a student was put into."""
    import diffusers

    teacher, out, edited = whole
    trust = {"trust_remote_code": True} if edited else {}
    student = load_model(out / "model")
    student.save_pretrained(tmp_path / "alone")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(out / "model", **trust)
    pipeline.save_pretrained(tmp_path / "whole")
    type(pipeline).from_pretrained(teacher, transformer=student).save_pretrained(tmp_path / "put")
    kind = diffusers.AutoModel if edited else type(student)
    found = [kind.from_pretrained(str(tmp_path / "alone"), **trust), load_model(tmp_path / "alone")]
    for name in ("whole", "put"):
        again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / name, **trust)
        assert (drawn(again) - drawn(pipeline)).abs().max() <= 1e-4
        found += [again.transformer, load_model(tmp_path / name)]
        again.save_pretrained(tmp_path / f"{name} once more")
        once_more = diffusers.DiffusionPipeline.from_pretrained(tmp_path / f"{name} once more", **trust)
        assert (drawn(once_more) - drawn(pipeline)).abs().max() <= 1e-4
    for model in found:
        assert type(model).__name__ == type(student).__name__
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in student.state_dict().items())
