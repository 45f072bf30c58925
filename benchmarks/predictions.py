"""What `ppclc plan` said of a recipe's run, before it and after its analysis, against what the run then took.

    python -m benchmarks.predictions [--recipe two_digits] [--run out/two_digits] [--repeats 5]

Needs a whole run in the folder: every pass made anew, none reused. `config` is what is said with the configuration
alone, where the plan is spaced evenly until the target is met: its parameters and bytes are those of another student
than the run's. `analysis` is what is said with the run's own plan. Speeds are measured anew every time that
`ppclc plan` is asked, so it is asked several times: told are the median, the lowest and the highest error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results_file import write_results
from ppclc import commands


def measured(run: Path) -> dict[str, float]:
    """Parameters, bytes of the weight files, peak memory and seconds of a run."""
    report = json.loads((run / "report.json").read_text("utf-8"))
    if any(stage["reused"] for stage in report["stages"]):
        raise SystemExit(f"{run}: passes were reused, so the run's time is not known; wanted a run in an empty folder")
    return {
        "parameters": report["student"]["parameters"],
        "bytes": sum(file.stat().st_size for file in (run / "model").rglob("*.safetensors")),
        "peak_bytes": max(stage["peak_rss_bytes"] for stage in report["stages"]),
        "seconds": sum(stage["seconds"] for stage in report["stages"]),
    }


def predicted(recipe: str, out: Path) -> dict[str, Any]:
    """The same four as `ppclc plan` has them, with its basis and its seconds by pass."""
    said = commands.plan(recipe, [], out)
    return {
        "basis": said["basis"],
        "parameters": said["student"]["parameters"],
        "bytes": said["student"]["bytes"],
        "peak_bytes": said["run"]["peak_bytes"],
        "seconds": sum(said["run"]["seconds"].values()),
        "by_pass": said["run"]["seconds"],
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest, highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def main() -> None:
    """Predict, several times on both bases, compare, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="two_digits")
    parser.add_argument("--run", type=Path, default=Path("out/two_digits"))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    took = measured(options.run)
    said: dict[str, list[dict[str, Any]]] = {"config": [], "analysis": []}
    with tempfile.TemporaryDirectory() as nowhere:
        for _ in range(options.repeats):
            for name, out in (("config", Path(nowhere)), ("analysis", options.run)):
                said[name].append(predicted(options.recipe, out))
                if said[name][-1]["basis"] != name:
                    raise SystemExit(f"{options.run}: no analysis of recipe {options.recipe} as it is now")
    errors = {
        name: {key: spread([100 * (row[key] / value - 1) for row in rows]) for key, value in took.items()} for name, rows in said.items()
    }
    for name, found in errors.items():
        print(name, {key: f"{row['median']:.1f} ({row['lowest']:.1f} to {row['highest']:.1f}) %" for key, row in found.items()}, flush=True)
    print(write_results("predictions", {"recipe": options.recipe, "measured": took, "error_percent": errors, "predicted": said}))


if __name__ == "__main__":
    main()
