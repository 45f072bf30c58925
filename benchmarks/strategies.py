"""Which rule chooses the blocks that go: ours against PPCL's, block influence, LAPTOP-Diff's criterion and even spacing.

    python -m benchmarks.strategies [--removed 3 4 6] [--training-seeds 0 1] [--steps 200] [--scenes 2048] [--seeds 20 21 22 23]

Depth and modulation rank alone: every student of a row has the same number of blocks, the same rank, no dead
code, so the same parameters, and the same fine-tune steps, which are the same time. What ours trains before it
chooses comes on top, and is told beside. There is no local phase: its length would depend on how many intervals
a rule makes. Blocks start as each rule says: PPCL's interval from its first block, a dropped block's neighbour
as it is. Students are judged on the same prompts and noise, so that differences are paired; seeds of scenes are
ones that no choice was made on. One results file for each training seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.even_blocks import difference
from benchmarks.results_file import write_results
from ppclc.analysis.detection import even_intervals
from ppclc.compiler import compress
from ppclc.loading.classes import predicted_parameters
from ppclc.loading.sources import open_source
from ppclc.passes import verify
from ppclc.plan import CompressionPlan
from ppclc.recipe import parse_recipe
from ppclc.run import Run
from ppclc.screens.display import Display

STRATEGIES = ("output_error", "ppcl", "block_influence", "laptop", "even")
BLOCKS = 12


def student(out: Path, strategy: str, removed: int, training_seed: int, options: argparse.Namespace) -> Run:
    """One student, trained and judged."""
    source = open_source("builtin:two-digits")
    like = CompressionPlan.of(source.family.name, BLOCKS, even_intervals([BLOCKS], removed), [], options.rank, True)
    recipe = {
        "model": {"path": "builtin:two-digits"},
        "calibrate": {"source": "images"},
        "analyze": {"strategy": strategy},
        "plan": {"text_stream": "none", "ffn": "none", "modulation_rank": options.rank},
        "target": {"parameters": predicted_parameters(source.family, source.config, like)},
        "distill": {"steps": 0, "finetune_steps": options.steps, "finetune_learning_rate": 1.5e-3, "seed": training_seed},
        "verify": {"scenes": options.scenes, "seeds": options.seeds, "guidance": [1]},
    }
    return compress(parse_recipe(recipe, str(out)), out.name, out, Display(5, -1), until="verify")


def outcomes(run: Run) -> torch.Tensor:
    """Whether each scene came out right, (N,) 0 or 1."""
    assert run.student
    digest = run.store.digest("measure-student", verify.VERSION, run.recipe.verify.measure_key(), run.student)
    right = load_file(run.store.folder("measure-student", digest) / "tensors.safetensors")["right_g1"]
    assert run.verdict and abs(100 * right.mean().item() - run.verdict.quality["scene_accuracy_g1"].student) < 1e-4  # noqa: PT018
    return right


def row(run: Run) -> dict[str, Any]:
    """What is told of one student."""
    assert run.plan and run.verdict and run.student and run.analysis  # noqa: PT018
    return {
        "intervals": [[i.first, i.last] for i in run.plan.intervals],
        "starts": run.analysis.starts,
        "parameters": run.student.parameters,
        "sets_judged": len(run.analysis.supernet),
        "plans_tried": len(run.analysis.trials),
        "seconds": {s.name: s.seconds for s in run.store.stages if s.name in ("analyze", "distill")},
        "quality": {name: q.model_dump() for name, q in run.verdict.quality.items()},
    }


def main() -> None:
    """Train and judge every student; a results file a training seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--removed", type=int, nargs="+", default=[3, 4, 6])
    parser.add_argument("--training-seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--scenes", type=int, default=2048)
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22, 23])
    parser.add_argument("--out", type=Path, default=Path("out/strategies"))
    options = parser.parse_args()
    for training_seed in options.training_seeds:
        table: dict[str, Any] = {}
        for removed in options.removed:
            right, rows = {}, {}
            for strategy in STRATEGIES:
                run = student(options.out, strategy, removed, training_seed, options)
                rows[strategy], right[strategy] = row(run), outcomes(run)
                print(removed, strategy, rows[strategy]["intervals"], rows[strategy]["quality"]["scene_accuracy_g1"]["student"], flush=True)
            counts = {r["parameters"] for r in rows.values()}
            if len(counts) > 1:
                raise SystemExit(f"{removed} blocks removed: students of {sorted(counts)} parameters, not the same cut")
            better = {s: difference(right["output_error"], right[s]) for s in STRATEGIES[1:]}
            table[str(removed)] = {"students": rows, "ours_better_by": better}
        told = vars(options) | {"out": options.out.name, "training_seed": training_seed}
        print(write_results(f"strategies-seed{training_seed}", {"options": told, "removed": table}), flush=True)


if __name__ == "__main__":
    main()
