"""report: every record of a run as one JSON document for programs and one self-contained page for people.

`report.json` is the contract. `report.html` shows the same figures with pictures; it loads nothing from
anywhere, and needs the extra `ppclc[report]` (Jinja, Matplotlib). Its charts are `ppclc/screens/charts.py`.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import math
import re
import struct
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppclc import __version__
from ppclc.plan import CompressionPlan
from ppclc.records import Analysis, Benchmark, Distilled, Export, Stage, Verdict, write_text
from ppclc.screens.charts import analysis_charts, quality_charts, style, training_charts
from ppclc.screens.words import (
    bytes_text,
    edit_words,
    gate_label,
    gated,
    label,
    many,
    merged_spans,
    number,
    percent,
    plan_words,
    seconds,
    shape,
    span_words,
)

SETS_SHOWN = 4
"""Sets of blocks of one number that the page lists."""
PAIRS = 24
"""Most image pairs on the page."""
IMAGE_WIDTH = 160
"""Small images are enlarged by a whole factor to about this many pixels."""
LARGEST_IMAGE = 384
"""Large images are thinned by a whole factor until they are at most this wide or high."""
MISSING = "report.html was not written: {names} cannot be imported; pip install 'ppclc[report]', then: ppclc report {out}"
STABILITY = {
    "ppcl.resamples": "PPCL's intervals, calibration samples drawn again",
    "ppcl.bands": "PPCL's intervals, one quarter of the timesteps at a time",
    "selection.resamples": "our intervals by cost alone, probe samples drawn again",
    "supernet.resamples": "our intervals by the supernet, samples drawn again",
    "selection.bands": "our intervals by cost alone, one quarter of the timesteps at a time",
}
"""What of the analysis was repeated, in words."""
STALE = "{path} is from an earlier run and does not show this one"


@dataclass(frozen=True)
class ReportInputs:
    """All that a run has to tell. `teacher` and `student` each give `parameters`, `bytes` and `blocks`.

    bank: folder of the record by key of every distilled edit that other sizes can be cut from; own: keys of this student's edits.
    plan_is_fixed: whether the recipe left nothing to be chosen. judged: whether the model has a task that judges what it generates.
    """

    out: Path
    recipe_name: str
    recipe_text: str
    model_path: str
    teacher: Mapping[str, int]
    student: Mapping[str, int]
    plan: CompressionPlan
    analysis: Analysis
    distilled: Sequence[Distilled]
    verdict: Verdict | None
    exports: Sequence[Export]
    benchmark: Benchmark | None
    stages: Sequence[Stage]
    versions: Mapping[str, str]
    bank: Mapping[str, Path] = field(default_factory=dict)
    own: Collection[str] = ()
    plan_is_fixed: bool = False
    judged: bool = True


@dataclass(frozen=True)
class Tile:
    """One headline figure. `tone` is `good`, `bad` or empty."""

    label: str
    value: str
    detail: str
    tone: str = ""


@dataclass(frozen=True)
class Cell:
    """One teacher block within the student block that stands for it."""

    block: int
    kind: str
    note: str


@dataclass(frozen=True)
class Stand:
    """One student block and the teacher blocks it stands for; `badges` name its width edits."""

    number: int
    cells: tuple[Cell, ...]
    badges: tuple[str, ...]


@dataclass(frozen=True)
class Pluggable:
    """One distilled edit of the bank: its key, the local steps it was trained, the bytes of its tensors' file."""

    key: str
    steps: int
    bytes: int
    chosen: bool


@dataclass(frozen=True)
class Size:
    """One size that was cut from the bank: where it lies in OUT, and its own `size.json`."""

    folder: str
    parameters: int
    share: float
    blocks: int
    finetune_steps: int


@dataclass(frozen=True)
class Pair:
    """Both models' images for one prompt, as PNG data URIs."""

    prompt: str
    teacher: str
    student: str


def write_report(inputs: ReportInputs) -> dict[str, Any]:
    """`report` (what `report.json` now holds), `files` (written, in OUT) and `warnings` (why a file is missing).

    Never fails for want of Jinja or Matplotlib: the JSON is written, and a warning says what to install.
    """
    report = write_json(inputs)
    page = inputs.out / "report.html"
    if missing := missing_libraries():
        warnings = [MISSING.format(names=" and ".join(missing), out=inputs.out)]
        stale = [STALE.format(path=page)] if page.exists() else []
        return {"report": report, "files": ["report.json"], "warnings": warnings + stale}
    write_text(page, report_html(inputs))
    return {"report": report, "files": ["report.json", "report.html"], "warnings": []}


def write_json(inputs: ReportInputs) -> dict[str, Any]:
    """The document `report.json`, once it is written."""
    report = report_json(inputs)
    write_text(inputs.out / "report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return report


def missing_libraries() -> list[str]:
    """What the page needs and cannot be imported here."""

    def absent(name: str) -> bool:
        try:
            importlib.import_module(name)
        except ImportError:
            return True
        return False

    return [name for name in ("jinja2", "matplotlib") if absent(name)]


# ---------------------------------------------------------------------------------------------- report.json


def report_json(inputs: ReportInputs) -> dict[str, Any]:
    """The document `report.json`: plain JSON values, null where a figure is not finite."""
    keys = ("parameters", "bytes", "blocks")
    verdict = inputs.verdict
    document = {
        "ppclc": __version__,
        "recipe_sha256": hashlib.sha256(inputs.recipe_text.encode()).hexdigest(),
        "teacher": {key: inputs.teacher[key] for key in keys},
        "student": {key: inputs.student[key] for key in keys},
        "plan": inputs.plan.model_dump(mode="json"),
        "quality": {name: q.model_dump() for name, q in verdict.quality.items()} if verdict else {},
        "gates": [gate.model_dump() for gate in verdict.gates] if verdict else [],
        "stages": [stage.model_dump() for stage in inputs.stages],
        "exports": [export_json(export) for export in inputs.exports],
        "bench": [row.model_dump() for row in inputs.benchmark.rows] if inputs.benchmark else [],
        "versions": dict(inputs.versions),
    }
    return {key: _finite(value) for key, value in document.items()}


def export_json(export: Export) -> dict[str, Any]:
    """One entry of `exports`; what a back end counts of fused attention stands in its options."""
    entry = export.model_dump(include={"backend", "files", "bytes", "dtype", "shapes", "parity"})
    counted = ("attention_fused", "attention_total")
    return entry | {key: export.options[key] for key in counted if key in export.options}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------- report.html


def report_html(inputs: ReportInputs) -> str:
    """The page `report.html`. Needs Jinja and Matplotlib."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    words = {"stability": STABILITY.get, "number": number, "percent": percent, "size": bytes_text, "seconds": seconds, "shape": shape}
    environment.filters |= words | {"label": label, "gate_label": gate_label, "edit": edit_words}
    with style():
        charts = {
            "analysis": analysis_charts(inputs.analysis, inputs.plan),
            "training": training_charts(inputs.distilled),
            "quality": quality_charts(inputs.verdict),
        }
    return environment.get_template("report.html").render(
        inputs=inputs,
        verdict=inputs.verdict,
        report=report_json(inputs),
        tiles=tiles(inputs),
        stands=stands(inputs.plan),
        edits=plan_words(inputs.plan),
        scored=scored(inputs.analysis),
        fixed=inputs.plan_is_fixed,
        judged=inputs.judged,
        tried=tried(inputs.analysis),
        started=started(inputs.analysis),
        pluggable=pluggable(inputs.bank, inputs.own),
        sizes=sizes(inputs.out),
        pairs=image_pairs(inputs.verdict),
        charts=charts,
        css=(here / "report.css").read_text("utf-8"),
        fresh=[stage for stage in inputs.stages if not stage.reused],
    )


# ------------------------------------------------------------------------------------------ headline and plan


def tiles(inputs: ReportInputs) -> list[Tile]:
    """The headline figures that this run has, in reading order."""
    found = [removed_tile(inputs), quality_tile(inputs.verdict), speed_tile(inputs.benchmark), parity_tile(inputs.exports)]
    return [tile for tile in found if tile]


def removed_tile(inputs: ReportInputs) -> Tile:
    """How much smaller the student is."""
    t, s = inputs.teacher, inputs.student
    share = 100 * (1 - s["parameters"] / t["parameters"])
    detail = f"{many(t['parameters'])} → {many(s['parameters'])}; {bytes_text(t['bytes'])} → {bytes_text(s['bytes'])}; {t['blocks']} → {s['blocks']} blocks"
    return Tile("Parameters removed", f"{share:.1f} %", detail)


def quality_tile(verdict: Verdict | None) -> Tile | None:
    """The drop of the first metric that a gate holds, else of the first metric."""
    if not verdict or not verdict.quality:
        return None
    held = [gated(gate.name)[0] for gate in verdict.gates]
    name = next((n for n in verdict.quality if n in held), next(iter(verdict.quality)))
    q = verdict.quality[name]
    parts = [f"{number(q.teacher)} → {number(q.student)} {q.unit}".strip()]
    if q.ci95:
        low, high = q.ci95
        parts.append(f"95 % interval {percent(low)} to {percent(high)} %" + (", which includes zero" if low <= 0 <= high else ""))
    passed = [gate.passed for gate, metric in zip(verdict.gates, held, strict=True) if metric == name]
    tone = ("good" if all(passed) else "bad") if passed else ""
    if q.in_decibels:
        return Tile(label(name), f"{number(q.student)} dB", "from the teacher's images", tone)
    return Tile(f"Drop of {label(name)}", f"{percent(q.drop_percent)} %", "; ".join(parts), tone)


def speed_tile(benchmark: Benchmark | None) -> Tile | None:
    """Speed-up of the student over all settings that were measured: the range, not the best."""
    rows = [r for r in benchmark.rows if r.target == "student" and r.speedup] if benchmark else []
    if not rows:
        return None
    values = [r.speedup for r in rows if r.speedup]
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    where = ", ".join(dict.fromkeys(f"{r.place} on {r.device}" for r in rows))
    several = f", {len(rows)} settings" if len(rows) > 1 else ""
    value = f"{low}×" if low == high else f"{low}–{high}×"
    return Tile("Speed-up of one step", value, f"median latency, same back end and run: {where}{several}")


def parity_tile(exports: Sequence[Export]) -> Tile | None:
    """How far the ONNX artefact, else the first one compared, is from eager PyTorch."""
    compared = sorted((e for e in exports if e.parity), key=lambda e: e.backend != "onnx")
    if not compared or not (parity := compared[0].parity):
        return None
    name = "ONNX" if compared[0].backend == "onnx" else compared[0].backend
    distance = f"relative L2 {number(parity.rel_l2, 2)}, cosine {parity.cosine:.7f}"
    detail = f"largest difference from eager PyTorch, {compared[0].dtype}; {distance}"
    return Tile(f"{name} parity", number(parity.max_abs, 2), detail)


def stands(plan: CompressionPlan) -> list[Stand]:
    """The student's blocks in order, each with the teacher blocks that it stands for."""
    references = {edit.block: edit.reference for edit in plan.text_stream}
    found = []
    for student, first in enumerate(plan.kept):
        span = plan.interval_at(first)
        last = span.last if span else first
        badges = [f"text ← {references[first]}"] if first in references else []
        badges += [f"{e.stream} ffn" for e in plan.ffn if e.block == first] + (["adapter"] if span in plan.adapters else [])
        kind = "merged" if span else "kept"
        note = f"blocks {first}–{last} became student block {student}" if span else f"kept as student block {student}"
        if first in references:
            note += f"; text stream mapped from block {references[first]}"
        note += "".join(f"; {e.stream} feed-forward network made linear" for e in plan.ffn if e.block == first)
        note += "; linear adapters in front of it" if span in plan.adapters else ""
        cells = tuple(Cell(b, kind, f"Teacher block {b}: {note}") for b in range(first, last + 1))
        found.append(Stand(student, cells, tuple(badges)))
    return found


def scored(analysis: Analysis) -> list[tuple[str, str, str]]:
    """The best sets of blocks by the supernet, few for each number of blocks: blocks, distance, and, with the first, how many were judged."""
    rows = []
    for count in sorted({len(s.dropped) for s in analysis.supernet}):
        sets = [s for s in analysis.supernet if len(s.dropped) == count]
        for n, s in enumerate(sets[:SETS_SHOWN]):
            rows.append((", ".join(map(str, s.dropped)), number(s.distance, 3), number(len(sets)) if n == 0 else ""))
    return rows


def tried(analysis: Analysis) -> list[tuple[str, str]]:
    """The plans that were trained for a moment, the best first: their edits in short, and how far from the teacher's their samples came to lie."""
    found = []
    for result in analysis.trials:
        plan, parts = result.plan, []
        parts += [f"blocks {span_words(merged_spans(plan))} merged"] if plan.intervals else []
        parts += [f"text of {', '.join(str(e.block) for e in plan.text_stream)} mapped"] if plan.text_stream else []
        for stream in ("image", "text"):
            linear = [str(e.block) for e in plan.ffn if e.stream == stream]
            parts += [f"{stream} networks of {', '.join(linear)} linear"] if linear else []
        found.append(("; ".join(parts) or "no edit", _least(result.errors)))
    return found


def started(analysis: Analysis) -> list[tuple[str, str]]:
    """Where the plan's student blocks were tried to start from, the best first: the teacher's blocks, and how far the samples then came to lie."""
    spans = {analysis.plan.interval_key(i): f"{i.first} to {i.last}" for i in analysis.plan.intervals}
    return [
        (", ".join(f"{spans[key]} from {start}" for key, start in result.starts.items()), _least(result.errors))
        for result in analysis.start_trials
    ]


def _least(errors: Sequence[tuple[int, float]]) -> str:
    """The least distance of a trial, and after how many steps it had come to it."""
    step, error = min(errors, key=lambda e: e[1])
    return f"{number(error, 3)} after {step} steps"


# ------------------------------------------------------------------------------------------------- other sizes


def pluggable(bank: Mapping[str, Path], own: Collection[str]) -> list[Pluggable]:
    """Every distilled edit, intervals by their blocks, each with whether it is among this student's own."""
    rows = []
    for key, folder in bank.items():
        steps, tensors = json.loads((folder / "record.json").read_text("utf-8"))["steps"], folder / "tensors.safetensors"
        rows.append(Pluggable(key, steps, tensors.stat().st_size if tensors.is_file() else 0, key in own))
    return sorted(rows, key=lambda r: ([int(n) for n in re.findall(r"\d+", r.key)], r.key))


def sizes(out: Path) -> list[Size]:
    """The sizes that lie in `OUT/sizes`, the largest first; what cannot be read as one is left out."""
    found = []
    for file in out.glob("sizes/*/size.json"):
        try:
            document = json.loads(file.read_text("utf-8"))
            teacher, student = document["teacher"]["parameters"], document["student"]
            row = student["parameters"], student["parameters"] / teacher, student["blocks"], document["finetune_steps"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.append(Size(f"sizes/{file.parent.name}", *row))
    return sorted(found, key=lambda s: (-s.parameters, s.folder))


# ----------------------------------------------------------------------------------------------------- images


def image_pairs(verdict: Verdict | None) -> list[Pair]:
    """Up to `PAIRS` pairs of images from the same noise and prompt."""
    if not verdict or not {"teacher", "student"} <= verdict.tensors.keys():
        return []
    rows = zip(verdict.prompts, verdict.tensors["teacher"], verdict.tensors["student"], strict=False)
    return [Pair(prompt, png_uri(t), png_uri(s)) for prompt, t, s in list(rows)[:PAIRS]]


def png_uri(image: Any) -> str:
    """A PNG data URI of an image (3, H, W) in 0..1, enlarged or thinned by a whole factor, no smoothing."""
    import numpy as np

    pixels = image.detach().float().cpu().nan_to_num().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    height, width, _ = pixels.shape
    keep = max(1, math.ceil(max(height, width) / LARGEST_IMAGE))
    grow = max(1, IMAGE_WIDTH // max(height, width))
    pixels = np.repeat(np.repeat(pixels[::keep, ::keep], grow, 0), grow, 1)
    return "data:image/png;base64," + base64.b64encode(_png(pixels.tobytes(), pixels.shape[1], pixels.shape[0])).decode()


def _png(rgb: bytes, width: int, height: int) -> bytes:
    """An 8-bit RGB PNG. Source: the PNG specification, sections 5 and 11."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + rgb[y * width * 3 : (y + 1) * width * 3] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
