"""What is told while a stage runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ppclc.screens import display
from ppclc.screens.display import Display


@pytest.mark.parametrize("terminal", [False, True])
def test_the_time_left_is_that_of_the_part_that_runs(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage of two parts, of 100 and 40 seconds, whose shares both begin at nothing."""
    now = 1000.0
    monkeypatch.setattr(display.time, "perf_counter", lambda: now)
    out = io.StringIO()
    with Display(1, 0, Console(file=out, force_terminal=terminal, width=200)).stage("analyze") as progress:
        for seconds, part in ((100, "intervals"), (40, "trials")):
            for step in range(11):
                progress(step / 10, part)
                now += seconds / 10
    lines = out.getvalue().splitlines()
    assert "analyze: " in lines[-1]
    if not terminal:
        assert lines[0] == "[1/1] analyze: 10 %, 90 s left, intervals"
        assert "[1/1] analyze: 90 %, 10 s left, intervals" in lines
        assert [line for line in lines if "trials" in line] == [
            f"[1/1] analyze: {p} %, {s} s left, trials" for p, s in ((10, 36), (40, 24), (70, 12))
        ]
