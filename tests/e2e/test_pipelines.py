"""Whole pipelines, compress to bench: encoders, VAE, transformer and scheduler of a few thousand parameters, real classes, nothing from a hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ppclc.compiler import compress
from ppclc.display import Display
from ppclc.encoding import decoder
from ppclc.models import load_model, open_source
from ppclc.recipe import parse_recipe
from tests.contracts.test_families import subject_of
from tests.pipelines import flux_pipeline, qwen_pipeline

PROMPTS = ["a cat", "a very long red dog on a blue mat", "two green birds", "rain", "a house by the sea", "snow", "a ship", "tea"]
SIZE = [16, 32]
PIPELINES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "flux": ("FluxPipeline", flux_pipeline),
    "qwen_image": ("QwenImagePipeline", qwen_pipeline),
}


@pytest.fixture(scope="module", params=PIPELINES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where: Path = tmp_path_factory.mktemp(request.param)
    PIPELINES[request.param][1](subject_of(request.param).model).save_pretrained(where / "pipeline")
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
        "bench": {"runs": 3},
    }


@pytest.mark.slow
def test_a_whole_pipeline_is_compressed_judged_exported_and_benched(folder: Path, tmp_path: Path) -> None:
    run = compress(parse_recipe(recipe(folder), "pipeline"), "pipeline", tmp_path, Display(0, -1))
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

    name = folder.name.rstrip("0123456789")
    pipeline = getattr(diffusers, PIPELINES[name][0]).from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    source = open_source(str(folder / "pipeline"))
    given = {"num_inference_steps": 2, "height": SIZE[0], "width": SIZE[1]}
    if name == "flux":
        given |= {"max_sequence_length": 48}
    drawn = {
        kind: pipeline("a cat", generator=torch.Generator().manual_seed(0), output_type=kind, **given).images for kind in ("latent", "pt")
    }
    with decoder(source, (4, 8), "float32") as decode:
        assert decode is not None
        assert torch.allclose(decode(drawn["latent"]), drawn["pt"].float(), atol=1e-5)


def test_a_student_goes_back_into_its_pipeline(folder: Path, tmp_path: Path) -> None:
    """What is sliced loads as the transformer of the pipeline that it came from, and draws."""
    import diffusers

    cut = recipe(folder) | {"plan": {"text_stream": "none", "ffn": "none", "modulation_rank": "none"}, "export": []}
    compress(parse_recipe(cut, "depth"), "depth", tmp_path, Display(0, -1), until="slice")
    name = folder.name.rstrip("0123456789")
    transformer = load_model(tmp_path / "model")
    pipeline = getattr(diffusers, PIPELINES[name][0]).from_pretrained(folder / "pipeline", transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    assert type(transformer).__name__ == type(pipeline.transformer).__name__
    image = pipeline("tea", num_inference_steps=1, height=SIZE[0], width=SIZE[1], output_type="pt").images
    assert image.shape == (1, 3, *SIZE)
    assert torch.isfinite(image).all()
