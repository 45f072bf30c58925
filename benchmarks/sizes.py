"""What students of several sizes are worth beside their teacher, and beside the teacher trained on as long.

    python -m benchmarks.sizes [--sizes p48 blocks7 p34 p25 control] [--training-seeds 0 1 2] [--scenes 2048] [--seeds 200 ... 207]

`p48`: 52 % of the parameters gone; `blocks7`: 5 of 12 blocks gone and nothing else; `p34`, `p25`: 66 % and 75 % gone.
One plan a size, three trainings of it. `control`: the teacher itself given the fine-tune's steps and batches, on data alone, which
says what of a student's figure could be continued training. Every model draws the same prompts and noise, on seeds that no
choice was made on. One results file a size.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.judging import Judge, Outcomes
from benchmarks.results_file import write_results
from ppclc.analysis.detection import even_intervals
from ppclc.compiler import compress
from ppclc.data.samples import open_samples
from ppclc.loading.classes import count_parameters, predicted_parameters
from ppclc.loading.sources import open_source
from ppclc.models import apply_plan, load_model, load_source, set_threads
from ppclc.passes import distill as distill_pass
from ppclc.plan import CompressionPlan
from ppclc.recipe import parse_recipe
from ppclc.records import write_tensors
from ppclc.run import Run
from ppclc.screens.display import Display
from ppclc.teachers import ResidentTeacher

BLOCKS, GONE = 12, 5
ANALYZE = {"supernet_steps": 80, "supernet_sets": 32, "trials": 6, "trial_steps": 40}
DISTILL = {"steps": 100, "width_steps": 50, "finetune_steps": 2000, "finetune_learning_rate": 3e-3}
BY_SIZE = {
    "blocks7": {"finetune_steps": 3000},
    "p34": {"finetune_steps": 1500},
    "p25": {"finetune_steps": 1500},
    # The teacher learns nothing from its own velocity: what is left to it is the data.
    "control": {"data_weight": 1.0},
}
SHARES = {"p48": 0.48, "p34": 0.34, "p25": 0.25}


def distill(size: str) -> dict[str, Any]:
    """Section `distill` of a size's recipe, less its seed."""
    return DISTILL | BY_SIZE.get(size, {})


def recipe(size: str, seed: int) -> dict[str, Any]:
    """The recipe of a size and training seed."""
    target: dict[str, Any] = {"parameters": SHARES.get(size)}
    plan: dict[str, Any] = {}
    if size == "blocks7":
        source = open_source("builtin:two-digits")
        like = CompressionPlan.of(source.family.name, BLOCKS, even_intervals([BLOCKS], GONE))
        target = {"parameters": predicted_parameters(source.family, source.config, like)}
        plan = {"text_stream": "none", "ffn": "none", "modulation_rank": "none"}
    return {
        "model": {"path": "builtin:two-digits"},
        "calibrate": {"source": "images"},
        "analyze": ANALYZE,
        "target": target,
        "plan": plan,
        "distill": distill(size) | {"seed": seed},
    }


def student(size: str, seed: int, out: Path) -> Run:
    """The sliced student of a size and training seed."""
    return compress(parse_recipe(recipe(size, seed), size), size, out / size, Display(4, -1), until="slice")


def control(seed: int, out: Path) -> Any:
    """The teacher after the fine-tune's steps on the fine-tune's batches, learning from the data."""
    source = open_source("builtin:two-digits")
    set_threads(source)
    teacher, work = load_source(source), out / "control" / f"seed{seed}"
    model = apply_plan(teacher, CompressionPlan.of(source.family.name, BLOCKS))
    trained = work / "trained.safetensors"
    if not trained.is_file():
        work.mkdir(parents=True, exist_ok=True)
        settings = distill_pass.DistillSettings.model_validate(distill("control") | {"seed": seed})
        samples = open_samples("images", source, teacher, "train")
        by_blocks = ResidentTeacher(teacher, source.family)
        write_tensors(trained, distill_pass.finetune(by_blocks, model, samples, settings, lambda share, note: None, work).tensors)
        model = apply_plan(teacher, CompressionPlan.of(source.family.name, BLOCKS))
    model.load_state_dict(load_file(trained))
    return model


def row(judge: Judge, teacher: dict[float, Outcomes], model: Any, key: str, guidance: list[float]) -> dict[str, Any]:
    """Figures of one model by guidance."""
    quality: dict[str, Any] = {}
    for g in guidance:
        quality |= judge.quality(teacher[g], judge.outcomes(model, key, g), g)
    return {"parameters": count_parameters(model), "quality": quality}


def told(run: Run) -> dict[str, Any]:
    """Plan and cost of a run."""
    assert run.plan
    return {"plan": run.plan.model_dump(mode="json"), "seconds": {s.name: s.seconds for s in run.store.stages}}


def main() -> None:
    """Train and judge; one results file a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["p48", "blocks7", "p34", "p25", "control"])
    parser.add_argument("--training-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=2048)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(200, 208)))
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--out", type=Path, default=Path("out/sizes"))
    options = parser.parse_args()
    source = open_source("builtin:two-digits")
    set_threads(source)
    judge = Judge(source, options.scenes, tuple(options.seeds), options.out / "judged")
    whole = load_source(source)
    teacher = {g: judge.outcomes(whole, "teacher", g) for g in options.guidance}
    for size in options.sizes:
        rows = {}
        for seed in options.training_seeds:
            if size == "control":
                model, key, more = control(seed, options.out), f"control-{seed}-{distill(size)}", {}
            else:
                run = student(size, seed, options.out)
                assert run.student
                model, key, more = load_model(run.out / "model"), run.student.digest, told(run)
            rows[str(seed)] = row(judge, teacher, model, key, options.guidance) | more
            print(size, seed, {k: (q["student"], q["drop_percent"], q["ci95"]) for k, q in rows[str(seed)]["quality"].items()}, flush=True)
        settings = {"scenes": options.scenes, "seeds": options.seeds, "distill": distill(size), "analyze": ANALYZE}
        results = {"size": size, "teacher_parameters": count_parameters(whole), "settings": settings, "training_seeds": rows}
        print(write_results(f"sizes-{size}", results), flush=True)


if __name__ == "__main__":
    main()
