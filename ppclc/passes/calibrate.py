"""calibrate: second moments of the teacher's states, streamed; no activation is kept.

Shape suffixes: B batch, T token, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from ppclc import flow
from ppclc.families import Family
from ppclc.models import blocks_of, trace
from ppclc.records import CalibrationStats
from ppclc.samples import Samples, SourceKind

VERSION = 1
BATCH = 64
TEXT_INPUT = "text_input"
Pixels = Annotated[int, Field(ge=1)]


class CalibrateSettings(BaseModel):
    """Section `calibrate` of a recipe. `longest`: most blocks an interval may span in the analysis.

    `path`: the user's data, by `source`: a text file of prompts, a folder or shards of captioned images,
    or cached samples. `resolution`: height and width in pixels, or one number for both; it tells the
    size of the images, and for prompts the size at which the teacher samples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    source: SourceKind = "auto"
    path: Annotated[str, Field(min_length=1)] | None = None
    resolution: Pixels | Annotated[list[Pixels], Field(min_length=2, max_length=2)] = 256
    samples: Annotated[int, Field(ge=2)] = 2048
    longest: Annotated[int, Field(ge=2)] = 10
    seed: Annotated[int, Field(ge=0)] = 0

    def moments(self) -> dict[str, Any]:
        """The settings on which the moments depend, but for the data itself."""
        return self.model_dump(exclude={"source", "path", "resolution"})


def calibrate(
    model: Any, family: Family, samples: Samples, settings: CalibrateSettings, progress: Callable[[float, str], None]
) -> CalibrationStats:
    """Moments of every block's input and output by stream, of the modulated text inputs, and of `SiLU(temb)`."""
    generator = torch.Generator().manual_seed(settings.seed)
    sums = Moments(settings.longest)
    blocks = blocks_of(model, family)
    done = 0
    while done < settings.samples:
        count = min(BATCH, settings.samples - done)
        x, t, conditioning = samples.draw(count, generator)
        seen = trace(model, family, flow.inputs_for(model, x, t, conditioning))
        mask = conditioning.get("encoder_hidden_states_mask")
        for stream, states in seen.states.items():
            sums.add(stream, states, mask if stream == "text" else None)
        if seen.temb is not None:
            with torch.no_grad():
                inputs = [family.text_input(b, s, seen.temb) for b, s in zip(blocks, seen.states["text"][:-1], strict=True)]
            sums.add(TEXT_INPUT, inputs, mask)
            sums.add("temb", [torch.nn.functional.silu(seen.temb)], None)
        done += count
        progress(done / settings.samples, "")
    return CalibrationStats(num_blocks=len(blocks), longest=settings.longest, rows=sums.rows, samples=done, tensors=sums.tensors)


class Moments:
    """Running sums of states: `sum` of rows and `cross` products of states at most `longest` blocks apart, float64."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.tensors: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}

    def add(self, name: str, states: list[torch.Tensor], mask: torch.Tensor | None) -> None:
        """Add one batch of states, each (B, T, D) or (B, D); rows where the mask (B, T) is zero do not enter."""
        flat = [s.reshape(-1, s.shape[-1]) if mask is None else s[mask.bool()] for s in states]
        self.rows[name] = self.rows.get(name, 0) + len(flat[0])
        for i, x in enumerate(flat):
            self._accumulate(f"{name}.sum.{i}", x.double().sum(0))
            for j in range(i, min(i + self.longest, len(flat) - 1) + 1):
                # float32 products over one batch, float64 over all of them.
                self._accumulate(f"{name}.cross.{i}.{j}", (x.float().T @ flat[j].float()).double())

    def _accumulate(self, key: str, value: torch.Tensor) -> None:
        self.tensors[key] = self.tensors[key] + value if key in self.tensors else value
