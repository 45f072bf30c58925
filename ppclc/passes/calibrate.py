"""calibrate: second moments of the teacher's states, streamed; no activation is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from ppclc import flow
from ppclc.families import Family
from ppclc.ffn_maps import FfnMoments
from ppclc.models import Trace, blocks_of, groups_of, trace
from ppclc.moments import BANDS, CHUNKS, Moments, rows_of
from ppclc.records import CalibrationStats
from ppclc.samples import Sample, Samples, SourceKind, picked

VERSION = 3
BATCH = 64
FAR_EVERY = 16
"""One batch in so many enters the far moments, which cost as many products a block as the longest interval has blocks."""
GROUPED_BYTES = 256 * 2**20
"""Most memory that moments by group may take; beyond it the analysis goes without its stability."""
TEXT_INPUT = "text_input"
Pixels = Annotated[int, Field(ge=1)]


class CalibrateSettings(BaseModel):
    """Section `calibrate` of a recipe. `longest`: most blocks an interval may span in the analysis.

    `path`: the user's data, by `source`: a text file of prompts, a folder or shards of captioned images,
    or cached samples. `resolution`: height and width in pixels, or one number for both; it tells the
    size of the images, and for prompts the size at which the teacher samples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
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
    """Near and far moments of every block's states by stream, of the modulated text inputs, and of `SiLU(temb)`."""
    generator = torch.Generator().manual_seed(settings.seed)
    moments, ffns, blocks = Moments(), FfnMoments(), blocks_of(model, family)
    batches = -(-settings.samples // BATCH)
    # A few batches at least, spread over the run: far moments must be of full rank.
    far_every = max(1, min(FAR_EVERY, batches // 4))
    seconds, done, groups = 0.0, 0, False
    for n in range(batches):
        x, t, conditioning = by_timestep(samples.draw(min(BATCH, settings.samples - done), generator))
        far = n % far_every == 0
        seen = trace(model, family, flow.inputs_for(model, x, t, conditioning), mids=far)
        start = time.perf_counter()
        groups = grouped_bytes(seen) <= GROUPED_BYTES
        mask = family.mask_of(conditioning)
        add_near(moments, seen, t, mask, f"chunk.{n % CHUNKS}." if groups else None)
        if far:
            add_far(moments, seen, mask, text_inputs(model, family, seen), settings.longest)
            for stream, mids in seen.mids.items():
                ffns.add(stream, mids, seen.states[stream][1:], mask if stream == "text" else None)
        seconds += time.perf_counter() - start
        done += len(t)
        progress(done / settings.samples, "")
    if groups:
        moments.add_up([f"band.{b}." for b in range(BANDS)], list(seen.states))
    return CalibrationStats(
        num_blocks=len(blocks),
        longest=settings.longest,
        rows=moments.rows | ffns.rows,
        samples=done,
        grouped=groups,
        moment_seconds=seconds,
        tensors=moments.tensors | ffns.tensors,
    )


def by_timestep(sample: Sample) -> Sample:
    """The samples in rising order of their timesteps, so that bands are contiguous rows."""
    return picked(sample, torch.argsort(sample[1]).tolist())


def grouped_bytes(seen: Trace) -> int:
    """Memory that near moments take once more for every group."""
    each = sum(2 * len(states) * states[0].shape[-1] ** 2 for states in seen.states.values())
    return 8 * each * (BANDS + CHUNKS)


def add_near(moments: Moments, seen: Trace, timestep: torch.Tensor, mask: torch.Tensor | None, chunk: str | None) -> None:
    """Near moments of one batch whose timesteps rise; with a chunk, under its name and that of each timestep's band alone."""
    slices: list[tuple[int, int, tuple[str, ...]]] = [(0, len(timestep), ("",))]
    if chunk is not None:
        bands = (timestep * BANDS).long().clamp(max=BANDS - 1)
        ends = [int((bands <= b).sum()) for b in range(BANDS)]
        slices = [(a, b, (chunk, f"band.{i}.")) for i, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if b > a]
    for first, last, prefixes in slices:
        for stream, states in seen.states.items():
            rows = mask[first:last] if mask is not None and stream == "text" else None
            moments.add_near(stream, [rows_of(s[first:last], rows) for s in states], prefixes)
    if seen.temb is not None:
        moments.add_near("temb", [torch.nn.functional.silu(seen.temb)])


@torch.no_grad()
def text_inputs(model: Any, family: Family, seen: Trace) -> list[torch.Tensor]:
    """The modulated text state that feeds the text keys and values of each block whose text stream may go."""
    found = []
    for number, (block, group) in enumerate(zip(blocks_of(model, family), groups_of(model, family), strict=True)):
        if group.text_modules and group.text_input is not None:
            found.append(group.text_input(block, seen.states["text"][number], seen.shared[number]))
    return found


def add_far(moments: Moments, seen: Trace, mask: torch.Tensor | None, inputs: Sequence[torch.Tensor], longest: int) -> None:
    """Far moments of one batch: both streams, and the text inputs of blocks from the first on."""
    for stream, values in (seen.states | ({TEXT_INPUT: list(inputs)} if inputs else {})).items():
        rows = mask if stream != "image" else None
        moments.add_far(stream, [rows_of(v, rows) for v in values], longest)
