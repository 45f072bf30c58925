"""What an analysis has found so far, a line each, so that one that was stopped does not measure it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ppclc.records import disk_errors

Key = tuple[Any, ...]
"""Words and numbers that tell a result from all others of the same analysis."""


class Journal:
    """Results by key, kept in a file where one is given. What a kill has cut off at its end is left out, and measured again."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self._found = path, dict[str, Any]()
        if path is None or not path.is_file():
            return
        whole = 0
        data = path.read_bytes()
        for line in data.splitlines(keepends=True):
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError, RecursionError):
                break
            if not (isinstance(key, str) and line.endswith(b"\n")):
                break
            self._found[key], whole = value, whole + len(line)
        if whole < len(data):
            with disk_errors(path), path.open("r+b") as file:
                file.truncate(whole)

    def get(self, *key: Any) -> Any:
        """What was found, None where nothing was."""
        return self._found.get(json.dumps(key))

    def put(self, value: Any, *key: Any) -> None:
        """Keep what was found, numbers and lists of them."""
        name = json.dumps(key)
        line = json.dumps([name, value])
        self._found[name] = json.loads(line)[1]  # as the file has it, whatever becomes of the value
        if self.path is not None:
            with disk_errors(self.path), self.path.open("ab") as file:
                file.write(line.encode() + b"\n")

    def tensor(self, *key: Any) -> torch.Tensor | None:
        """As `get`, of what `put_tensor` kept."""
        found = self.get(*key)
        return None if found is None else torch.tensor(found[1], dtype=getattr(torch, found[0]))

    def put_tensor(self, value: torch.Tensor, *key: Any) -> None:
        """Keep a tensor of a few numbers, to the bit."""
        self.put([str(value.dtype).removeprefix("torch."), value.tolist()], *key)
