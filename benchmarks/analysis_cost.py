"""What the analysis costs beside the teacher's own forwards: moments, probes and CKA, and the output-error costs.

    python -m benchmarks.analysis_cost [--samples 2048] [--repeats 5]

Forwards alone and calibration with probes and CKA run in turn over the same tokens; the medians are compared.
Memory of the moments is shown for half and for all of the samples. The output-error costs are counted in
forwards of one sample, against their budget, with the time they took beside that of as many plain forwards.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch

from benchmarks.results_file import write_results
from ppclc.analysis.budget import PlanSettings
from ppclc.analysis.closed_forms import Probes, cka_map
from ppclc.analysis.edit_costs import EditCosts
from ppclc.analysis.moments import near_of
from ppclc.analysis.search import AnalyzeSettings, Search
from ppclc.data.samples import Samples, open_samples
from ppclc.families import STREAMS
from ppclc.loading.sources import open_source
from ppclc.models import load_source, quiet_libraries, set_threads
from ppclc.passes.analyze import probe_set
from ppclc.passes.calibrate import BATCH, CalibrateSettings, calibrate
from ppclc.records import CalibrationStats, measured
from ppclc.teachers import ResidentTeacher, Teacher


def nothing(*_: Any) -> None:
    """Progress that nobody watches."""


def forwards(teacher: Teacher, samples: Samples, count: int) -> None:
    """The teacher on the samples that calibration draws, its states seen and let go."""
    generator = torch.Generator().manual_seed(0)
    for done in range(0, count, BATCH):
        sample = samples.draw(min(BATCH, count - done), generator)
        for _, sweep in teacher.sweep([sample], range(teacher.num_blocks + 1)):
            sweep.states.clear()


def analysed(teacher: Teacher, samples: Samples, count: int) -> CalibrationStats:
    """Calibration, then probes, their errors and CKA of both streams."""
    stats = calibrate(teacher, samples, CalibrateSettings(samples=count), nothing)
    for stream in STREAMS:
        probes = Probes(near_of(stats.tensors, stats.rows, stream, stats.num_blocks), 1e-4)
        cka_map(probes, stats.longest)
        for block in range(stats.num_blocks):
            probes.error(block)
    return stats


def seconds(run: Any, *args: Any) -> tuple[float, Any]:
    """Wall time of a call, and its result."""
    start = time.perf_counter()
    result = run(*args)
    return time.perf_counter() - start, result


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    quiet_libraries()
    source = open_source("builtin:two-digits")
    threads = set_threads(source)
    teacher = ResidentTeacher(load_source(source), source.family)
    samples = open_samples("images", source, teacher, "choose")
    forwards(teacher, samples, 256)
    plain, with_moments, inside = [], [], []
    for _ in range(options.repeats):
        plain.append(seconds(forwards, teacher, samples, options.samples)[0])
        took, stats = seconds(analysed, teacher, samples, options.samples)
        with_moments.append(took)
        inside.append(stats.moment_seconds)
    memory = {}
    for count in (options.samples // 2, options.samples):
        with measured("moments") as stage:
            stats = analysed(teacher, samples, count)
        memory[str(count)] = {"moment_bytes": sum(t.nbytes for t in stats.tensors.values()), "peak_rss_bytes": stage[0].peak_rss_bytes}
    settings = AnalyzeSettings()
    took, costs = seconds(EditCosts, teacher, probe_set(samples, settings.probes), stats, settings.ridge, settings.budget)
    search = Search(source, costs, settings, PlanSettings(), [], [], nothing)
    more, _ = seconds(search.measure_intervals)
    per_forward = median(plain) / options.samples
    results = {
        "options": vars(options) | {"threads": threads},
        "forwards_s": plain,
        "forwards_moments_probes_cka_s": with_moments,
        "moments_s": inside,
        "overhead_percent": 100 * (median(with_moments) / median(plain) - 1),
        "memory": memory,
        "output_error": {
            **search.work(),
            "seconds": took + more,
            "seconds_of_as_many_forwards": costs.spent * per_forward,
        },
    }
    print(write_results("analysis-cost", results), f"overhead {results['overhead_percent']:.1f} %")


if __name__ == "__main__":
    main()
