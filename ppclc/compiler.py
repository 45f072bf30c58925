"""The driver: names the passes in their order, and holds nothing else."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ppclc.bank import held_edits, interval_job, intervals_to_distill, joined, start_of, width_job
from ppclc.budget import budget_of
from ppclc.cache import FEW, Cache
from ppclc.closed_forms import interval_adapters
from ppclc.devices import Ranks
from ppclc.display import Display
from ppclc.encoding import Unencoded, cached, find_data
from ppclc.errors import OutputError, PlanError, RecipeError
from ppclc.families import Bank, Family
from ppclc.ffn_refits import refitted_ffns
from ppclc.interrupts import raise_if_stopped
from ppclc.local_edits import LocalEdit, Teaching, interval_edit, width_edits
from ppclc.models import (
    Source,
    build_student,
    check_teacher,
    count_parameters,
    load_model,
    load_source,
    open_source,
    quiet_libraries,
    set_threads,
    student_config,
)
from ppclc.passes import analyze as analyze_pass
from ppclc.passes import bench as bench_pass
from ppclc.passes import calibrate as calibrate_pass
from ppclc.passes import distill as distill_pass
from ppclc.passes import export as export_pass
from ppclc.passes import report as report_pass
from ppclc.passes import slice as slice_pass
from ppclc.passes import verify as verify_pass
from ppclc.plan import CompressionPlan, Interval
from ppclc.recipe import ExportTarget, Recipe
from ppclc.records import (
    Analysis,
    Benchmark,
    CalibrationStats,
    Distilled,
    Export,
    Job,
    Measured,
    Record,
    Stage,
    Store,
    Student,
    Verdict,
    check_writable,
    digest_of,
    measured,
    write_text,
)
from ppclc.samples import Samples, open_samples
from ppclc.search import Lessons
from ppclc.teachers import ResidentTeacher, StreamedTeacher, Teacher

PASSES = ("calibrate", "analyze", "distill", "slice", "verify", "export", "bench", "report")
LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "onnx", "onnxscript", "onnxruntime", "numpy", "scikit-learn")


@dataclass
class Run:
    """One compilation: recipe, output folder, store, and what has been made so far; `ranks` are the processes that share it."""

    recipe: Recipe
    name: str
    out: Path
    display: Display
    source: Source
    cache: Cache | None = None
    ranks: Ranks = field(default_factory=Ranks)
    store: Store = field(init=False)
    stats: CalibrationStats | None = None
    analysis: Analysis | None = None
    plan: CompressionPlan | None = None
    edits: list[Distilled] = field(default_factory=list)
    student: Student | None = None
    verdict: Verdict | None = None
    exports: list[Export] = field(default_factory=list)
    teacher_exports: list[Export] = field(default_factory=list)
    benchmark: Benchmark | None = None
    report: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.store = Store(self.out, ranks=self.ranks)

    @cached_property
    def teacher(self) -> Any:
        """The whole model, loaded once it is first needed."""
        return load_source(self.source, self.recipe.model.dtype)

    @cached_property
    def by_blocks(self) -> Teacher:
        """The teacher as distillation runs it, on the device that trains; a streamed one is never in memory as a whole."""
        if self.recipe.distill.teacher == "streamed":
            return StreamedTeacher(self.source, self.recipe.model.dtype, self.ranks.device)
        return ResidentTeacher(self.teacher.to(self.ranks.device), self.source.family)

    def part(self) -> None:
        """Leave the other ranks, and bring the teacher back from the device: what follows is for one process, on the CPU."""
        self.ranks = self.store.ranks = self.ranks.leave()
        if "teacher" in self.__dict__:
            self.teacher.to("cpu")
        self.__dict__.pop("by_blocks", None)

    @property
    def called(self) -> Any:
        """What can be called as the teacher is."""
        return self.by_blocks if self.recipe.distill.teacher == "streamed" else self.teacher


def compress(recipe: Recipe, name: str, out: Path, display: Display, until: str = "report", ranks: Ranks | None = None) -> Run:
    """Every pass up to `until`, recipe to report.

    Of several ranks the main one runs the passes while the others wait, but for `distill`, in which all have a share;
    after it the others are done, and have the records up to there.

    Raises:
        RecipeError, ModelError, PlanError, OutputError: the user's mistake, before anything is written.
        UnavailableError: a back end's library is missing, or the disk is full.
    """
    if until not in PASSES:
        raise RecipeError(f"--until {until}: wanted one of {', '.join(PASSES)}")
    quiet_libraries()
    ranks = ranks or Ranks()
    with ranks.main_first():
        run = prepare(recipe, name, out, display, ranks)
    steps: dict[str, Callable[[Run, Callable[[float, str], None]], None]] = {
        "calibrate": calibrate,
        "analyze": analyze,
        "distill": distill,
        "slice": slice_student,
        "verify": verify,
        "export": export,
        "bench": bench,
        "report": report,
    }
    display.stages = PASSES.index(until) + 1
    for step in PASSES[: display.stages]:
        raise_if_stopped()
        if step == "slice":
            run.part()
            if not ranks.is_main:
                break
        with display.stage(step) as progress:
            steps[step](run, progress)
    return run


def prepare(recipe: Recipe, name: str, out: Path, display: Display, ranks: Ranks) -> Run:
    """Check all that can be checked before work begins, load the teacher, claim the output folder."""
    for target in recipe.export:
        export_pass.check_backend(target.backend, target.dtype)
    source = open_source(recipe.model.path, recipe.model.revision)
    check_teacher(source)
    set_threads(source)
    verify_pass.check_gates(recipe.verify, source)
    budget_of(source, recipe.target, recipe.model.dtype)
    wanted = recipe.calibrate
    found = find_data(wanted.source, wanted.path, wanted.resolution, source, recipe.model.revision)
    check_writable(out)
    mark = _check_mark(out, source, "give another folder with -o")
    cache, encoding = _cached(found, out / "records", recipe.model.dtype, display)  # before the teacher: both may not fit in memory
    run = Run(recipe, name, out, display, source, cache, ranks)
    _ = run.called  # weights that are not whole are refused before anything is written
    run.store.stages += encoding
    if not mark.is_file():
        write_text(mark, f"{source.digest()} {recipe.model.path}\n")
    if ranks.is_main:
        write_text(out / "recipe.yaml", recipe.to_yaml())
    return run


def reopen(recipe: Recipe, name: str, out: Path, display: Display) -> Run:
    """A run of `compress` as it stands: its teacher, moments and analysis, nothing made and nothing written.

    Raises:
        OutputError: the folder holds the work of another teacher, or a run that has not come as far as its analysis.
    """
    again = f"go on with: ppclc compress {out / 'recipe.yaml'} -o {out}"
    source = open_source(recipe.model.path, recipe.model.revision)
    check_teacher(source)
    set_threads(source)
    _check_mark(out, source, "the teacher has changed since; put it back, or compress it anew into another folder")
    wanted = recipe.calibrate
    found = find_data(wanted.source, wanted.path, wanted.resolution, source, recipe.model.revision)
    if isinstance(found, Unencoded) and not found.folder(out / "records", recipe.model.dtype).is_dir():
        raise OutputError(f"{out}: the run is not finished, its samples are not encoded; {again}")
    cache = cached(found, out / "records", recipe.model.dtype, display.say)
    run = Run(recipe, name, out, display, source, cache)
    run.store.frozen = True
    try:
        calibrate(run, lambda *_: None)
        choose(run, lambda *_: None)
    except OutputError as error:
        raise OutputError(f"{out}: the run is not finished, or was made by another version of ppclc ({error}); {again}") from None
    run.store = Store(out)
    return run


def _check_mark(out: Path, source: Source, way_out: str) -> Path:
    """The file that says whose work a folder holds. Raises OutputError when that is another teacher's."""
    mark = out / "records" / "teacher"
    if mark.is_file() and mark.read_text("utf-8").split()[:1] != [source.digest()]:
        raise OutputError(f"{out}: holds the work of another teacher, {mark.read_text('utf-8').split(maxsplit=1)[-1].strip()}; {way_out}")
    return mark


def _cached(found: Cache | Unencoded | None, records: Path, dtype: str, display: Display) -> tuple[Cache | None, list[Stage]]:
    """The user's samples, and what encoding them took, which counts as calibration, when they are not there yet."""
    if not isinstance(found, Unencoded) or found.folder(records, dtype).is_dir():
        return cached(found, records, dtype, display.say), []
    with measured("calibrate") as cost:
        cache = cached(found, records, dtype, display.say)
    return cache, cost


def _samples(run: Run, split: str) -> Samples:
    samples = open_samples(run.recipe.calibrate.source, run.source, run.called, split, run.cache)
    if samples.cache and samples.cache.shares_rows and split == "choose":
        run.display.say(
            f"warning: {samples.cache.rows} samples are too few to be kept apart (wanted {FEW}): calibration, training and judging share all of them"
        )
    if samples.kind == "noise" and split == "choose":
        run.display.say("warning: calibrating on random embeddings and latents; what is measured on them says little about real prompts")
    return samples


def _base(run: Run) -> Record:
    """The root of all digests: the teacher and its dtype."""
    return Record(digest=digest_of([run.source.digest(), run.recipe.model.dtype]))


def calibrate(run: Run, progress: Callable[[float, str], None]) -> None:
    """Moments of the teacher's states."""
    settings, samples = run.recipe.calibrate, _samples(run, "choose")
    run.stats = run.store.make(
        CalibrationStats,
        "calibrate",
        calibrate_pass.VERSION,
        settings.moments() | {"source": samples.identity},
        (_base(run),),
        lambda _: calibrate_pass.calibrate(run.teacher, run.source.family, samples, settings, progress),
    )


def analyze(run: Run, progress: Callable[[float, str], None]) -> None:
    """Probes, candidates and the plan; a plan.json that a person has edited goes first."""
    choose(run, progress)
    with run.ranks.main_first():
        run.plan = _edited_plan(run, _made(run.analysis).plan)
    student_config(run.source.family, run.source.config, run.plan)


def choose(run: Run, progress: Callable[[float, str], None]) -> None:
    """Probes, candidates, and the plan that meets the target."""
    recipe, stats = run.recipe, _made(run.stats)
    sections = (recipe.analyze, recipe.target, recipe.plan)
    lessons = Lessons(recipe.distill.batch, recipe.distill.finetune_learning_rate)
    run.analysis = run.store.make(
        Analysis,
        "analyze",
        analyze_pass.VERSION,
        [*(s.model_dump() for s in sections), *([asdict(lessons)] if recipe.analyze.learns else [])],
        (stats,),
        lambda _: analyze_pass.analyze(
            run.teacher, run.source, stats, _samples(run, "train"), *sections, recipe.model.dtype, progress, lessons
        ),
    )


def _edited_plan(run: Run, plan: CompressionPlan) -> CompressionPlan:
    """The plan to follow: `plan.json` as a person left it, else the analysis's own, which is then written there."""
    path, ours = run.out / "plan.json", run.out / "records" / "plan.json"
    known = [plan.to_json(), ours.read_text("utf-8") if ours.is_file() else None]
    if path.is_file() and ours.is_file() and path.read_text("utf-8") not in known:
        edited = CompressionPlan.read(path)
        if (edited.family, edited.num_blocks) != (plan.family, plan.num_blocks):
            raise PlanError(f"{path}: a plan for {edited.num_blocks} blocks of {edited.family}, wanted {plan.num_blocks} of {plan.family}")
        run.display.say(f"{path} was edited: it is followed; remove it to take the analysis's own plan")
        return edited
    for file in (path, ours):  # the user's first: a run that is killed in between must not take an older plan for an edit
        if not file.is_file() or file.read_text("utf-8") != plan.to_json():
            write_text(file, plan.to_json())
    return plan


def distill(run: Run, progress: Callable[[float, str], None]) -> None:
    """One record an edit: intervals, then the width edits of what they became; then the fine-tune of the whole.

    Of intervals that are not the plan's no tensors are kept in memory.
    """
    plan, settings, ridge, stats = _made(run.plan), run.recipe.distill, run.recipe.analyze.ridge, _made(run.stats)
    samples, family, teacher = _samples(run, "train"), run.source.family, run.by_blocks
    teaching = Teaching(family, run.source.config, teacher.block_tensors)
    total = max(1, settings.steps + settings.width_steps + settings.finetune_steps)

    def part(before: int, steps: int, name: str) -> Callable[[float, str], None]:
        return lambda share, note: progress((before + share * steps) / total, f"{name}: {note}")

    jobs, edits = [], []
    for interval in intervals_to_distill(_made(run.analysis), plan, settings):
        start = start_of(_made(run.analysis), plan.interval_key(interval), interval)
        given = partial(_interval_start, teacher, stats, ridge, plan, interval, start)
        edits.append(interval_edit(teaching, plan, interval, given, settings.weights))
        jobs.append(interval_job(edits[-1].key, start, settings, samples.identity, _base(run)))
    trained = _train_edits(run, edits, jobs, settings.steps, part(0, settings.steps, "intervals"))
    own = trained[: len(plan.intervals)]
    bank = joined(stats, ridge, plan, family, own)

    def refit() -> None:
        if any(plan.interval_at(edit.block) for edit in plan.ffn):
            drawn = distill_pass.refit_samples(samples, settings, run.ranks.device)
            bank.update(refitted_ffns(teacher, teaching, plan, bank, drawn, ridge))

    widths = width_edits(teaching, plan, bank, settings.weights)
    under = {e.edit: e for e in own}
    jobs = [width_job(e.key, settings, samples.identity, _base(run), stats, ridge, [under[k] for k in e.stands_on]) for e in widths]
    own += _train_edits(run, widths, jobs, settings.width_steps, part(settings.steps, settings.width_steps, "width"), refit)
    bank |= {e.edit: e.tensors for e in own}
    tuned = finetune(run, plan, bank, own, settings, part(settings.steps + settings.width_steps, settings.finetune_steps, "fine-tune"))
    run.edits = [*own, *(e.model_copy(update={"tensors": {}}) for e in trained[len(plan.intervals) :]), tuned]


def _interval_start(
    teacher: Teacher, stats: CalibrationStats, ridge: float, plan: CompressionPlan, interval: Interval, start: int
) -> dict[str, Any]:
    """What an interval's block starts from: a teacher's block, with adapters in closed form where the plan has them."""
    adapters = interval_adapters(stats, ridge, interval.first, start) if interval in plan.adapters else {}
    return teacher.block_tensors(start) | adapters


def _train_edits(
    run: Run,
    edits: list[LocalEdit],
    jobs: list[Job],
    steps: int,
    progress: Callable[[float, str], None],
    before: Callable[[], None] = lambda: None,
) -> list[Distilled]:
    """The records of some edits, those that are not there trained beside each other. before: what is done once there are any."""
    settings, samples = run.recipe.distill, _samples(run, "train")

    def build(left: list[int], works: list[Path]) -> list[Distilled]:
        before()
        chosen = [edits[i] for i in left]
        return distill_pass.distill_edits(
            run.by_blocks, chosen, steps, samples, settings, progress, works, run.out / "curves", run.ranks.device
        )

    return run.store.make_all(Distilled, jobs, build, "distill", on="each") if edits else []


def finetune(
    run: Run,
    plan: CompressionPlan,
    bank: Bank,
    edits: Sequence[Distilled],
    settings: distill_pass.DistillSettings,
    progress: Callable[[float, str], None],
) -> Distilled:
    """The whole student of a plan, trained end to end from the bank and the plan's distilled edits."""
    samples, ridge, teacher = _samples(run, "train"), run.recipe.analyze.ridge, run.by_blocks
    told = settings.model_copy(update={"finetune_steps": 0 if plan.is_empty else settings.finetune_steps})

    def whole(work: Path) -> Distilled:
        student = build_student(run.source.family, run.source.config, plan, teacher.tensors(), bank)
        return distill_pass.finetune(teacher, student, samples, told, progress, work, run.out / "curves", run.ranks, plan.ends)

    what = [told.joint() | {"source": samples.identity}, plan.model_dump(), ridge]
    inputs = (_base(run), _made(run.stats), *edits)
    return run.store.make(Distilled, "finetune", distill_pass.VERSION, what, inputs, whole, stage="distill", on="all")


def slice_student(run: Run, progress: Callable[[float, str], None]) -> None:
    """The student's folder, `OUT/model`."""
    plan, trained, folder = _made(run.plan), run.edits[-1], run.out / "model"
    run.student = run.store.make(
        Student,
        "slice",
        slice_pass.VERSION,
        plan.model_dump(),
        (trained,),
        lambda _: slice_pass.slice_student(run.teacher, plan, trained, folder),
        valid=lambda student: slice_pass.is_intact(student, folder),
    )


def verify(run: Run, progress: Callable[[float, str], None]) -> None:
    """Both models judged, then compared."""
    settings, student = run.recipe.verify, _made(run.student)
    model = load_model(run.out / "model", run.recipe.model.dtype)
    outcomes: list[Measured] = []
    for i, (label, subject, root) in enumerate((("teacher", run.teacher, _base(run)), ("student", model, student))):

        def half(done: float, note: str, i: int = i, label: str = label) -> None:
            progress((i + done) / 2, f"{note} the {label}")

        outcomes.append(
            run.store.make(
                Measured,
                f"measure-{label}",
                verify_pass.VERSION,
                settings.measure_key(),
                (root,),
                partial(verify_pass.measure, subject, run.source, settings, half),
                stage="verify",
            )
        )
    run.verdict = run.store.make(
        Verdict,
        "verify",
        verify_pass.VERSION,
        settings.model_dump(mode="json"),
        (outcomes[0], outcomes[1], student),
        lambda _: verify_pass.verify(run.teacher, model, run.source, (outcomes[0], outcomes[1]), _samples(run, "judge"), settings),
    )


def export(run: Run, progress: Callable[[float, str], None]) -> None:
    """Every target of the recipe for the student, and the teacher beside it as the baseline of `bench`."""
    model = load_model(run.out / "model", run.recipe.model.dtype)
    run.exports, run.teacher_exports = [], []
    jobs = [(t, role) for t in run.recipe.export for role in ("student", "teacher")]
    for n, (target, role) in enumerate(jobs):
        root: Record = _made(run.student) if role == "student" else _base(run)
        subject = model if role == "student" else run.teacher
        baseline = run.out / "records" / f"teacher-{target.backend}-{target.dtype}"
        folder = run.out / "export" / target.backend if role == "student" else baseline
        record = run.store.make(
            Export,
            f"export-{target.backend}-{target.dtype}-{role}",
            export_pass.VERSION,
            target.model_dump(),
            (root,),
            partial(_export, subject, run.source.family, target, folder, root.digest),
            valid=partial(export_pass.is_intact, folder=folder),
            stage="export",
        )
        (run.exports if role == "student" else run.teacher_exports).append(record)
        progress((n + 1) / len(jobs), f"{target.backend} {role}")


def _export(model: Any, family: Family, target: ExportTarget, folder: Path, digest: str, _: Path) -> Export:
    return export_pass.export_model(model, family, target.backend, target.dtype, folder, digest)


def bench(run: Run, progress: Callable[[float, str], None]) -> None:
    """Teacher and student, eager and in every back end that runs here, interleaved in one run."""
    settings = run.recipe.bench
    run.benchmark = run.store.make(
        Benchmark,
        "bench",
        bench_pass.VERSION,
        [settings.model_dump(), _machine(run.source)],
        (_made(run.student), *run.exports, *run.teacher_exports),
        lambda _: bench_models(
            run.source,
            {"teacher": run.teacher, "student": load_model(run.out / "model", run.recipe.model.dtype)},
            {
                "teacher": [run.out / "records" / f"teacher-{t.backend}-{t.dtype}" for t in run.recipe.export],
                "student": [run.out / "export" / t.backend for t in run.recipe.export],
            },
            settings.batch,
            settings.runs,
            progress,
        ),
    )


def bench_models(
    source: Source, models: dict[str, Any], exports: dict[str, list[Path]], batch: int, runs: int, progress: Callable[[float, str], None]
) -> Benchmark:
    """Latency of models by label, eager and as the artefacts in `exports`, on one set of inputs.

    Raises:
        RecipeError: models that do not take the same inputs.
    """
    lowered = {label: source.family.lowered(model) for label, model in models.items()}
    widths = {label: (model.config["in_channels"], model.config["joint_attention_dim"]) for label, model in models.items()}
    if len(set(widths.values())) > 1:
        raise RecipeError(f"bench: {', '.join(models)} take inputs of different widths; wanted a teacher and its students")
    first = next(iter(lowered.values()))
    size = {**first.sizes[0], "batch": batch}
    targets = [bench_pass.eager_target(label, low.reference) for label, low in lowered.items()]
    for label, low in lowered.items():
        found = [f for f in exports.get(label, []) if (f / bench_pass.ONNX_MODEL).is_file()]
        targets += [bench_pass.onnxruntime_target(label, folder, low.reference) for folder in found]
    dtype = str(next(next(iter(models.values())).parameters()).dtype).removeprefix("torch.")
    return bench_pass.run_bench(targets, first.inputs(**size), size, runs, "cpu", dtype, progress)


def report(run: Run, progress: Callable[[float, str], None]) -> None:
    """`report.json` and `report.html`; written at every run, since it also says what that run reused."""
    student = _made(run.student)
    inputs = report_pass.ReportInputs(
        out=run.out,
        recipe_name=run.name,
        recipe_text=run.recipe.to_yaml(),
        model_path=run.recipe.model.path,
        teacher=teacher_size(run),
        student={"parameters": student.parameters, "bytes": student.bytes, "blocks": student.blocks},
        plan=_made(run.plan),
        analysis=_made(run.analysis),
        distilled=run.edits,
        verdict=run.verdict,
        exports=run.exports,
        benchmark=run.benchmark,
        stages=run.store.stages,
        versions=versions(),
        bank=bank_of(run),
    )
    with measured("report") as cost:
        written = report_pass.write_report(inputs)
    # The JSON once more, with the report's own cost, now that it is known.
    run.report = report_pass.write_json(replace(inputs, stages=[*run.store.stages, *cost]))
    for note in written["warnings"]:
        run.display.say(note)


def teacher_size(run: Run) -> dict[str, int]:
    """Parameters, bytes and blocks of the teacher."""
    return {
        "parameters": count_parameters(run.teacher),
        "bytes": sum(f.stat().st_size for f in run.source.weight_files()),
        "blocks": run.source.family.num_blocks(run.source.config),
    }


def bank_of(run: Run) -> dict[str, Path]:
    """Folder by key of every distilled edit that a run's recipe holds."""
    settings, ridge = run.recipe.distill, run.recipe.analyze.ridge
    return held_edits(run.store, _made(run.analysis), _made(run.stats), ridge, settings, _samples(run, "train").identity, _base(run))


def _machine(source: Source) -> dict[str, Any]:
    return {"machine": platform.machine(), "processor": platform.processor(), "cores": os.cpu_count(), "threads": set_threads(source)}


def versions() -> dict[str, str]:
    """Versions of Python and of every library that has a say in the result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _made(value: Any) -> Any:
    assert value is not None, "a pass ran before the one that it reads"
    return value
