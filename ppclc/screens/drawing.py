"""A plan for people: a strip of the teacher's blocks with what is cut, and teacher and student side by side."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import Any

import psutil
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ppclc.plan import CompressionPlan
from ppclc.screens.words import bytes_text

CELL = 4
LABEL = 12
WHOLE, MERGED, MAPPED, LINEAR, ADAPTED, GONE = "■", "─", "▒", "╱", "▶", " "


def plan_drawing(document: dict[str, Any], width: int = 80) -> list[RenderableType]:
    """What `ppclc plan` shows, from its JSON document, for a screen of `width` columns."""
    plan = CompressionPlan.model_validate(document["plan"])
    return [*strip(plan, width), Text(), *[Text(line) for line in words(plan)], Text(), _table(document), Text(), _run(document["run"])]


def strip(plan: CompressionPlan, width: int = 80) -> list[Text]:
    """The teacher's blocks in forward order, one column each, a row for every part that some edit changes."""
    rows = {"image": [_depth(plan, b) for b in range(plan.num_blocks)]}
    if plan.text_stream:
        mapped = {e.block for e in plan.text_stream}
        rows["text"] = [MAPPED if b in mapped else cell for b, cell in enumerate(rows["image"])]
    for stream in ("image", "text"):
        linear = {e.block for e in plan.ffn if e.stream == stream}
        if linear:
            gone = {e.block for e in plan.text_stream} if stream == "text" else set()
            cells = [GONE if b in gone else cell for b, cell in enumerate(rows["image"])]
            rows[f"{stream} ffn"] = [LINEAR if b in linear else cell for b, cell in enumerate(cells)]
    if plan.adapters:
        adapted = {i.first for i in plan.adapters}
        rows["adapters"] = [ADAPTED if b in adapted else cell for b, cell in enumerate(rows["image"])]
    columns = max(1, (width - LABEL) // CELL)
    lines: list[Text] = []
    for start in range(0, plan.num_blocks, columns):
        blocks = range(start, min(start + columns, plan.num_blocks))
        lines.append(Text(f"{'block':<{LABEL}}" + "".join(f"{b:>{CELL}}" for b in blocks), style="dim"))
        lines += [Text(f"{name:<{LABEL}}" + "".join(_cell(cells[b]) for b in blocks)) for name, cells in rows.items()]
    return lines


def _depth(plan: CompressionPlan, block: int) -> str:
    """A block's mark: kept, or merged into the first block of its interval."""
    return WHOLE if block in plan.kept else MERGED


def _cell(mark: str) -> str:
    """A mark in its column; a merged block is tied to the one before."""
    return MERGED * (CELL - 1) + "┤" if mark == MERGED else f"{mark:>{CELL}}"


def words(plan: CompressionPlan) -> list[str]:
    """Every edit in words, a line a kind, with the mark that stands for it."""
    lines = [f"{WHOLE} whole block"]
    if plan.intervals:
        lines.append(f"{MERGED} merged into one block: {', '.join(f'{i.first}-{i.last}' for i in plan.intervals)}")
    if plan.text_stream:
        lines.append(f"{MAPPED} text stream mapped: {_ranges(e.block for e in plan.text_stream)}")
    linear = {stream: [e.block for e in plan.ffn if e.stream == stream] for stream in ("image", "text")}
    lines += [f"{LINEAR} {stream} feed-forward made linear: {_ranges(blocks)}" for stream, blocks in linear.items() if blocks]
    if plan.adapters:
        lines.append(f"{ADAPTED} adapters before: {', '.join(f'{i.first}-{i.last}' for i in plan.adapters)}")
    if plan.modulation_rank is not None:
        lines.append(f"  modulation of rank {plan.modulation_rank}")
    if plan.dead_code:
        lines.append("  dead code removed")
    return [*lines, "  nothing is cut"] if plan.is_empty else lines


def _ranges(blocks: Iterable[int]) -> str:
    """Numbers with runs drawn together: `3-7, 10`."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _table(document: dict[str, Any]) -> Table:
    teacher, student = document["teacher"], document["student"]
    table = Table("", "teacher", "student", "remains", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {"blocks": "blocks", "parameters": "parameters", "bytes": "weights on disk", "vram_bytes": "memory while running"}
    for key, name in rows.items():
        show = bytes_text if "bytes" in key else "{:,}".format
        table.add_row(name, show(teacher[key]), show(student[key]), f"{100 * student[key] / teacher[key]:.1f} %")
    if teacher["latency_ms"] is None:
        table.add_row("latency", "not measured", "run: ppclc bench", "")
    else:
        ms = teacher["latency_ms"], student["latency_ms"]
        table.add_row("latency", f"{ms[0]:.2f} ms", f"{ms[1]:.2f} ms", f"{100 * ms[1] / ms[0]:.1f} %")
    return table


def _run(run: dict[str, Any]) -> Text:
    passes = ", ".join(f"{name} {duration_text(s)}" for name, s in run["seconds"].items() if s >= 1)
    total = duration_text(sum(run["seconds"].values()))
    memory, disk = bytes_text(run["peak_bytes"]), bytes_text(run["disk_peak_bytes"])
    told = f"ppclc compress takes about {total} here from the start ({passes}), {memory} of memory and {disk} of disk"
    if run["disk_peak_bytes"] > 1.05 * run["disk_bytes"]:
        told += f", of which {bytes_text(run['disk_bytes'])} are left at the end"
    lacking = [
        f"{bytes_text(there)} {what}"
        for key, there, what in (
            ("peak_bytes", psutil.virtual_memory().total, "of memory"),
            ("disk_peak_bytes", shutil.disk_usage(".").free, "free on the disk"),
        )
        if run[key] > there
    ]
    return Text(told + (f"; this machine has {' and '.join(lacking)}" if lacking else ""))


def duration_text(seconds: float) -> str:
    """Seconds, minutes, hours or days, whichever reads best."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
