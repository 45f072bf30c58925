"""The fine-tune in two processes on the CPU against one process with twice the batch: the same losses, in how much of the time.

    python -m benchmarks.devices [--batch 64] [--steps 20] [--repeats 3]

A process computes in one thread, and makes its next batch ready in a second one where a core is left for it: a single
process keeps two cores busy by itself. `one_core` is a single process that has one core. All runs are interleaved, and the
best time of each kind counts. `cpu_seconds` is what each process used of a core, in all of its threads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.results_file import write_results
from ppclc.data.samples import open_samples
from ppclc.loading.sources import open_source
from ppclc.machine.devices import open_ranks
from ppclc.models import apply_plan, load_source, quiet_libraries
from ppclc.passes import distill
from ppclc.plan import CompressionPlan
from ppclc.teachers import ResidentTeacher

INTERVALS = [(3, 4), (6, 7), (9, 10)]
BAR = 0.65
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
KINDS = {"one": (1, None), "one_core": (1, 1), "two": (2, None)}
"""Processes, and the cores that they have among them; None for all."""


def train(batch: int, steps: int) -> dict[str, Any] | None:
    """Losses by step, seconds by the clock, and of a core on each rank; None where this is not the main rank."""
    quiet_libraries()
    ranks, source = open_ranks(), open_source("builtin:two-digits")
    model = load_source(source)
    student = apply_plan(model, CompressionPlan.of(source.family.name, 12, INTERVALS))
    settings = distill.DistillSettings(batch=batch, finetune_steps=steps)
    samples, teacher = open_samples("images", source, model, "train"), ResidentTeacher(model, source.family)
    with tempfile.TemporaryDirectory() as folder:
        ranks.wait()
        start, used = time.perf_counter(), time.process_time()
        distill.finetune(teacher, student, samples, settings, lambda *_: None, Path(folder), Path(folder), ranks)
        own = time.process_time() - used
        ranks.wait()
        seconds = time.perf_counter() - start
        cpu = [ranks.world * s for s in ranks.mean([own if r == ranks.rank else 0.0 for r in range(ranks.world)])]
        curve = Path(folder) / "finetune.jsonl"
        losses = [json.loads(line)["loss"] for line in curve.read_text("utf-8").splitlines()] if ranks.is_main else []
    ranks.leave()
    return {"losses": losses, "seconds": seconds, "cpu_seconds": cpu} if ranks.is_main else None


def measure(processes: int, cores: int | None, batch: int, steps: int) -> dict[str, Any]:
    """One run in processes of its own; `batch` is that of a step."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    own = ["-m", "benchmarks.devices", "--worker", "--batch", str(batch // processes), "--steps", str(steps)]
    command = [sys.executable, *(LAUNCH if processes > 1 else []), *own]
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(everywhere)[:cores])
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    finally:
        os.sched_setaffinity(0, everywhere)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Times of every kind, ratios of the best, and the largest relative difference of a loss."""
    best = {kind: min(r["seconds"] for r in found) for kind, found in runs.items()}
    cpu = {kind: min(max(r["cpu_seconds"]) for r in found) for kind, found in runs.items()}
    one = torch.tensor(runs["one"][0]["losses"], dtype=torch.float64)
    others = torch.tensor([r["losses"] for found in runs.values() for r in found], dtype=torch.float64)
    return {
        "bar": BAR,
        "ratio": best["two"] / best["one"],
        "ratio_to_one_core": best["two"] / best["one_core"],
        "cpu_ratio": cpu["two"] / cpu["one"],
        "largest_relative_loss_difference": ((others - one) / one).abs().max().item(),
        "kinds": {
            kind: {"processes": KINDS[kind][0], "cores": KINDS[kind][1], "best_seconds": best[kind]}
            | {key: [r[key] for r in found] for key in ("seconds", "cpu_seconds")}
            for kind, found in runs.items()
        },
    }


def main() -> None:
    """Run every kind in turn, several times, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="samples a process, where there are two")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        result = train(options.batch, options.steps)
        if result:
            print(json.dumps(result))
        return
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    load = [os.getloadavg()[0]]
    for _ in range(options.repeats):
        for kind, (processes, cores) in KINDS.items():
            runs[kind].append(measure(processes, cores, 2 * options.batch, options.steps))
        load.append(os.getloadavg()[0])
    setting = {"batch_of_a_step": 2 * options.batch, "steps": options.steps, "intervals": INTERVALS, "load_average": load}
    print(write_results("devices", setting | summary(runs)))


if __name__ == "__main__":
    main()
