"""An export that fails costs the run nothing but itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ppclc import cli
from ppclc.errors import VerificationError
from ppclc.passes import export as export_pass


@pytest.mark.slow
def test_a_run_whose_export_fails_is_judged_timed_and_told(
    make_teacher: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_teacher(2).save_pretrained(tmp_path / "teacher")
    recipe = {
        "model": {"path": str(tmp_path / "teacher")},
        "calibrate": {"source": "noise", "samples": 64, "longest": 3},
        "plan": {"intervals": [[0, 1]], "text_stream": "none", "ffn": "none", "modulation_rank": "none"},
        "distill": {"steps": 1, "width_steps": 1, "finetune_steps": 1, "batch": 2},
        "verify": {"samples": 4},
        "export": [{"backend": "onnx"}],
        "bench": {"runs": 3, "steps": 1, "providers": ["cpu"]},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    whole = export_pass.export_source

    def broken(source: Any, *args: Any, **given: Any) -> Any:
        if source.path.endswith("model"):  # the student's
            raise VerificationError("onnx: does not run")
        return whole(source, *args, **given)

    monkeypatch.setattr(export_pass, "export_source", broken)
    command = ["compress", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 1, done.output
    assert "export failed: student: onnx: does not run" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["exports"] == []
    assert {(row["target"], row["backend"]) for row in report["bench"]} == {
        ("teacher", "eager"),
        ("student", "eager"),
        ("teacher", "onnxruntime"),
    }
    again = CliRunner().invoke(cli.app, ["report", str(tmp_path / "out")])
    assert again.exit_code == 0, again.output
    assert "without an export: " in again.stdout
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["bench"] == report["bench"]
    assert told["quality"] == report["quality"]
    monkeypatch.setattr(export_pass, "export_source", whole)  # the same command again, once it can be written
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["backend"] for row in report["exports"]] == ["onnx"]
    assert len(report["bench"]) == 4
