"""What was measured as Markdown: a heading and a table for each part, and what was not run with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.measuring import Row, shown

HIDDEN = {"weight_bytes", "broke", "of", "graph_note", "speedup_ci95", "seconds", "float32_products", "tflop", "ci95", "rounds_ms"}
"""What stands in the JSON file alone."""
UNITS = {"weight_bytes": "weights", "peak_bytes": "peak", "parameters": "parameters", "learned_parameters": "parameters", "bytes": "size"}
TITLES = {
    "correctness": "Kernels against float64",
    "speed": "Speed of the kernels",
    "ladder": "The ladder: one denoising step",
    "analysis": "Analysis and distillation at a real block's size",
    "engines": "Engines of four blocks",
}


def markdown(document: Mapping[str, Any]) -> str:
    """The whole document."""
    machine = document["machine"]
    about = ", ".join(f"{name} {value}" for name, value in machine.items() if value not in (None, ""))
    lines = [f"# {document['name']}: measured on {machine.get('gpu') or machine['processor']}", "", about, ""]
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    lines += [f"`{document['command']}`; {versions}", ""]
    for name, part in document["parts"].items():
        lines += [f"## {TITLES.get(name, name)}", ""]
        lines += _part(part)
    return "\n".join(lines).rstrip() + "\n"


def _part(part: Mapping[str, Any]) -> list[str]:
    if part.get("not_run"):
        return [f"not run: {part['not_run']}", ""]
    state = [f"{name} {before} -> {part['after'].get(name, '')}" for name, before in part.get("before", {}).items() if "after" in part]
    lines = [f"{part['seconds']:.0f} s" + (f"; {', '.join(state)}" if state else ""), ""]
    for rows in grouped(part["rows"]):
        lines += [*table(rows), ""]
    return lines


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of the same kind beside each other: those that begin with the same name for what they are about."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        first = next(iter(row))
        found.setdefault((first, str(row["what"]) if first == "what" else ""), []).append(row)
    return list(found.values())


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of one table; a row that was not run has its reason in the last column."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in HIDDEN and name != "not_run"))
    reasons = any("not_run" in row for row in rows)
    head = [UNITS.get(name, name.replace("_", " ")) for name in names] + (["not run"] if reasons else [])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [cell(name, row.get(name)) for name in names] + ([str(row.get("not_run", "")).replace("|", "/")] if reasons else [])
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cell(name: str, value: Any) -> str:
    """A value as it stands in a table: shares in percent, bytes in GB, parameters in billions, rates in powers of ten that are read."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return " ".join(f"{k} {shown(v)}" for k, v in value.items())
    if name == "share" or name.endswith("_share") or name == "spread" or "share_of" in name:
        return f"{100 * value:.1f} %"
    if name in ("bytes", "peak_bytes"):
        return f"{value / 1e9:.2f} GB"
    if name in ("parameters", "learned_parameters"):
        return f"{value / 1e9:.2f} B"
    if name == "per_s":
        return f"{value / 1e12:.3g} T/s"
    return shown(value).replace("|", "/")
