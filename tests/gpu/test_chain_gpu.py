"""A whole small pipeline, compress to bench, on a GPU: with kernels and without, from the same data to nearly the same sums and student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ppclc import kernels
from ppclc.compiler import compress
from ppclc.machine.devices import open_ranks
from ppclc.recipe import parse_recipe
from ppclc.run import Run
from ppclc.screens.display import Display
from tests.e2e.test_pipelines import PIPELINES, WIDTH, recipe, with_images

# What libraries warn of on a GPU is theirs, and not what is tested here.
pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"), pytest.mark.filterwarnings("ignore")]


def compressed(folder: Path, out: Path, way: str, **changes: Any) -> Run:
    # Bench's compiled models and graphs are tested elsewhere, and take minutes.
    bench = {"runs": 3, "steps": 1, "compiled": False, "size": {"height": 8, "width": 8, "text": 16}}
    given = recipe(folder) | {"kernels": way, "export": [], "bench": bench} | changes
    return compress(parse_recipe(given, "recipe"), "recipe", out, Display(2, -1), ranks=open_ranks())


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_goes_through_the_chain_on_the_gpu(name: str, tmp_path: Path) -> None:
    """Encoders, calibration, distillation and verdict on the device; the student differs by rounding alone from that of plain PyTorch there."""
    ways = ["torch"] if kernels.lacks() else ["torch", "triton"]
    folder = with_images(name, tmp_path)
    runs = {way: compressed(folder, tmp_path / way, way, **(WIDTH if name == "qwen_image" else {})) for way in ways}
    for run in runs.values():
        assert run.report is not None
        assert run.verdict is not None
        assert 0 < run.verdict.quality["velocity_error"].student < 2
        assert run.verdict.quality["flow_loss"].teacher > 0
        assert next(run.teacher.parameters()).device.type == "cpu"
        assert run.stats is not None
        assert all(t.device.type == "cpu" and bool(torch.isfinite(t).all()) for t in run.stats.tensors.values())
    if len(runs) == 2:
        plain, by_kernel = runs["torch"], runs["triton"]
        if plain.plan == by_kernel.plan:  # costs of random weights lie close
            a, b = (run.verdict.quality["velocity_error"].student for run in runs.values() if run.verdict)
            assert b == pytest.approx(a, rel=0.1)
        assert plain.stats is not None
        assert by_kernel.stats is not None
        for key, wanted in plain.stats.tensors.items():
            found = by_kernel.stats.tensors[key]
            assert (found.double() - wanted.double()).norm() <= 1e-3 * wanted.double().norm(), key


def test_a_streamed_teacher_gives_nearly_the_sums_of_a_resident_one(tmp_path: Path) -> None:
    folder = with_images("qwen_image", tmp_path)
    resident, streamed = (
        compressed(folder, tmp_path / mode, "auto", distill=recipe(folder)["distill"] | {"teacher": mode})
        for mode in ("resident", "streamed")
    )
    assert resident.stats is not None
    assert streamed.stats is not None
    for key, wanted in resident.stats.tensors.items():
        assert (streamed.stats.tensors[key].double() - wanted.double()).norm() <= 1e-3 * wanted.double().norm(), key
