"""Which blocks go: those that the selection picks, against evenly spaced ones, at the same cut and training time.

    python -m benchmarks.even_blocks [--removed 3] [--rank 8] [--steps 400] [--scenes 2048] [--out out/even_blocks]

Both sides have the same number of parameters: the same number of blocks removed, the same modulation
rank, the dead code removed, the text stream whole. Three students: `ours` (selected intervals, local
distillation, fine-tune), `even` (evenly spaced intervals, the same training), `even_plain` (the blocks
dropped without local distillation, the time that saves spent on more fine-tuning). All are judged on
the same prompts and noise, so that differences are paired.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.results_file import write_results
from ppclc.compiler import Run, compress
from ppclc.detection import even_intervals
from ppclc.display import Display
from ppclc.recipe import parse_recipe

BLOCKS = 12


def run(out: Path, plan: dict[str, Any], target: dict[str, Any], distill: dict[str, Any], scenes: int, seeds: list[int]) -> Run:
    """One student, trained and judged."""
    recipe = parse_recipe(
        {
            "model": {"path": "builtin:two-digits"},
            "calibrate": {"source": "images"},
            "plan": plan,
            "target": target,
            "distill": distill,
            "verify": {"scenes": scenes, "seeds": seeds, "guidance": [1]},
        },
        str(out),
    )
    return compress(recipe, out.name, out, Display(8), until="verify")


def training_seconds(made: Run) -> float:
    """Seconds spent in `distill`."""
    return next(s.seconds for s in made.store.stages if s.name == "distill")


def outcomes(made: Run) -> torch.Tensor:
    """Whether each scene came out right, (N,) 0 or 1."""
    newest = max((made.out / "records").glob("measure-student-*/tensors.safetensors"), key=lambda p: p.stat().st_mtime)
    return load_file(newest)["right_g1"].double()


def row(made: Run) -> dict[str, Any]:
    """What is told of one student."""
    assert made.plan
    assert made.verdict
    assert made.student
    return {
        "intervals": [[i.first, i.last] for i in made.plan.intervals],
        "parameters": made.student.parameters,
        "training_seconds": training_seconds(made),
        "scene_accuracy_g1": made.verdict.quality["scene_accuracy_g1"].model_dump(),
        "frechet_distance_g1": made.verdict.quality["frechet_distance_g1"].model_dump(),
        "velocity_error": made.verdict.quality["velocity_error"].student,
    }


def difference(ours: torch.Tensor, other: torch.Tensor) -> dict[str, Any]:
    """Points of scene accuracy by which ours is better, with the 95 % interval of the paired difference."""
    delta = 100 * (ours - other)
    half = 1.96 * delta.std().item() / len(delta) ** 0.5
    mean = delta.mean().item()
    return {"points": mean, "ci95": [mean - half, mean + half], "n": len(delta)}


def main() -> None:
    """Run the three, compare, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--removed", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--local-steps", type=int, default=100)
    parser.add_argument("--scenes", type=int, default=2048)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    parser.add_argument("--out", type=Path, default=Path("out/even_blocks"))
    options = parser.parse_args()
    same = {"text_stream": "none", "modulation_rank": options.rank}
    local = {"steps": options.local_steps, "finetune_steps": options.steps}
    judged = (options.scenes, options.seeds)
    spread = [list(i) for i in even_intervals(BLOCKS, options.removed)]
    even = run(options.out / "even", {**same, "intervals": spread}, {}, local, *judged)
    assert even.student
    ours = run(options.out / "ours", same, {"parameters": even.student.parameters}, local, *judged)
    assert ours.student
    if ours.student.parameters != even.student.parameters:
        raise SystemExit(f"ours has {ours.student.parameters} parameters, even has {even.student.parameters}: not the same cut")
    fine = next(e for e in ours.edits if e.edit == "finetune")
    stages = [s for s in ours.store.stages if s.name == "distill"]
    share = training_seconds(ours) / (training_seconds(ours) - _local_seconds(ours)) if stages and fine.steps else 1.0
    plain = run(
        options.out / "even_plain",
        {**same, "intervals": spread},
        {},
        {"steps": 0, "finetune_steps": round(options.steps * share)},
        *judged,
    )
    students = {"ours": ours, "even": even, "even_plain": plain}
    results = {name: row(made) for name, made in students.items()}
    versus = {name: difference(outcomes(ours), outcomes(students[name])) for name in ("even", "even_plain")}
    print(
        write_results("even-blocks", {"options": vars(options) | {"out": options.out.name}, "students": results, "ours_better_by": versus})
    )


def _local_seconds(made: Run) -> float:
    """Seconds of the local phase alone, from the records of the intervals."""
    import json

    stages = (made.out / "records").glob("interval-*/stage.json")
    return sum(json.loads(p.read_text("utf-8"))["seconds"] for p in stages)


if __name__ == "__main__":
    main()
