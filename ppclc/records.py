"""What passes hand on, and the Store that makes each of them once.

A record is frozen data: JSON for numbers and words, safetensors for tensors, in one folder. The
folder's name holds a digest over the pass's VERSION, its settings and the digests of its inputs, so
a record is found again when nothing that it depends on has changed, and is made anew when something
has. It is drafted beside its place and renamed when whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ppclc.errors import OutputError, UnavailableError
from ppclc.machine.devices import Ranks
from ppclc.plan import CompressionPlan


class Record(BaseModel):
    """Base of all records. `tensors` goes to safetensors, everything else to JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    stays_on_disk: ClassVar[bool] = False
    """Whether a record that was made or found holds its tensors as `StoredTensors`, not in memory."""
    digest: str = ""
    tensors: Mapping[str, Any] = Field(default_factory=dict, exclude=True)


class CalibrationStats(Record):
    """Second moments of a teacher's states, as `ppclc.analysis.moments` names them: in float64, or in float32 where kernels on a GPU summed them up.

    State i is the input of block i (i = `num_blocks`: the output of the last). Near moments of streams
    `image`, `text` and `temb` (of `SiLU(temb)`, one row a forward), far ones of `image`, `text` and
    `text_input` (the modulated text state that feeds block i's keys and values), and those of the
    feed-forward networks (`ppclc.analysis.ffn_maps`). When `grouped`, near
    moments also stand under `chunk.<c>.` and `band.<b>.`: of every eighth batch, and of each band of
    timesteps. Rows are counted in `rows`; `moment_seconds` went into moments, beside the forwards; on
    a GPU, which works on by itself, into asking for them.
    """

    num_blocks: int
    longest: int
    rows: dict[str, int]
    samples: int
    grouped: bool = False
    moment_seconds: float = 0.0


class Candidate(BaseModel):
    """One possible edit with what it costs, as the squared relative velocity error of its stand-in."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: str
    first: int
    last: int
    cost: float
    parameters: int


class Agreement(BaseModel):
    """Jaccard index of chosen intervals with those of repeated runs: mean, lowest, highest."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    jaccard: float
    lowest: float
    highest: float
    runs: int


class SetScore(BaseModel):
    """Blocks left out together, and how far the supernet then samples from the teacher."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    dropped: tuple[int, ...]
    distance: float


class TrialResult(BaseModel):
    """A plan, and how far its student samples from the teacher after so many steps of a short training."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    plan: CompressionPlan
    errors: list[tuple[int, float]]


class StartResult(BaseModel):
    """By the key of an interval the block that its student block started from, and how far the plan's student then came to sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    starts: dict[str, int]
    errors: list[tuple[int, float]]


class Analysis(Record):
    """Probes, CKA, first differences, candidates, and the plan chosen.

    `stability`: agreement of PPCL's intervals (`ppcl.`) and of the selection's (`selection.`) over
    resampled samples (`resamples`) and single timestep bands (`bands`). `work`: forwards of one sample
    through the teacher that the costs of intervals were allowed and took, and all costs together; intervals considered and possible.
    `starts`: by the key of an interval of the plan or considered for it, the teacher block that its student block starts from.
    `trials`: the best first, as are `start_trials`, of the plan from other starts; `supernet`: by number of blocks, the best
    first. Distances are those of `quality.SampledDistance`.

    `probe_error[stream][i]`: share of a block's residual variance that its linear probe leaves.
    Tensor `cka` (streams, L, L): `cka[s, u, k]`, NaN where not computed. Tensors `modulation.basis`
    (D, D), columns by falling variance, and `modulation.mean` (D,), where the family has them.
    """

    reading: str
    strategy: str
    streams: list[str]
    probe_error: dict[str, list[float]]
    first_differences: dict[str, list[float | None]]
    ppcl_intervals: list[tuple[int, int]]
    candidates: list[Candidate]
    modulation_error: dict[int, float]
    stability: dict[str, Agreement] = {}
    work: dict[str, float] = {}
    starts: dict[str, int] = {}
    supernet: list[SetScore] = []
    trials: list[TrialResult] = []
    start_trials: list[StartResult] = []
    plan: CompressionPlan


class Distilled(Record):
    """One trained edit, or the whole student after the fine-tune; `tensors` are its weights."""

    stays_on_disk: ClassVar[bool] = True
    edit: str
    steps: int
    losses: list[tuple[int, float]]


class Student(Record):
    """A sliced student as it lies on disk, with the SHA-256 of each of its files."""

    plan: CompressionPlan
    parameters: int
    bytes: int
    blocks: int
    files: dict[str, str]


class Quality(BaseModel):
    """One metric, teacher beside student. Its drop is in percent of the teacher's, worse is positive."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    teacher: float
    student: float
    drop_percent: float
    ci95: tuple[float, float] | None
    n: int
    seeds: list[int]
    noise: float
    unit: str
    better: str

    @property
    def in_decibels(self) -> bool:
        """Whether it tells how far from the teacher's images: those have as many decibels as are told at most, of which a drop tells nothing."""
        return self.unit.startswith("dB")


class Gate(BaseModel):
    """A metric held against its limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    value: float
    limit: float
    passed: bool


class Measured(Record):
    """One model's raw results on a task, kept by digest: `outcomes` per scene, `values` per seed, as tensors."""

    values: dict[str, list[float]]


class Verdict(Record):
    """The quality table, the gates, and images of both models from the same noise (`teacher`, `student`); notes on what could not be judged."""

    quality: dict[str, Quality]
    gates: list[Gate]
    prompts: list[str]
    notes: list[str] = []


class Parity(BaseModel):
    """Worst distance of an artefact from eager over the shapes that were run."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_abs: float
    rel_l2: float
    cosine: float


class Export(Record):
    """An artefact of a back end, in `folder`; files are relative to it."""

    backend: str
    folder: str
    files: dict[str, str]
    bytes: int
    dtype: str
    shapes: list[dict[str, int]]
    parity: Parity | None
    inputs: list[str]
    options: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, float]


class BenchRow(BaseModel):
    """Latency of one target in one back end.

    speedup: the teacher's p50 over this one, same back end, dtype and run; `speedup_ci95` its 95 % interval over rounds. spread: (p90 - p10) / p50.
    noise: why the run is not to be trusted to the last digit, empty where nothing speaks against it. end_to_end_ms: a whole loop of steps.
    flops: of matrix products and attention. floor_ms: the least that this device needs for that or for reading the weights; floor_share: of
    p50. sdpa: how eager attention was computed. cuda_graph: whether a recorded call was replayed; its teacher is one that was, too. clock: what
    timed it. session: how the back end ran, in its own words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    target: str
    backend: str
    device: str
    dtype: str
    shape: dict[str, int]
    warmup: int
    runs: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    peak_bytes: int
    speedup: float | None
    speedup_ci95: tuple[float, float] | None = None
    spread: float = 0.0
    noise: str = ""
    samples_per_s: float | None = None
    end_to_end_ms: float | None = None
    parameters: int | None = None
    flops: int | None = None
    floor_ms: float | None = None
    floor_share: float | None = None
    sdpa: str = ""
    cuda_graph: bool = False
    clock: str = ""
    session: dict[str, Any] = {}

    @property
    def place(self) -> str:
        """The back end, as `eager` or `eager, CUDA graph`."""
        return f"{self.backend}, CUDA graph" if self.cuda_graph else self.backend


class Benchmark(Record):
    """All rows of one interleaved run. A loop had `steps` steps of `calls_a_step` calls; roofline: what the device can do at best, as measured.

    gpu: clocks, temperature and power `before` and `after`, `not told` where nothing tells; empty on a CPU. notes: what was not timed, and why.
    """

    rows: list[BenchRow]
    steps: int = 0
    calls_a_step: int = 1
    roofline: dict[str, float] = {}
    gpu: dict[str, str] = {}
    notes: list[str] = []


class Stage(BaseModel):
    """What making a record took. Peak memory is the resident set of this process and its children."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    seconds: float
    peak_rss_bytes: int
    reused: bool = False


R = TypeVar("R", bound=Record)


def digest_of(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says of a folder into our errors.

    Raises:
        UnavailableError: the disk is full, or has no room for one file.
        OutputError: the folder cannot be written.
    """
    try:
        yield
    except Exception as error:
        code = getattr(error, "errno", None)
        full = code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
        if full:
            raise UnavailableError(f"{path}: the disk is full; make room, or give another folder with -o, and run again") from error
        if code == errno.EFBIG or "File too large" in str(error):
            limits = "its file system or this shell's limit (ulimit -f)"
            raise UnavailableError(f"{path}: a file is larger than {limits} allows; give another folder with -o, and run again") from error
        if isinstance(error, OSError) and code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise OutputError(f"{path}: cannot be written ({error.strerror}); give another folder with -o") from error
        raise


def check_writable(folder: Path) -> None:
    """Raise OutputError for a folder that could not be made or written; leaves nothing behind."""
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    trial = nearest / ".ppclc-trial"  # of one name, so that what a killed run left is taken away by the next
    try:
        trial.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another run's trial was the same folder
            trial.rmdir()
    except OSError as error:
        reason = "is a file" if nearest.is_file() else error.strerror
        raise OutputError(f"{folder}: cannot be written ({nearest}: {reason}); give another folder with -o") from None


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A draft folder that becomes `path` when the block ends well, and vanishes otherwise."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.parent / f".{path.name}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            yield draft
            replace_folder(draft, path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def replace_folder(new: Path, path: Path) -> None:
    """Put a whole folder in the place of another; what was there goes last."""
    old = path.parent / f".{path.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _settle(file: Path) -> None:
    """Have a file's content on the disk before its name is: a name may outlive a loss of power that the content does not."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.parent / f".{path.name}.draft"
        draft.write_text(text, "utf-8")
        _settle(draft)
        os.replace(draft, path)


STORED_AS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
"""Names in safetensors files by torch's own names of dtypes."""


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None, let_go: bool = False) -> None:
    """Write tensors as safetensors, whole or not at all, one after the other from where they lie.

    The library's own writer copies all of them into memory first, which doubles what a checkpoint takes. let_go: whether each is taken out of
    `tensors`, a dictionary, once it is written: of sums that lie in files the disk then holds one twice, and not all.
    Source: https://github.com/huggingface/safetensors#format.
    """
    import torch

    with disk_errors(path):
        draft = path.parent / f".{path.name}.draft"
        with draft.open("wb") as file:
            file.write(safetensors_header(tensors, metadata))
            for name in file_order(tensors):
                file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                if let_go and isinstance(tensors, dict):
                    del tensors[name]
        _settle(draft)
        os.replace(draft, path)


def safetensors_header(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """The first bytes of a safetensors file that holds these tensors, or what has a dtype and a shape like them, in `file_order`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in file_order(tensors):
        tensor = tensors[name]
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        kind = STORED_AS[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_order(tensors: Mapping[str, Any]) -> list[str]:
    """Names in the order in which the library lays tensors down: by falling width of their dtype, so that all are aligned, then by name."""
    return sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))


def write_record(record: Record, folder: Path, let_go: bool = False) -> None:
    """Write `record.json` and, where there are tensors, `tensors.safetensors`. let_go: as of `write_tensors`."""
    if record.tensors:
        write_tensors(folder / "tensors.safetensors", record.tensors, let_go=let_go)
    write_text(folder / "record.json", record.model_dump_json(indent=1) + "\n")


def read_record(kind: type[R], folder: Path) -> R:
    """The record in a folder. Raises OutputError when it is not one of that kind."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        record = kind.model_validate_json((folder / "record.json").read_text("utf-8"))
        tensors = folder / "tensors.safetensors"
        if not tensors.exists():
            return record
        return record.model_copy(update={"tensors": StoredTensors(tensors) if kind.stays_on_disk else load_file(tensors)})
    except (OSError, ValueError, SafetensorError) as error:
        why = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
        raise OutputError(f"{folder}: no readable {kind.__name__} record ({why}); remove the folder and run again") from None


class StoredTensors(Mapping[str, Any]):
    """The tensors of a safetensors file by name, each read anew when it is asked for.

    Raises:
        SafetensorError: not a whole file.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._path = path
        with safe_open(path, "pt") as file:
            self._names = tuple(file.keys())

    def __getitem__(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Job:
    """What a record is made from: its name, the version of what makes it, settings, and the records that go in."""

    name: str
    version: int
    settings: Any
    inputs: tuple[Record, ...]


Builders = Literal["main", "each", "all"]
LARGE_BYTES = 2**28
"""Tensors of a record that are larger are read back from its file once it is whole."""


@dataclass
class Store:
    """Makes each record once, in `out/records/<pass>-<digest>/`, and remembers what that took.

    A store that is `frozen` reads what is there and makes nothing.
    Of several ranks, the main one decides what is left to be made; all of them hand back the same records.
    """

    out: Path
    stages: list[Stage] = field(default_factory=list)
    partial: dict[str, float] = field(default_factory=dict)
    frozen: bool = False
    ranks: Ranks = field(default_factory=Ranks)

    def digest(self, name: str, version: int, settings: Any, *inputs: Record) -> str:
        """Digest of a record still to be made."""
        return digest_of([name, version, settings, [i.digest for i in inputs]])

    def folder(self, name: str, digest: str) -> Path:
        """Where a record lies once it is made."""
        return self.out / "records" / f"{name}-{digest}"

    def make(
        self,
        kind: type[R],
        name: str,
        version: int,
        settings: Any,
        inputs: tuple[Record, ...],
        build: Callable[[Path], R],
        valid: Callable[[R], bool] = lambda _: True,
        stage: str | None = None,
        on: Builders = "main",
    ) -> R:
        """The record, read if it is there (and `valid`), else built, by default on the main rank.

        `build` is given a work folder, kept until the record is whole: a place for checkpoints.

        Raises:
            OutputError: a frozen store does not hold it.
        """
        job = Job(name, version, settings, inputs)
        return self.make_all(kind, [job], lambda _, works: [build(works[0])], stage or name, valid, on)[0]

    def make_all(
        self,
        kind: type[R],
        jobs: Sequence[Job],
        build: Callable[[list[int], list[Path]], Iterable[R]],
        stage: str,
        valid: Callable[[R], bool] = lambda _: True,
        on: Builders = "main",
    ) -> list[R]:
        """Records that are made together: those that are there (and `valid`) are read, the others built in one go.

        `build` is given the numbers of the jobs that are left and a work folder for each; what it makes is written as it
        comes. Its cost, up to the first record, is shared out evenly.
        on: the ranks that build: the main one alone, `each` a share of what is left, or `all` of them together, of
        which the main one has the records.
        """
        digests = [self.digest(j.name, j.version, j.settings, *j.inputs) for j in jobs]
        folders = [self.folder(j.name, d) for j, d in zip(jobs, digests, strict=True)]
        found: dict[int, R] = {}
        if self.ranks.is_main:  # others might look when a record is there that this rank has just made
            found = {i: record for i, folder in enumerate(folders) if (record := self._found(kind, folder, valid, stage))}
            for i in found:  # left by a run that was killed when the record was whole
                shutil.rmtree(self._work(jobs[i].name, digests[i]), ignore_errors=True)
        left = self.ranks.told([i for i in range(len(jobs)) if i not in found])
        if left and self.frozen:
            raise OutputError(f"{folders[left[0]]}: no such record, wanted that of a finished run")
        mine = self.ranks.mine(left) if on == "each" else left if on == "all" or self.ranks.is_main else []
        if mine:
            writes = self.ranks.is_main or on == "each"
            found |= self._made(jobs, mine, digests, build, stage, len(left), writes)
        self.ranks.wait()
        return [found[i] if i in found else read_record(kind, folder) for i, folder in enumerate(folders)]

    def _made(
        self,
        jobs: Sequence[Job],
        left: list[int],
        digests: Sequence[str],
        build: Callable[[list[int], list[Path]], Iterable[R]],
        stage: str,
        among: int,
        writes: bool,
    ) -> dict[int, R]:
        """The records of some jobs by number, built and written; of `among` jobs that are built at the same time."""
        works = [self._work(jobs[i].name, digests[i]) for i in left]
        for work in works:
            with disk_errors(work):
                work.mkdir(parents=True, exist_ok=True)
        with measured(stage) as cost:
            built = iter(build(left, works))
            first = list(islice(built, 1))
        found: dict[int, R] = {}
        for i, work, record in zip(left, works, chain(first, built), strict=True):
            first.clear()
            if not writes:
                continue
            part, folder = cost[0].model_copy(update={"seconds": cost[0].seconds / among}), self.folder(jobs[i].name, digests[i])
            made = record.model_copy(update={"digest": digests[i]})
            read_again = made.stays_on_disk or _is_large(made)
            with whole_folder(folder) as draft:
                write_record(made, draft, let_go=read_again)
                write_text(draft / "stage.json", part.model_dump_json())
            found[i] = read_record(type(made), folder) if read_again else made
            del record, made
            shutil.rmtree(work, ignore_errors=True)
        self._remember(cost[0])
        return found

    def _work(self, name: str, digest: str) -> Path:
        """Where a record's checkpoints lie until it is whole."""
        return self.out / "records" / f".{name}-{digest}.work"

    def _found(self, kind: type[R], folder: Path, valid: Callable[[R], bool], stage: str) -> R | None:
        """The record that lies in a folder, if it does and is valid."""
        if not (folder / "record.json").exists():
            return None
        record = read_record(kind, folder)
        if not valid(record):
            return None
        try:
            past = Stage.model_validate_json((folder / "stage.json").read_text("utf-8"))
        except (OSError, ValueError):  # what it took is not known any more, which is no reason to make it again
            past = Stage(name=stage, seconds=0.0, peak_rss_bytes=0)
        self._remember(past.model_copy(update={"reused": True, "name": stage}))
        return record

    def _remember(self, stage: Stage) -> None:
        for i, other in enumerate(self.stages):
            if other.name == stage.name:
                seconds, peak = other.seconds + stage.seconds, max(other.peak_rss_bytes, stage.peak_rss_bytes)
                self.stages[i] = Stage(name=stage.name, seconds=seconds, peak_rss_bytes=peak, reused=other.reused and stage.reused)
                return
        self.stages.append(stage)


def _is_large(record: Record) -> bool:
    """Whether a record's tensors are better mapped from its file than kept where they were made: in memory, or in files of the work folder."""
    size: int = sum(tensor.nbytes for tensor in record.tensors.values())
    return size > LARGE_BYTES


@contextmanager
def measured(name: str, every_s: float = 0.05) -> Iterator[list[Stage]]:
    """Wall time and peak resident memory, children included, of the block; the list is filled when it ends."""
    import psutil

    process = psutil.Process()
    done = threading.Event()
    peak = [0]

    def resident() -> int:
        total: int = process.memory_info().rss
        for child in process.children(recursive=True):
            try:
                total += child.memory_info().rss
            except psutil.Error:
                continue
        return total

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            done.wait(every_s)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    stages: list[Stage] = []
    start = time.perf_counter()
    try:
        yield stages
    finally:
        done.set()
        watcher.join()
        stages.append(Stage(name=name, seconds=time.perf_counter() - start, peak_rss_bytes=max(peak[0], resident())))
