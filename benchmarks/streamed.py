"""What a teacher that is never in memory as a whole takes: peak memory and time of a sweep, by the number of blocks.

    python -m benchmarks.streamed [--blocks 12 24 48] [--heads 9] [--batches 2] [--batch 2] [--side 12] [--steps 10]

Teachers of random weights, a shard a block, are swept to their last block's output, streamed and resident, each in
a process of its own; once alone, and once as the local phase of `distill` runs it, with two intervals of two blocks, each
in memory from its checkpoint to its checkpoint, and both results at the end. The files are dropped from the page
cache first, so that the first sweep reads from the disk.

peak: the highest resident set of the process, less its resident set after all imports and a whole run on a tiny model,
with the free memory that these left given back to the system.
block: the bytes of one block. activations: the most bytes that tensors made by operators hold at once, counted tensor
by tensor on a resident teacher: the chunk's states with all that a block makes of them; in training also what the
student's forward keeps for its backward. What the backward makes, and what the allocator wastes, is not counted.
The bar is 1.5 x (3 blocks + activations). A student in training is 4 blocks by itself: weights, gradient, two moments.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.results_file import write_results
from ppclc.data.samples import Sample
from ppclc.families import Family
from ppclc.loading.checkpoints import WEIGHTS
from ppclc.loading.classes import empty_model, random_model
from ppclc.loading.sources import open_source
from ppclc.models import blocks_of, load_source, quiet_libraries
from ppclc.plan import CompressionPlan
from ppclc.teachers import ResidentTeacher, StreamedTeacher, Sweep, Teacher
from ppclc.training.local_edits import Teaching, Weights, interval_edit
from ppclc.training.local_phase import LocalPhase, LocalSettings
from ppclc.training.trainer import TrainingSettings

BAR = 1.5
HEAD = 64
MODES = ("resident", "streamed")


def teacher_config(family: Family, blocks: int, heads: int) -> dict[str, Any]:
    """Configuration of a teacher with so many blocks and heads."""
    sizes = {"attention_head_dim": HEAD, "axes_dims_rope": [16, 24, 24], "in_channels": 64, "out_channels": 16, "joint_attention_dim": 512}
    return {"_class_name": family.class_name, "num_layers": blocks, "num_attention_heads": heads, **sizes}


def write_teacher(folder: Path, family: Family, config: Mapping[str, Any]) -> None:
    """A teacher of random weights: a shard a block and one for the rest, no more than one of them in memory."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in empty_model(family, config).state_dict().items():
        place = family.block_of(config, name)
        key = place[0] if place else "rest"
        shards.setdefault(f"{WEIGHTS.removesuffix('.safetensors')}-{key}.safetensors", {})[name] = tensor.shape
    generator = torch.Generator().manual_seed(0)
    for file, shapes in shards.items():
        tensors = {n: 0.05 * torch.randn(s, generator=generator) + float(n.endswith("weight") and len(s) == 1) for n, s in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the pages of a folder's files, so that they are read from the disk."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def draw(family: Family, config: Mapping[str, Any], batches: int, batch: int, side: int) -> list[Sample]:
    """A chunk of random samples of `side` x `side` image tokens."""
    drawn: list[Sample] = []
    for n in range(batches):
        given = family.example_inputs(config, batch, side, side, 32, torch.Generator().manual_seed(n))
        drawn.append((given.pop("hidden_states"), given.pop("timestep"), given))
    return drawn


class LiveBytes(TorchDispatchMode):
    """Counts the bytes that tensors made by operators hold at once, but for those of given modules and tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.left_out: set[int] = set()
        self.peak = 0

    def leave_out(self, tensors: Any) -> None:
        """Not count these, which were there before."""
        self.left_out |= {t.untyped_storage()._cdata for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.left_out:
                storage = tensor.untyped_storage()
                self.live[StorageWeakRef(storage)] = storage.nbytes()
        self.live = {ref: size for ref, size in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def student_block(teacher: Teacher, block: int) -> nn.Module:
    """A block to be trained, started from a copy of the teacher's."""
    key = teacher.family.groups[0].count_key
    student = blocks_of(empty_model(teacher.family, {**teacher.config, key: 1}), teacher.family)[0]
    student.load_state_dict(teacher.block_tensors(block), strict=True, assign=True)
    return student.requires_grad_(True).train()


def train(teacher: Teacher, student: nn.Module, sweep: Sweep, first: int, last: int, steps: int, forward_only: bool) -> None:
    """Steps of AdamW on the states before and after an interval, a batch of the chunk at a time."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    for step in range(steps):
        n = step % len(sweep.shared)
        output = teacher.group(first).call(student, sweep.states[first][n], sweep.shared[n][first])
        loss = sum((output[s] - wanted).square().mean() for s, wanted in sweep.states[last + 1][n].items())
        if forward_only:
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def run_sweep(teacher: Teacher, samples: Sequence[Sample], steps: int, counter: LiveBytes | None = None) -> list[torch.Tensor]:
    """One sweep to the last block's output, with training on two blocks in the middle when there are steps: all that came of it."""
    first = teacher.num_blocks // 2 - 1
    last, results = first + 1, []
    stops = {first, last + 1, teacher.num_blocks} if steps else {teacher.num_blocks}
    for number, sweep in teacher.sweep(samples, stops):
        if steps and number == last + 1:
            with torch.utils._python_dispatch._disable_current_modes() if counter else nullcontext():
                student = student_block(teacher, first)
            if counter:
                counter.leave_out(list(student.parameters()))
            train(teacher, student, sweep, first, last, steps, counter is not None)
            results += [p.detach() for p in student.parameters()]
            del student
            sweep.states.clear()
        if number == teacher.num_blocks:
            results += [t for states in sweep.states.pop(number) for t in states.values()]
    return results


def local_phase(teacher: Teacher, samples: Sequence[Sample], steps: int, intervals: int = 2) -> Iterator[torch.Tensor]:
    """The local phase of `distill` itself on some intervals, the samples over and over: what the edits come to, one after the other."""
    length, turns = teacher.num_blocks, itertools.cycle(samples)
    plan = CompressionPlan.of(teacher.family.name, length, [(n, n + 1) for n in range(0, length, length // intervals)][:intervals])
    teaching = Teaching(teacher.family, teacher.config, teacher.block_tensors)
    edits = [interval_edit(teaching, plan, i, partial(teacher.block_tensors, i.first), Weights()) for i in plan.intervals]
    with tempfile.TemporaryDirectory() as work:
        works = [Path(work) / e.key for e in edits]
        for folder in works:
            folder.mkdir()
        settings = LocalSettings(steps, len(samples[0][0]), 1e-4, steps, 0, len(samples), TrainingSettings())
        for record in LocalPhase(teacher, lambda _: next(turns), edits, works, settings, lambda share, note: None).run():
            yield from (record.tensors[name] for name in sorted(record.tensors))
            del record


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 over the bytes of some tensors."""
    sums = hashlib.sha256()
    for tensor in tensors:
        sums.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return sums.hexdigest()


def open_teacher(mode: str, folder: Path) -> Teacher:
    """The teacher of a folder, of one kind or the other."""
    source = open_source(str(folder))
    return StreamedTeacher(source, "float32") if mode == "streamed" else ResidentTeacher(load_source(source), source.family)


def warm_up(family: Family, steps: int) -> None:
    """A whole run on a tiny model, so that what libraries load on first use is there."""
    config = {"_class_name": family.class_name, **family.tiny_config}
    tiny = ResidentTeacher(random_model(family, config), family)
    samples = draw(family, config, 1, 1, 2)
    digest(local_phase(tiny, samples, steps) if steps else run_sweep(tiny, samples, 0))


def forget_the_past() -> None:
    """Return free memory to the system, and let the peak start again from what is left (Linux alone).

    Else what is needed later hides in what the imports left behind, or their peak stands for its own.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", "ascii")


def peak_resident() -> int:
    """The highest resident set in bytes since the peak was reset."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def child(options: argparse.Namespace) -> dict[str, Any]:
    """What one process measures of itself."""
    family = open_source(str(options.folder)).family
    warm_up(family, options.steps)
    process = psutil.Process()
    forget_the_past()
    before = process.memory_info().rss
    teacher = open_teacher(options.child, options.folder)
    samples = draw(family, teacher.config, options.batches, options.batch, options.side)
    loaded = process.memory_info().rss
    took, read, found = [], [], ""
    for _ in range(options.sweeps):
        start, earlier = time.perf_counter(), getattr(teacher, "read_seconds", 0.0)
        found = digest(local_phase(teacher, samples, options.steps, options.intervals) if options.steps else run_sweep(teacher, samples, 0))
        took.append(time.perf_counter() - start)
        read.append(getattr(teacher, "read_seconds", 0.0) - earlier)
    peak = peak_resident()
    sizes = {"baseline_rss_bytes": before, "opened_bytes": loaded - before, "peak_bytes": peak - before}
    return sizes | {"sweep_s": took, "read_s": read, "sha256": found}


def count_activations(options: argparse.Namespace) -> int:
    """The most bytes that activations hold at once, on a resident teacher."""
    teacher = open_teacher("resident", options.folder)
    samples = draw(teacher.family, teacher.config, options.batches, options.batch, options.side)
    counter = LiveBytes()
    counter.leave_out([dict(teacher.tensors()), samples])
    with counter:
        run_sweep(teacher, samples, options.steps, counter)
    return counter.peak


def in_process(mode: str, folder: Path, options: argparse.Namespace, steps: int) -> Any:
    """What a process of its own gives: `resident` or `streamed` measurements, or the `count` of activations."""
    sizes = {k: getattr(options, k) for k in ("batches", "batch", "side", "sweeps", "intervals")} | {"steps": steps}
    command = [sys.executable, "-m", "benchmarks.streamed", "--child", mode, "--folder", str(folder)]
    command += [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure_depth(folder: Path, options: argparse.Namespace, activations: Mapping[int, int], block: int) -> dict[str, Any]:
    """Both kinds of teacher, with and without training; ratios to what the bar counts."""
    found: dict[str, Any] = {}
    for steps, name in ((0, "sweep"), (options.steps, "sweep_and_training")):
        runs = {}
        for mode in MODES:
            drop_from_cache(folder)
            runs[mode] = in_process(mode, folder, options, steps)
        counted = 3 * block + activations[steps]
        ratio = runs["streamed"]["peak_bytes"] / counted
        equal = runs["streamed"]["sha256"] == runs["resident"]["sha256"]
        found[name] = {**runs, "counted_bytes": counted, "ratio": ratio, "within_bar": ratio <= BAR, "equal_bits": equal}
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=12)
    parser.add_argument("--intervals", type=int, default=2, help="that learn in the local phase")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sweeps", type=int, default=2)
    parser.add_argument("--child", choices=[*MODES, "count"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, family: Family, tell: Callable[[str], None]) -> dict[str, Any]:
    """Every depth in turn, its files gone before the next."""
    results: dict[str, Any] = {"depths": {}}
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "transformer"
            config = teacher_config(family, blocks, options.heads)
            write_teacher(folder, family, config)
            block = 4 * sum(p.numel() for p in blocks_of(empty_model(family, config), family)[0].parameters())
            if "activation_bytes" not in results:
                activations = {steps: in_process("count", folder, options, steps) for steps in (0, options.steps)}
                named = {"sweep": activations[0], "sweep_and_training": activations[options.steps]}
                results |= {"block_bytes": block, "activation_bytes": named}
            files = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            results["depths"][str(blocks)] = {"file_bytes": files, **measure_depth(folder, options, activations, block)}
        for name in ("sweep", "sweep_and_training"):
            one = results["depths"][str(blocks)][name]
            streamed = one["streamed"]
            tell(
                f"{blocks} blocks, {name}: ratio {one['ratio']:.2f}, equal bits {one['equal_bits']}, peak {streamed['peak_bytes'] / 2**20:.0f}"
                f" of resident {one['resident']['peak_bytes'] / 2**20:.0f} MiB, read {streamed['read_s']} of {streamed['sweep_s']} s"
            )
    return results


def main() -> None:
    """Measure and write the results file; in a child, measure itself."""
    options = parse()
    quiet_libraries()
    if options.child:
        print(json.dumps(count_activations(options) if options.child == "count" else child(options)))
        return
    family = open_source("builtin:two-digits").family
    shown = {k: v for k, v in vars(options).items() if k not in ("child", "folder")}
    results = {"options": shown | {"threads": torch.get_num_threads()}, "bar": BAR, **measure(options, family, print)}
    print(write_results("streamed", results))


if __name__ == "__main__":
    main()
