"""Several processes: shares of a batch, and runs that `accelerate launch` starts on the CPU, against one process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ppclc import cli
from ppclc.data.batches import Share
from ppclc.data.cache import Cache, open_cache
from ppclc.data.samples import Samples, open_samples, picked
from ppclc.errors import UnavailableError
from ppclc.loading.sources import open_source
from ppclc.machine.devices import Ranks, has_spare_core, launcher_warning, open_ranks
from ppclc.records import Distilled, Job, Store
from ppclc.training.shards import forget_older, newest_step, shard_file
from ppclc.training.trainer import Trainer, TrainingSettings

ROOT = Path(__file__).parents[2]
TWO = ["--multi_gpu", "--num_processes", "2"]
LAUNCHERS = {"copies": TWO, "sharded": ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"]}
REST = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
RECIPE = """
model: {path: "builtin:two-digits"}
calibrate: {samples: 64, longest: 2}
plan: {intervals: [[3, 4], [6, 7], [9, 10]], text_stream: none, ffn: [{block: 1, stream: image}], modulation_rank: none}
distill: {steps: 0, width_steps: 0, finetune_steps: 14, batch: 8, checkpoint_every: 4}
"""
EDITS = ["interval-3-4", "interval-6-7", "interval-9-10", "ffn-1-image"]


@pytest.mark.parametrize(("cores", "processes", "spare"), [({0}, 1, False), ({0, 1}, 1, True), ({0, 1}, 2, False), ({0, 1, 2}, 2, True)])
def test_batches_are_made_ahead_where_a_core_is_left(cores: set[int], processes: int, spare: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert has_spare_core("cpu") is spare
    assert has_spare_core("cuda:0")


def start(launcher: Sequence[str], *args: str) -> subprocess.Popen[str]:
    """`ppclc compress` up to the distillation, in one process, or in as many as a launcher is told to."""
    launched = ["-m", "accelerate.commands.launch", *launcher, *REST] if launcher else []
    command = [sys.executable, *launched, "-m", "ppclc", "compress", *args, "--until", "distill"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


def run(launcher: Sequence[str], *args: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    process = start(launcher, *args)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def curve(out: Path, name: str = "finetune") -> list[dict[str, float]]:
    path = out / "curves" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tensors(out: Path, name: str = "finetune") -> dict[str, torch.Tensor]:
    (found,) = (out / "records").glob(f"{name}-*/tensors.safetensors")
    return load_file(found)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in curve(out)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


# -- shares ------------------------------------------------------------------------------------------------------------


def cached_samples(folder: Path, latents: bool, teacher: Any) -> Samples:
    source = open_source("builtin:two-digits")
    g = torch.Generator().manual_seed(0)
    rows = {"encoder_hidden_states": torch.randn(40, 5, 32, generator=g)}
    if latents:
        rows["latents"] = torch.randn(40, 32, 12, generator=g)
    rows["encoder_hidden_states_mask"] = torch.arange(5)[None] < torch.arange(40)[:, None] % 5 + 1
    save_file(rows, folder / "rows.safetensors", metadata={"height": "4", "width": "8"})
    return open_samples("cached", source, teacher, "train", open_cache(str(folder / "rows.safetensors"), source))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "noise", "latents", "prompts"])
def test_shares_of_a_batch_are_its_rows_and_leave_the_generator_alike(kind: str, tmp_path: Path) -> None:
    def teacher(**given: Any) -> tuple[torch.Tensor]:
        seen.append(len(given["timestep"]))
        return (given["hidden_states"] * given["timestep"][:, None, None] + given["encoder_hidden_states"].sum((1, 2))[:, None, None],)

    seen: list[int] = []
    source = open_source("builtin:two-digits")
    cached = kind in ("latents", "prompts")
    samples = cached_samples(tmp_path, kind == "latents", teacher) if cached else open_samples(kind, source, teacher, "train")  # type: ignore[arg-type]
    generators = [torch.Generator().manual_seed(4) for _ in range(4)]
    for _ in range(2):
        (x, t, known), target = samples.draw_with_target(12, generators[3])
        seen.clear()
        parts = [samples.draw_with_target(12, generators[r], Share(r, 3)) for r in range(3)]
        assert all(torch.equal(g.get_state(), generators[3].get_state()) for g in generators)
        assert all(rows <= 4 for rows in seen)  # of its share, and of prompts only those that go on
        assert torch.equal(torch.cat([p[0][1] for p in parts]), t)
        assert torch.allclose(torch.cat([p[0][0] for p in parts]), x, atol=1e-5)
        if target is not None:
            assert torch.equal(torch.cat([p[1] for p in parts if p[1] is not None]), target)
        for n, ((_, _, own), _) in enumerate(parts):
            assert own.keys() <= known.keys()
            assert own["img_shapes"] == known["img_shapes"][n * 4 : n * 4 + 4]
            text = own["encoder_hidden_states"]  # padded to the longest of its own rows
            assert torch.equal(text, known["encoder_hidden_states"][n * 4 : n * 4 + 4, : text.shape[1]])


def test_only_a_shares_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = cached_samples(tmp_path, True, None)
    read: list[list[int]] = []
    whole = Cache.read

    def noted(cache: Cache, rows: list[int]) -> dict[str, torch.Tensor]:
        read.append(rows)
        return whole(cache, rows)

    monkeypatch.setattr(Cache, "read", noted)
    for share in (Share(), Share(0, 2), Share(1, 2)):
        samples.draw(6, torch.Generator().manual_seed(1), share)
    assert read[1] + read[2] == read[0]


def test_a_batch_is_not_shared_out_unevenly() -> None:
    assert [list(Share(r, 3).of(6)) for r in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="multiple"):
        Share(0, 3).of(7)


def test_rows_are_picked_of_all_that_is_as_long_as_the_batch() -> None:
    known = {"a": torch.arange(4), "b": list("abcd"), "c": torch.tensor(7), "d": torch.zeros(3), "e": "four"}
    x, t, own = picked((torch.arange(8).view(4, 2), torch.arange(4), known), [2, 0])
    assert (x.tolist(), t.tolist()) == ([[4, 5], [0, 1]], [2, 0])
    assert (own["a"].tolist(), own["b"], own["c"].item(), len(own["d"]), own["e"]) == ([2, 0], ["c", "a"], 7, 3, "four")


# -- ranks, in one process ---------------------------------------------------------------------------------------------


def test_one_process_is_alone() -> None:
    ranks, module = Ranks(), nn.Linear(2, 2)
    ranks.wait()
    assert (ranks.is_main, ranks.any(True), ranks.any(False), ranks.mean([1.5]), ranks.told("x")) == (True, True, False, [1.5], "x")
    assert ranks.mine([1, 2, 3]) == [1, 2, 3]
    assert ranks.prepared(module, []) is module
    assert ranks.leave() == ranks
    assert [Ranks(r, 2).mine([1, 2, 3]) for r in range(2)] == [[1, 3], [2]]


def test_a_launcher_that_starts_one_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_CPU", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launcher_warning() is None
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "--multi_gpu" in (launcher_warning() or "")


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "FSDP_OFFLOAD_PARAMS"])
def test_what_is_not_done_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UnavailableError, match="launcher asks for"):
        open_ranks()


class Told(Ranks):
    """A rank of two whose fellow is always there; `left` is what the main rank says."""

    left: Any = None

    def wait(self) -> None:
        """The fellow is there."""

    def told(self, value: Any) -> Any:
        return value if self.is_main else self.left


def test_a_store_builds_on_the_ranks_that_are_named(tmp_path: Path) -> None:
    built: list[str] = []

    def make(rank: int, on: Any) -> list[Distilled]:
        ranks = Told(rank, 2)
        object.__setattr__(ranks, "left", [0, 1, 2])
        jobs = [Job(f"{on}-{n}", 1, {}, ()) for n in range(3)]

        def build(left: list[int], works: list[Path]) -> list[Distilled]:
            built.append(f"{on} {rank} {left}")
            return [Distilled(edit=f"{rank}", steps=0, losses=[], tensors={"x": torch.ones(1)}) for _ in left]

        return Store(tmp_path, ranks=ranks).make_all(Distilled, jobs, build, "distill", on=on)

    for on in ("main", "all"):
        assert [d.edit for d in make(0, on)] == ["0"] * 3
        assert len(make(1, on)) == 3
    with pytest.raises(Exception, match="each-1"):  # the other rank's is not there yet
        make(0, "each")
    assert [d.edit for d in make(1, "each")] == ["0", "1", "0"]
    assert built == ["main 0 [0, 1, 2]", "all 0 [0, 1, 2]", "all 1 [0, 1, 2]", "each 0 [0, 2]", "each 1 [1]"]


def test_shards_of_a_step_count_only_together(tmp_path: Path) -> None:
    ranks = [Told(r, 2, sharded=True) for r in range(2)]
    assert newest_step(tmp_path, ranks[0]) is None
    for step, rank in ((4, 0), (4, 1), (8, 0)):
        shard_file(tmp_path, step, ranks[rank]).touch()
    assert [newest_step(tmp_path, r) for r in ranks] == [4, 4]
    shard_file(tmp_path, 8, ranks[1]).touch()
    assert newest_step(tmp_path, ranks[1]) == 8
    for r in ranks:
        forget_older(tmp_path, 8, r)
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"checkpoint-8-{r}-of-2.safetensors" for r in range(2)]
    for other in (Told(0, 3, sharded=True), Ranks()):
        with pytest.raises(UnavailableError, match="sharded over 2 processes"):
            newest_step(tmp_path, other)
    trainer = Trainer(nn.Linear(2, 2), 4, 0.1, TrainingSettings())
    with pytest.raises(UnavailableError, match="sharded over 2 processes"):
        trainer.load(tmp_path / "checkpoint.safetensors")


# -- runs of two processes ---------------------------------------------------------------------------------------------

MORE = ["--set", "distill.accumulate=2", "--set", "distill.ema=0.5"]
LOCAL = ["--set", "distill.steps=3", "--set", "distill.width_steps=2", "--set", "distill.local_batch=4"]
"""A local phase, which has one batch for all ranks: edits, not samples, are spread over them."""


@pytest.fixture(scope="module")
def alone(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with twice the batch, two micro-batches a step, and an average."""
    out = tmp_path_factory.mktemp("alone") / "out"
    code, _, err = run((), recipe, "-o", str(out), "--set", "distill.batch=16", *MORE, *LOCAL)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def together(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str, str]]:
    """Output folder, standard output and standard error of two processes' run, by how they share the model."""

    @cache
    def ran(kind: str) -> tuple[Path, str, str]:
        folder = tmp_path_factory.mktemp(kind)
        code, out, err = run(LAUNCHERS[kind], recipe, "-o", str(folder), "--json", *MORE, *LOCAL)
        assert code == 0, err
        return folder, out, err

    return ran


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("kind", LAUNCHERS)
def test_two_processes_train_as_one_with_twice_the_batch(kind: str, alone: Path, together: Callable[[str], tuple[Path, str, str]]) -> None:
    """Edits, spread over the ranks, come out as in one process; so does the fine-tune, up to the order of sums."""
    both, out, err = together(kind)
    assert len(out.splitlines()) == 1  # one rank speaks
    assert json.loads(out)["plan"]["intervals"][0] == {"first": 3, "last": 4}
    assert len(re.findall(r"^\[3/3\] distill: \d+\.\d s$", err, re.MULTILINE)) == 1, err
    for key in EDITS:
        one, two = tensors(alone, key), tensors(both, key)
        assert one.keys() == two.keys()
        assert all(torch.equal(v, two[k]) for k, v in one.items()), key
        assert [r["loss"] for r in curve(both, key)] == [r["loss"] for r in curve(alone, key)] != []
    assert losses(both) == pytest.approx(losses(alone), rel=1e-5)
    assert len(losses(alone)) == 14
    ours, theirs = tensors(both), tensors(alone)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(v, theirs[k], rtol=1e-4, atol=1e-5) for k, v in ours.items())
    assert not list((both / "records").glob(".*"))


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    import psutil

    return sorted(p.pid for p in psutil.Process(launcher.pid).children())


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("kind", LAUNCHERS)
def test_a_stop_on_one_rank_stops_all_and_resumes_to_the_same_bits(
    kind: str, recipe: str, together: Callable[[str], tuple[Path, str, str]], tmp_path: Path
) -> None:
    args = [recipe, *MORE, *LOCAL, "-o", str(tmp_path / "parts")]
    process = start(LAUNCHERS[kind], *args)
    while len(curve(tmp_path / "parts")) < 6 and process.poll() is None:
        time.sleep(0.05)
    os.kill(workers(process)[-1], signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err  # the launcher's own; the rank that was asked gave 130
    assert "exitcode  : 130" in err
    done = len(curve(tmp_path / "parts"))
    assert 6 <= done < 14
    (work,) = (tmp_path / "parts" / "records").glob(".finetune-*.work")
    assert any(str(done) in f.name or f.name == "checkpoint.safetensors" for f in work.iterdir())
    code, _, err = run(LAUNCHERS[kind], *args)
    assert code == 0, err
    unbroken, _, _ = together(kind)
    assert losses(tmp_path / "parts") == losses(unbroken)
    whole = tensors(unbroken)
    assert all(torch.equal(v, whole[k]) for k, v in tensors(tmp_path / "parts").items())


@pytest.mark.long
@pytest.mark.slow
def test_an_error_on_one_rank_ends_all(recipe: str, tmp_path: Path) -> None:
    """Before the others have begun, and, in the middle of training, without a word."""
    begun = time.monotonic()
    code, _, err = run(TWO, recipe, "-o", str(tmp_path), "--set", "model.path=nowhere")
    assert code == 1
    assert err.count("ppclc: nowhere") + err.count("nowhere:") >= 1
    assert time.monotonic() - begun < 120
    process = start(TWO, recipe, "-o", str(tmp_path / "out"), "--set", "distill.finetune_steps=1000")
    while len(curve(tmp_path / "out")) < 2 and process.poll() is None:
        time.sleep(0.05)
    os.kill(workers(process)[0], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1


def test_help_knows_nothing_of_ranks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher's environment changes no command that does not train."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["ppclc", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "compress" in capsys.readouterr().out
