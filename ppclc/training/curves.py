"""Loss curves of a training, as JSON lines and, where its library is there, for TensorBoard.

<folder>/<name>.jsonl          one line a step: step, loss, its terms, learning rate, seconds since this process began
<folder>/tensorboard/<name>/   the same as scalars
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppclc.records import disk_errors


class Curve:
    """A curve that goes on after `done` steps; what an earlier run wrote beyond them is taken back."""

    def __init__(self, folder: Path, name: str, done: int) -> None:
        self.path, self.start = folder / f"{name}.jsonl", time.perf_counter()
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            kept = _lines(self.path, done)
            self.file = self.path.open("w", encoding="utf-8")
            self.file.writelines(kept)
        self.board = _board(folder / "tensorboard" / name, done)

    def add(self, step: int, terms: Mapping[str, float], learning_rate: float) -> None:
        """One step, counted from 1; its loss is the sum of the terms."""
        row = {"step": step, "loss": sum(terms.values()), **terms, "learning_rate": learning_rate}
        with disk_errors(self.path):
            print(json.dumps(row | {"seconds": round(time.perf_counter() - self.start, 3)}), file=self.file, flush=True)
            if self.board is not None:
                for key, value in row.items():
                    if key != "step":
                        self.board.add_scalar(key, value, step)

    def close(self) -> None:
        """Write out what is left."""
        self.file.close()
        if self.board is not None:
            self.board.close()


def _lines(path: Path, done: int) -> list[str]:
    """Whole lines of an earlier run up to step `done`."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text("utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= done and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError):
            continue  # cut off when the power went
    return kept


def _board(folder: Path, done: int) -> Any | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=done + 1 if done else None)
