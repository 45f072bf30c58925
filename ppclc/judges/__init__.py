"""Judges of images: learned measures of how well an image fits its prompt, or of how far two images lie apart.

A judge is one file here with a `PLUGIN`; its being there registers it, and the entry-point group `ppclc.judges` adds others. Each has a library
and weights of its own. `verify` runs those whose library is installed and whose weights are at hand: nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ppclc import plugins
from ppclc.errors import UnavailableError

Fits = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]
"""Scores (B,) of images (B, 3, H, W) in 0..1 for their prompts."""
Apart = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Distances (B,) of images (B, 3, H, W) in 0..1 from others."""


@dataclass(frozen=True)
class Judge:
    """All that ppclc knows of one judge.

    weights: what is loaded where nobody names others. unit and better: of its figures, `higher` or `lower`. open: given the
    weights' name or folder, the function that judges; raises UnavailableError where library or weights are not at hand, saying what would
    help. paired: whether that is a distance between both models' images, and no score of each. relative: whether a drop is told in percent
    of the teacher's mean, else in hundredths of the unit.
    """

    weights: str
    unit: str
    better: str
    open: Callable[[str], Fits | Apart]
    paired: bool = False
    relative: bool = True


def open_judges(wanted: dict[str, str | None] | None) -> tuple[dict[str, tuple[Judge, Fits | Apart]], list[str]]:
    """The judges by name, ready to judge, and of those that are not at hand why.

    wanted: by name the weights, None for a judge's own; None for every judge that is at hand.

    Raises:
        UnavailableError: a judge that was asked for by name is not at hand.
    """
    found, left = {}, []
    for name in plugins.names("judges") if wanted is None else wanted:
        judge: Judge = plugins.load("judges", name)
        try:
            found[name] = (judge, judge.open((wanted or {}).get(name) or judge.weights))
        except UnavailableError as error:
            if wanted is not None:
                raise UnavailableError(f"verify.judges.{name}: {error}") from None
            left.append(f"{name}: {error}")
    return found, left
