"""The demo's student against evenly dropped blocks: the same cut, the same training, the same time.

    python -m benchmarks.even_blocks [--run out/two_digits] [--scenes 2048] [--seeds 10 11]

The rival keeps evenly spaced blocks, has the demo's modulation rank and no dead code, and as few blocks less
as leave it at least as many parameters as the demo's student has: it is given the larger model. Its local
phase and fine-tune have the demo's steps, with fine-tune steps added until it has trained for as long as the
demo did. Both are judged on the same prompts and noise, on seeds that no choice was made on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.results_file import write_results
from ppclc.analysis.detection import even_intervals
from ppclc.compiler import compress
from ppclc.loading.classes import predicted_parameters
from ppclc.loading.sources import open_source
from ppclc.models import load_source, quiet_libraries, set_threads
from ppclc.passes.verify import VerifySettings
from ppclc.plan import CompressionPlan
from ppclc.recipe import Recipe, parse_recipe, read_recipe
from ppclc.run import Run
from ppclc.screens.display import Display


def training_seconds(report: list[dict[str, Any]]) -> float:
    """Seconds spent in `distill`."""
    return float(next(s["seconds"] for s in report if s["name"] == "distill"))


def rival_plan(student: CompressionPlan, parameters: int) -> CompressionPlan:
    """Evenly spaced blocks at the student's rank: the most of them gone that leaves at least so many parameters."""
    source = open_source("builtin:two-digits")
    plans = [
        CompressionPlan.of(student.family, student.num_blocks, even_intervals([student.num_blocks], n), [], student.modulation_rank, True)
        for n in range(1, student.num_blocks)
    ]
    return [p for p in plans if predicted_parameters(source.family, source.config, p) >= parameters][-1]


def train_rival(recipe: Recipe, plan: CompressionPlan, out: Path, finetune_steps: int) -> Run:
    """The rival, sliced."""
    document = recipe.model_dump(mode="json")
    document["target"] = {}
    document["plan"] = {
        "intervals": [[i.first, i.last] for i in plan.intervals],
        "text_stream": "none",
        "ffn": "none",
        "modulation_rank": plan.modulation_rank,
    }
    document["distill"]["finetune_steps"] = finetune_steps
    return compress(parse_recipe(document, str(out)), out.name, out, Display(4), until="slice")


def difference(ours: torch.Tensor, other: torch.Tensor) -> dict[str, Any]:
    """Points of scene accuracy by which ours is better, with the 95 % interval of the paired difference."""
    delta = 100 * (ours.double() - other.double())
    half = 1.96 * delta.std().item() / len(delta) ** 0.5
    mean = delta.mean().item()
    return {"points": mean, "ci95": [mean - half, mean + half], "n": len(delta)}


def main() -> None:
    """Train the rival, judge both, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("out/two_digits"))
    parser.add_argument("--scenes", type=int, default=2048)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    parser.add_argument("--out", type=Path, default=Path("out/even_blocks"))
    options = parser.parse_args()
    quiet_libraries()
    report, recipe = json.loads((options.run / "report.json").read_text("utf-8")), read_recipe(options.run / "recipe.yaml")
    demo = CompressionPlan.model_validate(report["plan"])
    plan = rival_plan(demo, report["student"]["parameters"])
    steps, wanted = recipe.distill.finetune_steps, training_seconds(report["stages"])
    rival = train_rival(recipe, plan, options.out, steps)
    took = training_seconds([s.model_dump() for s in rival.store.stages])
    if took < 0.97 * wanted:
        steps = round(steps * wanted / took)
        rival = train_rival(recipe, plan, options.out, steps)
        took = training_seconds([s.model_dump() for s in rival.store.stages])
    source = open_source("builtin:two-digits")
    set_threads(source)
    settings = VerifySettings(scenes=options.scenes, seeds=tuple(options.seeds), guidance=(1.0,))
    folders = {"ours": options.run / "model", "even": options.out / "model"}
    models = {"teacher": load_source(source)} | {n: load_source(open_source(str(f))) for n, f in folders.items()}
    assert source.task is not None
    judged = {name: source.task.measure(model, settings, lambda done: None)[0] for name, model in models.items()}
    rows = {}
    for name, seconds in (("ours", wanted), ("even", took)):
        quality = source.task.compare(judged["teacher"], judged[name], settings)
        parameters = sum(p.numel() for p in models[name].parameters())
        rows[name] = {"parameters": parameters, "training_seconds": seconds, "quality": {k: q.model_dump() for k, q in quality.items()}}
    rows["ours"]["plan"], rows["even"]["plan"] = report["plan"], plan.model_dump(mode="json")
    rows["even"]["finetune_steps"], rows["ours"]["finetune_steps"] = steps, recipe.distill.finetune_steps
    better = difference(judged["ours"]["right_g1"], judged["even"]["right_g1"])
    print(write_results("even-blocks", {"students": rows, "ours_better_by": better}))


if __name__ == "__main__":
    main()
