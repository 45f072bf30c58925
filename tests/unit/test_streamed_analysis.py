"""Calibration and analysis of a teacher that is never in memory as a whole: what a resident one gives, from one block at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ppclc import run, teachers
from ppclc.analysis import moments
from ppclc.analysis.closed_forms import Probes
from ppclc.analysis.edit_costs import EditCosts
from ppclc.analysis.journal import Journal
from ppclc.analysis.moments import near_of
from ppclc.compiler import compress
from ppclc.data.samples import Samples, open_samples
from ppclc.families import STREAMS
from ppclc.loading.sources import Source, open_source
from ppclc.models import load_source
from ppclc.passes import calibrate as calibrate_pass
from ppclc.passes.analyze import probe_set
from ppclc.passes.calibrate import CalibrateSettings, calibrate
from ppclc.plan import CompressionPlan
from ppclc.recipe import parse_recipe
from ppclc.records import CalibrationStats, Store
from ppclc.screens.display import Display
from ppclc.teachers import ResidentTeacher, StreamedTeacher, Teacher
from tests.unit.test_reach import mapped_sums

BLOCKS = 6
SETTINGS = CalibrateSettings(samples=150, longest=3)


def quiet(*_: Any) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def source(teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("sharded")
    teacher.save_pretrained(folder / "transformer", max_shard_size="100KB")
    return open_source(str(folder))


@pytest.fixture(scope="module")
def noise(source: Source) -> Samples:
    return open_samples("auto", source, None, "train")


@pytest.fixture
def resident(source: Source) -> Teacher:
    return ResidentTeacher(load_source(source), source.family)


@pytest.fixture
def streamed(source: Source) -> StreamedTeacher:
    return StreamedTeacher(source, "float32")


@pytest.fixture(scope="module")
def stats(source: Source, noise: Samples) -> CalibrationStats:
    return calibrate(ResidentTeacher(load_source(source), source.family), noise, SETTINGS, quiet)


def deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


# -- calibrate ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_moments_are_those_of_a_resident_teacher(
    stats: CalibrationStats, streamed: StreamedTeacher, resident: Teacher, noise: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "LARGE_BYTES", 1)
    found = calibrate(streamed, noise, SETTINGS, quiet, tmp_path)
    if sys.platform == "linux":  # sums of groups are in memory
        assert mapped_sums(tmp_path) == len([t for t in stats.tensors if not t.startswith(("image.", "text."))])
    assert found.model_dump(exclude={"tensors", "moment_seconds"}) == stats.model_dump(exclude={"tensors", "moment_seconds"})
    assert found.tensors.keys() == stats.tensors.keys()
    for name, wanted in stats.tensors.items():
        assert found.tensors[name].dtype == torch.float64
        assert deviation(found.tensors[name], wanted) < 1e-5, name  # float32 products over other batches
    # And to the bit where the resident one takes a state at a time too.
    monkeypatch.setattr(calibrate_pass, "TOGETHER", 0)
    streamed.held_bytes = 1
    found = calibrate(streamed, noise, SETTINGS, quiet, tmp_path)
    again = calibrate(resident, noise, SETTINGS, quiet)
    assert all(torch.equal(found.tensors[n], again.tensors[n]) for n in again.tensors)


@pytest.mark.slow
def test_blocks_are_read_once_for_as_many_samples_as_may_be_held(
    streamed: StreamedTeacher, noise: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    own = StreamedTeacher.block
    monkeypatch.setattr(StreamedTeacher, "block", lambda self, n: (read.append(n) if self._held != n else None, own(self, n))[1])
    calibrate(streamed, noise, SETTINGS, quiet)
    assert read == list(range(BLOCKS))
    read.clear()
    streamed.held_bytes = 1
    calibrate(streamed, noise, SETTINGS, quiet)
    assert read == 3 * list(range(BLOCKS))  # batches of 64, 64 and 22


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_large_states_pass_in_parts(
    kind: str, stats: CalibrationStats, noise: Samples, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    teacher = request.getfixturevalue(kind)
    sample = noise.draw(64, torch.Generator().manual_seed(0))
    monkeypatch.setattr(teachers, "PASSING_BYTES", 10 * teacher.state_bytes(sample))
    parts = teacher.parts(sample)
    assert [len(t) for _, t, _ in parts] == [10, 10, 10, 10, 10, 10, 4]
    assert torch.equal(torch.cat([x for x, _, _ in parts]), sample[0])
    found = calibrate(teacher, noise, SETTINGS, quiet)
    assert found.rows == stats.rows
    assert all(deviation(found.tensors[n], t) < 1e-5 for n, t in stats.tensors.items())


def test_probes_keep_few_matrices_and_are_the_same_when_made_again(stats: CalibrationStats, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = Probes(near_of(stats.tensors, stats.rows, "image", BLOCKS), 1e-4)
    first = [probes.step(i).clone() for i in range(BLOCKS)]
    monkeypatch.setattr("ppclc.analysis.closed_forms.KEPT_PROBES", 2)
    probes = Probes(probes.near, 1e-4)
    again = [probes.step(i) for i in (*range(BLOCKS), 0)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=False))
    assert torch.equal(again[-1], first[0])
    assert len(probes.kept) == 2


# -- costs -------------------------------------------------------------------------------------------------------------

WIDE = [
    CompressionPlan.of("qwen_image", BLOCKS, [], [4, 5], None, True),
    CompressionPlan.of("qwen_image", BLOCKS, [], [3, 4], None, False),
    CompressionPlan.of("qwen_image", BLOCKS, [], [], 8, True),
    CompressionPlan.of("qwen_image", BLOCKS, [], [], 4, False),
    CompressionPlan.of("qwen_image", BLOCKS, ffn=[(2, "text"), (4, "image")]),
]


def every_cost(costs: EditCosts) -> dict[str, torch.Tensor]:
    spans = [(u, v) for u in range(BLOCKS) for v in range(u + 1, min(u + 3, BLOCKS))]
    found = {f"interval {s} {kept}": e for s, (e, kept) in costs.intervals(spans).items()}
    found |= {f"dropped {b}": e for b, e in enumerate(costs.dropped(range(BLOCKS)))}
    networks = [(b, s) for s in STREAMS for b in (0, 3, 4) if s in costs.family.ffn_streams(costs.teacher.config, b)]
    found |= {f"network {n}": e for n, e in zip(networks, costs.ffns(networks), strict=True)}
    found |= {f"student {n}": e for n, e in enumerate(costs.students(WIDE))}
    cuts = [{(0, 1): 1, (3, 5): 4}, {(2, 3): 2}]
    found |= {f"cut {n}": e for n, e in enumerate(costs.cuts(cuts))} | {
        f"bare cut {n}": e for n, e in enumerate(costs.cuts(cuts, linear=False))
    }
    found |= {f"adapted {s}": costs.adapted(*s)[0] for s in ((0, 1), (2, 4))}
    return found | {"influence": torch.tensor(costs.influences())}


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 4, 1000])
def test_costs_are_those_of_a_resident_teacher_to_the_bit(
    together: int, stats: CalibrationStats, resident: Teacher, streamed: StreamedTeacher, noise: Samples
) -> None:
    probes = probe_set(noise, 80)
    wanted = EditCosts(resident, probes, stats, 1e-4)
    held = sum(x.nbytes for e in wanted.embedded for x in e.states.values())
    streamed.held_bytes = together * held
    costs = EditCosts(streamed, probes, stats, 1e-4)
    assert (wanted.together, costs.together) == (1, together)
    assert torch.equal(costs.energy, wanted.energy)
    found, known = every_cost(costs), every_cost(wanted)
    assert found.keys() == known.keys()
    assert all(torch.equal(found[n], known[n]) for n in known)
    assert costs.spent == wanted.spent
    assert min(e.sum().item() for n, e in known.items() if n != "influence") > 0


def test_a_block_is_read_once_for_detours_that_go_side_by_side(
    stats: CalibrationStats, streamed: StreamedTeacher, noise: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = EditCosts(streamed, probe_set(noise, 32), stats, 1e-4)
    read: list[int] = []
    own = StreamedTeacher.block
    monkeypatch.setattr(StreamedTeacher, "block", lambda self, n: (read.append(n) if self._held != n else None, own(self, n))[1])
    spans = [(u, u + 1) for u in range(BLOCKS - 1)]
    costs.intervals(spans)
    assert read == list(range(BLOCKS))
    read.clear()
    costs.journal = Journal()  # which knew them all
    costs.together = 4  # ten detours, by what they leave: 0 0 1 1, 2 2 3 3, 4 4
    costs.intervals(spans)
    assert read == [*range(BLOCKS), *range(2, BLOCKS), *range(4, BLOCKS)]
    assert streamed._held is None
    assert list(costs._states) == [0, 4]


# -- the chain ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_chain_up_to_distillation_never_loads_the_teacher(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {
        "model": {"path": source.path},
        "calibrate": {"samples": 64, "longest": 3},
        "analyze": {"probes": 16},
        "target": {"parameters": 0.8},
        "plan": {"ffn": "none", "text_stream": [5], "modulation_rank": "none"},
        "distill": {"steps": 2, "width_steps": 2, "finetune_steps": 0, "batch": 4},
    }
    untrained = {**recipe, "analyze": {"probes": 16, "supernet_steps": 0, "trials": 0}}
    whole = compress(parse_recipe(untrained, "whole"), "whole", tmp_path / "whole", Display(2, -1), until="analyze")
    assert "warning: a streamed" not in capsys.readouterr().err
    monkeypatch.setattr(run, "load_source", forbidden)
    recipe["distill"] = {**recipe["distill"], "teacher": "streamed"}
    made = compress(parse_recipe(recipe, "blocks"), "blocks", tmp_path / "blocks", Display(4), until="slice")
    told = capsys.readouterr().err
    assert "warning: a streamed teacher is not trained: no supernet and no trials, the plan is chosen by untrained costs alone" in told
    assert made.plan == whole.plan
    assert made.plan is not None
    assert made.plan.intervals
    assert made.plan.text_stream
    assert made.analysis is not None
    assert not made.analysis.supernet
    assert not made.analysis.trials
    assert (tmp_path / "blocks" / "model" / "transformer" / "config.json").is_file()


def forbidden(*_: Any) -> Callable[..., Any]:
    raise AssertionError("the whole teacher was loaded")


def test_a_large_record_is_read_back_so_that_what_it_was_made_in_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(work: Path) -> CalibrationStats:
        sums = moments.Moments(work)
        sums.accumulate("a", torch.arange(5, dtype=torch.float64))
        assert mapped_sums(work) == (sys.platform == "linux")
        return CalibrationStats(num_blocks=1, longest=1, rows={}, samples=1, tensors=sums.tensors)

    monkeypatch.setattr(moments, "LARGE_BYTES", 1)
    for limit, name in ((1, "large"), (2**28, "small")):
        monkeypatch.setattr("ppclc.records.LARGE_BYTES", limit)
        record = Store(tmp_path).make(CalibrationStats, name, 1, {}, (), made)
        mapped = f"/{name}-" in Path("/proc/self/maps").read_text() and "tensors.safetensors" in Path("/proc/self/maps").read_text()
        assert mapped == (name == "large")
        assert torch.equal(record.tensors["a"], torch.arange(5, dtype=torch.float64))
        del record
