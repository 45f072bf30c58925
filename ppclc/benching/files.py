"""What `ppclc bench -o` writes: a result as JSON, as a Markdown table, and as a picture of latency against parameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppclc.models import require_library
from ppclc.records import Benchmark, BenchRow, disk_errors, write_text

COLUMNS = (
    "target",
    "back end",
    "device",
    "dtype",
    "p50 ms",
    "p90 ms",
    "p99 ms",
    "speed-up (95 % interval)",
    "samples/s",
    "share of the roofline",
    "peak MB",
)


def write_bench(result: Benchmark, machine: dict[str, Any], folder: Path) -> list[Path]:
    """`bench.json`, `bench.md` and, where parameters are known, `bench.png`; the files. Raises UnavailableError without matplotlib."""
    plt = require_library("matplotlib", "report")
    plt.use("Agg")
    document = result.model_dump(mode="json", exclude={"digest"}) | {"machine": machine}
    write_text(folder / "bench.json", json.dumps(document, indent=1) + "\n")
    write_text(folder / "bench.md", markdown(result, machine))
    files = [folder / "bench.json", folder / "bench.md"]
    if any(row.parameters for row in result.rows):
        files.append(picture(result.rows, folder / "bench.png"))
    return files


def markdown(result: Benchmark, machine: dict[str, Any]) -> str:
    """A table of all rows, then what it was measured on."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in result.rows]
    shape = ", ".join(f"{k} {v}" for k, v in (result.rows[0].shape if result.rows else {}).items())
    lines += [
        "",
        f"One call: {shape}. {', '.join(f'{row.runs} runs after {row.warmup}' for row in result.rows[:1])} calls to warm up; targets interleaved.",
    ]
    if clocks := {row.clock for row in result.rows if row.clock}:
        lines += ["", f"Timed by {' and '.join(sorted(clocks))}."]
    loops = [row for row in result.rows if row.end_to_end_ms is not None]
    if loops:
        told = ", ".join(f"{row.target} in {row.place} {row.end_to_end_ms:.0f} ms" for row in loops)
        lines += ["", f"{result.steps} steps of {result.calls_a_step} call{'s' * (result.calls_a_step > 1)} each: {told}."]
    if result.roofline:
        rates = f"{result.roofline['copy_bytes_per_s'] / 1e9:.1f} GB/s copied, {result.roofline['matrix_flops_per_s'] / 1e12:.3g} TFLOP/s in matrix products"
        lines += ["", f"The roofline as measured here: {rates}."]
    lines += [f"\nNoisy: {row.target} in {row.place}: {row.noise}." for row in result.rows if row.noise]
    lines += [f"\nThe GPU {when}: {state}." for when, state in result.gpu.items()]
    lines += [f"\n{note}." for note in result.notes]
    lines += ["", "Measured on: " + "; ".join(f"{k} {v}" for k, v in machine.items()) + "."]
    return "\n".join(lines) + "\n"


def cells(row: BenchRow) -> list[str]:
    """A row's figures as text."""
    interval = f" ({row.speedup_ci95[0]:.2f} to {row.speedup_ci95[1]:.2f})" if row.speedup_ci95 else ""
    return [
        row.target,
        row.place,
        row.device,
        row.dtype,
        *(f"{value:.2f}" for value in (row.p50_ms, row.p90_ms, row.p99_ms)),
        f"{row.speedup:.2f}{interval}" if row.speedup else "–",
        f"{row.samples_per_s:.3g}" if row.samples_per_s else "–",
        f"{100 * row.floor_share:.0f} %" if row.floor_share else "–",
        f"{row.peak_bytes / 1e6:.0f}",
    ]


def picture(rows: Sequence[BenchRow], path: Path) -> Path:
    """Latency against parameters, a line a back end, from p50 up to p90."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for backend in dict.fromkeys(row.place for row in rows):
        own = sorted((r for r in rows if r.place == backend and r.parameters), key=lambda r: r.parameters or 0)
        if not own:
            continue
        x, y = [(r.parameters or 0) / 1e6 for r in own], [r.p50_ms for r in own]
        above = [r.p90_ms - r.p50_ms for r in own]
        axes.errorbar(x, y, yerr=[[0.0] * len(own), above], marker="o", capsize=3, label=backend)
        for row, at, ms in zip(own, x, y, strict=True):
            axes.annotate(Path(row.target).name, (at, ms), textcoords="offset points", xytext=(6, -10), fontsize=8)
    axes.set(xlabel="parameters, millions", ylabel=f"one call, ms (p50, bar to p90), {rows[0].device}", ylim=(0, None), xlim=(0, None))
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with disk_errors(path):
        figure.savefig(path, dpi=120)
    return path
