"""The proof on a GPU, run small on the CPU: every part is there, wrong kernels and broken parts are told, and nothing stops the rest."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import correctness, measuring, speed, tables
from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.measuring import NotRun, Proof

ROOT = Path(__file__).resolve().parents[2]


def run(out: Path, *more: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any], str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(out), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    (document,) = out.glob("*.json")
    return done, json.loads(document.read_text("utf-8")), document.with_suffix(".md").read_text("utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any], str]:
    """All parts; one of them fails."""
    return run(tmp_path_factory.mktemp("whole"), "--failing", "speed")


@pytest.mark.slow
def test_every_part_is_in_both_files(whole: tuple[subprocess.CompletedProcess[str], dict[str, Any], str]) -> None:
    done, document, markdown = whole
    assert list(document["parts"]) == list(PARTS)
    assert all(f"## {tables.TITLES[part]}" in markdown for part in PARTS)
    assert document["command"] == "python -m benchmarks.gpu --tiny"
    assert str(ROOT) not in json.dumps(document)
    assert markdown in done.stdout


@pytest.mark.slow
def test_a_part_that_fails_is_told_and_stops_nothing(whole: tuple[subprocess.CompletedProcess[str], dict[str, Any], str]) -> None:
    done, document, markdown = whole
    assert done.returncode == 1
    assert document["parts"]["speed"]["not_run"] == "RuntimeError: speed was asked to fail"
    assert "not run: RuntimeError: speed was asked to fail" in markdown
    assert document["parts"]["ladder"]["rows"]
    assert document["parts"]["analysis"]["rows"]


@pytest.mark.slow
def test_kernels_agree_with_float64(whole: tuple[subprocess.CompletedProcess[str], dict[str, Any], str]) -> None:
    rows = whole[1]["parts"]["correctness"].get("rows", [])
    measured = [row for row in rows if "not_run" not in row]
    assert all(row["passed"] and row["rel_l2"] <= row["limit"] for row in measured)
    assert not any(row.get("broke") for row in rows)


@pytest.mark.slow
def test_the_ladder_and_the_analysis_have_numbers(whole: tuple[subprocess.CompletedProcess[str], dict[str, Any], str]) -> None:
    parts = whole[1]["parts"]
    eager = [r for r in parts["ladder"]["rows"] if r.get("way") == "eager" and r["kernels"] == "torch"]
    assert {"teacher", "fewer blocks", "narrowed"} <= {r["layout"] for r in eager}
    assert all(r["rel_l2_to_eager"] == 0 for r in eager)
    assert all(r["ms"] > 0 and r["speedup"] > 0 and r["tflop"] > 0 for r in eager)
    by_model = {(r["model"], r["layout"]): r for r in eager}
    for model, _ in by_model:
        assert by_model[model, "fewer blocks"]["parameters"] < by_model[model, "teacher"]["parameters"]
    compiled = [r for r in parts["ladder"]["rows"] if r.get("way") == "torch.compile"]
    assert compiled
    assert all("no CUDA device" in r["not_run"] for r in compiled)
    (calibrated,) = [r for r in parts["analysis"]["rows"] if r["what"] == "calibration"]
    (step,) = [r for r in parts["analysis"]["rows"] if r["what"] == "distillation step"]
    assert calibrated["forward_ms_a_block"] > 0
    assert sum(step[f"{part}_ms"] for part in ("forward", "loss", "backward", "clip", "optimizer")) <= step["step_ms"]
    assert step["tokens_per_s"] > 0


@pytest.mark.slow
def test_speed_alone_has_ceilings(tmp_path: Path) -> None:
    done, document, _ = run(tmp_path, "--parts", "speed")
    rows = document["parts"]["speed"]["rows"]
    assert done.returncode == 0
    assert {r["dtype"] for r in rows if r.get("ceiling") == "matrix"} == {"bfloat16", "float16", "float32"}
    assert all(r["event_us"] > 0 for r in rows if "event_us" in r)
    assert all("no CUDA device" in r["not_run"] for r in rows if r.get("formulation") == "kernel")


@pytest.mark.slow
def test_ratios_are_of_replays_that_took_turns() -> None:
    """All in each round, so that a clock that falls is in both; where something is in no graph, of what events tell."""
    made = list[str]()

    def graph(name: str, us: float) -> Any:
        return SimpleNamespace(us=lambda: made.append(name) or us * (1 + len(made) // 2))

    times = {k: np.array(v) for k, v in measuring.replayed_us({"kernel": graph("kernel", 2.0), "eager": graph("eager", 6.0)}, 8).items()}
    assert [sorted(made[i : i + 2]) for i in range(0, 16, 2)] == [["eager", "kernel"]] * 8
    assert len({tuple(made[i : i + 2]) for i in range(0, 16, 2)}) == 2  # not always the same first
    rows = {"kernel": {"event_us": 10.0}, "eager": {"event_us": 40.0}, "other": {"event_us": 20.0}, "none": {"not_run": "why"}}
    found = speed.with_ratios(rows, times)
    assert 2 < found["eager"]["kernel_is_faster"] < 4
    low, high = found["eager"]["ci95"]
    assert low <= found["eager"]["kernel_is_faster"] <= high
    assert found["kernel"]["kernel_is_faster"] == 1
    assert found["other"]["kernel_is_faster"] == 2
    assert found["none"] == {"not_run": "why"}
    assert speed.with_ratios({"eager": {"event_us": 1.0}, "kernel": {"not_run": "why"}}, {})["eager"] == {"event_us": 1.0}


@pytest.mark.slow
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3
    assert "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_there_is_no_time_for_is_not_begun() -> None:
    proof = Proof("cpu", ends_at=time.perf_counter() + 5)
    proof.needs(1)
    with pytest.raises(NotRun, match="no time left: about 60 s wanted"):
        proof.needs(60)


def test_a_broken_case_is_a_row_and_the_next_goes_on() -> None:
    def breaks() -> list[dict[str, Any]]:
        raise ValueError("wrong at /a/path/of/mine here")

    def refuses() -> list[dict[str, Any]]:
        raise NotRun("not here")

    rows = measuring.rows_of(Proof("cpu", tiny=True), [({"n": 1}, breaks), ({"n": 2}, refuses), ({"n": 3}, lambda: [{"ms": 1.0}])])
    assert rows == [
        {"n": 1, "not_run": "ValueError: wrong at ... here", "broke": True},
        {"n": 2, "not_run": "not here"},
        {"n": 3, "ms": 1.0},
    ]
    assert len(tables.table(rows)) == 5


class Plain:
    """Moments as they should be, or with rows left out, or with an output that is never written."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    @staticmethod
    def symmetric(second: torch.Tensor) -> torch.Tensor:
        return torch.triu(second) + torch.triu(second, 1).T

    def add_moments(self, second: Any, cross: Any, x: Any, y: Any = None, mask: Any = None, centres: Any = ()) -> None:
        x, y = (z if z is None or not centres else (z.float() - c).to(z.dtype) for z, c in zip((x, y), centres or (0, 0), strict=True))
        if mask is not None:
            x, y = x[mask], y[mask]
        if self.fault == "rows":
            x, y = x[1:], None if y is None else y[1:]
        upper = torch.ones_like(second, dtype=torch.bool).triu()
        added = torch.empty_like(second) if self.fault == "unwritten" else x.float().T @ x.float()
        second[upper] += added[upper]
        second[~upper] = torch.nan
        if cross is not None:
            cross += x.float().T @ y.float()


@pytest.mark.parametrize(("fault", "good"), [("", True), ("rows", False), ("unwritten", False)])
def test_wrong_moments_do_not_pass(monkeypatch: pytest.MonkeyPatch, fault: str, good: bool) -> None:
    monkeypatch.setattr(correctness, "kernel_module", lambda name: Plain(fault))
    monkeypatch.setattr(correctness, "CHECKS", {"moments": correctness.check_moments})
    rows = correctness.correctness(Proof("cpu", tiny=True))
    assert len(rows) == 3 * (2 * 3 + 1)
    assert all(row["passed"] for row in rows) is good
    assert not any("not_run" in row for row in rows)


@pytest.mark.parametrize("fault", ["", "unscaled"])
def test_a_wrong_gradient_does_not_pass(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def gated(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + gate[:, None] * (y.detach() + 0 * y if fault else y)

    monkeypatch.setattr(correctness, "kernel_module", lambda name: SimpleNamespace(gated_residual=gated))
    monkeypatch.setattr(correctness, "CHECKS", {"gated_residual": correctness.check_gated_residual})
    rows = correctness.correctness(Proof("cpu", tiny=True))
    assert {row["output"] for row in rows} == {"output", "gradient of x", "gradient of gate", "gradient of y"}
    assert {row["output"] for row in rows if not row["passed"]} == ({"gradient of y"} if fault else set())


def test_nothing_to_run_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise NotRun("the kernels are not there")

    monkeypatch.setattr(correctness, "kernel_module", absent)
    with pytest.raises(NotRun, match=r"^the kernels are not there$"):
        correctness.correctness(Proof("cpu", tiny=True))
