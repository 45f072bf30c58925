"""Local and joint training against joint training alone, and against PPCL as printed: the same cut, the same time.

    python -m benchmarks.local_phase [--joint-steps 85 140 280] [--local-steps 200] [--training-seeds 0 1 2] [--scenes 2048] [--seeds 220 ... 227]

Six of twelve blocks gone at modulation rank 8, in the time of so many joint steps. `joint`: joint steps alone. `ours`: our plan, from
the same start, local steps, and joint steps for the time that is left. `ppcl`: the paper's intervals trimmed to as many blocks, each
started from its first block, direction alone, six local steps for a joint one as printed; batches and learning rates as ours. Steps
are timed in one run before anything is trained; none of the times includes the analysis.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.factors import Lab, laboratory
from benchmarks.judging import Judge, better_by
from benchmarks.results_file import write_results
from ppclc.loading.sources import open_source
from ppclc.models import load_source, set_threads

RATIO = 6
"""Local steps for one joint step. Source: arXiv 2511.16156, training set-up (6,000 and 1,000)."""
TIMED = 24
TRAINED = {"learning_rate": 5e-3, "finetune_learning_rate": 7e-3}
"""Peaks that were best of several for the one and for the other, each alone."""


def step_seconds(lab: Lab, out: Path, rounds: int = 7) -> tuple[float, float]:
    """Seconds of a local step of all intervals, and of a joint step.

    The joint step's are the least; the local step's follow by the median ratio of both, timed right after each other: a busy
    neighbour slows both of a pair.
    """
    pairs = []
    for n in range(rounds):
        pair = []
        for kind, other in (("steps", "finetune_steps"), ("finetune_steps", "steps")):
            start = time.perf_counter()
            lab.student(0, out / f"timing-{kind}-{n}-{time.time_ns()}", distill=TRAINED | {kind: TIMED, other: 0})
            pair.append((time.perf_counter() - start) / TIMED)
        pairs.append(pair)
    joint = min(j for _, j in pairs)
    return joint * median(own / j for own, j in pairs), joint


def changes_for(joint_steps: int, local_steps: int, local_s: float, joint_s: float) -> dict[str, dict[str, Any]]:
    """What each of the three is, in the time of so many joint steps."""
    whole = joint_steps * joint_s
    printed = round(whole / (RATIO * local_s + joint_s))
    paper = {"steps": RATIO * printed, "finetune_steps": printed, "magnitude": 0.0, "data_weight": 0.0}
    return {
        "ours": {"distill": TRAINED | {"steps": local_steps, "finetune_steps": round((whole - local_steps * local_s) / joint_s)}},
        "joint": {"distill": TRAINED | {"steps": 0, "finetune_steps": joint_steps}},
        "ppcl": {"start": "first", "distill": TRAINED | paper},
    }


def main() -> None:
    """Train and judge the three at every budget; one results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--joint-steps", type=int, nargs="+", default=[85, 140, 280])
    parser.add_argument("--local-steps", type=int, default=200)
    parser.add_argument("--step-seconds", type=float, nargs=2, help="of a local and a joint step, as an earlier run timed them")
    parser.add_argument("--training-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=2048)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(220, 228)))
    parser.add_argument("--out", type=Path, default=Path("out/local_phase"))
    options = parser.parse_args()
    source = open_source("builtin:two-digits")
    set_threads(source)
    labs = {"ours": laboratory(options.out), "ppcl": laboratory(options.out, "ppcl")}
    labs["joint"] = labs["ours"]
    local_s, joint_s = options.step_seconds or step_seconds(labs["ours"], options.out)
    judge = Judge(source, options.scenes, tuple(options.seeds), options.out / "judged")
    right = judge.outcomes(load_source(source), "teacher", 1)["right_g1"]
    budgets = {}
    for joint_steps in options.joint_steps:
        rows: dict[str, Any] = {}
        found: dict[str, list[torch.Tensor]] = {}
        for name, change in changes_for(joint_steps, options.local_steps, local_s, joint_s).items():
            seconds, outcomes = [], []
            for seed in options.training_seeds:
                start = time.perf_counter()
                model = labs[name].student(seed, options.out / "work" / str(joint_steps) / name / str(seed), **change)
                seconds.append(time.perf_counter() - start)
                outcomes.append(judge.outcomes(model, f"{name}-{seed}-{change}", 1)["right_g1"])
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
            print(joint_steps, name, rows[name]["by_seed"], seconds, rows[name]["ours_leads_by"], flush=True)
        budgets[str(joint_steps)] = {"seconds": joint_steps * joint_s, "students": rows}
    settings = {"scenes": options.scenes, "seeds": options.seeds, "training_seeds": options.training_seeds, "distill": TRAINED}
    results = {"settings": settings, "step_seconds": {"local": local_s, "joint": joint_s}, "budgets": budgets}
    print(write_results("local-phase", results), flush=True)


if __name__ == "__main__":
    main()
