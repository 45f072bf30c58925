"""What an analysis has found so far, kept through kills."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ppclc.analysis.journal import Journal
from ppclc.errors import UnavailableError


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_was_put_is_found_again_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    path, value = tmp_path / "found.jsonl", torch.randn(40, dtype=torch.float64).to(dtype)
    value[3], value[4] = math.inf, -0.0
    journal = Journal(path)
    assert journal.tensor("errors", 1, 2) is None
    journal.put_tensor(value, "errors", 1, 2)
    journal.put([[1, 0.1]], "trials", (3, 4))
    for one in (journal, Journal(path)):
        found = one.tensor("errors", 1, 2)
        assert found is not None
        assert (found.dtype, found.tolist()) == (dtype, value.tolist())
        assert one.get("trials", (3, 4)) == [[1, 0.1]]
        assert one.get("trials", (3, 5)) is None


def test_without_a_file_it_remembers_alone() -> None:
    journal = Journal()
    value = [(1, 1.5)]
    journal.put(value, "a")
    value.append((2, 2.5))
    assert journal.get("a") == [[1, 1.5]]  # as a file would have it


@pytest.mark.parametrize("cut", range(1, 24))
def test_what_a_kill_cut_off_is_left_out_and_written_anew(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    for n in range(3):
        Journal(path).put(n, "errors", n)
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(path)
    assert [journal.get("errors", n) for n in range(3)][:1] == [0]
    assert journal.get("errors", 2) is None
    journal.put(7, "errors", 2)
    assert Journal(path).get("errors", 2) == 7
    assert path.read_bytes().endswith(b"\n")


def test_noise_is_not_taken_for_results(tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    Journal(path).put(1, "a")
    with path.open("ab") as file:
        file.write(b"\x00\xff\n[1, 2, 3]\n")
    assert Journal(path).get("a") == 1
    assert path.read_bytes().count(b"\n") == 1


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "found.jsonl")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UnavailableError, match="the disk is full"):
        journal.put(1, "a")
