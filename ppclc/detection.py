"""Rules that choose blocks from scores: PPCL's first differences, and the rivals it is compared with. No torch.

Every rule ends in intervals: a dropped block joins the kept block before it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

Span = tuple[int, int]


def first_difference_intervals(cka: Sequence[Sequence[float]]) -> tuple[list[Span], list[float | None]]:
    """PPCL's intervals of two or more blocks, and the difference `delta(u, k)` seen at each block k.

    From block u on, the interval grows while the drop of CKA shrinks, and is cut before the first k whose
    drop is larger than the one before. Source: arXiv 2511.16156, equations 4 and 5, with `k in [u+2, M]`.
    """
    length = len(cka)
    intervals: list[Span] = []
    deltas: list[float | None] = [None] * length
    u = 0
    while u < length:
        k = u + 1
        previous: float | None = None
        while k < length and not math.isnan(cka[u][k]):
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


def spans_of_dropped(dropped: Iterable[int], length: int) -> dict[Span, int] | None:
    """Intervals that remove these blocks, each with the block that stays: the kept one before a run, or, at the start, after it.

    None when no block is left.
    """
    gone = set(dropped)
    kept = [i for i in range(length) if i not in gone]
    if not kept:
        return None
    edges = [0, *kept[1:], length]
    return {(a, b - 1): stays for (a, b), stays in zip(itertools.pairwise(edges), kept, strict=True) if b - a > 1}


def even_intervals(length: int, removed: int) -> list[Span]:
    """Intervals that remove `removed` of `length` blocks, evenly spaced: pairs while they fit, longer runs beyond."""
    kept = length - removed
    edges = [round(i * length / kept) for i in range(kept + 1)]
    return [(a, b - 1) for a, b in itertools.pairwise(edges) if b - a > 1]
