"""Figures and names in words, as pages, cards and screens show them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from ppclc.plan import CompressionPlan

GATE_KEYS = {"drop_percent": "drop", "upper_percent": "upper end of the drop's 95 % interval"}
"""What of a metric a gate can hold, in words."""


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
    unit, divisor = scaled(count)
    return f"{count / divisor:.4g} {unit.strip()}"


def scaled(largest: float) -> tuple[str, float]:
    """A word for the axis and its divisor."""
    steps = [("billion ", 1e9), ("million ", 1e6), ("thousand ", 1e3)]
    return next(((word, divisor) for word, divisor in steps if largest >= divisor), ("", 1.0))


def bytes_text(count: float) -> str:
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


def merged_spans(plan: CompressionPlan) -> list[tuple[int, int]]:
    """First and last block of every interval of a plan."""
    return [(i.first, i.last) for i in plan.intervals]


def span_words(spans: Sequence[tuple[int, int]]) -> str:
    """Spans of blocks in words: `3–4, 7–9`."""
    return ", ".join(f"{a}–{b}" for a, b in spans) or "none"


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
