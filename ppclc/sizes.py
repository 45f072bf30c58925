"""Other sizes from a finished run: a plan whose edits its bank holds, sliced without training unless that is asked for.

The plan of a size is chosen as `compress` chooses, by the costs that the analysis measured, from held edits alone.
What the recipe fixes by hand stays what is allowed: a list means any part of it.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ppclc import compiler, distilling
from ppclc.analysis import selection
from ppclc.analysis.budget import (
    LEAST_NUMBER,
    RANK_TOLERANCE,
    PlanSettings,
    TargetSettings,
    adapted_spans,
    allows,
    budget_of,
    by_hand,
    layout,
)
from ppclc.analysis.selection import Budget, Options, Span
from ppclc.bank import INTERVAL, EditBank, considered, interval_plan, needed
from ppclc.errors import OutputError, PlanError, RecipeError
from ppclc.loading.classes import student_config
from ppclc.loading.sources import BUILTIN, Source, check_teacher, open_source
from ppclc.machine.locks import alone_in
from ppclc.models import quiet_libraries
from ppclc.passes import slice as slice_pass
from ppclc.passes.distill import DistillSettings
from ppclc.plan import CompressionPlan, Interval
from ppclc.publishing import comfyui
from ppclc.publishing.cards import CARD, Card, write_card
from ppclc.publishing.pipelines import names_in, surround
from ppclc.recipe import Recipe, read_recipe
from ppclc.records import Analysis, Distilled, Store, Student, check_writable, digest_of, file_digest, whole_folder, write_text
from ppclc.run import Run
from ppclc.screens.display import Display

VERSION = 1
SIZE_FILE = "size.json"
CHAINS = 8
"""Sets of intervals of each number of removed blocks that are looked at: some allow fewer text streams than others."""
UNKNOWN = 1.0
"""Cost of a removed block of an interval that nobody measured: all of the velocity."""


# ---------------------------------------------------------------------------------------------- the plan of a size


@dataclass(frozen=True)
class Costs:
    """Squared relative velocity errors that an analysis measured, edit by edit; 0 for width edits by hand, which it did not weigh."""

    intervals: Mapping[Span, float]
    text: Mapping[int, float]
    ffn: Mapping[tuple[str, int], float]
    ranks: Mapping[int, float]

    @classmethod
    def of(cls, analysis: Analysis) -> Costs:
        """The costs in an analysis."""
        rows: dict[str, dict[Span, float]] = {}
        for c in analysis.candidates:
            rows.setdefault(c.kind, {})[c.first, c.last] = c.cost
        ffn = {(kind.removesuffix("_ffn"), u): cost for kind in rows if kind.endswith("_ffn") for (u, _), cost in rows[kind].items()}
        text = {v - u + 1: cost for (u, v), cost in rows.get("text_stream", {}).items()}
        return cls(rows.get("interval", {}), text, ffn, analysis.modulation_error)

    def interval(self, span: Span) -> float:
        """Cost of an interval."""
        return self.intervals.get(span, UNKNOWN * (span[1] - span[0]))

    def rank(self, rank: int) -> float:
        """Cost of a modulation rank: its own, else that of the next smaller one that was measured."""
        return self.ranks[max((r for r in self.ranks if r <= rank), default=rank)] if self.ranks else 0.0

    def plan(self, plan: CompressionPlan) -> float:
        """Cost of a plan, edits taken to be independent."""
        ffn = sum(self.ffn.get((e.stream, e.block), 0.0) for e in plan.ffn)
        rank = 0.0 if plan.modulation_rank is None else self.rank(plan.modulation_rank)
        return sum(self.interval((i.first, i.last)) for i in plan.intervals) + self.text.get(len(plan.text_stream), 0.0) + ffn + rank


@dataclass(frozen=True)
class Choice:
    """What the plan of a size may be made of: ways to begin, one for each use of the lists made by hand, and the intervals to be had."""

    options: Sequence[Options]
    costs: Costs

    @classmethod
    def of(cls, source: Source, analysis: Analysis, wanted: PlanSettings, spans: Sequence[Span], reach: int) -> Choice:
        """The choice that a recipe's `plan` leaves of these intervals. reach: blocks that the moments span."""
        costs = Costs.of(analysis)
        allowed = {s: costs.interval(s) for s in spans if interval_allowed(wanted, s)}
        fit = [r for r, c in costs.ranks.items() if c <= (wanted.modulation_error or RANK_TOLERANCE)]
        rank = {"auto": min(fit, default=None), "none": None}.get(str(wanted.modulation_rank), wanted.modulation_rank)
        base = Options(
            **layout(source),
            chains=selection.best_chains(source.family.sizes(source.config), allowed, CHAINS),
            ranks=[(0.0, None), *([(costs.rank(rank), rank)] if isinstance(rank, int) else [])],
            text_runs=[(0.0, 0), *((c, k) for k, c in costs.text.items() if wanted.text_stream == "auto")],
            ffns=sorted((c, s, b) for (s, b), c in costs.ffn.items() if wanted.ffn == "auto"),
            dead_code=wanted.dead_code,
            protect=frozenset(wanted.protect),
            text_reach=reach,
            adapters=None if (adapted := adapted_spans(wanted)) is None else frozenset(adapted),
        )
        texts = [None, wanted.text_stream] if isinstance(wanted.text_stream, list) else [None]
        ffns = [None, by_hand(wanted)] if isinstance(wanted.ffn, list) else [None]
        return cls([replace(base, text_blocks=t, fixed_ffns=f) for t, f in itertools.product(texts, ffns)], costs)

    def best(self, budget: Budget) -> CompressionPlan | None:
        """The cheapest plan within a budget with no edit that the budget does not need; None when there is none."""
        found = []
        for options in self.options:
            try:
                found += selection.contenders(options, budget, 1)
            except RecipeError:
                continue
        if not found and budget.met(smallest := self.smallest(budget)):
            found = [smallest]
        return min((self.trimmed(plan, budget) for plan in found), key=self.costs.plan, default=None)

    def trimmed(self, plan: CompressionPlan, budget: Budget) -> CompressionPlan:
        """A plan without what the budget does not need, edits by hand included."""
        return selection.put_back(plan, replace(self.options[0], ranks=[(0.0, None), (0.0, plan.modulation_rank)]), budget)

    def smallest(self, budget: Budget) -> CompressionPlan:
        """The plan of least value: most blocks removed, and every width edit that goes with them."""
        plans = []
        for options in self.options:
            for (_, spans), (_, rank), (_, k) in itertools.product(
                options.chains[max(options.chains)], options.ranks[-1:], options.text_runs
            ):
                text = options.text(k, spans)
                if text is not None and selection.fits(options, budget, spans, text, rank):
                    free = [(b, s) for _, s, b in options.usable_ffns(spans, text)]
                    plans.append(options.plan(spans, text, rank, options.fixed_ffns if options.fixed_ffns is not None else free))
        return min(plans, key=budget.value)


def interval_allowed(wanted: PlanSettings, span: Span) -> bool:
    """Whether a recipe's `plan` allows an interval: one of its list, or a free one."""
    if isinstance(wanted.intervals, list):
        return list(span) in wanted.intervals
    return wanted.intervals == "auto" and allows(wanted, *span)


def target_of(parameters: float) -> TargetSettings:
    """The target of so many parameters, a share up to 1. Raises RecipeError for what is no size."""
    try:
        return TargetSettings(parameters=parameters)
    except ValidationError:
        raise RecipeError(
            f"--parameters {parameters:g}: wanted a share of the teacher's up to 1.0, or a number of them, at least {LEAST_NUMBER:,}"
        ) from None


def plan_of_size(run: Run, bank: EditBank, target: TargetSettings) -> CompressionPlan:
    """The plan for a target from the edits that a bank holds.

    The run's own plan goes first where it fits and the budget needs all of it: trials chose that one.

    Raises:
        RecipeError: a target above the teacher.
        PlanError: the bank does not come down to it.
    """
    analysis, wanted = _analysis(run), run.recipe.plan
    budget = budget_of(run.source, target, run.recipe.model.dtype)
    assert budget is not None
    held = bank.intervals(adapted_spans(wanted))
    choice = Choice.of(run.source, analysis, wanted, held, bank.stats.longest)
    own = analysis.plan
    if not bank.lacking(own) and budget.met(own) and choice.trimmed(own, budget) == own:
        return own
    found = choice.best(budget)
    if found is None:
        wider = Choice.of(run.source, analysis, wanted, sorted({*held, *considered(analysis)}), bank.stats.longest)
        raise PlanError(_out_of_reach(run, bank, budget, choice.smallest(budget), wider))
    return found


def _out_of_reach(run: Run, bank: EditBank, budget: Budget, smallest: CompressionPlan, wider: Choice) -> str:
    """What to say of a size that is below all that a bank can be cut to."""
    whole = budget.value(CompressionPlan.of(smallest.family, smallest.num_blocks))
    least = budget.value(smallest)
    share = math.ceil(1000 * least / whole) / 1000
    text = (
        f"{run.out}: {budget.limit:,.0f} parameters are out of the bank's reach: the smallest size that it can be cut to is "
        f"{least:,.0f} parameters, {share:g} of the teacher's; wanted --parameters {share:g} or more"
    )
    plan = wider.best(budget)
    if plan is not None:
        return f"{text}, or {', '.join(bank.lacking(plan))} in the bank; train with: {train_all(run)}"
    far = wider.smallest(budget)
    if lacking := bank.lacking(far):
        more = f"; with every edit that the recipe allows, {', '.join(lacking)} among them, it is {budget.value(far):,.0f}"
        return f"{text}{more}; train with: {train_all(run)}"
    return f"{text}; no other edit is allowed below plan in {run.out / 'recipe.yaml'}"


def train_all(run: Run) -> str:
    """The command that fills a run's bank."""
    return f"ppclc compress {shlex.quote(str(run.out / 'recipe.yaml'))} -o {shlex.quote(str(run.out))} --set distill.bank=all"


def plan_by_hand(run: Run, bank: EditBank, path: Path) -> CompressionPlan:
    """The plan in a file. Raises PlanError when it is of another model, or has intervals that the bank lacks."""
    plan = CompressionPlan.read(path)
    student_config(run.source.family, run.source.config, plan)
    lacking = bank.lacking(plan)
    if lacking:
        forms = [interval_plan(_analysis(run).plan, Interval(first=u, last=v), run.recipe.plan) for u, v in considered(_analysis(run))]
        trained = {form.interval_key(form.intervals[0]) for form in forms}
        by_plan = f"put the plan into {run.out / 'plan.json'} and run: ppclc compress {run.out / 'recipe.yaml'} -o {run.out}"
        way_out = train_all(run) if trained.issuperset(lacking) else by_plan
        held = ", ".join(k for k in bank.folders if k.startswith("interval-")) or "no interval"
        raise PlanError(f"{path}: the bank in {run.out} lacks {', '.join(lacking)}; it holds {held}; train them with: {way_out}")
    return plan


# ------------------------------------------------------------------------------------------------------- the command


def slice_size(
    out: Path,
    parameters: float | None,
    plan_file: Path | None,
    folder: Path | None,
    changes: list[str],
    verbosity: int,
    single_file: bool = False,
) -> dict[str, Any]:
    """Cut another size from a finished run; what `size.json` says of it. With `single_file`, a file for ComfyUI lies beside it.

    Raises:
        RecipeError: neither a size nor a plan, both, or a changed key that is not of the fine-tune.
        PlanError: a size or a plan that the bank does not reach, or that ComfyUI has no class for.
        OutputError: no finished run in `out`, or something else's folder to write to.
    """
    if (parameters is None) == (plan_file is None):
        got = "got both" if plan_file is not None else "got no size"
        raise RecipeError(f"ppclc slice: {got}; wanted --parameters or --plan, one of them")
    target = None if parameters is None else target_of(parameters)
    if folder:
        check_home(folder)
    recipe = stored_recipe(out)
    settings = finetune_settings(out, recipe, changes)
    quiet_libraries()
    display = Display(2 if settings.finetune_steps else 1, verbosity)
    run = compiler.reopen(recipe, f"{out.name}.yaml", out, display)
    run.store = Store(out)
    with alone_in(out):
        bank = _open_bank(run)
        plan = plan_of_size(run, bank, target) if target else plan_by_hand(run, bank, Path(str(plan_file)))
        if single_file:
            comfyui.check_layout(run.source.family, plan)
        home = (folder or out / "sizes" / size_name(plan, parameters, 0 if plan.is_empty else settings.finetune_steps)).absolute()
        if not folder:
            check_home(home)
        document = _cut(run, bank, plan, settings, home)
        if single_file:
            _write_single_file(home, home.name if folder else f"{out.absolute().name}-{home.name}", display)
    for line in summary(document, recipe.model.path, _shown(home)):
        display.say(line)
    return document


def stored_recipe(out: Path) -> Recipe:
    """The recipe of the run in a folder. Raises OutputError when there is none."""
    if not (out / "recipe.yaml").is_file():
        raise OutputError(f"{out}: holds no run of ppclc compress, wanted its output folder; make one with: ppclc compress RECIPE -o {out}")
    return read_recipe(out / "recipe.yaml")


def finetune_settings(out: Path, recipe: Recipe, changes: list[str]) -> DistillSettings:
    """How a size is fine-tuned: by the recipe with changes on top, and not at all unless `distill.finetune_steps` is among them.

    Raises:
        RecipeError: a change of anything else than the fine-tune.
    """
    changed = read_recipe(out / "recipe.yaml", ["distill.finetune_steps=0", *changes])
    old, new = recipe.model_dump(), changed.model_dump()
    sections = [s for s in old if s != "distill" and old[s] != new[s]]
    free = {*recipe.distill.joint(), "gradient_checkpointing", "checkpoint_every", "chunk"}
    local = [f"distill.{k}" for k in old["distill"] if k not in free and old["distill"][k] != new["distill"][k]]
    if wrong := [*sections, *local]:
        raise RecipeError(
            f"--set {wrong[0]}: a slice takes the edits of {out} as they are; wanted distill.finetune_steps and what that training is set by; "
            f"for anything else run: ppclc compress {shlex.quote(str(out / 'recipe.yaml'))}"
        )
    if changes and not changed.distill.finetune_steps:
        raise RecipeError(f"--set {changes[0]}: nothing is trained without steps; wanted distill.finetune_steps above 0 beside it")
    return changed.distill


def size_name(plan: CompressionPlan, parameters: float | None, steps: int) -> str:
    """Folder name of a size: `p0.60`, `p900000`, or `plan-` with a digest; `-f200` behind it after so many fine-tune steps."""
    if parameters is None:
        name = f"plan-{digest_of(plan.model_dump())[:8]}"
    else:
        name = f"p{parameters:.2f}" if round(parameters, 2) == parameters and parameters <= 1 else f"p{parameters:.10g}"
    return f"{name}-f{steps}" if steps else name


def check_home(home: Path) -> None:
    """Raise OutputError for a folder that cannot be written, or holds anything but an earlier size: it would be replaced whole."""
    there = sorted(p.name for p in home.iterdir()) if home.is_dir() else []
    known = {SIZE_FILE, "transformer", CARD, comfyui.FOLDER, *names_in(home)}
    if there and not {SIZE_FILE, "transformer"} <= set(there) <= known:
        other = [name for name in there if name not in known] or there
        raise OutputError(f"{home}: holds something else than a size, {other[0]}, which would be lost; give another folder with -o")
    check_writable(home)


def _cut(run: Run, bank: EditBank, plan: CompressionPlan, settings: DistillSettings, home: Path) -> dict[str, Any]:
    """The student of a plan in its folder, whole or not at all; what was cut before and lies there intact is left."""
    edits, tensors = bank.read(plan)
    display, dtype, steps = run.display, run.recipe.model.dtype, 0 if plan.is_empty else settings.finetune_steps
    tuned: list[Distilled] = []
    if steps:
        with display.stage("fine-tune") as progress:
            tuned = [distilling.finetune(run, plan, tensors, edits, settings, progress, f"finetune-{home.name}")]
        run.part()
    document: dict[str, Any] = {
        "teacher": compiler.teacher_size(run),
        "student": {},
        "plan": plan.model_dump(mode="json"),
        "gates": [],
        "finetune_steps": steps,
        "pluggable": bank.trained(plan),
        "closed_form": bank.closed(plan),
    }

    def build(_: Path) -> Student:
        with whole_folder(home) as draft:
            trained = tuned[0].tensors if tuned else {}
            made = slice_pass.write_student(run.source, dtype, plan, tensors, trained, draft)
            return _with_document(made, document, draft, _card(run.source, dtype, document, plan, "distilled edits"))

    with display.stage("slice"):
        made = run.store.make(
            Student,
            "size",
            VERSION,
            [slice_pass.VERSION, plan.model_dump(), run.recipe.analyze.ridge],
            (bank.stats, *edits, *tuned),
            build,
            valid=lambda student: slice_pass.is_intact(student, home),
        )
    for note in surround(run.source, home):
        display.say(note)
    return document | {"student": _size_of(made)}


def _with_document(made: Student, document: dict[str, Any], draft: Path, card: Card) -> Student:
    """A student with what else its folder holds: the other components, its card, `size.json`."""
    document["student"] = _size_of(made)
    surround(card.source, draft)
    write_card(replace(card, student=document["student"]), draft)
    write_text(draft / SIZE_FILE, json.dumps(document, indent=1) + "\n")
    return made.model_copy(update={"files": made.files | {SIZE_FILE: file_digest(draft / SIZE_FILE)}})


def is_model(where: str, parameters: float | None, plan_file: Path | None) -> bool:
    """Whether what is to be cut is a model, and no output folder of a run."""
    folder = Path(where).expanduser()
    if where.startswith(BUILTIN) or (folder / "transformer" / "config.json").is_file() or (folder / "config.json").is_file():
        return not (folder / "records").is_dir()
    return not folder.exists() and parameters is None and plan_file is not None  # an id of the hub


def slice_model(
    place: tuple[str, str | None, str | None], plan_file: Path | None, folder: Path | None, verbosity: int, single_file: bool = False
) -> dict[str, Any]:
    """Cut a model (path, revision, variant) by a plan with no run: blocks that go, and nothing that would have to be fitted; what `size.json` says of it.

    Raises:
        RecipeError: no plan, or no folder to write to.
        PlanError: a plan of another model, or with edits that follow from a run.
        ModelError: there is no such model, or it is not whole.
        OutputError: something else's folder to write to.
    """
    if plan_file is None or folder is None:
        home = Path(place[0]).expanduser().absolute().parent
        own = f", or its run, {home}, for another size of it" if (home / "records").is_dir() else ""
        raise RecipeError(
            f"ppclc slice {place[0]}: a model and no run of ppclc compress: wanted --plan plan.json, and -o for the student's folder{own}"
        )
    quiet_libraries()
    source, plan = open_source(*place), CompressionPlan.read(plan_file)
    check_teacher(source)
    student_config(source.family, source.config, plan)
    fitted = [key for key in needed(plan, source.family) if not INTERVAL.match(key)]
    if fitted or plan.adapters:
        raise PlanError(
            f"{plan_file}: {', '.join(fitted) or 'adapters'} follow from calibration, which a model's folder does not hold; "
            "wanted intervals alone, or the output folder of ppclc compress"
        )
    if single_file:
        comfyui.check_layout(source.family, plan)
    home, display = folder.absolute(), Display(1, verbosity)
    check_home(home)
    document: dict[str, Any] = {
        "teacher": compiler.size_of(source),
        "student": {},
        "plan": plan.model_dump(mode="json"),
        "gates": [],
        "finetune_steps": 0,
        "pluggable": [],
        "closed_form": [],
    }
    dtype = str(next(iter(source.places().values())).dtype).removeprefix("torch.")
    with display.stage("slice"), whole_folder(home) as draft:
        made = slice_pass.write_student(source, dtype, plan, {}, {}, draft)
        _with_document(made, document, draft, _card(source, dtype, document, plan, "its teacher by a plan, without training"))
    if single_file:
        _write_single_file(home, home.name, display)
    told = ["no interval was trained: its first block stands for it"] if plan.intervals else []
    for line in [*summary(document, place[0], _shown(home)), *told]:
        display.say(line)
    return document


def _write_single_file(home: Path, name: str, display: Display) -> None:
    written = comfyui.write_single_file(home, home / comfyui.FOLDER / f"{name}.safetensors")
    display.say(f"wrote {_shown(written)}: for ComfyUI's models/diffusion_models")


def _card(source: Source, dtype: str, document: Mapping[str, Any], plan: CompressionPlan, made: str) -> Card:
    """What the card of a size tells: how it was made and how far trained, and that nobody measured it."""
    steps = document["finetune_steps"]
    tuned = f"fine-tuned end to end for {steps} steps" if steps else "not fine-tuned end to end, which makes it a starting point"
    return Card(source, plan, document["teacher"], document["student"], dtype, [f"It was cut from {made}, and {tuned}."])


def _size_of(student: Student) -> dict[str, int]:
    return student.model_dump(include={"parameters", "bytes", "blocks"})


def summary(document: Mapping[str, Any], teacher_path: str, home: Path) -> list[str]:
    """What a person wants to know of a size, a line each."""
    teacher, student = document["teacher"], document["student"]
    gone = 100 * (1 - student["parameters"] / teacher["parameters"])
    trained, closed, steps = document["pluggable"], document["closed_form"], document["finetune_steps"]
    told = [
        "",
        f"parameters  {teacher['parameters']:,} -> {student['parameters']:,} ({gone:.1f} % removed)",
        f"blocks  {teacher['blocks']} -> {student['blocks']}; weights {student['bytes'] / 1e6:.1f} MB",
    ]
    if trained:
        told.append(f"out of the bank: {', '.join(trained)}")
    if closed:
        told.append(f"in closed form, not trained: {', '.join(closed)}")
    if steps:
        told.append(f"fine-tuned end to end for {steps} steps")
    elif trained or closed:
        told.append("not fine-tuned, which is a starting point; to train it: the same command with --set distill.finetune_steps=200")
    return [*told, f"wrote {home}; next: ppclc bench {shlex.quote(str(home))} --against {shlex.quote(teacher_path)}"]


def _open_bank(run: Run) -> EditBank:
    """The bank of a reopened run. Raises OutputError when nothing was distilled yet."""
    assert run.stats is not None
    bank = EditBank(distilling.bank_of(run), run.stats, run.recipe.analyze.ridge, run.source.family)
    again = compiler.go_on(run.out)
    if not bank.folders and not (run.out / "model" / "transformer" / "config.json").is_file():
        raise OutputError(f"{run.out}: the run is not finished, its bank is empty; {again}")
    followed = run.out / "plan.json"
    if lacking := bank.lacking(CompressionPlan.read(followed) if followed.is_file() else _analysis(run).plan):
        run.display.say(
            f"warning: {', '.join(lacking)} of the run's own plan not in the bank, by the recipe as it stands: sizes are cut from the rest; {again}"
        )
    return bank


def _analysis(run: Run) -> Analysis:
    assert run.analysis is not None
    return run.analysis


def _shown(path: Path) -> Path:
    """A path as people would type it: below the working directory where it lies there."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
