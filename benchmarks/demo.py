"""What a finished run of the demo recipe is worth, judged again on scenes that no choice was made on.

    python -m benchmarks.demo [--run out/two_digits] [--scenes 2048] [--seeds 100 ... 107] [--guidance 1]

Takes the run's report as it stands, judges its teacher and its student again on fresh seeds, and writes
one results file with both.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from benchmarks.results_file import write_results
from ppclc.loading.sources import open_source
from ppclc.models import load_source, quiet_libraries, set_threads
from ppclc.passes.verify import VerifySettings


def main() -> None:
    """Judge again and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("out/two_digits"))
    parser.add_argument("--scenes", type=int, default=2048, help="scenes a seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(100, 108)))
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0])
    options = parser.parse_args()
    quiet_libraries()
    report = json.loads((options.run / "report.json").read_text("utf-8"))
    source = open_source("builtin:two-digits")
    assert source.task is not None
    set_threads(source)
    settings = VerifySettings(scenes=options.scenes, seeds=tuple(options.seeds), guidance=tuple(options.guidance))
    start = time.perf_counter()
    models = [load_source(source), load_source(open_source(str(options.run / "model")))]
    teacher, student = (source.task.measure(model, settings, lambda done: None)[0] for model in models)
    again = source.task.compare(teacher, student, settings)
    results = {
        "report": {k: report[k] for k in ("teacher", "student", "plan", "quality", "gates", "stages", "exports", "bench")},
        "recipe": (options.run / "recipe.yaml").read_text("utf-8"),
        "judged_again": {name: row.model_dump() for name, row in again.items()},
        "judged_again_seconds": time.perf_counter() - start,
    }
    print(write_results("demo", results))


if __name__ == "__main__":
    main()
