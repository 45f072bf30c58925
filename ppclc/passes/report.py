"""report: every record of a run as one JSON document for programs and one self-contained page for people.

`report.json` is the contract. `report.html` shows the same figures with pictures; it loads nothing from
anywhere, and needs the extra `ppclc[report]` (Jinja, Matplotlib). Charts are drawn in stand-in colours
that become the page's CSS variables, so that each follows the reader's light or dark theme.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib
import io
import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppclc import __version__
from ppclc.plan import CompressionPlan
from ppclc.records import Analysis, Benchmark, Candidate, Distilled, Export, Stage, Verdict, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SETS_SHOWN = 4
"""Sets of blocks of one number that the page lists."""
PAIRS = 24
"""Most image pairs on the page."""
IMAGE_WIDTH = 160
"""Small images are enlarged by a whole factor to about this many pixels."""
LARGEST_IMAGE = 384
"""Large images are thinned by a whole factor until they are at most this wide or high."""
LINES = 6
"""Most loss curves that are told apart by colour."""
POINTS = 600
"""Most points drawn of one loss curve."""
GATE_KEYS = {"drop_percent": "drop", "upper_percent": "upper end of the drop's 95 % interval"}
"""What of a metric a gate can hold, in words."""
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


@dataclass(frozen=True)
class Chart:
    """One picture with what it shows in a sentence, and in words for who cannot see it."""

    title: str
    caption: str
    svg: str


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
    size = ("parameters", "bytes", "blocks")
    verdict = inputs.verdict
    document = {
        "ppclc": __version__,
        "recipe_sha256": hashlib.sha256(inputs.recipe_text.encode()).hexdigest(),
        "teacher": {key: inputs.teacher[key] for key in size},
        "student": {key: inputs.student[key] for key in size},
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
    words = {"stability": STABILITY.get, "number": number, "percent": percent, "size": size, "seconds": seconds, "shape": shape}
    environment.filters |= words | {"label": label, "gate_label": gate_label, "edit": edit_words}
    with _style():
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


def number(value: float | None, digits: int = 4) -> str:
    """A figure with so many significant digits, `1,830,000` for a count, a dash for none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    mantissa, e, exponent = f"{value:.{digits}g}".partition("e")
    text = f"{mantissa}{e}{int(exponent)}" if e else mantissa
    return text.replace("-", "−")


def percent(value: float | None) -> str:
    """A share in percent to two decimals, without its sign: `-0.71`."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}".replace("-", "−")


def many(count: int) -> str:
    """A count in words: exact up to a hundred million, `20.43 billion` above."""
    if count < 100_000_000:
        return number(count)
    unit, divisor = _scale(count)
    return f"{count / divisor:.4g} {unit.strip()}"


def size(count: float) -> str:
    """Bytes in words, decimal units: `7.32 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def seconds(value: float) -> str:
    """A duration in words: `0.42 s`, `38 s`, `12 min 05 s`, `3 h 20 min`."""
    whole = round(value)
    if value < 9.95:
        return f"{value:.2g} s"
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def label(name: str) -> str:
    """A metric's name in words: `scene accuracy, guidance 2` for `scene_accuracy_g2`."""
    return re.sub(r"_g(\d+(?:\.\d+)?)$", r", guidance \1", name).replace("_", " ")


def gate_label(name: str) -> str:
    """A gate's name in words: `scene accuracy, guidance 2: drop in %` for `scene_accuracy_g2.drop_percent`."""
    metric, key = gated(name)
    return label(metric) + (f": {GATE_KEYS[key]} in %" if key else "")


def gated(name: str) -> tuple[str, str]:
    """The metric that a gate holds, and what of it is held; empty when the name does not say."""
    metric, _, key = name.rpartition(".")
    return (metric, key) if key in GATE_KEYS else (name, "")


def shape(sizes: Mapping[str, int]) -> str:
    """Named dimensions in words: `batch 1, image 32`."""
    return ", ".join(f"{name} {count}" for name, count in sizes.items()) or "–"


def edit_words(name: str) -> str:
    """A key of the bank in words: `blocks 3–4 as one` for `interval-3-4`; others as they are."""
    if match := re.fullmatch(r"interval-(\d+)-(\d+)(-adapted)?", name):
        return f"blocks {match[1]}–{match[2]} as one" + (", with adapters" if match[3] else "")
    if match := re.fullmatch(r"text-(\d+)-(\d+)a?-(\d+)-(\d+)a?", name):
        own, reference = (f"{a}–{b}" if a != b else a for a, b in (match.group(1, 2), match.group(3, 4)))
        return f"text stream of {own} from {reference}"
    if match := re.fullmatch(r"ffn-(\d+)(?:(-\d+)a?)?-(\w+)", name):
        return f"{match[3]} feed-forward network of {match[1]}{(match[2] or '').replace('-', '–')}"
    return "fine-tune of the whole student" if name == "finetune" else name


# ------------------------------------------------------------------------------------------ headline and plan


def tiles(inputs: ReportInputs) -> list[Tile]:
    """The headline figures that this run has, in reading order."""
    found = [removed_tile(inputs), quality_tile(inputs.verdict), speed_tile(inputs.benchmark), parity_tile(inputs.exports)]
    return [tile for tile in found if tile]


def removed_tile(inputs: ReportInputs) -> Tile:
    """How much smaller the student is."""
    t, s = inputs.teacher, inputs.student
    share = 100 * (1 - s["parameters"] / t["parameters"])
    detail = (
        f"{many(t['parameters'])} → {many(s['parameters'])}; {size(t['bytes'])} → {size(s['bytes'])}; {t['blocks']} → {s['blocks']} blocks"
    )
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


def plan_words(plan: CompressionPlan) -> list[str]:
    """Every edit of the plan in a sentence, for who cannot see the strip."""
    lines = [f"Blocks {i.first}–{i.last} became one, student block {plan.student_block(i.first)}." for i in plan.intervals]
    mapped = "Block {} takes its text keys and values from a linear map of block {}'s text state."
    lines += [mapped.format(e.block, e.reference) for e in plan.text_stream]
    lines += [f"The {e.stream} feed-forward network of block {e.block} became one linear map." for e in plan.ffn]
    lines += [f"Blocks {i.first}–{i.last} have linear adapters before them, one a stream." for i in plan.adapters]
    if plan.modulation_rank is not None:
        lines.append(f"The modulation of every block takes {plan.modulation_rank} inputs, the leading directions of the time embedding.")
    if plan.dead_code:
        lines.append("What nothing reads in the last block's text half was removed, which changes no output.")
    return lines or ["The plan is empty: the student is the teacher."]


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
        parts += [f"blocks {_spans(_chosen(plan))} merged"] if plan.intervals else []
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


# ----------------------------------------------------------------------------------------------------- charts

INK, MUTED, RULE, PAPER, BAND = "#010101", "#010102", "#010103", "#010104", "#010105"
SERIES = ["#020101", "#020102", "#020103", "#020104", "#020105", "#020106"]
THEME = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAPER: "var(--card)",
    BAND: "var(--band)",
    **{colour: f"var(--c{i})" for i, colour in enumerate(SERIES, 1)},
}
"""Stand-in colours that Matplotlib writes, and what they become in the page."""


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib set up for the page, and put back as it was."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "ppclc", "text.parse_math": False, "font.size": 9.5,
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
        "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": RULE, "axes.titlesize": 9.5,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
        "xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
        "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "xtick.minor.size": 0, "ytick.minor.size": 0,
        "grid.color": RULE, "grid.linewidth": 0.6, "lines.linewidth": 1.6, "lines.solid_capstyle": "round",
        "legend.frameon": False, "legend.fontsize": 8.5, "legend.handlelength": 1.4, "axes.unicode_minus": True,
        "figure.constrained_layout.w_pad": 0.07, "figure.constrained_layout.h_pad": 0.05,
    }  # fmt: skip
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def chart(title: str, caption: str, alt: str, draw: Callable[[Figure, Axes], None], size: tuple[float, float] = (5.2, 3.1)) -> Chart:
    """A chart drawn on one set of axes, as SVG without metadata whose colours and font are the page's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure, figure.add_subplot())
    buffer = io.StringIO()
    # The salt makes the ids of clip paths and markers differ from those of every other chart on the page.
    with _salt(title):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Chart(title, caption, _themed(buffer.getvalue(), alt))


@contextmanager
def _salt(title: str) -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": f"ppclc {title}"}):
        yield


def _themed(svg: str, alt: str) -> str:
    """The `<svg>` element alone: no namespaces, no metadata, no ids that nothing refers to, stand-in colours replaced."""
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, rest = body.split(">", 1)
    view = re.search(r'viewBox="[^"]+"', head)
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)
    rest = re.sub("|".join(THEME), lambda match: THEME[match[0]], rest)
    return f'<svg role="img" aria-label="{html.escape(alt)}" {view[0] if view else ""}>{rest}'.strip()


def _integers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=13, min_n_ticks=1))


def _log(axes: Axes) -> None:
    """Log scale on y with plain tick labels: whole decades, finer where there are few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    few = math.log10(high / low) < 2.2
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 2)))
    axes.yaxis.set_minor_locator(NullLocator())


def _bands(axes: Axes, spans: Sequence[tuple[int, int]], name: str) -> None:
    """Shade intervals of blocks along x."""
    for n, (first, last) in enumerate(spans):
        axes.axvspan(first - 0.45, last + 0.45, color=BAND, lw=0, zorder=0, label=name if n == 0 else None)


def _legend(axes: Axes, columns: int = 3) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, columnspacing=1.2, borderaxespad=0.2)


def _chosen(plan: CompressionPlan) -> list[tuple[int, int]]:
    return [(i.first, i.last) for i in plan.intervals]


def _spans(spans: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{a}–{b}" for a, b in spans) or "none"


def analysis_charts(analysis: Analysis, plan: CompressionPlan) -> list[Chart]:
    """What the analysis saw, chart by chart; those without data are left out."""
    maps = analysis.tensors.get("cka")
    charts = [cka_chart(s, maps[i].tolist(), plan, analysis.reading) for i, s in enumerate(analysis.streams)] if maps is not None else []
    if any(analysis.probe_error.values()):
        charts.append(probe_chart(analysis, plan))
    if any(d is not None for row in analysis.first_differences.values() for d in row):
        charts.append(difference_chart(analysis))
    if analysis.candidates:
        charts.append(candidate_chart(analysis, plan))
    if analysis.modulation_error:
        charts.append(rank_chart(analysis.modulation_error, plan.modulation_rank))
    return charts


def cka_chart(stream: str, table: list[list[float]], plan: CompressionPlan, reading: str) -> Chart:
    """Similarity by start and end block, with the plan's intervals outlined."""
    cells = [(u, k, value) for u, row in enumerate(table) for k, value in enumerate(row) if math.isfinite(value)]
    low_u, low_k, low = min(cells, key=lambda c: c[2], default=(0, 0, 1.0))

    def draw(figure: Figure, axes: Axes) -> None:
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Rectangle

        tiles = PatchCollection([Rectangle((k - 0.46, u - 0.46), 0.92, 0.92) for u, k, _ in cells], cmap="viridis", lw=0)
        tiles.set_array([c[2] for c in cells])
        tiles.set_clim(min(low, 0.999), 1)
        axes.add_collection(tiles)
        for first, last in _chosen(plan):
            for colour, width in ((PAPER, 4.5), (INK, 1.8)) if len(table) <= 24 else ((PAPER, 2.6), (INK, 1.1)):
                corner, side = (first - 0.5, first - 0.5), last - first + 1
                axes.add_patch(Rectangle(corner, side, side, fill=False, ec=colour, lw=width, joinstyle="round"))
        axes.set(xlim=(-0.75, len(table) - 0.25), ylim=(len(table) - 0.25, -0.75), aspect="equal")
        axes.set(xlabel="block k (where the probes end)", ylabel="block u (where they start)")
        axes.grid(False)
        _integers(axes.xaxis)
        _integers(axes.yaxis)
        bar = figure.colorbar(tiles, ax=axes, label="CKA", shrink=0.85)
        bar.outline.set_visible(False)

    against = "that output itself" if reading == "equation" else "block k's true output"
    return chart(
        f"CKA, {stream} stream",
        f"How alike block u's true output, pushed through the linear probes of the blocks up to k, is to {against}: 1 means the same up "
        "to scale and rotation, so a bright run along a row hints at blocks that one could stand for. Outlined: the intervals of the plan.",
        f"CKA map of the {stream} stream over {len(table)} blocks, from {low:.3f} (u = {low_u}, k = {low_k}) to 1. "
        f"Outlined: {_spans(_chosen(plan))}.",
        draw,
        (5.2, 4.3),
    )


def probe_chart(analysis: Analysis, plan: CompressionPlan) -> Chart:
    """Share of each block's work that its linear probe leaves."""

    def draw(_: Figure, axes: Axes) -> None:
        _bands(axes, _chosen(plan), "merged by the plan")
        for colour, (stream, errors) in zip(_colours(len(analysis.probe_error)), analysis.probe_error.items(), strict=True):
            axes.plot(range(len(errors)), errors, "o-", color=colour, ms=3.6, label=f"{stream} stream")
        axes.set(xlabel="block", ylabel="share left unexplained", xlim=(-0.6, plan.num_blocks - 0.4))
        axes.set_ylim(bottom=0)
        _integers(axes.xaxis)
        _legend(axes)

    worst = {s: max(range(len(e)), key=e.__getitem__) for s, e in analysis.probe_error.items() if e}
    return chart(
        "Probe error by block",
        "What one linear map cannot explain of the change that a block makes to its input: low means that the block is nearly linear, "
        "but says nothing of how much the output needs it.",
        "Probe error by block; largest: "
        + ", ".join(f"{s} stream at block {b} ({analysis.probe_error[s][b]:.3g})" for s, b in worst.items()),
        draw,
    )


def difference_chart(analysis: Analysis) -> Chart:
    """PPCL's first differences of CKA, each run of blocks a line of its own."""
    series = analysis.first_differences
    length = max(map(len, series.values()))

    def draw(_: Figure, axes: Axes) -> None:
        _bands(axes, analysis.ppcl_intervals, f"PPCL's intervals ({analysis.streams[0]} stream)")
        for colour, (stream, row) in zip(_colours(len(series)), series.items(), strict=True):
            values = [math.nan if d is None else d for d in row]
            axes.plot(range(len(values)), values, "o-", color=colour, ms=3.6, label=f"{stream} stream")
        cuts = sorted({last + 1 for _, last in analysis.ppcl_intervals} | {first for first, _ in analysis.ppcl_intervals})
        for n, cut in enumerate(c for c in cuts if 0 < c < length):
            axes.axvline(cut - 0.5, color=MUTED, lw=0.9, ls=(0, (3, 3)), zorder=1, label="PPCL cuts" if n == 0 else None)
        axes.axhline(0, color=RULE, lw=1)
        axes.set(xlabel="block k", ylabel="drop of CKA at block k", xlim=(-0.6, length - 0.4))
        _integers(axes.xaxis)
        _legend(axes, 2)

    return chart(
        "First differences and PPCL's cuts",
        "How much CKA falls when an interval grows by block k: PPCL's rule lets it grow while the falls shrink and cuts where one is "
        "larger than the last, so each line is one run and each gap a cut.",
        f"First differences of CKA by block. PPCL's intervals: {_spans(analysis.ppcl_intervals)}.",
        draw,
    )


def candidate_chart(analysis: Analysis, plan: CompressionPlan) -> Chart:
    """Every edit that was measured: what it costs against what it saves."""
    text = len(plan.text_stream)

    ffns = {(f"{e.stream}_ffn", e.block) for e in plan.ffn}

    def in_plan(c: Candidate) -> bool:
        if c.kind.endswith("_ffn"):
            return (c.kind, c.first) in ffns
        return c.last - c.first + 1 == text if c.kind == "text_stream" else (c.first, c.last) in _chosen(plan)

    taken = [c for c in analysis.candidates if in_plan(c)]
    unit, divisor = _scale(max(c.parameters for c in analysis.candidates))

    def draw(_: Figure, axes: Axes) -> None:
        kinds = list(dict.fromkeys(c.kind for c in analysis.candidates))
        for kind, colour, marker in zip(kinds, _colours(len(kinds)), "osD^vP", strict=False):
            for rows, full in ((analysis.candidates, False), (taken, True)):
                shown = [c for c in rows if c.kind == kind and c.cost > 0 and (c in taken) == full]
                style: dict[str, Any] = {"ms": 7, "mec": INK, "mew": 1.2} if full else {"ms": 4, "alpha": 0.55, "mew": 0}
                name = None if full else kind.replace("_", " ")
                xs, ys = [c.parameters / divisor for c in shown], [c.cost for c in shown]
                axes.plot(xs, ys, marker, color=colour, ls="", label=name, **style)
        axes.plot([], [], "o", ms=7, mfc="none", mec=INK, mew=1.2, label="in the plan")
        axes.set(xlabel=f"{unit}parameters saved", ylabel="velocity error before training")
        axes.margins(x=0.12)
        _log(axes)
        for c in _apart(taken, axes.get_ylim()):
            words = f"text of last {text}" if c.kind == "text_stream" else f"{c.first}" if c.first == c.last else f"{c.first}–{c.last}"
            axes.annotate(words, (c.parameters / divisor, c.cost), (7, -3), textcoords="offset points", fontsize=8.5)
        _legend(axes)

    return chart(
        "Candidates: cost against saving",
        "Each dot is one edit tried alone, with an untrained linear stand-in: lower costs less, further right saves more. "
        "The velocity error ranks edits; it is no measure of quality, which only generated scenes can judge.",
        f"{len(analysis.candidates)} candidate edits by parameters saved and velocity error. In the plan: "
        + (", ".join(f"{c.kind.replace('_', ' ')} {c.first}–{c.last} ({c.cost:.3g})" for c in taken) or "none of them"),
        draw,
    )


def _apart(candidates: Sequence[Candidate], limits: tuple[float, float]) -> list[Candidate]:
    """Those whose labels have room: no other label within a fifteenth of the height at about the same saving."""
    room = math.log(limits[1] / limits[0]) / 15
    near = max((c.parameters for c in candidates), default=0) / 5
    found: list[Candidate] = []
    for c in sorted((c for c in candidates if c.cost > 0), key=lambda c: c.cost):
        if all(abs(math.log(c.cost / o.cost)) > room or abs(c.parameters - o.parameters) > near for o in found):
            found.append(c)
    return found


def rank_chart(errors: Mapping[int, float], chosen: int | None) -> Chart:
    """Cost of a modulation rank."""
    ranks = sorted(errors)

    def draw(_: Figure, axes: Axes) -> None:
        axes.plot(ranks, [max(errors[r], 1e-16) for r in ranks], "o-", color=SERIES[0], ms=4, label="every block at this rank")
        if chosen is not None and chosen in errors:
            axes.plot(chosen, max(errors[chosen], 1e-16), "o", ms=9, mfc="none", mec=INK, mew=1.4, ls="", label=f"in the plan: {chosen}")
        axes.set(xlabel="modulation rank", ylabel="velocity error")
        _log(axes)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(r) for r in ranks])
        _legend(axes)

    return chart(
        "Modulation error by rank",
        "What it costs to let the time embedding reach every block through so few numbers: where the error is tiny, the rest of those "
        "weights did next to nothing.",
        "Velocity error by modulation rank: " + ", ".join(f"{r}: {errors[r]:.3g}" for r in ranks) + f". In the plan: {chosen or 'none'}.",
        draw,
    )


def training_charts(distilled: Sequence[Distilled]) -> list[Chart]:
    """Loss curves of intervals and of width edits, one a line, and of the fine-tune."""
    whole = [d for d in distilled if d.edit == "finetune" and d.losses]
    blocks = [d for d in distilled if d.edit.startswith("interval-") and d.losses]
    maps = [d for d in distilled if d not in whole and d not in blocks and d.losses]
    charts = []
    for title, own, local in (
        ("Intervals", "Each block learns on its own to do what its interval did", blocks),
        ("Width edits", "Each linear map starts where its own error is least, and learns what its block's output needs", maps),
    ):
        note = "" if len(local) <= LINES else " There are too many to name here; the table below has them all."
        caption = f"{own}, from the teacher's true inputs and outputs; pale is every step, bold the running mean."
        if local:
            charts.append(loss_chart(title, caption + note, local))
    if whole:
        caption = "Then the whole student learns to predict the teacher's velocity. A low loss is no proof: judge on scenes."
        charts.append(loss_chart("Fine-tune", caption, whole))
    return charts


def loss_chart(title: str, caption: str, curves: Sequence[Distilled]) -> Chart:
    """Loss by step, log scale."""

    def draw(_: Figure, axes: Axes) -> None:
        named = len(curves) <= LINES
        for colour, curve in zip(_colours(len(curves)), curves, strict=True):
            points = [(step, loss) for step, loss in curve.losses if loss > 0]
            smooth = _running_mean(points, max(1, len(points) // 25))
            if len(points) >= 50 and len(curves) <= LINES:
                axes.plot(*_thinned(points), color=colour, lw=0.8, alpha=0.3)
            axes.plot(*_thinned(smooth), color=colour, lw=1.6 if named else 0.9, label=edit_words(curve.edit) if named else None)
        axes.set(xlabel="step", ylabel="loss")
        _log(axes)
        if named:
            _legend(axes, 2)

    ends = ", ".join(f"{edit_words(c.edit)} {c.losses[0][1]:.3g} to {c.losses[-1][1]:.3g}" for c in curves[:LINES])
    return chart(f"{title}: loss", caption, f"{title}, loss from first to last step: {ends}", draw)


def quality_charts(verdict: Verdict | None) -> list[Chart]:
    """Drops with their intervals, when there are any intervals."""
    rows = [(name, q.drop_percent, q.ci95) for name, q in verdict.quality.items() if q.ci95] if verdict else []
    limits = [(*gated(gate.name), gate.limit) for gate in verdict.gates] if verdict else []
    if not rows:
        return []

    def draw(_: Figure, axes: Axes) -> None:
        for y, (name, drop, (low, high)) in enumerate(rows):
            axes.plot([low, high], [y, y], color=SERIES[0], lw=2.4)
            axes.plot(drop, y, "o", color=SERIES[0], ms=6.5, mec=PAPER, mew=1.2)
            for key, limit in [(key, limit) for metric, key, limit in limits if metric == name]:
                upper = key == "upper_percent"
                words = "gate: bar's right end at most here" if upper else "gate: dot at most here"
                axes.plot([limit] * 2, [y - 0.32, y + 0.32], color=SERIES[1], lw=2, ls=(0, (1.5, 1)) if upper else "-", label=words)
        axes.axvline(0, color=MUTED, lw=1)
        axes.set_yticks(range(len(rows)), [label(name).replace(", ", "\n") for name, *_ in rows])
        axes.set(xlabel="drop as in the table (right is worse)", ylim=(len(rows) - 0.4, -0.6))
        axes.grid(axis="y", visible=False)
        handles, names = axes.get_legend_handles_labels()
        legend = dict(zip(names, handles, strict=True))
        if legend:
            axes.legend(list(legend.values()), list(legend), loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, ncols=2)

    return [
        chart(
            "Drop with its 95 % interval",
            "The dot is the measured drop, the bar the range that holds the true one with 95 % confidence; a bar that crosses zero is "
            "no proven loss.",
            "; ".join(f"{label(n)}: {d:.3g} %, from {ci[0]:.3g} to {ci[1]:.3g} %" for n, d, ci in rows if ci),
            draw,
            (5.2, 1.3 + 0.42 * len(rows)),
        )
    ]


def _colours(count: int) -> list[str]:
    """A colour a curve; one for all when there are too many to tell apart."""
    return SERIES[:count] if count <= len(SERIES) else [SERIES[0]] * count


def _scale(largest: float) -> tuple[str, float]:
    """A word for the axis and its divisor."""
    steps = [("billion ", 1e9), ("million ", 1e6), ("thousand ", 1e3)]
    return next(((word, divisor) for word, divisor in steps if largest >= divisor), ("", 1.0))


def _running_mean(points: Sequence[tuple[int, float]], window: int) -> list[tuple[int, float]]:
    """Geometric mean over the last `window` points, which is what a log scale shows straight."""
    logs = [math.log(loss) for _, loss in points]
    found = []
    for i, (step, _) in enumerate(points):
        recent = logs[max(0, i + 1 - window) : i + 1]
        found.append((step, math.exp(sum(recent) / len(recent))))
    return found


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Steps and losses, at most about `POINTS` of them, the last one always."""
    stride = max(1, len(points) // POINTS)
    kept = [*points[:-1:stride], *points[-1:]]
    return [step for step, _ in kept], [loss for _, loss in kept]
