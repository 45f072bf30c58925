"""The whole chain on the embedded teacher, through the command line, in processes of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ppclc import cli
from ppclc.errors import PpclcError
from ppclc.models import load_model
from ppclc.plan import CompressionPlan

SMALL = """\
model: {path: "builtin:two-digits"}
calibrate: {samples: 64}
analyze: {probes: 16, supernet_steps: 4, supernet_sets: 8, trials: 2, trial_steps: 4}
target: {parameters: 0.45}
plan: {text_stream: [10, 11], ffn: none, modulation_rank: 8}
distill: {steps: 4, finetune_steps: 12, batch: 8, checkpoint_every: 2}
verify: {scenes: 16, seeds: [0, 1], guidance: [1], steps: 4, gates: {velocity_error: {drop_percent: 100}}}
export: [{backend: onnx}]
bench: {runs: 5, steps: 2}
"""
COMMAND = [sys.executable, "-m", "ppclc"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def ppclc(*args: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *args], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=840, check=False)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def in_this_process(*args: str) -> str:
    """Standard output of a command: starting Python and its libraries takes longer than most of them."""
    done = CliRunner().invoke(cli.app, args)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the chain has run to its end."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "small.yaml").write_text(SMALL)
    done = ppclc("compress", "small.yaml", "--json", cwd=folder)
    document = json.loads(done.stdout)
    assert set(document) == {"teacher", "student", "plan", "gates"}
    return folder


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its inode and time of change."""
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_the_report_keeps_its_contract(finished: Path) -> None:
    out = finished / "out" / "small"
    report = json.loads((out / "report.json").read_text())
    assert set(report) == {
        *("ppclc", "recipe_sha256", "teacher", "student", "plan", "quality", "gates", "stages", "exports", "bench", "versions"),
    }
    student = load_model(out / "model")
    assert report["student"]["parameters"] == sum(p.numel() for p in student.parameters())
    assert report["student"]["parameters"] <= 0.45 * report["teacher"]["parameters"]
    assert report["student"]["bytes"] == (out / "model/transformer/diffusion_pytorch_model.safetensors").stat().st_size
    assert [s["name"] for s in report["stages"]] == ["calibrate", "analyze", "distill", "slice", "verify", "export", "bench", "report"]
    assert {(b["target"], b["backend"]) for b in report["bench"]} == {
        (t, b) for t in ("teacher", "student") for b in ("eager", "onnxruntime")
    }
    assert report["exports"][0]["parity"]["max_abs"] <= 1e-4
    assert len(report["exports"][0]["shapes"]) == 3
    assert report["quality"]["scene_accuracy_g1"]["n"] == 32
    plan = CompressionPlan.read(out / "plan.json")
    assert plan.model_dump(mode="json") == report["plan"]
    assert (out / "report.html").stat().st_size > 50_000


@pytest.mark.slow
def test_a_second_run_makes_nothing_anew(finished: Path) -> None:
    out = finished / "out" / "small"
    before = files_of(out)
    ppclc("compress", "small.yaml", cwd=finished)
    after = files_of(out)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed <= {"report.json", "report.html", "recipe.yaml"}
    report = json.loads((out / "report.json").read_text())
    assert all(s["reused"] for s in report["stages"] if s["name"] != "report")


@pytest.mark.slow
def test_export_and_bench_work_bare(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's ONNX model lies there already: it is not made again."""
    done = ppclc("export", "--backend", "onnx", "--json", cwd=finished)
    exported = json.loads(done.stdout)
    assert exported["backend"] == "onnx"
    assert "holds this export already" in done.stderr
    assert exported == json.loads((finished / "out/small/report.json").read_text())["exports"][0]
    assert (finished / "out/small/export/onnx/transformer/model.onnx").is_file()
    monkeypatch.chdir(finished)
    rows = json.loads(in_this_process("bench", "--json", "--runs", "5", "--set", "bench.steps=1"))
    assert {r["target"] for r in rows} == {"teacher", "student"}
    assert all(r["p50_ms"] <= r["p90_ms"] <= r["p99_ms"] for r in rows)


@pytest.mark.slow
def test_a_model_in_a_run_is_no_run(finished: Path) -> None:
    done = ppclc("report", "out/small/model", cwd=finished, code=2)
    assert "out/small/model: holds no run of ppclc compress; wanted a folder with recipe.yaml and records/, as out/small is" in " ".join(
        done.stderr.split()
    )


@pytest.mark.slow
def test_another_size_is_cut_and_measured(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    out = finished / "out" / "small"
    document = json.loads(ppclc("slice", "out/small", "--parameters", "0.8", "--json", cwd=finished).stdout)
    assert set(document) == {"teacher", "student", "plan", "gates"}
    student = load_model(out / "sizes" / "p0.80")
    assert sum(p.numel() for p in student.parameters()) == document["student"]["parameters"] <= 0.8 * document["teacher"]["parameters"]
    size = "out/small/sizes/p0.80"
    rows = json.loads(in_this_process("bench", size, "--against", "builtin:two-digits", "--json", "--runs", "3", "--set", "bench.steps=1"))
    assert [r["target"] for r in rows] == ["teacher", "out/small/sizes/p0.80"]
    before = json.loads((out / "report.json").read_text()).keys()
    in_this_process("report", "out/small")
    assert json.loads((out / "report.json").read_text()).keys() == before
    assert "sizes/p0.80" in (out / "report.html").read_text()


@pytest.mark.slow
def test_a_student_is_no_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of a run is not done to a model: not another size, no training, and nothing is compressed into one."""
    model = finished / "out" / "small" / "model"
    before = files_of(model)
    plan = finished / "out" / "small" / "plan.json"
    for wanted, command in {
        r"or its run, .*small, for another size": ("slice", str(model), "--parameters", "0.8"),
        "--parameters: a model is cut by its plan alone": (
            "slice",
            "builtin:two-digits",
            "--plan",
            str(plan),
            "--parameters",
            "0.8",
            "-o",
            str(tmp_path),
        ),
        "--set: a model is cut by its plan alone": (
            "slice",
            "builtin:two-digits",
            "--plan",
            str(plan),
            "--set",
            "x=1",
            "-o",
            str(tmp_path),
        ),
        "holds a model; give another folder": ("compress", str(finished / "small.yaml"), "-o", str(model)),
    }.items():
        done = CliRunner().invoke(cli.app, command)
        assert isinstance(done.exception, PpclcError)
        assert done.exception.exit_code == 2
        assert re.search(wanted, str(done.exception))
    assert files_of(model) == before


@pytest.mark.slow
def test_the_student_loads_without_ppclc(finished: Path) -> None:
    """In a fresh process that cannot import ppclc, through diffusers alone, to the same bits."""
    folder = finished / "out" / "small" / "model" / "transformer"
    inputs = {
        "hidden_states": torch.linspace(-1, 1, 32 * 12).reshape(1, 32, 12),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.linspace(-1, 1, 5 * 32).reshape(1, 5, 32),
    }
    script = f"""
import copy, sys, torch; sys.modules["ppclc"] = None; torch.set_num_threads(1)
from diffusers import AutoModel
# A copy: mapped weights lie anywhere, and on some processors a product's last bit depends on where.
model = copy.deepcopy(AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True).eval())
x = torch.linspace(-1, 1, 32 * 12).reshape(1, 32, 12); c = torch.linspace(-1, 1, 5 * 32).reshape(1, 5, 32)
with torch.no_grad():
    y = model(hidden_states=x, timestep=torch.tensor([0.5]), encoder_hidden_states=c, img_shapes=[[(1, 4, 8)]], return_dict=False)[0]
import numpy; numpy.save({str(finished / "out.npy")!r}, y.numpy())
"""
    modules = finished / "modules"
    subprocess.run([sys.executable, "-c", script], check=True, env={**ENVIRONMENT, "HF_MODULES_CACHE": str(modules)}, timeout=120)
    model = load_model(folder)
    with torch.no_grad():
        here = model(**inputs, img_shapes=[[(1, 4, 8)]], return_dict=False)[0]
    assert np.array_equal(np.load(finished / "out.npy"), here.numpy())


@pytest.mark.slow
def test_another_teacher_in_the_same_folder_is_refused(finished: Path) -> None:
    from ppclc.models import apply_plan, save_model

    plan = CompressionPlan.of("qwen_image", 12, [(3, 4)])
    save_model(apply_plan(load_model("builtin:two-digits"), plan), plan, finished / "other")
    (finished / "other.yaml").write_text(SMALL.replace("builtin:two-digits", "other").replace("[10, 11]", "none"))
    before = files_of(finished / "out" / "small")
    done = ppclc("compress", "other.yaml", "-o", "out/small", cwd=finished, code=2)
    assert "another teacher" in done.stderr
    assert "-o" in done.stderr
    assert files_of(finished / "out" / "small") == before


@pytest.mark.slow
def test_a_failed_gate_exits_with_1_and_still_reports(finished: Path) -> None:
    done = ppclc("compress", "small.yaml", "--set", "verify.gates={velocity_error: {drop_percent: 0}}", cwd=finished, code=1)
    assert "gate failed: velocity_error.drop_percent" in done.stderr
    gates = json.loads((finished / "out/small/report.json").read_text())["gates"]
    assert [g["passed"] for g in gates] == [False]


@pytest.mark.slow
def test_an_edited_plan_is_followed(finished: Path) -> None:
    out = finished / "out" / "edited"
    shutil.copytree(finished / "out" / "small", out, ignore=shutil.ignore_patterns("export", "model", "sizes", "teacher-onnx-*"))
    plan = CompressionPlan.of("qwen_image", 12, [(5, 6)], [], 8, True)
    (out / "plan.json").write_text(plan.to_json())
    done = ppclc("compress", "small.yaml", "-o", str(out), "--until", "slice", cwd=finished)
    assert "was edited" in done.stderr
    assert CompressionPlan.read(out / "model/transformer/plan.json") == plan


@pytest.mark.slow
@pytest.mark.long
def test_killed_runs_resume_to_the_same_weights(finished: Path) -> None:
    """SIGKILL at several moments, from the first second to the last step; the end is that of an unbroken run."""
    weights = "model/transformer/diffusion_pytorch_model.safetensors"
    wanted = load_file(finished / "out" / "small" / weights)
    kills = 0
    for attempt in range(8):
        process = subprocess.Popen([*COMMAND, "compress", "small.yaml", "-o", "killed", "--until", "slice"], cwd=finished, env=ENVIRONMENT)
        deadline = time.monotonic() + 5 + 2 * attempt
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            break
    assert kills >= 2
    ppclc("compress", "small.yaml", "-o", "killed", "--until", "slice", cwd=finished)
    got = load_file(finished / "killed" / weights)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
