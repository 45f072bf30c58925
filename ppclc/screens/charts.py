"""The charts of a report, drawn in stand-in colours that become the page's CSS variables, so that each follows the reader's light or dark theme.

Needs Matplotlib, which is imported when something is drawn.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ppclc.plan import CompressionPlan
from ppclc.records import Analysis, Candidate, Distilled, Verdict
from ppclc.screens.words import edit_words, gated, label, merged_spans, number, scaled, span_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = 6
"""Most loss curves that are told apart by colour."""
POINTS = 600
"""Most points drawn of one loss curve."""
FEW_POINTS = 5
"""Points of a curve below which each is marked."""
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


@dataclass(frozen=True)
class Chart:
    """One picture with what it shows in a sentence, and in words for who cannot see it."""

    title: str
    caption: str
    svg: str


@contextmanager
def style() -> Iterator[None]:
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
        for first, last in merged_spans(plan):
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
        f"Outlined: {span_words(merged_spans(plan))}.",
        draw,
        (5.2, 4.3),
    )


def probe_chart(analysis: Analysis, plan: CompressionPlan) -> Chart:
    """Share of each block's work that its linear probe leaves."""

    def draw(_: Figure, axes: Axes) -> None:
        _bands(axes, merged_spans(plan), "merged by the plan")
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
        f"First differences of CKA by block. PPCL's intervals: {span_words(analysis.ppcl_intervals)}.",
        draw,
    )


def candidate_chart(analysis: Analysis, plan: CompressionPlan) -> Chart:
    """Every edit that was measured: what it costs against what it saves."""
    text = len(plan.text_stream)

    ffns = {(f"{e.stream}_ffn", e.block) for e in plan.ffn}

    def in_plan(c: Candidate) -> bool:
        if c.kind.endswith("_ffn"):
            return (c.kind, c.first) in ffns
        return c.last - c.first + 1 == text if c.kind == "text_stream" else (c.first, c.last) in merged_spans(plan)

    taken = [c for c in analysis.candidates if in_plan(c)]
    unit, divisor = scaled(max(c.parameters for c in analysis.candidates))

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
        caption = f"{own}, from the teacher's true inputs and outputs; means of ten steps each, smoothed where there are many."
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
            mark = "o" if len(smooth) < FEW_POINTS else None  # one point alone is no line
            axes.plot(
                *_thinned(smooth),
                marker=mark,
                ms=3.6,
                color=colour,
                lw=1.6 if named else 0.9,
                label=edit_words(curve.edit) if named else None,
            )
        axes.set(xlabel="step", ylabel="loss")
        _log(axes)
        if named:
            _legend(axes, 2)

    ends = ", ".join(f"{edit_words(c.edit)} {c.losses[0][1]:.3g} to {c.losses[-1][1]:.3g}" for c in curves[:LINES])
    return chart(f"{title}: loss", caption, f"{title}, loss from first to last step: {ends}", draw)


def quality_charts(verdict: Verdict | None) -> list[Chart]:
    """Drops with their intervals, when there are any intervals."""
    rows = [(name, q.drop_percent, q.ci95) for name, q in verdict.quality.items() if q.ci95 and not q.in_decibels] if verdict else []
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
