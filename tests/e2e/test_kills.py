"""Runs that are killed anywhere and go on to the same end: in this process at every kind of write, and the real process by signals.

What is killed in this process dies at one of its writes: from that moment on nothing reaches the disk any more, not
even what `finally` would clean up, and of the file that was just being settled only half is there.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import kills
from ppclc import compiler, plugins, records
from ppclc.backends import ExportRequest
from ppclc.compiler import PASSES, compress
from ppclc.machine.interrupts import SIGNALS, noted_interrupts, terminate_as_interrupt
from ppclc.plan import CompressionPlan
from ppclc.recipe import Recipe, parse_recipe
from ppclc.records import digest_of, file_digest
from ppclc.run import Run
from ppclc.screens.display import Display

WRITES = {"settle", "open", "os.rename", "os.mkdir", "os.remove", "shutil.rmtree", "shutil.copyfile"}
TRAININGS = ("interval", "text", "ffn", "finetune")
DISTILL = 1 + PASSES.index("distill")
WEIGHTS = "model/transformer/diffusion_pytorch_model.safetensors"


class Killed(BaseException):
    """The process is gone."""


@dataclass
class Power:
    """Counts what is written below a folder, by pass, and goes off at a chosen write of a chosen pass or the first one after it.

    only: the kind of write that counts and what its path must hold, None for all.
    """

    folder: Path | None = None
    at: tuple[int, int] | None = None
    only: tuple[str, str] | None = None
    gone: bool = False
    passing: int = 0
    counts: dict[int, int] = field(default_factory=dict)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None or event not in WRITES:
            return
        path = os.fspath(args[0]) if isinstance(args[0], str | os.PathLike) else ""
        if not path.startswith(str(self.folder)) or (event == "open" and not _writing(args[1], args[2])):
            return
        if self.gone:
            raise Killed
        if self.only and not (event == self.only[0] and self.only[1] in path):
            return
        self.counts[self.passing] = self.counts.get(self.passing, 0) + 1
        if self.at and (self.passing, self.counts[self.passing]) >= self.at:
            self.gone = True
            if event == "settle":
                os.truncate(path, os.path.getsize(path) // 2)
            raise Killed


def _writing(mode: str | None, flags: int) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) or (mode is not None and mode.strip("rbt") != "")


POWER = Power()
sys.addaudithook(lambda event, args: POWER.hook(event, args))  # cannot be taken away again; without a folder it does nothing


class Passes(Display):
    """A display that tells the power which pass is running."""

    def __init__(self) -> None:
        super().__init__(len(PASSES), -1)

    def stage(self, name: str) -> Any:
        POWER.passing = 1 + PASSES.index(name)
        return super().stage(name)


def run_until_killed(
    recipe: Recipe, out: Path, at: tuple[int, int] | None, only: tuple[str, str] | None = None, until: str = "report"
) -> Run | None:
    """A run that dies at the write `at` (pass, number), None if it did."""
    POWER.folder, POWER.at, POWER.only, POWER.gone, POWER.passing, POWER.counts = out, at, only, False, 0, {}
    try:
        with pytest.MonkeyPatch.context() as patch:
            # Tensors are not written by Python, so that what is half there is the file that is about to be settled.
            patch.setattr(records, "_settle", lambda file: POWER.hook("settle", (file,)))
            return compress(recipe, "tiny", out, Passes(), until)
    except Killed:
        return None
    finally:
        POWER.folder = None


@pytest.fixture(scope="module")
def recipe(make_teacher: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Every kind of edit on four blocks: what takes time is to lower them."""
    folder = tmp_path_factory.mktemp("four")
    make_teacher(4).save_pretrained(folder / "transformer")
    document = {
        "model": {"path": str(folder)},
        "calibrate": {"source": "noise", "samples": 16, "longest": 4},
        "analyze": {"probes": 16, "supernet_steps": 2, "supernet_sets": 2, "trials": 2, "trial_steps": 3},
        "target": {"parameters": 0.8},
        "plan": {"intervals": [[1, 2]], "text_stream": [3], "ffn": [{"block": 1, "stream": "image"}], "modulation_rank": 8},
        "distill": {"steps": 6, "width_steps": 12, "finetune_steps": 6, "batch": 2, "checkpoint_every": 1},
        "export": [{"backend": "onnx"}],
        "bench": {"runs": 2},
    }
    return parse_recipe(document, "here")


@pytest.fixture(scope="module")
def lowered_once() -> Iterator[None]:
    """ONNX files are lowered once for the same weights, and written again from then on: that is all that takes long."""
    backend = plugins.load("backends", "onnx")
    known: dict[str, tuple[dict[str, bytes], Any]] = {}
    export = backend.export

    def remembered(request: ExportRequest) -> Any:
        key = digest_of([[k, v.tolist()] for k, v in sorted(request.module.state_dict().items())])
        if key not in known:
            before = {p for p in request.out.rglob("*") if p.is_file()}
            written = export(request)
            files = {str(p.relative_to(request.out)): p.read_bytes() for p in request.out.rglob("*") if p.is_file() and p not in before}
            known[key] = files, written
        for name, content in known[key][0].items():
            (request.out / name).parent.mkdir(parents=True, exist_ok=True)
            (request.out / name).write_bytes(content)
        return known[key][1]

    object.__setattr__(backend, "export", remembered)
    logging.disable(logging.DEBUG)  # torch tells every step of lowering, and pytest would keep it
    yield
    logging.disable(logging.NOTSET)
    object.__setattr__(backend, "export", export)


@pytest.fixture(scope="module")
def unbroken(recipe: Recipe, lowered_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, int]]:
    """The folder of a run that nothing stopped, and what it wrote in each pass."""
    out = tmp_path_factory.mktemp("kills") / "whole"
    assert run_until_killed(recipe, out, None)
    return out, dict(POWER.counts)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
def test_a_run_killed_in_every_pass_ends_as_if_it_had_not_been(
    recipe: Recipe, unbroken: tuple[Path, dict[int, int]], tmp_path: Path, seed: int
) -> None:
    """Each pass is killed at random writes, first where it is fresh, then on what the kill left; each training at checkpoints too."""
    whole, counts = unbroken
    rng, fell, trainings = random.Random(seed), [], set()
    for number in range(len(PASSES) + 1):
        chosen: list[tuple[int, tuple[str, str] | None]] = []
        if number == DISTILL:  # each training at two of its checkpoints, with one behind it
            chosen += [(rng.randint(2, 3), ("settle", f"/.{kind}-")) for kind in TRAININGS for _ in range(2)]
        chosen += [(rng.randint(1, max(1, counts[number] // n)), None) for n in (1, 3)]
        for count, only in chosen:
            if run_until_killed(recipe, tmp_path / "out", (number, count), only) is None:
                fell.append(POWER.passing)
                check_nothing_half(tmp_path / "out")
                trainings |= {p.parent.name[1:].split("-")[0] for p in tmp_path.glob("out/records/.*.work/checkpoint.safetensors")}
    assert set(fell) == set(range(len(PASSES) + 1)) == set(counts)
    assert trainings == set(TRAININGS)  # each was stopped with a checkpoint behind it
    last = run_until_killed(recipe, tmp_path / "out", None)
    assert last
    check_same_end(tmp_path / "out", whole)
    assert kills.left_behind(tmp_path / "out") == []


def check_same_end(out: Path, whole: Path) -> None:
    got, wanted = load_file(out / WEIGHTS), load_file(whole / WEIGHTS)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(v, got[k]) for k, v in wanted.items())
    assert kills.outcome(out) == kills.outcome(whole)


def check_nothing_half(out: Path) -> None:
    """What stands under its own name is whole: records are read, listed files are what they were, plans parse."""
    for folder in (out / "records").glob("[a-z]*-*"):
        if (folder / "record.json").is_file():
            record = json.loads((folder / "record.json").read_text("utf-8"))
            json.loads((folder / "stage.json").read_text("utf-8"))
            if (folder / "tensors.safetensors").exists():
                load_file(folder / "tensors.safetensors")
            home = Path(record["folder"]) if "folder" in record else out / "model"
            for name, digest in record.get("files", {}).items():
                assert file_digest(home / name) == digest
        else:
            assert (folder / "export.json").is_file(), folder
    if (out / "plan.json").exists():
        CompressionPlan.read(out / "plan.json")
    if (out / "report.json").exists():
        json.loads((out / "report.json").read_text("utf-8"))


@pytest.mark.slow
def test_a_kill_between_two_plans_makes_none_of_them_a_persons_edit(recipe: Recipe, tmp_path: Path) -> None:
    """A recipe that changed, and a run that dies at either copy of the new plan: an older plan is not taken for an edit."""
    other = recipe.model_copy(update={"plan": recipe.plan.model_copy(update={"intervals": [[0, 1]], "ffn": "none"})})
    analyze = 1 + PASSES.index("analyze")
    assert run_until_killed(recipe, tmp_path / "first", None, until="analyze")
    shutil.copytree(tmp_path / "first", tmp_path / "whole")
    wanted = run_until_killed(other, tmp_path / "whole", None, ("settle", ""), "analyze")
    assert wanted
    settled = POWER.counts[analyze]
    for n in (settled - 1, settled):
        out = Path(shutil.copytree(tmp_path / "first", tmp_path / str(n)))
        assert run_until_killed(other, out, (analyze, n), ("settle", ""), "analyze") is None
        again = run_until_killed(other, out, None, until="analyze")
        assert again
        assert again.plan == wanted.plan == CompressionPlan.read(out / "plan.json") == CompressionPlan.read(out / "records" / "plan.json")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_last_look_is_not_lost(number: int) -> None:
    def block() -> None:
        with noted_interrupts() as interrupt:
            os.kill(os.getpid(), number)
            assert interrupt.asked

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        block()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_swallows_ends_the_run_after_its_pass(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    calibrate, before = compiler.calibrate, [signal.getsignal(n) for n in SIGNALS]

    def swallowing(*given: Any) -> None:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        calibrate(*given)

    monkeypatch.setattr(compiler, "calibrate", swallowing)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    terminate_as_interrupt()
    try:
        with pytest.raises(KeyboardInterrupt):
            compress(recipe, "tiny", tmp_path, Display(2, -1), "analyze")
    finally:
        terminate_as_interrupt()  # forgets the signal
        for n, handler in zip(SIGNALS, before, strict=True):
            signal.signal(n, handler)
    assert [p.name.split("-")[0] for p in (tmp_path / "records").glob("*-*")] == ["calibrate"]


# -- the real process --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A folder with an unbroken run of the small recipe, and what its passes took."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "kills.yaml").write_text(kills.RECIPE)
    whole = kills.Compiling(folder, "whole")
    assert whole.wait() == 0, "".join(whole.words)
    return folder, whole.seconds()


Strike = Callable[[str, signal.Signals, list[tuple[str, float]]], list[kills.Kill]]


@pytest.fixture
def strike(real: tuple[Path, dict[str, float]]) -> Strike:
    """Kill a run at some moments, one after the other, then let it end and compare it with the unbroken one."""
    folder, seconds = real

    def struck(out: str, number: signal.Signals, moments: list[tuple[str, float]]) -> list[kills.Kill]:
        made = [kills.kill(folder, out, moment, seconds, number) for moment in moments]
        last = kills.Compiling(folder, out)
        assert last.wait() == 0, "".join(last.words)
        check_same_end(folder / out, folder / "whole")
        return made

    return struck


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(7200)
def test_twenty_sigkills_over_all_passes(real: tuple[Path, dict[str, float]], strike: Strike) -> None:
    made = strike("killed", signal.SIGKILL, kills.moments(real[1], 20, seed=3))
    assert sum(k.exit_code == -signal.SIGKILL for k in made) >= 15
    assert {k.fell_in for k in made} >= {"analyze", "distill", "export"}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_end_in_exit_code_130(real: tuple[Path, dict[str, float]], strike: Strike, number: signal.Signals) -> None:
    moments = kills.moments(real[1], 0, seed=int(number), each=1, stages=PASSES)
    made = strike(number.name, number, moments)
    assert {k.exit_code for k in made} <= {130, 0}  # 0: the run was over before the signal came
    assert sum(k.exit_code == 130 for k in made) >= 5
