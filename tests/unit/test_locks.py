"""One run at a time in a folder, whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ppclc.errors import OutputError
from ppclc.machine import locks
from ppclc.machine.locks import alone_in

pytest.importorskip("fcntl")
HOLD = """import sys, time
from pathlib import Path
from ppclc.machine.locks import alone_in
with alone_in(Path(sys.argv[1])):
    print('in', flush=True)
    time.sleep(60)"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE_S", 0.1)
    out = tmp_path / "out"  # which need not be there, and is not made
    first = holder(out)
    try:
        with pytest.raises(OutputError, match=rf"another run is at work there \(process {first.pid}\); wait for it"), alone_in(out):
            pass
        with alone_in(tmp_path / "other"):
            pass
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        assert first.stdout is not None
        first.stdout.close()
    with alone_in(out):
        assert not out.exists()


def test_the_same_process_comes_again(tmp_path: Path) -> None:
    for _ in range(2):
        with alone_in(tmp_path):
            pass


def test_a_link_in_the_lock_s_place_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "precious").write_text("notes")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    with alone_in(tmp_path / "out"):
        (lock,) = tmp_path.glob("*.lock")
    lock.unlink()
    lock.symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"), alone_in(tmp_path / "out"):
        pass
    assert (tmp_path / "precious").read_text() == "notes"


def test_a_block_that_fails_lets_go(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), alone_in(tmp_path):
        raise RuntimeError
    with alone_in(tmp_path):
        pass
