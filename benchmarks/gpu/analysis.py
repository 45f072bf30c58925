"""The analysis and a step of distillation at a real block's size, by the code that does them: what each part takes, and what it takes of memory.

A teacher of a few blocks at Qwen-Image's own width, random weights, on the GPU; noise at 1328 x 1328 pixels with 512 text tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.ladder import Pool, Rung, stand
from benchmarks.gpu.measuring import NotRun, Proof, Row, kernels, kernels_here, reclaim, rows_of, synchronize
from ppclc import plugins
from ppclc.analysis.moments import Moments
from ppclc.data.samples import Sample, moved
from ppclc.families import Family
from ppclc.loading.published import published_config
from ppclc.machine.devices import Ranks
from ppclc.passes.calibrate import CalibrateSettings, Calibration, Piece, by_timestep, far_every
from ppclc.plan import CompressionPlan
from ppclc.teachers import ResidentTeacher
from ppclc.training.local_edits import BatchStates, Teaching, Weights, interval_edit
from ppclc.training.local_phase import batch_states
from ppclc.training.trainer import Trainer, TrainingSettings

BLOCKS, LONGEST, NARROW = 12, 10, 2
REPEATS, STEPS = 3, 6
SAMPLES, MOST_TOGETHER = 64, {"triton": 12, "torch": 2}
PARTS = ("forward", "loss", "backward", "clip", "optimizer")


@dataclass(frozen=True)
class Sized:
    """Noise for a model at a size in tokens."""

    family: Family
    config: Mapping[str, Any]
    height: int
    width: int
    text: int
    blocks: int
    """Of the whole model."""

    @property
    def tokens(self) -> int:
        """Tokens of a sample, both streams."""
        return self.height * self.width + self.text

    def draw(self, count: int, seed: int) -> Sample:
        """So many samples in rising order of their timesteps."""
        generator = torch.Generator().manual_seed(seed)
        given = self.family.example_inputs(self.config, count, self.height, self.width, self.text, generator)
        return by_timestep((given.pop("hidden_states"), given.pop("timestep"), given))


def sized(proof: Proof, blocks: int = BLOCKS) -> tuple[Sized, ResidentTeacher]:
    """The size, and a teacher of so many blocks on the device."""
    if proof.tiny:
        family: Family = plugins.load("families", "qwen_image")
        config = {**family.tiny_config, "_class_name": family.class_name, "num_layers": blocks}
        size = Sized(family, config, 4, 6, 5, blocks)
    else:
        family, config = published_config("Qwen/Qwen-Image")
        size = Sized(family, config | {"num_layers": blocks}, 83, 83, 512, config["num_layers"])
    pool: Pool = {}
    return size, ResidentTeacher(stand(size.family, Rung("", size.config), pool, proof).model, size.family)


def analysis(proof: Proof) -> list[Row]:
    """Rows of the calibration, then of a distillation step, with kernels and without."""
    size, teacher = sized(proof)
    ways = ["torch"] if kernels_here() == "torch" else ["auto", "triton", "torch"]
    kinds: dict[str, Callable[..., list[Row]]] = {"calibration": calibration, "distillation step": distillation}
    cases: list[tuple[Row, Callable[[], Sequence[Row]]]] = [
        ({"what": what, "kernels": way, "tokens": size.tokens}, partial(run, proof, size, teacher, way))
        for what, run in kinds.items()
        for way in ways
        if way != "auto" or what == "distillation step"  # calibrations have the same of both
    ]
    if "triton" not in ways:
        cases.append(({"what": "calibration and distillation", "kernels": "triton"}, partial(_no_kernels, proof)))
    rows = rows_of(proof, cases)
    if all("not_run" in row for row in rows):
        raise NotRun("; ".join(row["not_run"] for row in rows))
    return rows


def _no_kernels(proof: Proof) -> list[Row]:
    from ppclc.kernels import lacks

    raise NotRun(lacks())


def calibration(proof: Proof, size: Sized, teacher: ResidentTeacher, way: str) -> list[Row]:
    """Samples through the teacher: forwards alone, with near moments, with near and far ones; milliseconds a block and sample, and shares of the forward.

    As many samples together as `calibrate` takes, and of those with far moments as large a share as it has by default. `analysis_share_of_forward` is
    of the whole model: what relates two states is measured by windows of two lengths, and counted as often as that model has such pairs; sums on
    their way to the CPU are waited for once a pass, and not once for these few blocks.
    """
    proof.needs(20)
    blocks, settings = teacher.num_blocks, CalibrateSettings()
    tokens, every = settings.tokens, far_every(settings.samples)
    sample = teacher.parts(size.draw(SAMPLES, 1))[0]
    samples = len(sample[1])

    def forwards() -> None:
        for _, sweep in teacher.sweep([sample], range(blocks + 1)):
            sweep.states.clear()

    def summed(sums: Moments) -> None:
        Calibration(teacher, LONGEST, sums, 1, _quiet, tokens).add([Piece(sample, 0, False)])

    def far(sums: Moments, longest: int) -> tuple[float, float]:
        """Seconds of a piece in a lot of them, and seconds that the last of their sums are waited for afterwards."""
        start = time.perf_counter()
        Calibration(teacher, longest, sums, 1, _quiet, tokens).add([one] * together)
        synchronize(proof.device)
        passed = time.perf_counter()
        sums.copies.wait()
        return (passed - start) / together, time.perf_counter() - passed

    with kernels(way):
        forward = _median_s(forwards, proof)
        sums = Moments()
        near = _median_s(partial(summed, sums), proof)
        peak = _peak(proof)
        drain = _drained_s(sums, proof)
        proof.say(f"calibration, {way}: forwards {forward:.3f} s, with near moments {near:.3f} s")
        del sums
        one = Piece(sample, 0, True)
        together = min(MOST_TOGETHER[way], Calibration(teacher, LONGEST, Moments(), 1, _quiet, tokens).far_together(one))
        narrow_sums, sums = Moments(), Moments()
        far(narrow_sums, NARROW)
        narrow, _ = far(narrow_sums, NARROW)
        first, _ = far(sums, LONGEST)  # into fresh memory of the CPU
        later, last = far(sums, LONGEST)
    del narrow_sums, sums
    reclaim()
    lots = max(1.0, settings.samples / every / samples / together)
    cross = max(0.0, later - narrow) / (crosses(blocks, LONGEST) - crosses(blocks, NARROW))
    missing = crosses(size.blocks, LONGEST) / size.blocks - crosses(blocks, LONGEST) / blocks
    steady = (first / lots + later * (1 - 1 / lots) - near) / blocks + cross * missing + last / together / size.blocks
    return [
        {
            "blocks": blocks,
            "samples": samples,
            "forward_ms_a_block": 1e3 * forward / blocks / samples,
            "near_ms_a_block": 1e3 * (near - forward) / blocks / samples,
            "far_ms_a_block": 1e3 * steady / samples,
            "far_every": every,
            "far_together": together,
            "a_cross_ms": 1e3 * cross / samples,
            "first_lot_s": first * together,
            "later_lot_s": later * together,
            "waited_for_last_sums_s": last,
            "near_share_of_forward": (near - forward) / forward,
            "analysis_share_of_forward": ((near - forward) / blocks + steady / every) / (forward / blocks),
            "tokens_per_s": samples * size.tokens / near,
            "near_brought_to_cpu_s": drain,
            "peak_bytes": peak,
        }
    ]


def crosses(blocks: int, longest: int) -> int:
    """Pairs of states of a kind that far moments relate, each state with itself too."""
    return sum(min(j, longest) + 1 for j in range(blocks + 1))


def _drained_s(sums: Moments, proof: Proof) -> float:
    """Seconds to bring to the CPU what a whole calibration leaves on the device."""
    start = time.perf_counter()
    sums.drain()
    synchronize(proof.device)
    return time.perf_counter() - start


def _quiet(*_: Any) -> None:
    """Progress that nobody watches."""


def _median_s(run: Callable[[], Any], proof: Proof, repeats: int = REPEATS) -> float:
    """Seconds of a call with the device waited for, the median after one that warms up; peaks of memory are counted anew."""
    run()
    synchronize(proof.device)
    if proof.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        synchronize(proof.device)
        times.append(time.perf_counter() - start)
    return median(times)


def _peak(proof: Proof) -> int:
    return int(torch.cuda.max_memory_allocated()) if proof.is_cuda else 0


@dataclass
class Marks:
    """Moments of a step, by name: events on a GPU, else readings of the clock."""

    is_cuda: bool
    at: dict[str, Any] = field(default_factory=dict)

    def mark(self, name: str) -> None:
        """Set a mark now."""
        if self.is_cuda:
            self.at[name] = torch.cuda.Event(enable_timing=True)
            self.at[name].record()
        else:
            self.at[name] = time.perf_counter()

    def ms(self, first: str, last: str) -> float:
        """Milliseconds between two marks, once the device was waited for."""
        a, b = self.at[first], self.at[last]
        return float(a.elapsed_time(b)) if self.is_cuda else 1e3 * (b - a)


@contextlib.contextmanager
def marked(trainer: Trainer, marks: Marks) -> Iterator[None]:
    """A block in which a trainer's steps leave marks between their parts."""
    clip = trainer.clip

    def clipped() -> Any:
        marks.mark("backward")
        return clip()

    trainer.clip = clipped
    hooks: list[Any] = [
        trainer.module.register_forward_pre_hook(lambda *_: marks.mark("start")),
        trainer.module.register_forward_hook(lambda *_: marks.mark("forward")),
        trainer.optimizer.register_step_pre_hook(lambda *_: marks.mark("clip")),
        trainer.optimizer.register_step_post_hook(lambda *_: marks.mark("optimizer")),
    ]
    try:
        yield
    finally:
        trainer.clip = clip
        for hook in hooks:
            hook.remove()


def distillation(proof: Proof, size: Sized, teacher: ResidentTeacher, way: str) -> list[Row]:
    """Steps of one interval's block: what the teacher takes for its batch, and each part of the step; `Trainer` and `interval_edit` as they are."""
    proof.needs(12)
    plan = CompressionPlan.of(size.family.name, teacher.num_blocks, [(1, 2)])
    teaching = Teaching(size.family, teacher.config, teacher.block_tensors)
    edit = interval_edit(teaching, plan, plan.intervals[0], partial(teacher.block_tensors, 1), Weights())
    samples = [moved(size.draw(1, 2), proof.device)]
    with kernels(way):
        teacher_s = _median_s(lambda: list(teacher.sweep(samples, edit.stops)), proof, 2)
        _, sweep = list(teacher.sweep(samples, edit.stops))[-1]
        batch = batch_states(size.family, sweep, samples, 0)
        trainer = Trainer(edit.build().train(), STEPS + 2, 1e-5, TrainingSettings(), Ranks(device=proof.device), name=edit.key)
        marks, steps = Marks(proof.is_cuda), list[dict[str, float]]()
        loss = partial(_marked_loss, edit.loss, batch, marks)
        with marked(trainer, marks):
            for number in range(STEPS + 2):
                if number == 2 and proof.is_cuda:
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                trainer.step([loss])
                synchronize(proof.device)
                whole = 1e3 * (time.perf_counter() - start)
                order = ("start", *PARTS)
                steps.append({f"{b}_ms": marks.ms(a, b) for a, b in itertools.pairwise(order)} | {"step_ms": whole})
    middle = {key: median(s[key] for s in steps[2:]) for key in steps[0]}
    learned = sum(p.numel() for p in trainer.parameters.values())
    return [
        {
            "teacher_ms": 1e3 * teacher_s,
            "teacher_blocks": max(edit.stops),
            **middle,
            "tokens_per_s": size.tokens / (middle["step_ms"] / 1e3),
            "learned_parameters": learned,
            "peak_bytes": _peak(proof),
            "final_loss": trainer.losses[-1],
        }
    ]


def _marked_loss(loss: Callable[[nn.Module, BatchStates], Any], batch: BatchStates, marks: Marks, module: nn.Module) -> Any:
    terms = loss(module, batch)
    marks.mark("loss")
    return terms
