"""The analysis on CUDA tensors that have shapes and no values, at Qwen-Image's own width: it goes by kernels, waits for nothing, and takes little."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import analysis_counted, fake_cuda
from benchmarks.fake_cuda import DEVICE, Counted
from ppclc.analysis.closed_forms import Probes, cka_map, far_of, linear_map
from ppclc.analysis.ffn_maps import ffn_map
from ppclc.analysis.moments import near_of
from ppclc.analysis.reach import moment_counts
from ppclc.data.samples import open_samples
from ppclc.families import Family
from ppclc.kernels import takes
from ppclc.kernels.distillation_loss import state_loss
from ppclc.passes.calibrate import CalibrateSettings, calibrate
from ppclc.records import CalibrationStats
from ppclc.teachers import ResidentTeacher

BLOCKS, WIDTH = 3, 3072
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(fake_cuda.lacks()), reason=fake_cuda.lacks())]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return analysis_counted.counted(BLOCKS, free_bytes=20 * 10**9)


@pytest.fixture(scope="module")
def small(teacher: Any, family: Family) -> CalibrationStats:
    """Of a tiny teacher on the CPU."""
    samples = open_samples("noise", SimpleNamespace(family=family, config=dict(teacher.config)), teacher, "choose")  # type: ignore[arg-type]
    return calibrate(ResidentTeacher(teacher, family), samples, CalibrateSettings(samples=64, longest=3), lambda *_: None)


def count(counted: Counted, name: str) -> int:
    return sum(c.count for (called, _), c in counted.calls.items() if called == name)


def test_as_many_samples_pass_together_as_the_batch_of_a_gpu_has(found: dict[str, Any]) -> None:
    state_bytes = 2 * WIDTH * (83 * 83 + 512)
    assert found["samples"] == 2**28 // state_bytes == 5
    assert 2 <= found["together"] <= 12


def test_near_moments_are_left_on_the_device_by_kernels_alone(found: dict[str, Any]) -> None:
    """Nothing is read back or waited for while a piece passes; a state's products are one launch, and so is a step."""
    near = found["near"]
    assert near.to_host == []
    assert count(near, "ppclc.add_moments") == 2 * (BLOCKS + 1)
    assert count(near, "ppclc.difference") == 2 * BLOCKS


@pytest.mark.slow
def test_far_moments_are_brought_to_the_cpu_once_for_all_that_pass_together(found: dict[str, Any]) -> None:
    far, together, longest = found["far"], found["together"], 10
    teacher = analysis_counted.teacher_of(BLOCKS)
    kept = moment_counts(teacher.family, teacher.config, longest)
    pairs, networks = sum(kept.far.values()), sum(kept.ffn.values())
    matrices = 4 * pairs + 8 * networks  # to those of networks something in float64 is added
    vectors = 8 * (kept.far_states + networks)
    assert sum(nbytes for _, nbytes in far.to_host) == matrices * WIDTH**2 + vectors * WIDTH
    near = 2 * (BLOCKS + 1)
    assert count(far, "ppclc.add_moments") == together * (near + pairs + networks // 2)


@pytest.mark.parametrize("kind", ["near", "far"])
def test_products_are_made_in_the_dtype_of_the_states(kind: str, found: dict[str, Any]) -> None:
    flops: dict[torch.dtype, int] = {}
    for calls in found[kind].calls.values():
        for dtype, n in calls.flops.items():
            flops[dtype] = flops.get(dtype, 0) + n
    assert flops[torch.bfloat16] > 0.999 * sum(flops.values())


def test_the_analysis_is_a_tenth_of_the_forwards_at_most(found: dict[str, Any]) -> None:
    """By counts, of near moments alone: a few blocks have no whole window of far ones. `benchmarks/results` has both."""
    near = sum(map(analysis_counted.seconds, found["near"].calls.values()))
    assert near / (BLOCKS * found["samples"]) <= 0.05 * analysis_counted.FORWARD_S


def test_what_is_counted_is_what_operators_do() -> None:
    with fake_cuda.fake_cuda(10**9):
        x, y = (torch.empty(64, 32, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        with Counted() as found:
            x @ y.T
            x[:, :8].reshape(-1, 8).sum().cpu()
    assert found.calls["aten.mm", (64, 64)].flops == {torch.bfloat16: 2 * 64 * 64 * 32}
    assert found.calls["aten.mm", (64, 64)].nbytes == 2 * (2 * 64 * 32 + 64 * 64)
    assert [name for name, _ in found.calls] == ["aten.mm", "aten.sum"]  # a view does nothing
    assert found.to_host == [("aten._to_copy", 2)]


def test_the_loss_reaches_its_kernel_as_an_operator_where_tensors_stand_for_others() -> None:
    with fake_cuda.fake_cuda(10**9), Counted() as found:
        student, teacher = (torch.empty(1, 2048, 512, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        assert takes("distillation_loss", student, teacher)
        assert state_loss(student, teacher, 0.1).shape == ()
    assert "ppclc.distillation_loss" in {name for name, _ in found.calls}


@pytest.mark.parametrize("reading", ["equation", "caption"])
def test_closed_forms_are_solved_where_the_teacher_is(reading: str, small: CalibrationStats) -> None:
    """Every operator on matrices has them on the device; the tables and maps come back to the CPU."""
    with fake_cuda.fake_cuda(10**9), Counted() as found:
        stats = small.model_copy(update={"tensors": {name: tensor.clone() for name, tensor in small.tensors.items()}})
        probes = Probes(near_of(stats.tensors, stats.rows, "image", stats.num_blocks, device=DEVICE), 1e-4)
        table = cka_map(probes, stats.longest, far_of(stats, "image", DEVICE) if reading == "caption" else None)
        weight, bias = linear_map(far_of(stats, "image", DEVICE), 0, 2, 1e-4)
        network = ffn_map(stats.tensors, stats.rows, 1, "image", 1e-4, DEVICE)
    assert table.device.type == "cpu"
    assert {weight.device, bias.device, *(t.device for t in network.values())} == {DEVICE}
    # The probe of each block but the first, a map, and a network.
    assert count(found, "aten._linalg_solve_ex") == stats.num_blocks + 1
    assert sum(nbytes for _, nbytes in found.to_host) == 8 * sum(min(stats.longest, stats.num_blocks - u) for u in range(stats.num_blocks))


def test_there_is_a_reason_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_cuda, "lacks", lambda: "there is no C++ compiler")
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"), fake_cuda.fake_cuda(1):
        pass
