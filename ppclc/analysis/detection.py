"""Rules that choose blocks from scores: PPCL's first differences, and the rivals it is compared with. No torch.

Every rule ends in intervals: a dropped block joins the kept block before it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

Span = tuple[int, int]


def first_difference_intervals(
    cka: Sequence[Sequence[float]], groups: Sequence[int] | None = None
) -> tuple[list[Span], list[float | None]]:
    """PPCL's intervals of two or more blocks, and the difference `delta(u, k)` seen at each block k.

    From block u on, the interval grows while the drop of CKA shrinks, and is cut before the first k whose
    drop is larger than the one before, and where a group of blocks ends. `groups`: blocks of each, one group where it is None.
    Source: arXiv 2511.16156, equations 4 and 5, with `k in [u+2, M]`.
    """
    length = len(cka)
    intervals: list[Span] = []
    deltas: list[float | None] = [None] * length
    for first, end in group_ranges(groups or [length]):
        u = first
        while u < end:
            k = u + 1
            previous: float | None = None
            while k < end and not math.isnan(cka[u][k]):
                delta = cka[u][k - 1] - cka[u][k]
                if previous is not None and delta > previous:
                    break
                deltas[k] = delta
                previous = delta
                k += 1
            if k - u >= 2:
                intervals.append((u, k - 1))
            u = k
    return intervals, deltas


def group_ranges(groups: Sequence[int]) -> list[Span]:
    """First block of each group, and the one after its last, by their numbers of blocks."""
    ends = list(itertools.accumulate(groups))
    return list(zip([0, *ends], ends, strict=False))


def removed_by(spans: Iterable[Span], groups: Sequence[int]) -> tuple[int, ...]:
    """Blocks of each group that go with these intervals."""
    counts = [0] * len(groups)
    for u, v in spans:
        counts[next(n for n, (_, end) in enumerate(group_ranges(groups)) if u < end)] += v - u
    return tuple(counts)


def trimmed(intervals: Iterable[Span], cka: Sequence[Sequence[float]], removed: int) -> list[Span] | None:
    """PPCL's intervals with just `removed` blocks gone: those of the lowest CKA are put back, the last of them in part.

    The paper's rule tiles the whole depth and knows no budget; this is the least that one must add. None
    when the rule removes fewer. Source: ours.
    """
    left = sorted(intervals)
    spare = sum(v - u for u, v in left) - removed
    if spare < 0:
        return None
    while spare > 0:
        u, v = min(left, key=lambda i: cka[i[0]][i[1]])
        left.remove((u, v))
        if v - u > spare:
            left.append((u, v - spare))
        spare -= min(spare, v - u)
    return sorted(left)


def lowest(scores: Sequence[float], removed: int, allowed: Sequence[bool]) -> list[int] | None:
    """The blocks of least score, as many as are to be removed. None when too few are allowed."""
    order = sorted((score, i) for i, score in enumerate(scores) if allowed[i])
    return sorted(i for _, i in order[:removed]) if removed <= len(order) else None


def spans_of_dropped(dropped: Iterable[int], groups: Sequence[int]) -> dict[Span, int] | None:
    """Intervals that remove these blocks, each with the block that stays: the kept one before a run, or, at a group's start, after it.

    None when no block of a group is left.
    """
    gone = set(dropped)
    found: dict[Span, int] = {}
    for first, end in group_ranges(groups):
        kept = [i for i in range(first, end) if i not in gone]
        if not kept:
            return None
        edges = [first, *kept[1:], end]
        found |= {(a, b - 1): stays for (a, b), stays in zip(itertools.pairwise(edges), kept, strict=True) if b - a > 1}
    return found


def even_intervals(groups: Sequence[int], removed: int) -> list[Span]:
    """Intervals that remove `removed` blocks, evenly spaced: pairs while they fit, longer runs beyond.

    Every group gives as large a share of its blocks, and keeps one at least.
    """
    total, spans = sum(groups), []
    shares = [min(size - 1, removed * size // total) for size in groups]
    by_rest = sorted(range(len(groups)), key=lambda n: (-(removed * groups[n] % total), n))
    while sum(shares) < removed:
        open_groups = [n for n in by_rest if shares[n] < groups[n] - 1]
        for n in open_groups[: removed - sum(shares)]:
            shares[n] += 1
    for (first, _), size, share in zip(group_ranges(groups), groups, shares, strict=True):
        edges = [first + round(i * size / (size - share)) for i in range(size - share + 1)]
        spans += [(a, b - 1) for a, b in itertools.pairwise(edges) if b - a > 1]
    return spans
