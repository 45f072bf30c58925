"""Local and joint training against joint training alone, and against PPCL as printed: the same cut, the same time.

    python -m benchmarks.local_phase [--training-seeds 0 1 2] [--scenes 2048] [--seeds 220 ... 227]

Six of twelve blocks gone at modulation rank 8. `ours`: our plan, 100 local and 200 joint steps. `joint`: our plan, from the same
start, joint steps alone, as many as take the time of ours. `ppcl`: the paper's intervals trimmed to as many blocks, each started
from its first block, direction alone, six local steps for one joint step as printed, joint steps on the teacher's velocity, as many
of both as take the time of ours. A step's time is the least of several, measured in one run before anything is trained.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.factors import DISTILL, Lab, laboratory
from benchmarks.judging import Judge, better_by
from benchmarks.results_file import write_results
from ppclc.models import load_source, open_source, set_threads

RATIO = 6
"""Local steps for one joint step. Source: arXiv 2511.16156, training set-up (6,000 and 1,000)."""
TIMED = 24


def step_seconds(lab: Lab, out: Path, rounds: int = 3) -> tuple[float, float]:
    """Seconds of a local step of all intervals, and of a joint step."""
    found: dict[str, list[float]] = {"steps": [], "finetune_steps": []}
    for n in range(rounds):
        for kind, other in (("steps", "finetune_steps"), ("finetune_steps", "steps")):
            start = time.perf_counter()
            lab.student(0, out / f"timing-{kind}-{n}-{time.time_ns()}", distill={kind: TIMED, other: 0})
            found[kind].append((time.perf_counter() - start) / TIMED)
    return min(found["steps"]), min(found["finetune_steps"])


def main() -> None:
    """Train and judge the three; one results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=2048)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(220, 228)))
    parser.add_argument("--out", type=Path, default=Path("out/local_phase"))
    options = parser.parse_args()
    source = open_source("builtin:two-digits")
    set_threads(source)
    labs = {"ours": laboratory(options.out), "ppcl": laboratory(options.out, "ppcl")}
    labs["joint"] = labs["ours"]
    local_s, joint_s = step_seconds(labs["ours"], options.out)
    whole = DISTILL["steps"] * local_s + DISTILL["finetune_steps"] * joint_s
    printed = round(whole / (RATIO * local_s + joint_s))
    changes: dict[str, dict[str, Any]] = {
        "ours": {},
        "joint": {"distill": {"steps": 0, "finetune_steps": round(whole / joint_s)}},
        "ppcl": {
            "start": "first",
            "distill": {"steps": RATIO * printed, "finetune_steps": printed, "magnitude": 0.0, "data_weight": 0.0},
        },
    }
    judge = Judge(source, options.scenes, tuple(options.seeds), options.out / "judged")
    right = judge.outcomes(load_source(source), "teacher", 1)["right_g1"]
    rows: dict[str, Any] = {}
    found: dict[str, list[torch.Tensor]] = {}
    for name, change in changes.items():
        seconds, outcomes = [], []
        for seed in options.training_seeds:
            start = time.perf_counter()
            model = labs[name].student(seed, options.out / "work" / name / str(seed), **change)
            seconds.append(time.perf_counter() - start)
            outcomes.append(judge.outcomes(model, f"{name}-{seed}-{change}-{DISTILL}", 1)["right_g1"])
        found[name] = outcomes
        rows[name] = {
            "changes": change,
            "training_seconds": seconds,
            "plan": labs[name].plan.model_dump(mode="json"),
            "by_seed": [100 * o.mean().item() for o in outcomes],
            "teacher_leads_by": better_by(right.repeat(len(outcomes)), torch.cat(outcomes)),
            "ours_leads_by": better_by(torch.cat(found["ours"]), torch.cat(outcomes)),
            "ours_leads_by_seed": [better_by(a, b) for a, b in zip(found["ours"], outcomes, strict=True)],
        }
        print(name, rows[name]["by_seed"], seconds, rows[name]["ours_leads_by"], flush=True)
    settings = {"scenes": options.scenes, "seeds": options.seeds, "training_seeds": options.training_seeds, "distill": DISTILL}
    results = {"settings": settings, "step_seconds": {"local": local_s, "joint": joint_s}, "students": rows}
    print(write_results("local-phase", results), flush=True)


if __name__ == "__main__":
    main()
