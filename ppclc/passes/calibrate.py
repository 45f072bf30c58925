"""calibrate: second moments of the teacher's states, streamed; no activation is kept."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from ppclc.analysis.ffn_maps import FfnMoments
from ppclc.analysis.moments import BANDS, CHUNKS, TOGETHER, Moments, numbers_of, rows_of
from ppclc.analysis.reach import EVERYTHING, KINDS, Reach, grouped, moment_counts
from ppclc.costs.blocks import width_of
from ppclc.data.samples import Sample, Samples, SourceKind, picked
from ppclc.families import STREAMS, States
from ppclc.machine.devices import free_bytes
from ppclc.records import CalibrationStats
from ppclc.teachers import TEXT_INPUT, Inside, StreamedTeacher, Teacher

VERSION = 4
BATCH = 64
FAR_EVERY = 16
"""One batch in so many enters the far moments, which cost as many products a block as the longest interval has blocks."""
FAR_TOGETHER, WINDOWS_SHARE = 64, 0.5
"""Batches with far moments that pass a teacher on a GPU together, and what their states may take of the memory that near sums leave free there."""
MEMORY_SHARE = 0.25
"""Sums that would take more than so much of the memory that is free lie in files."""
Pixels = Annotated[int, Field(ge=1)]


class CalibrateSettings(BaseModel):
    """Section `calibrate` of a recipe. `longest`: most blocks an interval may span in the analysis.

    `tokens`: image tokens of a sample that enter the sums, at most; of more every second, third ... is taken, beginning with another one in
    each sample. Neighbours tell much the same, and sums over all of them cost a GPU a tenth of the teacher's forwards and more; null takes all.
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
    tokens: Annotated[int, Field(ge=1)] | None = 2048
    seed: Annotated[int, Field(ge=0)] = 0

    def moments(self) -> dict[str, Any]:
        """The settings on which the moments depend, but for the data itself."""
        return self.model_dump(exclude={"source", "path", "resolution"})


def calibrate(
    teacher: Teacher,
    samples: Samples,
    settings: CalibrateSettings,
    progress: Callable[[float, str], None],
    work: Path | None = None,
    reach: Reach = EVERYTHING,
) -> CalibrationStats:
    """Near moments of every block's states by stream, and of `SiLU(temb)`; far ones within `reach`, of the modulated text inputs and networks too.

    A resident teacher takes a batch at a time; on a GPU of those with far moments several, so that their sums, which have no room there beside one
    another, are brought to the CPU seldom. A streamed one takes as many as it may hold, so that its blocks are read seldom. Its large sums lie in
    files under `work`, and so do those that memory has no room for.
    """
    streamed = isinstance(teacher, StreamedTeacher)
    counts = moment_counts(teacher.family, teacher.config, settings.longest, reach)
    in_files = streamed or lies_in_files(8 * counts.matrices * width_of(teacher.config) ** 2)
    sums = Moments(work if in_files else None, by_block=streamed)
    found = Calibration(teacher, settings.longest, sums, settings.samples, progress, settings.tokens, reach)
    pieces = drawn_pieces(teacher, samples, settings, reach)
    if isinstance(teacher, StreamedTeacher):
        for piece in pieces:
            found.add([piece, *itertools.islice(pieces, found.held(teacher, piece) - 1)])
        return found.stats()
    waiting: list[Piece] = []
    for piece in pieces:
        if piece.far:
            waiting.append(piece)
        else:
            found.add([piece])
        if waiting and len(waiting) >= found.far_together(waiting[0]):
            found.add(waiting)
            waiting = []
    if waiting:
        found.add(waiting)
    return found.stats()


def lies_in_files(nbytes: int) -> bool:
    """Whether sums of so many bytes lie in files that the system maps, and not in memory."""
    return nbytes > MEMORY_SHARE * free_bytes("cpu")


@dataclass(frozen=True)
class Piece:
    """Samples that pass the teacher together, in rising order of their timesteps: a batch, or a part of one.

    far: whether they enter the far moments. number: of the piece, by which its image tokens are chosen.
    """

    sample: Sample
    chunk: int
    far: bool
    number: int = 0

    def __len__(self) -> int:
        return len(self.sample[1])


def drawn_pieces(teacher: Teacher, samples: Samples, settings: CalibrateSettings, reach: Reach = EVERYTHING) -> Iterator[Piece]:
    """All samples of a calibration, drawn a batch at a time."""
    generator = torch.Generator().manual_seed(settings.seed)
    every, count = far_every(settings.samples), itertools.count()
    for n, first in enumerate(range(0, settings.samples, BATCH)):
        sample = by_timestep(samples.draw(min(BATCH, settings.samples - first), generator))
        for part in teacher.parts(sample):
            yield Piece(part, n % CHUNKS, n % every == 0 and not reach.is_empty, next(count))


def far_every(samples: int) -> int:
    """One batch in so many enters the far moments: a few at least, spread over the run, for these must be of full rank."""
    return max(1, min(FAR_EVERY, -(-samples // BATCH) // 4))


def by_timestep(sample: Sample) -> Sample:
    """The samples in rising order of their timesteps, so that bands are contiguous rows."""
    return picked(sample, torch.argsort(sample[1]).tolist())


@dataclass(frozen=True)
class Text:
    """Which text of a piece counts: its mask (B, T), None for all, and the rows that it keeps, by number, where the teacher is."""

    mask: torch.Tensor | None
    kept: torch.Tensor | None

    def of(self, samples: slice) -> torch.Tensor | None:
        """What `rows_of` takes for some of the samples."""
        return self.kept if samples == slice(None) or self.mask is None else self.mask[samples]


class Calibration:
    """Moments in the making: pieces are sent through the teacher, and what they pass is summed up."""

    def __init__(
        self,
        teacher: Teacher,
        longest: int,
        moments: Moments,
        samples: int,
        progress: Callable[[float, str], None],
        tokens: int | None = None,
        reach: Reach = EVERYTHING,
    ) -> None:
        self.tokens, self.reach = tokens, reach
        self.related = Related(reach, longest, teacher.num_blocks + 1)
        self.teacher, self.longest, self.moments, self.ffns = teacher, longest, moments, FfnMoments(moments)
        self.samples, self.progress = samples, progress
        self.together: dict[int, int] = {}
        self.seconds, self.done, self.grouped = 0.0, 0, False

    def held(self, teacher: StreamedTeacher, piece: Piece) -> int:
        """Pieces like this one whose states may be held: two states of each, and of the far ones a window."""
        window = (self.longest + 1) / FAR_EVERY
        return max(1, int(teacher.held_bytes / (len(piece) * teacher.state_bytes(piece.sample) * (2 + window))))

    def far_together(self, piece: Piece) -> int:
        """Pieces like this one whose windows of states may lie on the teacher's device at once; one on a CPU, where sums are added up at once."""
        device = self.teacher.device
        if device.type == "cpu":
            return 1
        if len(piece) not in self.together:
            self.together[len(piece)] = self._far_together(piece, device)
        return self.together[len(piece)]

    def _far_together(self, piece: Piece, device: torch.device) -> int:
        states = self.teacher.embed(picked(piece.sample, [0])).states
        passing, kept = (sum(x.nbytes for x in s.values()) for s in (states, self._chosen(states, piece)))
        near = 4 * len(STREAMS) * (2 * self.teacher.num_blocks + 1) * width_of(self.teacher.config) ** 2
        free = free_bytes(device) - max(0, near - self.moments.on_device.held_bytes)
        # Of each its state and the one before, and what the window keeps, of text's inputs too.
        each = len(piece) * (2 * passing + (self.related.widest + 1) * kept)
        return max(1, min(FAR_TOGETHER, int(WINDOWS_SHARE * free / each)))

    def add(self, pieces: Sequence[Piece]) -> None:
        """Send pieces through the teacher, all of them through a block before the next."""
        texts = [self._text_of(p) for p in pieces]
        far = {n: Windows(self.related) for n, p in enumerate(pieces) if p.far}
        whole: list[States] = []  # of small states those of all blocks, which are then summed up at once
        before: list[States] = []
        count, blocks = sum(map(len, pieces)), self.teacher.num_blocks
        inside = far if self.related.inside else ()
        for number, sweep in self.teacher.sweep([p.sample for p in pieces], range(blocks + 1), inside=inside):
            start = time.perf_counter()
            states = [self._chosen(s, p) for s, p in zip(sweep.states.pop(number), pieces, strict=True)]
            if number == 0:
                self.grouped = grouped(blocks, [x.shape[-1] for x in states[0].values()])
                for temb in sweep.tembs:
                    if temb is not None:
                        self.moments.add_near("temb", [torch.nn.functional.silu(temb)])
            if len(pieces) == 1 and all((blocks + 1) * x.numel() <= TOGETHER for x in states[0].values()):
                whole.append(states[0])
            else:
                for n, piece in enumerate(pieces):
                    self._add_near(number, piece, states[n], before[n] if before else None, texts[n])
                self.moments.settle()
            for n, windows in far.items():
                self._add_far(number, windows, states[n], sweep.inside.get(n), texts[n].kept, pieces[n])
            if far and len(pieces) > 1:  # what ends at this state has all that these pieces give
                self.moments.drain(("far.", "ffn."), wait=False)
            before = states
            self.seconds += time.perf_counter() - start
            self.progress((self.done + count * number / blocks) / self.samples, "")
        start = time.perf_counter()
        if whole:
            self._add_whole(pieces[0], whole, texts[0])
        self.seconds += time.perf_counter() - start
        self.done += count

    def _chosen(self, states: States, piece: Piece) -> States:
        """States with the image tokens that enter the sums."""
        image = states.get("image")
        if image is None or self.tokens is None or image.shape[1] <= self.tokens:
            return states
        every = -(-image.shape[1] // self.tokens)
        # A copy, so that the whole may be let go.
        return {**states, "image": image[:, piece.number % every :: every].contiguous()}

    def _slices(self, piece: Piece) -> list[tuple[slice, tuple[str, ...]]]:
        """Rows of a piece by the names that they are summed under: the whole; or, grouped, its chunk's and each band's."""
        if not self.grouped:
            return [(slice(None), ("",))]
        bands = (piece.sample[1] * BANDS).long().clamp(max=BANDS - 1)
        ends = [int((bands <= b).sum()) for b in range(BANDS)]
        found = enumerate(zip([0, *ends], ends, strict=False))
        return [(slice(a, b), (f"chunk.{piece.chunk}.", f"band.{i}.")) for i, (a, b) in found if b > a]

    def _text_of(self, piece: Piece) -> Text:
        mask = self.teacher.family.mask_of(piece.sample[2])
        return Text(mask, numbers_of(mask, self.teacher.device))

    def _add_near(self, number: int, piece: Piece, states: States, before: States | None, text: Text) -> None:
        for rows, prefixes in self._slices(piece):
            for stream in STREAMS:
                kept = text.of(rows) if stream == "text" else None
                last = None if before is None else rows_of(before[stream][rows], kept)
                self.moments.add_near_one(stream, number, self.teacher.num_blocks + 1, rows_of(states[stream][rows], kept), last, prefixes)

    def _add_whole(self, piece: Piece, states: Sequence[States], text: Text) -> None:
        for rows, prefixes in self._slices(piece):
            for stream in STREAMS:
                kept = text.of(rows) if stream == "text" else None
                self.moments.add_near(stream, [rows_of(s[stream][rows], kept) for s in states], prefixes)

    def _add_far(
        self, number: int, windows: Windows, states: States, inside: Inside | None, kept: torch.Tensor | None, piece: Piece
    ) -> None:
        """Far moments with the state of that number, and of what lies within the block before it."""
        for stream in STREAMS:
            self._add_far_of(stream, number, windows, states[stream], kept if stream == "text" else None)
        if inside is None:
            return
        block = number - 1
        if inside.text_input is not None:
            self._add_far_of(TEXT_INPUT, block, windows, inside.text_input, kept)
        for stream, mid in self._chosen(inside.mids, piece).items():
            if self.reach.has_network(block, stream):
                self.ffns.add(stream, block, mid, states[stream], kept if stream == "text" else None)

    def _add_far_of(self, kind: str, number: int, windows: Windows, states_BTD: torch.Tensor, kept: torch.Tensor | None) -> None:
        if number in self.related.last[kind]:
            self.moments.add_far(kind, number, windows.with_state(kind, number, rows_of(states_BTD, kept)))

    def stats(self) -> CalibrationStats:
        """The record of what was summed up."""
        start = time.perf_counter()
        self.moments.drain()
        self.seconds += time.perf_counter() - start
        if self.grouped:
            self.moments.add_up([f"band.{b}." for b in range(BANDS)], list(STREAMS))
        return CalibrationStats(
            num_blocks=self.teacher.num_blocks,
            longest=self.longest,
            rows=self.moments.rows,
            samples=self.done,
            grouped=self.grouped,
            moment_seconds=self.seconds,
            tensors=self.moments.tensors,
        )


class Related:
    """Which earlier states every state is related to, by kind. last: of a state that is kept, the last that asks for it."""

    def __init__(self, reach: Reach, longest: int, states: int) -> None:
        self.before = {kind: {n: reach.before(kind, n, longest) for n in range(states)} for kind in KINDS}
        self.last = {kind: {i: n for n, there in before.items() for i in there} for kind, before in self.before.items()}
        self.widest = max(len(there) for before in self.before.values() for there in before.values())
        self.inside = bool(self.last[TEXT_INPUT]) or reach.networks != frozenset()


class Windows:
    """The states of each kind that later ones are related to, by number."""

    def __init__(self, related: Related) -> None:
        self.related, self.kinds = related, dict[str, dict[int, torch.Tensor]]()

    def with_state(self, kind: str, number: int, x_ND: torch.Tensor) -> dict[int, torch.Tensor]:
        """What the state of that number is related to, with itself."""
        window = self.kinds.get(kind, {}) | {number: x_ND}
        self.kinds[kind] = {i: x for i, x in window.items() if self.related.last[kind][i] > number}
        return {i: window[i] for i in self.related.before[kind][number]}
