"""One results file a run: what was measured, on what machine, with which versions, by which command."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil

from ppclc.environment import versions

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's own name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def unused(folder: Path, name: str) -> Path:
    """`<date>-<name>.json` in a folder, numbered where there is one already."""
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = folder / f"{day}-{name}.json"
    number = 2
    while path.exists():
        path = folder / f"{day}-{name}-{number}.json"
        number += 1
    return path


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Write `results/<date>-<name>.json`; never over an earlier one."""
    path = unused(RESULTS, name)
    machine = {"processor": processor(), "cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total}
    command = " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    document = {"name": name, "command": command, "machine": machine, "versions": versions(), **results}
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return path
