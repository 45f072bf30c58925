"""What each command does, between the command line and the driver."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ppclc import compiler, kernels, sizes
from ppclc.analysis.budget import budget_of, check_by_hand, check_target, even_plan
from ppclc.artefacts.receipts import RECORD, model_digest_of, read_export
from ppclc.bench_subjects import asked_for, random_models, subjects_of
from ppclc.benching.files import markdown, write_bench
from ppclc.costs import blocks as block_costs
from ppclc.costs.predictions import predict
from ppclc.data.encoding import check_data
from ppclc.environment import accelerator, machine, versions
from ppclc.errors import OutputError, PpclcError, RecipeError
from ppclc.forecast.runs import run_costs
from ppclc.loading.classes import count_parameters, model_outline
from ppclc.loading.published import open_outline
from ppclc.loading.sources import BUILTIN, STUDENT, Source, check_teacher, open_source, run_at
from ppclc.loras.remap import remap
from ppclc.lowering import gpu
from ppclc.machine.devices import launcher_warning, open_ranks
from ppclc.models import load_source, quiet_libraries, require_library, set_threads
from ppclc.passes import export as export_pass
from ppclc.passes import report as report_pass
from ppclc.passes import verify as verify_pass
from ppclc.passes.bench import bench_models, check_providers, check_size, device_of
from ppclc.plan import CompressionPlan
from ppclc.recipe import Recipe, bench_settings, export_options, find_recipe, read_recipe
from ppclc.records import Benchmark, check_writable, write_text
from ppclc.run import check_late_settings, newest_out
from ppclc.screens.display import Display
from ppclc.screens.drawing import plan_drawing
from ppclc.slicing import check_weights

HEAD = ("teacher", "student", "plan", "gates")
"""What `compress` and `slice` print of a report."""
BLOCK_RUNS = 30
"""Most timed forwards of each model that tells what blocks cost."""

STARTER = """\
# Made by `ppclc init`. Every key has a default but model.path; `ppclc compress` writes them all to OUT/recipe.yaml.
model:
  {place}
  dtype: float32

calibrate:
  source: auto            # {data}
  samples: 2048

target:
  parameters: 0.5         # at most this share of the parameters remains (or a number of them)

plan:                     # auto, none, or a list by hand
  intervals: auto         # e.g. [[3, 4], [5, 7]]: teacher blocks, both ends inclusive
  text_stream: auto       # e.g. [9, 10, 11]
  ffn: auto               # e.g. [{{block: 3, stream: image}}]: feed-forward networks that become linear maps
  modulation_rank: auto   # or a number
  adapters: none          # linear maps before the blocks that stand for intervals; auto: all of them
  protect: []             # blocks that must stay as they are

distill:
  steps: 150              # local steps an interval
  finetune_steps: 800     # joint steps on the teacher's velocity

verify:
  scenes: 1024
  seeds: [0, 1]

export:
  - {{backend: onnx, dtype: float32}}
"""


TASK_DATA = "the task's own images"
USER_DATA = "images | prompts | cached | noise; auto: by what lies at path, your data, and without one noise"


def init(model: str, out: Path, revision: str | None = None, variant: str | None = None) -> str:
    """Write a starter recipe; says where. Raises OutputError rather than overwrite a file."""
    source = open_source(model, revision, variant)
    if out.exists():
        raise OutputError(f"{out}: is there already; give another file with -o")
    place = {"path": model, "revision": revision, "variant": variant}
    lines = "\n  ".join(f"{key}: {json.dumps(value)}" for key, value in place.items() if value is not None)
    write_text(out, STARTER.format(place=lines, data=TASK_DATA if source.task else USER_DATA))
    return f"wrote {out}; next: ppclc compress {out}"


def inspect(model: str, check: bool, revision: str | None = None, variant: str | None = None) -> dict[str, Any]:
    """Family, blocks, parameters and bytes of a model, from its configuration; `check` loads the weights too."""
    quiet_libraries()
    source = open_source(model, revision, variant)
    empty = model_outline(source.family, source.config)
    parts: dict[str, int] = {}
    for name, parameter in empty.named_parameters():
        parts[_part(name, source)] = parts.get(_part(name, source), 0) + parameter.numel()
    document: dict[str, Any] = {
        "model": source.path,
        "family": source.family.name,
        "class": source.config.get("_class_name"),
        "blocks": source.family.num_blocks(source.config),
        "groups": {g.name: source.config[g.count_key] for g in source.family.groups},
        "parameters": count_parameters(empty),
        "bytes": sum(f.stat().st_size for f in source.weight_files()),
        "parameters_by_part": dict(sorted(parts.items(), key=lambda p: -p[1])),
    }
    if source.notes:
        document["notes"] = list(source.notes)
    if check:
        check_weights(source)
        listed = (source.folder / "plan.json").is_file()
        document["checked"] = "every tensor is there, of the right shape, and finite" + ("; files are those of plan.json" if listed else "")
    return document


def _part(name: str, source: Source) -> str:
    """A parameter's part, the same for every block: `transformer_blocks.*.attn`."""
    for group in source.family.groups:
        if name.startswith(group.path + "."):
            return f"{group.path}.*.{name.removeprefix(group.path + '.').split('.')[1]}"
    return name.split(".")[0]


def plan(recipe_name: str, changes: list[str], out: Path | None) -> dict[str, Any]:
    """What a recipe cuts, and what that costs: the plan of its analysis where OUT holds one, else one spaced evenly.

    Needs a configuration and no weights. Raises PlanError for a plan that the model cannot take.
    """
    quiet_libraries()
    path = find_recipe(recipe_name)
    recipe = read_recipe(path, changes)
    source = open_outline(*recipe.model.place)
    check_teacher(source)
    set_threads(source)
    family, config, dtype = source.family, source.config, recipe.model.dtype
    verify_pass.check_gates(recipe.verify, source)
    check_late_settings(recipe, source)
    check_data(recipe.calibrate.source, recipe.calibrate.path, recipe.calibrate.resolution, source)
    check_by_hand(source, recipe.plan, recipe.calibrate.longest)
    check_target(recipe.plan, budget_of(source, recipe.target, dtype))
    found = _analysed_plan(out or default_out(path), recipe)
    cut = found or even_plan(source, recipe.target, recipe.plan, dtype)
    costs = block_costs.read(family, config, dtype)
    whole = CompressionPlan.of(family.name, family.num_blocks(config))
    teacher, student = (predict(family, config, p, dtype, costs) for p in (whole, cut))
    return {
        "teacher": teacher.model_dump(),
        "student": student.model_dump(),
        "plan": cut.model_dump(mode="json"),
        "basis": "analysis" if found else "config",
        "run": run_costs(recipe, source, cut, teacher, student).model_dump(),
    }


def leaves_free(recipe_name: str, changes: list[str]) -> bool:
    """Whether a recipe leaves something of its plan to the analysis."""
    return not read_recipe(find_recipe(recipe_name), changes).plan.is_fixed


def print_plan(document: dict[str, Any], free: bool) -> None:
    """A drawing of the teacher's blocks, and teacher and student side by side, on standard output. free: as `leaves_free` says."""
    console = Console(highlight=False)
    for part in plan_drawing(document, console.width):
        console.print(part)
    if free and document["basis"] == "config":
        console.print(
            "\nWhat the recipe leaves free is spaced evenly here, before any analysis; exact after: ppclc compress RECIPE --until analyze"
        )


def _analysed_plan(out: Path, recipe: Recipe) -> CompressionPlan | None:
    """The plan of the analysis in OUT that this recipe would reuse, if there is one."""
    plan_file, stored = out / "plan.json", out / "recipe.yaml"
    if not (plan_file.is_file() and stored.is_file()):
        return None
    earlier = read_recipe(stored)
    same = all(getattr(earlier, s) == getattr(recipe, s) for s in ("model", "calibrate", "analyze", "target", "plan"))
    return CompressionPlan.read(plan_file) if same else None


def default_out(recipe: Path) -> Path:
    """`out/<recipe's stem>`."""
    return Path("out") / recipe.stem


def compress(recipe_name: str, changes: list[str], out: Path | None, until: str, verbosity: int) -> tuple[int, dict[str, Any] | None]:
    """Run the passes; the exit code, and the report's head, None on ranks that have nothing to say.

    The code is 1 where a gate failed, else 3 where this machine lacked what an export or the bench takes, else 1 where an export failed.
    """
    path = find_recipe(recipe_name)
    recipe = read_recipe(path, changes)
    folder = out or default_out(path)
    ranks = open_ranks()
    display = Display(len(compiler.PASSES), verbosity if ranks.is_main else -1)
    if warning := launcher_warning():
        display.say(warning)
    run = compiler.compress(recipe, path.name, folder, display, until, ranks)
    if not ranks.is_main:
        return 0, None
    document: dict[str, Any] = {}
    if run.plan is not None:
        document["plan"] = run.plan.model_dump(mode="json")
    gates = run.verdict.gates if run.verdict else []
    if run.report:
        document = {k: run.report[k] for k in HEAD}
        for line in summary(run.report, folder):
            display.say(line)
    elif run.plan is not None:
        display.say(f"stopped after {until}, as asked; plan: {folder / 'plan.json'}")
        student = folder / "model" / "transformer" / "plan.json"
        if student.is_file() and CompressionPlan.read(student) != run.plan:
            display.say(f"{folder / 'model'} is still the student of an earlier plan; {compiler.go_on(folder)}")
    for gate in gates:
        if not gate.passed:
            display.say(f"gate failed: {gate.name} = {gate.value:.2f}, limit {gate.limit:g}")
    for failed in run.failed:
        display.say(failed)
    if any(not gate.passed for gate in gates):
        return 1, document
    return 3 if run.lacked else int(bool(run.failed)), document


def slice_size(
    where: str,
    parameters: float | None,
    plan_file: Path | None,
    folder: Path | None,
    changes: list[str],
    verbosity: int,
    single_file: bool = False,
    revision: str | None = None,
    variant: str | None = None,
) -> dict[str, Any]:
    """Cut another size from a finished run, or a model by a plan; the head of what a report would say. Raises as `ppclc.sizes` does."""
    if sizes.is_model(where, parameters, plan_file):
        if plan_file is not None and (parameters is not None or changes):
            what = "--parameters" if parameters is not None else "--set"
            raise RecipeError(
                f"ppclc slice {where}: {what}: a model is cut by its plan alone, without training; wanted --plan and -o, or a run's folder"
            )
        document = sizes.slice_model((where, revision, variant), plan_file, folder, verbosity, single_file)
    elif revision is not None or variant is not None:
        raise RecipeError(f"{where}: a run has no revisions and no variants; wanted its recipe's own, or a model")
    else:
        document = sizes.slice_size(Path(where), parameters, plan_file, folder, changes, verbosity, single_file)
    return {k: document[k] for k in HEAD}


def summary(report: dict[str, Any], out: Path) -> list[str]:
    """What a person wants to know first, a line each."""
    teacher, student = report["teacher"], report["student"]
    gone = 100 * (1 - student["parameters"] / teacher["parameters"])
    lines = [
        "",
        f"parameters  {teacher['parameters']:,} -> {student['parameters']:,} ({gone:.1f} % removed), blocks {teacher['blocks']} -> {student['blocks']}",
    ]
    for name, row in report["quality"].items():
        drop, ends = row["drop_percent"], row["ci95"] or ()
        way, sign = ("worse", 1) if drop >= 0 else ("better", -1)
        if row["unit"].startswith("dB"):  # of which the teacher has as many as are told at most, being compared with itself
            lines.append(f"{name}  {row['student']:.4g} dB from the teacher's images (n = {row['n']})")
            continue
        change = f"{way} by {abs(drop):.2f} %" if row["teacher"] else f"{drop:.2f} % {row['unit'].removeprefix('share ')}"
        low, high = sorted(sign * end for end in ends) if ends else (0.0, 0.0)
        interval = f", 95 % interval {low:.2f} to {high:.2f}" if ends else ""
        lines.append(f"{name}  {row['teacher']:.4g} -> {row['student']:.4g} ({change}{interval}; n = {row['n']})")
    for row in report["exports"]:
        measure = ("largest difference", "max_abs") if row["dtype"] == "float32" else ("relative L2 difference", "rel_l2")
        parity = f", {measure[0]} from eager {row['parity'][measure[1]]:.1e}" if row["parity"] else ", not run here"
        lines.append(f"{row['backend']} {row['dtype']}  {row['bytes'] / 1e6:.1f} MB{parity}")
    for row in report["bench"]:
        if row["target"] == "student" and row["speedup"]:
            low, high = row["speedup_ci95"] or (None, None)
            interval = f", 95 % interval {low:.2f} to {high:.2f}" if low is not None else ""
            place = f"{row['backend']}{', CUDA graph' * row['cuda_graph']}"
            lines.append(f"{place}  p50 {row['p50_ms']:.2f} ms, {row['speedup']:.2f} times the teacher's speed{interval}")
    noisy = [row for row in report["bench"] if row["noise"]]
    lines += [f"noisy run: {row['target']} in {row['backend']}: {row['noise']}" for row in noisy]
    return [*lines, f"report: {out / 'report.html'}"]


def export(
    model: str | None,
    backend: str,
    out: Path | None,
    dtype: str,
    verbosity: int,
    changes: list[str],
    force: bool = False,
    revision: str | None = None,
    variant: str | None = None,
) -> dict[str, Any]:
    """Lower a model; the entry of `exports`. changes: options of the back end, as `export.opset=20`."""
    quiet_libraries()
    options = export_options(changes)
    export_pass.check_backend(backend, dtype, options)
    own = {name: value for name, value in options.items() if name not in export_pass.OWN_OPTIONS}
    run = newest_out() if model is None else run_at(model)
    source = open_source(str(run / STUDENT if run else model), revision, variant)
    export_pass.check_float16(source.family, dtype, force)
    set_threads(source)
    display = Display(1, verbosity)
    folder = out or _free_folder((run / "export" if run else _own_home(str(model), source, display)) / backend, dtype)
    for note in source.notes:
        display.say(note)
    if record := export_pass.kept_export(folder, source.digest(), backend, dtype, own):
        display.say(f"{folder} holds this export already; nothing to do")
        return report_pass.export_json(record)
    with display.stage(f"export {source.path} to {backend}") as progress:
        record = export_pass.export_source(source, backend, dtype, folder, progress, options, force)
    for line in export_pass.told(record):
        display.say(line)
    display.say(f"wrote {folder}")
    return report_pass.export_json(record)


def _own_home(model: str, source: Source, display: Display) -> Path:
    """Where a model's exports lie, or a folder with its digest behind the name where those of another lie, which are not replaced unasked."""
    home, digest = Path("export") / Path(model.removeprefix(BUILTIN)).absolute().name, source.digest()
    others = [receipt.parent for receipt in sorted(home.glob(f"*/{RECORD}")) if _digest_at(receipt.parent) - {digest}]
    if not others:
        return home
    own = home.with_name(f"{home.name}-{digest[:8]}")
    display.say(f"{others[0]} is of another model, and stays; this one goes to {own}")
    return own


def _digest_at(folder: Path) -> set[str]:
    try:
        return {model_digest_of(folder)}
    except OutputError:  # damaged, and made again
        return set()


def _free_folder(folder: Path, dtype: str) -> Path:
    """A back end's folder, or one with the dtype behind its name where an export in another dtype lies there."""
    try:
        other = (folder / RECORD).is_file() and read_export(folder).dtype != dtype
    except OutputError:  # damaged, and made again
        other = False
    return folder.with_name(f"{folder.name}-{dtype}") if other else folder


def bench(
    targets: list[str],
    against: str | None,
    random_weights: str | None,
    dtype: str | None,
    changes: list[str],
    out: Path | None,
    verbosity: int,
) -> list[dict[str, Any]]:
    """Measure; the list `bench`. Without targets, the newest student against its own teacher, with its exports.

    A target is a model folder or that of an export. random_weights: a configuration, a published model's name, or a recipe, whose teacher and student by
    hand-made edits, or evenly spaced ones, are timed beside each other. What a block of each teacher costs is measured beside it, and kept for
    `ppclc plan` and `target.latency_ms`. out: a folder for the result as JSON, Markdown and a picture.
    """
    quiet_libraries()
    settings = bench_settings(changes)
    if out is not None:
        check_writable(out)
        require_library("matplotlib", "report")
    device = device_of(settings)
    if settings.kernels:
        kernels.check(settings.kernels)
    asked = asked_for(targets, against, random_weights, dtype)
    check_providers(settings, [read_export(folder).backend for folders in asked.exports.values() for folder in folders])
    first = next(iter(asked.sources.values()))
    check_size(settings, first.family, first.config)
    set_threads(first)
    models = {label: load_source(source, asked.dtype) for label, source in asked.whole.items()}
    display = Display(2, verbosity)
    for note in [*asked.notes, *(note for source in asked.sources.values() for note in source.notes)]:
        display.say(note)
    with display.stage("block costs") as progress:
        for source in asked.teachers:
            costs = block_costs.measure(
                source.family, source.config, asked.dtype, device, runs=min(settings.runs, BLOCK_RUNS), progress=progress
            )
            display.say(f"kept what a block of {source.path} costs here: {block_costs.keep(costs)}")
    models |= random_models(asked, device)
    with display.stage("bench") as progress:
        result, notes = bench_models(asked.family, subjects_of(asked, models), settings, asked.dtype, progress)
    for note in [*notes, *(f"noisy run: {row.target} in {row.place}: {row.noise}" for row in result.rows if row.noise)]:
        display.say(note)
    if out is not None:
        _write_bench(result, next(iter(asked.sources.values())), out, display)
    return [row.model_dump(mode="json") for row in result.rows]


def _write_bench(result: Benchmark, source: Source, out: Path, display: Display) -> None:
    """Files of a measurement, which is not lost where they cannot be written."""
    about = {**machine(source), **accelerator(), **versions()}
    try:
        for path in write_bench(result, about, out):
            display.say(f"wrote {path}")
    except PpclcError:
        print(markdown(result, about), file=sys.stderr)
        raise


def print_bench(rows: list[dict[str, Any]]) -> None:
    """A table on standard output."""
    heads = ("target", "backend", "p50 ms", "p90 ms", "p99 ms", "loop ms", "peak MB", "roofline", "speed-up")
    table = Table(*heads, box=None, title="one call: " + ", ".join(f"{k} {v}" for k, v in rows[0]["shape"].items()) if rows else None)
    for row in rows:
        interval = row["speedup_ci95"]
        speedup = f"{row['speedup']:.2f} ({interval[0]:.2f} to {interval[1]:.2f})" if row["speedup"] else "-"
        figures = (f"{row[k]:.2f}" for k in ("p50_ms", "p90_ms", "p99_ms"))
        loop = f"{row['end_to_end_ms']:.0f}" if row["end_to_end_ms"] else "-"
        share = f"{100 * row['floor_share']:.0f} %" if row["floor_share"] else "-"
        table.add_row(
            row["target"], row["backend"] + ", graph" * row["cuda_graph"], *figures, loop, f"{row['peak_bytes'] / 1e6:.0f}", share, speedup
        )
    console = Console()
    Console(width=max(console.width, 100)).print(table)  # narrower, figures would be broken


def report(out: Path) -> str:
    """Write the report of a finished run again, from its records."""
    stored = out / "recipe.yaml"
    if not (stored.is_file() and (out / "records").is_dir()):
        raise OutputError(f"{out}: holds no run of ppclc compress; wanted a folder with recipe.yaml and records/{_run_above(out)}")
    recipe = read_recipe(stored)
    run = compiler.reported(recipe, f"{out.name}.yaml", out, Display(1, 0))
    return "\n".join([*summary(run.report or {}, out), *run.failed])


def _run_above(folder: Path) -> str:
    above = folder.absolute().parent
    return f", as {folder.parent} is" if run_at(str(above)) else ""


def remap_lora(lora: Path, plan_file: Path, out: Path | None, model: str | None) -> dict[str, Any]:
    """Write a teacher's LoRA for the student of a plan; what was kept of it. Raises as `lora.remap` does."""
    return remap(lora, plan_file, out, model)


def print_remapped(document: dict[str, Any]) -> None:
    """What became of a LoRA's modules, a row an outcome, on standard output."""

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.1f}"

    table = Table("outcome", "modules", "% of the change", "% kept", box=None)
    rows = [*document["outcomes"].items(), ("among the kept: on blocks that stand for intervals", document["on_intervals"])]
    for outcome, row in rows:
        table.add_row(outcome, str(row["modules"]), percent(row["norm_share"]), percent(row["norm_kept"]))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{document['kept']} of {document['modules']} modules are left, with {percent(document['norm_kept'])} % of the squared norm of the change"
    )
    if document["checked_against"] is None:
        console.print(
            "shapes were not checked: no student of just this plan lies beside it or below, and no teacher was given with --model"
        )
    if document["modulation_mean"] == "basis":
        console.print("no calibration lies by the student: what a modulation's change adds at the mean is known within the basis alone")
    print(f"wrote {document['out']}")


EXTRAS = {
    "report": ("jinja2", "matplotlib"),
    "train": ("tensorboard",),
    "adamw8bit": ("bitsandbytes",),
    "onnx": ("onnx", "onnxscript"),
    "onnxruntime": ("onnxruntime",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx",),
}
"""Extras of ppclc with the modules that they bring."""


def doctor() -> dict[str, Any]:
    """Versions, cores, memory, devices, and for every back end and extra whether it is ready here, or the command that makes it so."""
    import psutil
    import torch

    from ppclc import plugins

    found = {extra: [m for m in modules if importlib.util.find_spec(m) is None] for extra, modules in EXTRAS.items()}
    document = {
        "versions": versions(),
        "python": sys.executable,
        "machine": f"{platform.machine()}, {set_threads()} threads",
        "gpu": gpu() or "none: everything runs on the CPU",
        "memory_bytes": psutil.virtual_memory().total,
        "memory_free_bytes": psutil.virtual_memory().available,
        "disk_free_bytes": shutil.disk_usage(".").free,
        "backends": {name: _state(plugins.load("backends", name)) for name in plugins.names("backends")},
        "kernels": (f"not taken: {reason}" if (reason := kernels.lacks()) else "ready"),
        "extras": {extra: f"pip install 'ppclc[{extra}]'" if missing else "ready" for extra, missing in found.items()},
    }
    if accelerated := accelerator():
        document |= {"clocks": accelerated["clocks_and_temperature"], "cuda": torch.version.cuda}
    return document


def _state(backend: Any) -> str:
    """Whether a back end is ready, with its libraries' versions, or what would make it so."""
    missing = [extra for modules, extra in backend.requires if not any(importlib.util.find_spec(m) for m in modules.split("|"))]
    if missing:
        return f"pip install 'ppclc[{missing[0]}]'"
    told = ", ".join(
        f"{name} {version}" for name, version in export_pass.versions(backend).items() if name not in ("ppclc", "torch", "diffusers")
    )
    state = backend.lacks() or (f"exports, and does not run: {reason}" if (reason := backend.cannot_run()) else "ready")
    return f"{state} ({told})" if told else state


def print_document(document: dict[str, Any], indent: int = 0) -> None:
    """Nested figures as indented lines on standard output."""
    for key, value in document.items():
        if isinstance(value, dict) and value:
            print(f"{' ' * indent}{key}:")
            print_document(value, indent + 2)
        else:
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            print(f"{' ' * indent}{key}: {shown}")
