"""Artefacts in plain diffusers pipelines: the same image as with the model itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import ppclc
from ppclc.errors import OutputError, RecipeError, VerificationError
from ppclc.passes.export import export_model
from tests.contracts.test_families import subject_of
from tests.pipelines import flux2_pipeline, flux_pipeline, qwen_pipeline

PIPELINES: dict[str, tuple[str, Callable[[Any], Any], dict[str, Any]]] = {
    "qwen_image": ("QwenImagePipeline", qwen_pipeline, {"num_layers": 1}),
    "flux": ("FluxPipeline", flux_pipeline, {"num_layers": 1, "num_single_layers": 1}),
    "flux2": (
        "Flux2KleinPipeline",
        flux2_pipeline,
        {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": False, "joint_attention_dim": 24},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if n == "qwen_image" else pytest.param(n, marks=pytest.mark.long) for n in PIPELINES])
def test_a_pipeline_draws_the_same_image_with_the_artefact(name: str, tmp_path: Path) -> None:
    kind, made, changes = PIPELINES[name]
    subject = subject_of(name, **changes)
    made(subject.model).save_pretrained(tmp_path / "pipeline")
    export_model(subject.model, subject.family, "onnx", "float32", tmp_path / "onnx", "abc")
    given: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 32, "output_type": "pt"}
    if name != "qwen_image":
        given["max_sequence_length"] = 48

    def drawn(pipeline: Any) -> torch.Tensor:
        pipeline.set_progress_bar_config(disable=True)
        image: torch.Tensor = pipeline(prompt="a red dog", generator=torch.Generator().manual_seed(0), **given).images
        return image

    pipeline = getattr(diffusers, kind)
    wanted = drawn(pipeline.from_pretrained(tmp_path / "pipeline"))
    bare = pipeline.from_pretrained(tmp_path / "pipeline", transformer=None)
    bare.transformer = ppclc.load_exported(tmp_path / "onnx")
    assert sum(p.numel() for p in bare.transformer.parameters()) == 0
    assert (drawn(bare) - wanted).abs().max() <= 1e-4
    check_refusals(name, bare.transformer, subject)


def check_refusals(name: str, transformer: Any, subject: Any) -> None:
    inputs = dict(subject.inputs)
    assert transformer(**inputs).sample.shape == transformer(**inputs, return_dict=False)[0].shape
    with pytest.raises(VerificationError, match="timestep was not given; the artefact takes hidden_states, "):
        transformer(**{n: v for n, v in inputs.items() if n != "timestep"})
    if name == "qwen_image":
        mask = torch.ones(inputs["encoder_hidden_states"].shape[:2])
        assert torch.equal(transformer(**inputs, encoder_hidden_states_mask=mask).sample, transformer(**inputs).sample)
        mask[1, -1] = 0
        with pytest.raises(VerificationError, match="leaves out text"):
            transformer(**inputs, encoder_hidden_states_mask=mask)
        with pytest.raises(VerificationError, match="samples of one shape"):
            transformer(**inputs | {"img_shapes": [[(1, 4, 8)], [(1, 8, 4)]]})


def test_a_folder_without_an_export_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no readable export\.json"):
        ppclc.load_exported(tmp_path)


@pytest.mark.slow
def test_an_option_that_the_back_end_has_not_is_refused(tmp_path: Path) -> None:
    subject = subject_of("qwen_image", num_layers=1)
    export_model(subject.model, subject.family, "onnx", "float32", tmp_path / "onnx", "abc")
    with pytest.raises(RecipeError, match="threads: onnxruntime has no such option; it has providers, cuda_graph"):
        ppclc.load_exported(tmp_path / "onnx", threads=2)
    transformer = ppclc.load_exported(tmp_path / "onnx", providers=["cpu"])
    assert transformer.session.options["providers"] == ["CPUExecutionProvider"]
