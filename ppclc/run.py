"""One compilation: what it is made from, what has been made so far, and how it is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ppclc.analysis.budget import TargetSettings, budget_of, check_by_hand, check_target, even_plan
from ppclc.analysis.search import AnalyzeSettings
from ppclc.data.cache import FEW, Cache
from ppclc.data.encoding import Unencoded, cached, find_data
from ppclc.data.samples import Samples, open_samples
from ppclc.errors import OutputError, RecipeError
from ppclc.judges import open_judges
from ppclc.loading.classes import model_outline
from ppclc.loading.sources import Source, check_teacher, open_source
from ppclc.machine.devices import Ranks, give_back
from ppclc.models import check_headers, load_source, set_threads
from ppclc.passes import export as export_pass
from ppclc.passes import verify as verify_pass
from ppclc.passes.bench import check_providers, check_size, device_of
from ppclc.plan import CompressionPlan
from ppclc.publishing.pipelines import components, pipeline_of
from ppclc.recipe import Recipe
from ppclc.records import (
    Analysis,
    Benchmark,
    CalibrationStats,
    Distilled,
    Export,
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
from ppclc.room import analysis_here, check_finetune, check_resident
from ppclc.screens.display import Display
from ppclc.slicing import check_weights
from ppclc.teachers import ResidentTeacher, StreamedTeacher, Teacher
from ppclc.training.trainer import check_optimizer


@dataclass
class Run:
    """One compilation: recipe, output folder, store, and what has been made so far; `ranks` are the processes that share it.

    failed: what the report is without. lacked: whether that is for want of something on this machine.
    """

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
    failed: list[str] = field(default_factory=list)
    lacked: bool = False
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
        """The teacher as passes up to distillation run it, on the device that trains; a streamed one is never in memory as a whole."""
        if self.recipe.distill.teacher == "streamed":
            return StreamedTeacher(self.source, self.recipe.model.dtype, self.ranks.device)
        return ResidentTeacher(self.teacher.to(self.ranks.device), self.source.family)

    @cached_property
    def analysis_settings(self) -> AnalyzeSettings:
        """Section `analyze` as teacher and device allow it."""
        return analysis_here(self.recipe, self.source, self.ranks.device)

    @property
    def is_finetuned(self) -> bool:
        """Whether a fine-tune has been done in this folder: one that goes on, perhaps on fewer devices, may have nothing left to train."""
        return finetuned(self.out)

    def write_recipe(self) -> None:
        """`recipe.yaml`, with every default filled in: what the folder's plan was made by."""
        write_text(self.out / "recipe.yaml", self.recipe.to_yaml())

    def part(self) -> None:
        """Leave the other ranks, and bring the teacher back from the device: what follows is for one process, and most of it on the CPU."""
        self.ranks = self.store.ranks = self.ranks.leave()
        if "teacher" in self.__dict__:
            self.teacher.to("cpu")
        self.__dict__.pop("by_blocks", None)
        give_back()

    @property
    def called(self) -> Any:
        """What can be called as the teacher is."""
        return self.by_blocks if self.recipe.distill.teacher == "streamed" else self.teacher

    @property
    def base(self) -> Record:
        """The root of all digests: the teacher and its dtype."""
        return Record(digest=digest_of([self.source.digest(), self.recipe.model.dtype]))

    def samples(self, split: str) -> Samples:
        """A split of the calibration samples; with the first one, `choose`, what is weak about them is said."""
        samples = open_samples(self.recipe.calibrate.source, self.source, self.called, split, self.cache)
        if samples.cache and samples.cache.shares_rows and split == "choose":
            self.display.say(
                f"warning: {samples.cache.rows} samples are too few to be kept apart (wanted {FEW}): calibration, training and judging share all of them"
            )
        if samples.kind == "noise" and split == "choose" and not self.store.frozen:
            self.display.say(
                "warning: calibrating on random embeddings and latents; what is measured on them says little about real prompts"
            )
        return samples


def prepare(recipe: Recipe, name: str, out: Path, display: Display, ranks: Ranks, passes: Sequence[str]) -> Run:
    """Check all that can be checked before work begins, load the teacher, claim the output folder. passes: those that are to be run."""
    planned = "analyze" in passes
    source = open_source(*recipe.model.place)
    for target in recipe.export:
        export_pass.check_backend(target.backend, target.dtype, target.options)
        export_pass.check_float16(source.family, target.dtype, target.force)
    check_teacher(source)
    check_late_settings(recipe, source)
    if "bench" in passes:
        device_of(recipe.bench)
    if not finetuned(out):
        check_resident(recipe, source, ranks.device)
    if (root := pipeline_of(source)) is not None:
        components(root)  # one that no student can be made whole by is refused before work begins
    set_threads(source)
    verify_pass.check_gates(recipe.verify, source)
    if recipe.verify.judges_by_name:
        open_judges(recipe.verify.judges_by_name)  # one that is asked for and not at hand is told before work begins
    budget = budget_of(source, recipe.target, recipe.model.dtype)
    wanted = recipe.calibrate
    found = find_data(wanted.source, wanted.path, wanted.resolution, source)
    check_writable(out)
    mark = check_mark(out, source, "give another folder with -o")
    check_by_hand(source, recipe.plan, recipe.calibrate.longest)
    if planned:
        check_target(recipe.plan, budget)
    check_headers(source)  # before anything is encoded
    if isinstance(found, Unencoded) and not found.folder(out / "records", recipe.model.dtype).is_dir():
        check_weights(source)  # so are values that are none: reading a model takes less than encoding for it
    # Before the teacher is there: both may not fit in memory.
    cache, encoding = cached_samples(found, out / "records", recipe.model.dtype, display, ranks.device)
    run = Run(recipe, name, out, display, source, cache, ranks)
    for note in source.notes if ranks.is_main else ():
        display.say(note)
    check_optimizer(recipe.distill)
    if recipe.analyze.learns and recipe.target.is_given and not run.analysis_settings.learns and ranks.is_main:
        what = "a streamed teacher is not trained" if recipe.distill.teacher == "streamed" else "there is no memory to train whole models"
        display.say(f"warning: {what}: no supernet and no trials, the plan is chosen by untrained costs alone")
    if planned and recipe.plan.is_fixed and not run.is_finetuned:
        check_finetune(recipe, source, even_plan(source, TargetSettings(), recipe.plan, recipe.model.dtype), ranks)
    _ = run.called  # weights that are not whole are refused before anything is written
    run.store.stages += encoding
    if not mark.is_file():
        write_text(mark, f"{source.digest()} {recipe.model.path}\n")
    if ranks.is_main and not (out / "recipe.yaml").is_file():  # an earlier run's stays until this one has a plan
        run.write_recipe()
    return run


def finetuned(out: Path) -> bool:
    """Whether a fine-tune has been done in a run's folder."""
    return any((out / "records").glob("finetune-*"))


def check_late_settings(recipe: Recipe, source: Source) -> None:
    """Raise RecipeError for what an export or a bench would refuse when all before it is done, whatever the machine."""
    for target in recipe.export:
        export_pass.named_backend(target.backend, target.dtype, target.options)
        if "sizes" in target.options:
            export_pass.check_sizes(source.family.lowered(model_outline(source.family, source.config)), target.options)
    check_size(recipe.bench, source.family, source.config)
    check_providers(recipe.bench, [target.backend for target in recipe.export])


def check_mark(out: Path, source: Source, way_out: str) -> Path:
    """The file that says whose work a folder holds. Raises OutputError when that is another teacher's."""
    mark = out / "records" / "teacher"
    if mark.is_file() and mark.read_text("utf-8").split()[:1] != [source.digest()]:
        raise OutputError(f"{out}: holds the work of another teacher, {mark.read_text('utf-8').split(maxsplit=1)[-1].strip()}; {way_out}")
    if not mark.is_file() and any((out / name).is_file() for name in ("config.json", "model_index.json", "transformer/config.json")):
        raise OutputError(f"{out}: holds a model; {way_out}")
    return mark


def cached_samples(
    found: Cache | Unencoded | None, records: Path, dtype: str, display: Display, device: str = "cpu"
) -> tuple[Cache | None, list[Stage]]:
    """The user's samples, and what encoding them took, which counts as calibration, when they are not there yet."""
    if not isinstance(found, Unencoded) or found.folder(records, dtype).is_dir():
        return cached(found, records, dtype, display.say), []
    with measured("calibrate") as cost:
        cache = cached(found, records, dtype, display.say, device)
    return cache, cost


def made(value: Any) -> Any:
    """What a pass has made; a mistake of ours where it has not run yet."""
    assert value is not None, "a pass ran before the one that it reads"
    return value


def newest_out() -> Path:
    """The output folder below `out/` whose student was made last. Raises RecipeError when there is none."""
    found = [p.parents[2] for p in Path("out").glob("*/model/transformer/config.json")]
    if not found:
        raise RecipeError("no student below out/ yet; give a MODEL, or run first: ppclc compress two_digits")
    return max(found, key=lambda f: (f / "model" / "transformer").stat().st_mtime)  # the folder above changes with its card
