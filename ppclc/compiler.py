"""The driver: the passes in their order, each with what its record is keyed by."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ppclc import kernels
from ppclc.analysis.closed_forms import check_calibrated, check_reach
from ppclc.analysis.reach import reach_of
from ppclc.analysis.search import AnalyzeSettings, Lessons
from ppclc.artefacts.receipts import RECORD, is_intact, read_export
from ppclc.bank import joined, needed
from ppclc.data.encoding import Unencoded, cached, decoder, find_data
from ppclc.distilling import bank_of, distill
from ppclc.environment import machine, versions
from ppclc.errors import OutputError, PlanError, RecipeError, UnavailableError, VerificationError, memory_lacks
from ppclc.families import Lowered
from ppclc.forecast.disk import disk_lacks
from ppclc.judges import open_judges
from ppclc.loading.classes import count_parameters, model_outline, student_config
from ppclc.loading.sources import Source, check_teacher, open_source
from ppclc.machine.devices import Ranks, alone_here, give_back
from ppclc.machine.interrupts import raise_if_stopped
from ppclc.machine.locks import alone_in
from ppclc.models import load_model, load_source, quiet_libraries, set_threads
from ppclc.passes import analyze as analyze_pass
from ppclc.passes import bench as bench_pass
from ppclc.passes import calibrate as calibrate_pass
from ppclc.passes import export as export_pass
from ppclc.passes import report as report_pass
from ppclc.passes import slice as slice_pass
from ppclc.passes import verify as verify_pass
from ppclc.plan import CompressionPlan
from ppclc.publishing.cards import Card, write_card
from ppclc.publishing.pipelines import surround
from ppclc.recipe import ExportTarget, Recipe
from ppclc.records import Analysis, Benchmark, CalibrationStats, Export, Measured, Record, Student, Verdict, measured, write_text
from ppclc.room import check_finetune, memory_told
from ppclc.run import Run, check_mark, made, prepare
from ppclc.screens.display import Display

SCALE_BATCHES, SCALE_BATCH = 8, 8
"""Of the run's samples, on which float8 finds its scales."""
PASSES = ("calibrate", "analyze", "distill", "slice", "verify", "export", "bench", "report")


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
    kernels.check(recipe.kernels)
    ranks = ranks or Ranks()
    with alone_in(out) if ranks.is_main else nullcontext():
        return _compress(recipe, name, out, display, until, ranks)


def _compress(recipe: Recipe, name: str, out: Path, display: Display, until: str, ranks: Ranks) -> Run:
    with ranks.main_first(), memory_told("start", recipe):
        run = prepare(recipe, name, out, display, ranks, PASSES[: PASSES.index(until) + 1])
        if ranks.is_main and PASSES.index(until) >= PASSES.index("distill") and not (out / "model").is_dir():
            tell_of_disk(run)
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
    with kernels.switched(recipe.kernels):
        for step in PASSES[: display.stages]:
            raise_if_stopped()
            if step == "slice":
                run.part()
                if not ranks.is_main:
                    break
            with memory_told(step, recipe), display.stage(step) as progress:
                steps[step](run, progress)
            if run.ranks.device != "cpu":
                give_back()  # libraries make their own work space of what PyTorch does not keep
    if run.student is not None:
        describe(run)
    return run


def tell_of_disk(run: Run) -> None:
    """A warning where the disk will be full before the student is there."""
    if lacking := disk_lacks(run.recipe, run.source, run.out):
        run.display.say(f"warning: {lacking}: the run stops when that is full, and the same command goes on once there is room")


def go_on(out: Path) -> str:
    """How a run is gone on with."""
    return f"go on with: ppclc compress {shlex.quote(str(out / 'recipe.yaml'))} -o {shlex.quote(str(out))}"


def reopen(recipe: Recipe, name: str, out: Path, display: Display) -> Run:
    """A run of `compress` as it stands: its teacher, moments and analysis, nothing made and nothing written; its store is frozen.

    Raises:
        OutputError: the folder holds the work of another teacher, or a run that has not come as far as its analysis.
    """
    again = go_on(out)
    quiet_libraries()
    source = open_source(*recipe.model.place)
    check_teacher(source)
    set_threads(source)
    check_mark(out, source, "the teacher has changed since; put it back, or compress it anew into another folder")
    wanted = recipe.calibrate
    found = find_data(wanted.source, wanted.path, wanted.resolution, source)
    if isinstance(found, Unencoded) and not found.folder(out / "records", recipe.model.dtype).is_dir():
        raise OutputError(f"{out}: the run is not finished, its samples are not encoded; {again}")
    cache = cached(found, out / "records", recipe.model.dtype, display.say)
    run = Run(recipe, name, out, display, source, cache, alone_here())
    run.store.frozen = True
    try:
        calibrate(run, lambda *_: None)
        choose(run, lambda *_: None)
    except OutputError as error:
        raise OutputError(f"{out}: the run is not finished, or was made by another version of ppclc ({error}); {again}") from None
    return run


def reported(recipe: Recipe, name: str, out: Path, display: Display) -> Run:
    """A finished run with its report written anew, from its records alone.

    Raises:
        OutputError: as `reopen`, and a run that is not finished.
    """
    run = reopen(recipe, name, out, display)
    run.store.stages.clear()  # told again, each once
    steps = (calibrate, analyze, distill, slice_student, verify, export)  # an export that failed leaves the rest to be told
    try:
        for step in steps:
            step(run, lambda *_: None)
        run.part()
        bench(run, lambda *_: None)
    except OutputError as error:
        if run.student is None or run.verdict is None:
            again = go_on(out)
            raise OutputError(f"{out}: the run is not finished ({error}); {again}") from None
        display.say("warning: measured on another machine, or not at all: the report has no latencies; ppclc bench measures here")
    report(run, lambda *_: None)
    describe(run)
    return run


def calibrate(run: Run, progress: Callable[[float, str], None]) -> None:
    """Moments of the teacher's states."""
    recipe, samples = run.recipe, run.samples("choose")
    settings, targeted = recipe.calibrate, recipe.target.is_given
    reach = reach_of(run.source.family, run.source.config, recipe.plan, targeted, recipe.analyze.reading)
    run.stats = run.store.make(
        CalibrationStats,
        "calibrate",
        calibrate_pass.VERSION,
        settings.moments() | {"source": samples.identity} | ({"reach": reach.identity} if reach.identity else {}),
        (run.base,),
        lambda work: calibrate_pass.calibrate(run.by_blocks, samples, settings, progress, work, reach),
    )


def analyze(run: Run, progress: Callable[[float, str], None]) -> None:
    """Probes, candidates and the plan; a plan.json that a person has edited goes first."""
    choose(run, progress)
    with run.ranks.main_first():
        run.plan = _edited_plan(run, made(run.analysis).plan)
        student_config(run.source.family, run.source.config, run.plan)
        check_reach(run.plan, made(run.stats).longest)
        check_calibrated(run.plan, made(run.stats))
        if not (run.store.frozen or run.is_finetuned):
            check_finetune(run.recipe, run.source, run.plan, run.ranks)
        if run.ranks.is_main and not run.store.frozen:
            run.write_recipe()


def choose(run: Run, progress: Callable[[float, str], None]) -> None:
    """Probes, candidates, and the plan that meets the target."""
    settings = run.analysis_settings
    try:
        run.analysis = _chosen(run, settings, progress)
    except OutputError:
        # One that is read again may be of a machine with room for more, or for less.
        if not run.store.frozen:
            raise
        run.analysis = _chosen(run, run.recipe.analysis if settings != run.recipe.analysis else settings.untrained(), progress)


def _chosen(run: Run, settings: AnalyzeSettings, progress: Callable[[float, str], None]) -> Analysis:
    recipe, stats = run.recipe, made(run.stats)
    sections = (settings, recipe.target, recipe.plan)
    lessons = Lessons(recipe.distill.batch, recipe.distill.finetune_learning_rate)
    return run.store.make(
        Analysis,
        "analyze",
        analyze_pass.VERSION,
        [*(s.model_dump() for s in sections), *([asdict(lessons)] if settings.learns else [])],
        (stats,),
        lambda work: analyze_pass.analyze(
            run.by_blocks, run.source, stats, run.samples("train"), *sections, recipe.model.dtype, progress, lessons, work
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
    if run.store.frozen:
        return plan
    for file in (path, ours):  # the user's first: a run that is killed in between must not take an older plan for an edit
        if not file.is_file() or file.read_text("utf-8") != plan.to_json():
            write_text(file, plan.to_json())
    return plan


def slice_student(run: Run, progress: Callable[[float, str], None]) -> None:
    """The student's folder, `OUT/model`."""
    plan, stats, folder, dtype = made(run.plan), made(run.stats), run.out / "model", run.recipe.model.dtype
    *edits, trained = run.edits

    def build(_: Path) -> Student:
        bank = {} if trained.tensors else joined(stats, run.recipe.analyze.ridge, plan, run.source.family, edits)
        return slice_pass.slice_student(run.source, dtype, plan, bank, trained.tensors, folder)

    run.student = run.store.make(
        Student,
        "slice",
        slice_pass.VERSION,
        plan.model_dump(),
        (trained,),
        build,
        valid=lambda student: slice_pass.is_intact(student, folder),
    )
    if not run.store.frozen:
        for note in surround(run.source, folder):
            run.display.say(note)


def describe(run: Run) -> None:
    """The student's model card and the recipe beside it, with all that is known of it so far, where its folder is still there."""
    plan, student, folder = made(run.plan), made(run.student), run.out / "model"
    if not (folder / "transformer" / "config.json").is_file():
        return
    sizes = student.model_dump(include={"parameters", "bytes", "blocks"})
    card = Card(run.source, plan, teacher_size(run), sizes, run.recipe.model.dtype, verdict=run.verdict, recipe=True)
    write_card(card, folder, run.recipe.to_yaml())


def verify(run: Run, progress: Callable[[float, str], None]) -> None:
    """Both models judged, then compared."""
    settings, student = run.recipe.verify, made(run.student)
    model = load_model(run.out / "model", run.recipe.model.dtype)
    outcomes: list[Measured] = []
    for i, (label, subject, root) in enumerate((("teacher", run.called, run.base), ("student", model, student))):

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
        lambda _: _verdict(run, model, (outcomes[0], outcomes[1])),
        # Judges that were not at hand may be by now.
        valid=lambda verdict: not verdict.notes or open_judges(settings.judges_by_name)[1] == verdict.notes,
    )
    for note in run.verdict.notes:
        run.display.say(f"not judged by {note}")


def _verdict(run: Run, model: Any, outcomes: tuple[Measured, Measured]) -> Verdict:
    """The verdict on a student; of a user's own pipeline its VAE decodes what both models sample."""
    dtype, samples, device = run.recipe.model.dtype, run.samples("judge"), run.ranks.device
    with decoder(run.source, run.cache.grid, dtype, device) if run.cache else nullcontext() as decode:
        return verify_pass.verify(run.called, model, run.source, outcomes, samples, run.recipe.verify, decode, device)


def export(run: Run, progress: Callable[[float, str], None]) -> None:
    """Every target of the recipe for the student, and the teacher beside it as the baseline of `bench`; what cannot be written is noted in `failed`."""
    run.exports, run.teacher_exports, run.failed = [], [], []
    jobs = [(t, folder, role) for t, folder in zip(run.recipe.export, export_folders(run), strict=True) for role in ("student", "teacher")]
    for n, (target, folders, role) in enumerate(jobs):
        root: Record = made(run.student) if role == "student" else run.base
        source = open_source(str(run.out / "model")) if role == "student" else run.source
        folder = folders[role]
        try:
            record = run.store.make(
                Export,
                f"export-{target.backend}-{target.dtype}-{role}",
                export_pass.VERSION,
                target.model_dump(),
                (root,),
                partial(_export, run, source, target, folder, role),
                valid=partial(is_intact, folder=folder),
                stage="export",
            )
        except Exception as error:  # what has been trained is still to be judged, timed and told
            lacking = memory_lacks(error)
            if isinstance(error, OutputError) and run.store.frozen:
                run.failed.append(f"without an export: {folder} is not there, or of an earlier {role}")
            elif isinstance(error, VerificationError) or lacking:
                run.failed.append(f"export failed: {role}: {lacking or error}")
                run.lacked |= bool(lacking)
            else:
                raise
            continue
        (run.exports if role == "student" else run.teacher_exports).append(record)
        progress((n + 1) / len(jobs), f"{target.backend} {role}")


def export_folders(run: Run) -> list[dict[str, Path]]:
    """Where the student's artefact of every target goes, `export/<backend>` for the first of a back end, and its teacher's."""
    seen: set[str] = set()
    found = []
    for target in run.recipe.export:
        name = f"{target.backend}-{target.dtype}" if target.backend in seen else target.backend
        seen.add(target.backend)
        teacher = run.out / "records" / f"teacher-{target.backend}-{target.dtype}"
        found.append({"student": run.out / "export" / name, "teacher": teacher})
    return found


def _export(run: Run, source: Source, target: ExportTarget, folder: Path, role: str, _: Path) -> Export:
    same = target.dtype == run.recipe.model.dtype and role == "teacher"
    model = (lambda: run.teacher) if same else None
    return export_pass.export_source(
        source,
        target.backend,
        target.dtype,
        folder,
        options=target.options,
        force=target.force,
        model=model,
        calibration=partial(calibration_batches, run),
    )


def calibration_batches(run: Run, lowered: Lowered) -> Iterator[dict[str, Any]]:
    """Batches of the run's own samples as inputs of a lowered module; masked text counts with the rest, since the module has no mask for it."""
    family, samples = run.source.family, run.samples("train")
    generator = torch.Generator().manual_seed(run.recipe.calibrate.seed)
    wanted = lowered.inputs(**lowered.sizes[0])
    for _ in range(SCALE_BATCHES):
        x, timestep, known = samples.draw(SCALE_BATCH, generator)
        given = {"hidden_states": x, "timestep": timestep * family.timestep_scale, **known}
        if family.text_mask not in wanted:
            given.pop(family.text_mask, None)
        given |= family.exported_inputs(run.source.config, given)
        yield {name: given[name].to(wanted[name].dtype) for name in wanted}


def bench(run: Run, progress: Callable[[float, str], None]) -> None:
    """Teacher and student, eager and in every back end that runs here, interleaved in one run; what cannot be timed is noted in `failed`."""
    settings, dtype = run.recipe.bench, run.recipe.model.dtype

    def build(_: Path) -> Benchmark:
        family, student = run.source.family, open_source(str(run.out / "model"))
        models = {"teacher": (run.teacher, run.source), "student": (load_source(student, dtype), student)}
        subjects = [
            bench_pass.Benched(label, source.config, model, family.lowered(model), _written(run, label))
            for label, (model, source) in models.items()
        ]
        try:
            result, notes = bench_pass.bench_models(family, subjects, settings, dtype, progress)
        finally:
            run.teacher.to("cpu")  # what comes behind is done there, and a GPU's memory is wanted elsewhere
        for note in notes:
            run.display.say(note)
        return result

    try:
        with memory_told("bench", run.recipe):
            run.benchmark = run.store.make(
                Benchmark,
                "bench",
                bench_pass.VERSION,
                [settings.model_dump(), machine(run.source)],
                (made(run.student), *run.exports, *run.teacher_exports),
                build,
            )
    except UnavailableError as error:  # what has been trained and judged is still to be told
        run.benchmark, run.lacked = None, True
        run.failed.append(f"bench failed: {error}")


def _written(run: Run, label: str) -> list[Path]:
    """Where a model's exports lie, of those that could be written."""
    there = [export.files for export in (run.exports if label == "student" else run.teacher_exports)]
    folders = [f[label] for f in export_folders(run)]
    return [f for f in folders if (f / RECORD).is_file() and read_export(f).files in there]


def report(run: Run, progress: Callable[[float, str], None]) -> None:
    """`report.json` and `report.html`; written at every run, since it also says what that run reused."""
    student = made(run.student)
    inputs = report_pass.ReportInputs(
        out=run.out,
        recipe_name=run.name,
        recipe_text=run.recipe.to_yaml(),
        model_path=run.recipe.model.path,
        teacher=teacher_size(run),
        student={"parameters": student.parameters, "bytes": student.bytes, "blocks": student.blocks},
        plan=made(run.plan),
        analysis=made(run.analysis),
        distilled=run.edits,
        verdict=run.verdict,
        exports=run.exports,
        benchmark=run.benchmark,
        stages=run.store.stages,
        versions=versions(),
        bank=bank_of(run),
        own=needed(made(run.plan), run.source.family),
        plan_is_fixed=run.recipe.plan.is_fixed,
        judged=run.source.task is not None,
    )
    with measured("report") as cost:
        written = report_pass.write_report(inputs)
    # The JSON once more, with the report's own cost, now that it is known.
    run.report = report_pass.write_json(replace(inputs, stages=[*run.store.stages, *cost]))
    for note in written["warnings"]:
        run.display.say(note)


def teacher_size(run: Run) -> dict[str, int]:
    """Parameters, bytes and blocks of the teacher."""
    return size_of(run.source)


def size_of(source: Source) -> dict[str, int]:
    """Parameters, bytes and blocks of a model."""
    return {
        "parameters": count_parameters(model_outline(source.family, source.config)),
        "bytes": sum(f.stat().st_size for f in source.weight_files()),
        "blocks": source.family.num_blocks(source.config),
    }
