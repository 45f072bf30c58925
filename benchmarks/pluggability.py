"""What other sizes are worth that are sliced from one run's bank: as they are, and after a short fine-tune.

    python -m benchmarks.pluggability [--shares 0.9 0.75 0.6 0.48 0.42 0.34] [--finetune-steps 0 50 200] [--training-seeds 0 1]

One run a training seed with `distill.bank: all`: every interval that the analysis considered, 100 local steps each. Each
share of the parameters is then a call of `ppclc slice`, without training and with joint steps on velocity and data. Every size is
judged on the same prompts and noise as the teacher, on seeds that no choice was made on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.judging import Judge
from benchmarks.results_file import write_results
from ppclc import sizes
from ppclc.compiler import compress
from ppclc.loading.sources import open_source
from ppclc.models import load_model, load_source, set_threads
from ppclc.recipe import parse_recipe
from ppclc.screens.display import Display


def recipe(seed: int) -> dict[str, Any]:
    """One run whose bank holds every edit."""
    return {
        "model": {"path": "builtin:two-digits"},
        "calibrate": {"source": "images"},
        "analyze": {"supernet_steps": 80, "supernet_sets": 32, "trials": 6, "trial_steps": 40},
        "target": {"parameters": 0.42},
        "distill": {
            "bank": "all",
            "steps": 100,
            "width_steps": 50,
            "finetune_steps": 0,
            "finetune_learning_rate": 3e-3,
            "seed": seed,
        },
    }


def main() -> None:
    """Fill the bank, cut every size, judge it; one results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.75, 0.6, 0.48, 0.42, 0.34])
    parser.add_argument("--finetune-steps", type=int, nargs="+", default=[0, 50, 200])
    parser.add_argument("--training-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[230, 231, 232, 233])
    parser.add_argument("--out", type=Path, default=Path("out/pluggability"))
    options = parser.parse_args()
    source = open_source("builtin:two-digits")
    set_threads(source)
    judge = Judge(source, options.scenes, tuple(options.seeds), options.out / "judged")
    whole = load_source(source)
    teacher = judge.outcomes(whole, "teacher", 1)
    rows: list[dict[str, Any]] = []
    banks: dict[str, Any] = {}
    for seed in options.training_seeds:
        out = options.out / f"seed{seed}"
        run = compress(parse_recipe(recipe(seed), "pluggability"), "pluggability", out, Display(4, -1), until="slice")
        banks[str(seed)] = {"edits": len(run.edits) - 1, "seconds": {s.name: s.seconds for s in run.store.stages}}
        for share in options.shares:
            for steps in options.finetune_steps:
                folder = out / "sizes" / f"p{share}-{steps}"
                start = time.perf_counter()
                document = sizes.slice_size(out, share, None, folder, [f"distill.finetune_steps={steps}"] if steps else [], -1)
                seconds = time.perf_counter() - start
                model = load_model(folder)
                key = f"{share}-{steps}-{seed}-{json.dumps(document['plan'])}"
                quality = judge.quality(teacher, judge.outcomes(model, key, 1), 1)
                rows.append(
                    {
                        "training_seed": seed,
                        "asked": share,
                        "parameters": document["student"]["parameters"],
                        "finetune_steps": steps,
                        "seconds": seconds,
                        "plan": document["plan"],
                        "pluggable": document["pluggable"],
                        "closed_form": document["closed_form"],
                        "quality": quality,
                    }
                )
                q = quality["scene_accuracy_g1"]
                print(
                    seed,
                    share,
                    steps,
                    document["student"]["parameters"],
                    q["student"],
                    q["drop_percent"],
                    q["ci95"],
                    round(seconds, 1),
                    flush=True,
                )
                torch.manual_seed(0)
    settings = {"scenes": options.scenes, "seeds": options.seeds, "training_seeds": options.training_seeds, "recipe": recipe(0)}
    print(write_results("pluggability", {"settings": settings, "banks": banks, "sizes": rows}), flush=True)


if __name__ == "__main__":
    main()
