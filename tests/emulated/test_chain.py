"""Whole chains on a GPU, emulated: they end where they end on the CPU, hold memory no longer than they must, and say so where there is none left."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from benchmarks import emulated_cuda
from ppclc.compiler import compress
from ppclc.machine.devices import Ranks
from ppclc.recipe import parse_recipe
from ppclc.run import Run
from ppclc.screens.display import Display
from tests.contracts.test_families import SUBJECTS, subject_of
from tests.e2e.test_pipelines import PIPELINES, recipe, with_images

pytestmark = [
    pytest.mark.skipif(not emulated_cuda.started(), reason="pytest -p tests.emulated.plugin runs it, where there is a C++ compiler"),
    pytest.mark.slow,
]
BENCH = {"runs": 2, "steps": 1, "compiled": False, "cuda_graphs": False, "size": {"height": 4, "width": 8, "text": 16}}


def compressed(asked: dict[str, Any], out: Path, device: str) -> Run:
    given = asked | {"kernels": "triton" if device == "cuda" else "torch", "export": [], "bench": BENCH | {"device": device}}
    until = "bench" if device == "cuda" else "verify"
    return compress(parse_recipe(given, "recipe"), "recipe", out, Display(0, -1), until, Ranks(device=device))


def compared(asked: dict[str, Any], out: Path) -> dict[str, Run]:
    """The same recipe on the CPU and on the GPU: the same plan, sums and figures but for rounding."""
    runs = {device: compressed(asked, out / device, device) for device in ("cpu", "cuda")}
    cpu, cuda = runs.values()
    assert cuda.plan == cpu.plan
    assert cuda.stats is not None
    assert cpu.stats is not None
    assert cuda.stats.tensors.keys() == cpu.stats.tensors.keys()
    for key, wanted in cpu.stats.tensors.items():
        found = cuda.stats.tensors[key]
        assert found.device.type == "cpu"
        assert (found.double() - wanted.double()).norm() <= 1e-4 * wanted.double().norm(), key
    assert cuda.verdict is not None
    assert cpu.verdict is not None
    for name, figure in cpu.verdict.quality.items():
        assert cuda.verdict.quality[name].student == pytest.approx(figure.student, rel=1e-3), name
    return runs


@pytest.mark.parametrize("name", PIPELINES)
def test_a_chain_ends_where_it_ends_on_the_cpu(name: str, tmp_path: Path) -> None:
    """Encoders, calibration by kernels' twins, analysis, both phases of distillation, verdict and bench; nothing stays on the device."""
    device = emulated_cuda.start()
    gc.collect()
    before = device.held()
    folder = with_images(name, tmp_path)
    run = compared(recipe(folder), tmp_path)["cuda"]
    assert run.benchmark is not None
    assert [(row.target, row.device) for row in run.benchmark.rows] == [("teacher", "cuda"), ("student", "cuda")]
    assert device.peak() > before
    del run
    gc.collect()
    assert device.held() <= before + 2**23  # of tables for positions, which diffusers keeps for later


@pytest.mark.long
@pytest.mark.parametrize("teacher", ["resident", "streamed"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_member_of_a_family_ends_where_it_ends_on_the_cpu(name: str, teacher: str, tmp_path: Path) -> None:
    """Without a pipeline, on noise; the teacher as a whole or block by block."""
    family, changes = SUBJECTS[name]
    subject_of(family, **changes).model.save_pretrained(tmp_path / "model" / "transformer")
    asked = {
        "model": {"path": str(tmp_path / "model")},
        "calibrate": {"source": "noise", "samples": 32, "longest": 2},
        "analyze": {"probes": 16, "supernet_steps": 2, "supernet_sets": 4, "trials": 2, "trial_steps": 3},
        "target": {"parameters": 0.85},
        "distill": {"steps": 2, "width_steps": 2, "finetune_steps": 2, "batch": 4, "teacher": teacher},
        "verify": {"samples": 4},
    }
    run = compared(asked, tmp_path)["cuda"]
    assert not run.failed
    assert run.student is not None
