"""What each part of distillation is worth: one factor changed at a time, everything else as it is by default.

    python -m benchmarks.factors [--factors ...] [--training-seeds 0 1] [--scenes 1024] [--seeds 210 211 212 213]

Six of twelve blocks gone at modulation rank 8, by one plan for all, 100 local and 200 joint steps at the rates that each phase does best at. Each variant's students are
judged on the same prompts and noise as the default's of the same training seed; what is told is the default's lead in points
of scene accuracy without guidance, with the 95 % interval of the paired difference over all training seeds together.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.judging import Judge, better_by
from benchmarks.results_file import write_results
from ppclc.analysis.closed_forms import closed_form_bank, interval_adapters
from ppclc.analysis.edit_costs import kept_choices
from ppclc.compiler import compress
from ppclc.data.samples import Samples, open_samples
from ppclc.loading.sources import open_source
from ppclc.models import build_student, load_source, set_threads
from ppclc.passes import distill as distill_pass
from ppclc.passes.distill import DistillSettings
from ppclc.plan import CompressionPlan, Interval
from ppclc.quality import velocity_error
from ppclc.recipe import parse_recipe
from ppclc.run import Run
from ppclc.screens.display import Display
from ppclc.teachers import ResidentTeacher
from ppclc.training.local_edits import BatchStates, LocalEdit, Teaching, interval_edit
from ppclc.training.local_phase import LocalPhase, LocalSettings

BLOCKS, GONE, RANK, TRIED_STEPS = 12, 6, 8, 30
DISTILL = {"steps": 100, "learning_rate": 5e-3, "finetune_steps": 200, "finetune_learning_rate": 7e-3}
DEFAULT: dict[str, Any] = {"start": "best", "adapters": False, "ridge": 1e-4, "sequential": False, "local_shift": 1.0, "distill": {}}
FACTORS: dict[str, dict[str, Any]] = {
    "start: first block": {"start": "first"},
    "start: middle block": {"start": "middle"},
    "start: last block": {"start": "last"},
    "start: by thirty local steps": {"start": "tried"},
    "adapters": {"adapters": True},
    "adapters, ridge 1e-2": {"adapters": True, "ridge": 1e-2},
    "adapters, ridge 1e-6": {"adapters": True, "ridge": 1e-6},
    "local batches of 64": {"distill": {"local_batch": 64}},
    "magnitude 0": {"distill": {"magnitude": 0.0}},
    "magnitude 1": {"distill": {"magnitude": 1.0}},
    "sequential": {"sequential": True},
    "local timesteps towards noise": {"local_shift": 3.0},
    "joint timesteps towards noise": {"distill": {"timestep_shift": 3.0}},
    "text weight 0": {"distill": {"text_weight": 0.0}},
    "text weight 0.3": {"distill": {"text_weight": 0.3}},
    "no local phase": {"distill": {"steps": 0}},
    "no fine-tune": {"distill": {"finetune_steps": 0}},
    "fine-tune half on data": {"distill": {"data_weight": 0.5}},
    "fine-tune on image states too": {"distill": {"state_weight": 0.1}},
    "fine-tune on data alone": {"distill": {"data_weight": 1.0}},
}


class Lab:
    """One teacher, one plan, and students made from them with a factor changed."""

    def __init__(self, run: Run) -> None:
        assert run.plan and run.stats and run.analysis  # noqa: PT018
        self.source, self.stats, self.plan, self.starts = run.source, run.stats, run.plan, run.analysis.starts
        self.model, self.family = run.teacher, run.source.family
        self.teacher = ResidentTeacher(self.model, self.family)
        self.teaching = Teaching(self.family, run.source.config, self.teacher.block_tensors)
        self.samples = open_samples("images", self.source, self.model, "train")

    def start(self, interval: Interval, how: str) -> int:
        """The block that an interval's student block is a copy of."""
        known = {"first": interval.first, "middle": (interval.first + interval.last) // 2, "last": interval.last}
        return known.get(how, self.starts.get(interval.key, interval.first))

    def student(self, seed: int, work: Path, **changes: Any) -> Any:
        """A trained student."""
        factor = DEFAULT | changes
        settings = DistillSettings.model_validate(DISTILL | factor["distill"] | {"seed": seed})
        plan = self.plan
        if factor["adapters"]:
            spans = [(i.first, i.last) for i in plan.intervals]
            plan = CompressionPlan.of(plan.family, plan.num_blocks, spans, [], plan.modulation_rank, plan.dead_code, (), spans)
        bank: dict[str, Any] = dict(closed_form_bank(self.stats, factor["ridge"], plan))
        samples = self.samples.shifted(factor["local_shift"])
        if factor["start"] == "tried":
            factor |= {"tried": self.tried(plan, samples, settings, work)}
        edits = [interval_edit(self.teaching, plan, i, partial(self._tensors, plan, i, factor), settings.weights) for i in plan.intervals]
        if factor["sequential"]:
            bank |= self._in_sequence(edits, plan, samples, settings, work)
        else:
            works = self._folders(edits, work)
            made = distill_pass.distill_edits(self.teacher, edits, settings.steps, samples, settings, _quiet, works)
            bank |= {d.edit: d.tensors for d in made}
        student = build_student(self.family, self.source.config, plan, self.teacher.tensors(), bank)
        folder = work / "finetune"
        folder.mkdir(parents=True, exist_ok=True)
        tuned = distill_pass.finetune(self.teacher, student, self.samples, settings, _quiet, folder)
        student.load_state_dict(tuned.tensors)
        return student.eval().requires_grad_(False)

    def tried(self, plan: CompressionPlan, samples: Samples, settings: DistillSettings, work: Path) -> dict[str, int]:
        """By interval the start whose block has the least loss after a short local phase on the same batches."""
        edits = [
            replace(
                interval_edit(self.teaching, plan, i, partial(self.teacher.block_tensors, s), settings.weights), key=f"{i.key}-from-{s}"
            )
            for i in plan.intervals
            for s in kept_choices(i.first, i.last)
        ]
        folders = self._folders(edits, work / "starts")
        made = distill_pass.distill_edits(self.teacher, edits, TRIED_STEPS, samples, settings, _quiet, folders)
        losses = {d.edit: d.losses[-1][1] for d in made}
        found = {}
        for i in plan.intervals:
            found[i.key] = min(kept_choices(i.first, i.last), key=lambda s: losses[f"{i.key}-from-{s}"])
        print(found, losses, flush=True)
        return found

    def _tensors(self, plan: CompressionPlan, interval: Interval, factor: dict[str, Any]) -> dict[str, torch.Tensor]:
        start = factor["tried"][interval.key] if factor["start"] == "tried" else self.start(interval, factor["start"])
        adapters = interval_adapters(self.stats, factor["ridge"], interval.first, start) if interval in plan.adapters else {}
        return self.teacher.block_tensors(start) | adapters

    def _folders(self, edits: list[LocalEdit], work: Path) -> list[Path]:
        folders = [work / e.key for e in edits]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        return folders

    def _in_sequence(
        self, edits: list[LocalEdit], plan: CompressionPlan, samples: Samples, settings: DistillSettings, work: Path
    ) -> dict[str, Any]:
        """Blocks trained one after the other, each on what the students before it give instead of the teacher's states."""
        bank: dict[str, Any] = {}
        before: list[Interval] = []
        for edit, interval in zip(edits, plan.intervals, strict=True):
            state = [self.teaching.block(self.teaching.plan(plan, [i]), i.first, bank) for i in before]
            chained = LocalEdit(
                edit.key,
                tuple(range(interval.last + 2)),
                (),
                edit.build,
                partial(self._chained_loss, edit, interval, list(zip(before, state, strict=True))),
                edit.tensors,
            )
            local = LocalSettings(
                settings.steps, settings.local_samples, settings.learning_rate, settings.checkpoint_every, settings.seed, 1, settings
            )
            phase = LocalPhase(
                self.teacher, lambda g: samples.draw(settings.local_samples, g), [chained], self._folders([edit], work), local, _quiet
            )
            bank |= {d.edit: d.tensors for d in phase.run()}
            before.append(interval)
        return bank

    def _chained_loss(
        self, edit: LocalEdit, interval: Interval, before: list[tuple[Interval, Any]], module: Any, batch: BatchStates
    ) -> dict[str, torch.Tensor]:
        """The edit's loss on the states of the students before it; in between, the teacher's own blocks run on them."""
        with torch.no_grad():
            states, at = batch.states[0], 0
            for span, block in before:
                states = self.teaching.call(block, span.first, self._through(states, batch, at, span.first), batch.shared)
                at = span.last + 1
            states = self._through(states, batch, at, interval.first)
        given = BatchStates({**batch.states, interval.first: states}, batch.shared, batch.mask)
        return dict(edit.loss(module, given))

    def _through(self, states: Any, batch: BatchStates, first: int, last: int) -> Any:
        for block in range(first, last):
            states = self.teaching.call(self.model.transformer_blocks[block], block, states, batch.shared)
        return states


def _quiet(share: float, note: str) -> None:
    """Progress that nobody watches."""


def laboratory(out: Path, strategy: str = "output_error") -> Lab:
    """The teacher with the plan that a strategy makes for that many blocks."""
    source = open_source("builtin:two-digits")
    recipe = {
        "model": {"path": "builtin:two-digits"},
        "calibrate": {"source": "images"},
        "analyze": {"strategy": strategy, "supernet_steps": 80, "supernet_sets": 32, "trials": 6, "trial_steps": 60},
        "plan": {"text_stream": "none", "ffn": "none", "modulation_rank": RANK},
        "target": {"parameters": parameters_left(source)},
    }
    return Lab(compress(parse_recipe(recipe, "factors"), "factors", out / "run", Display(2, -1), until="analyze"))


def parameters_left(source: Any) -> int:
    """Parameters of a student with so many blocks gone at that rank."""
    from ppclc.analysis.detection import even_intervals
    from ppclc.loading.classes import predicted_parameters

    like = CompressionPlan.of(source.family.name, BLOCKS, even_intervals([BLOCKS], GONE), [], RANK, True)
    return predicted_parameters(source.family, source.config, like)


def main() -> None:
    """Train and judge every variant; one results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", nargs="+", default=list(FACTORS))
    parser.add_argument("--training-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[210, 211, 212, 213])
    parser.add_argument("--out", type=Path, default=Path("out/factors"))
    options = parser.parse_args()
    source = open_source("builtin:two-digits")
    set_threads(source)
    lab = laboratory(options.out)
    judge = Judge(source, options.scenes, tuple(options.seeds), options.out / "judged")
    whole = load_source(source)
    right = judge.outcomes(whole, "teacher", 1)["right_g1"].repeat(len(options.training_seeds))
    generator = torch.Generator().manual_seed(50)
    probes = [open_samples("images", source, whole, "choose").draw(64, generator) for _ in range(8)]
    rows: dict[str, Any] = {}
    found: dict[str, torch.Tensor] = {}
    for name in ["default", *options.factors]:
        changes = FACTORS.get(name, {})
        outcomes, errors = [], []
        for seed in options.training_seeds:
            key = f"{name}-{seed}-{DISTILL}-{changes}"
            known = judge.place(key, 1).with_suffix(".json")  # a variant that is done is not trained again
            model = None
            if not known.is_file():
                model = lab.student(seed, options.out / "work" / name.replace(" ", "_").replace(":", "") / str(seed), **changes)
            outcomes.append(judge.outcomes(model, key, 1)["right_g1"])
            if model is not None:
                known.write_text(json.dumps(velocity_error(whole, model, probes)))
            errors.append(json.loads(known.read_text()))
        found[name] = torch.cat(outcomes)
        rows[name] = {
            "changes": changes,
            "scene_accuracy_g1": 100 * found[name].mean().item(),
            "by_seed": [100 * o.mean().item() for o in outcomes],
            "velocity_error": sum(errors) / len(errors),
            "teacher_leads_by": better_by(right, found[name]),
            "default_leads_by": better_by(found["default"], found[name]),
        }
        print(name, rows[name]["by_seed"], rows[name]["velocity_error"], rows[name]["default_leads_by"], flush=True)
    told = {"scenes": options.scenes, "seeds": options.seeds, "training_seeds": options.training_seeds, "distill": DISTILL}
    print(write_results("factors", {"settings": told, "plan": lab.plan.model_dump(mode="json"), "factors": rows}), flush=True)


if __name__ == "__main__":
    main()
