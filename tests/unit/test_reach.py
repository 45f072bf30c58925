"""Far moments by what a recipe can need of them: nothing that an edit asks for is missing, and what is kept is the same as ever."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

from ppclc import cli, records
from ppclc.analysis.budget import PlanSettings
from ppclc.analysis.closed_forms import closed_form_bank, interval_adapters
from ppclc.analysis.device_sums import DeviceSums, HostCopies, Place, Taken
from ppclc.analysis.reach import EVERYTHING, Reach, moment_counts, reach_of
from ppclc.data.samples import Samples, open_samples
from ppclc.errors import PlanError
from ppclc.families import Family
from ppclc.loading.published import published_config
from ppclc.loading.sources import open_source
from ppclc.passes import calibrate as calibrate_pass
from ppclc.passes.calibrate import CalibrateSettings, calibrate
from ppclc.plan import CompressionPlan
from ppclc.recipe import find_recipe, read_recipe
from ppclc.records import CalibrationStats, Store
from ppclc.teachers import ResidentTeacher

SETTINGS = CalibrateSettings(samples=130, longest=4)
FIXED = PlanSettings.model_validate(
    {"intervals": [[1, 2]], "text_stream": [4, 5], "ffn": [{"block": 0, "stream": "image"}], "adapters": [[1, 2]]}
)
FIXED_PLAN = CompressionPlan.of("qwen_image", 6, [(1, 2)], [4, 5], None, True, [(0, "image")], [(1, 2)])


def quiet(*_: Any) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def tiny(teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reach") / "teacher"
    teacher.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def samples(tiny: Path, teacher: Any) -> Samples:
    return open_samples("noise", open_source(str(tiny)), teacher, "choose")


@pytest.fixture(scope="module")
def whole(teacher: Any, family: Family, samples: Samples) -> CalibrationStats:
    return calibrate(ResidentTeacher(teacher, family), samples, SETTINGS, quiet)


def test_states_of_one_run_are_related_and_others_not() -> None:
    runs = Reach({"image": ((1, 3), (3, 6)), "text": ()})
    assert [runs.before("image", n, 10) for n in (0, 2, 3, 5, 7)] == [[], [1, 2], [1, 2, 3], [3, 4, 5], []]
    assert runs.before("image", 6, 2) == [4, 5, 6]
    assert runs.before("text", 3, 10) == []
    assert runs.before("text_input", 3, 2) == [1, 2, 3]


def test_the_published_depth_cut_needs_a_fraction() -> None:
    family, config = published_config("Qwen/Qwen-Image")
    wanted = read_recipe(find_recipe("qwen_image_12b")).plan
    kept = reach_of(family, config, wanted, False, "equation")
    few, all_ = moment_counts(family, config, 10, kept), moment_counts(family, config, 10)
    pairs = sum((v - u + 2) * (v - u + 3) // 2 for u, v in wanted.intervals if isinstance(wanted.intervals, list))
    shared = 5 + 6  # where one interval ends the next one begins, and its first state is the other's last
    assert few.far["image"] == few.far["text"] == pytest.approx(pairs, abs=shared)
    assert few.far["text_input"] == 0
    assert not any(few.ffn.values())
    assert 5 * sum(few.far.values()) < sum(all_.far.values()) == 2 * 616 + 605
    assert few.near == all_.near


@pytest.mark.parametrize(
    ("changes", "targeted", "reading", "everything"),
    [
        ({}, True, "equation", True),
        ({"ffn": "none"}, True, "equation", True),
        ({"intervals": [[1, 2]]}, True, "caption", True),
        ({"intervals": [[1, 2]]}, True, "equation", False),
        ({"intervals": "none", "text_stream": "none", "ffn": "none"}, True, "equation", False),
    ],
)
def test_what_is_left_free_keeps_all_that_it_may_need(
    changes: dict[str, Any], targeted: bool, reading: str, everything: bool, family: Family
) -> None:
    kept = reach_of(family, {**family.tiny_config, "num_layers": 6}, PlanSettings.model_validate(changes), targeted, reading)
    assert (kept == EVERYTHING) == everything
    if not everything:
        assert kept.runs["image"] == (((1, 3),) if changes["intervals"] != "none" else ())
        assert ("text" in kept.runs) == ("text_stream" in changes)  # free with a target: any of them


def test_a_fixed_plan_s_moments_are_those_of_all(
    whole: CalibrationStats, teacher: Any, family: Family, samples: Samples, tiny: Path
) -> None:
    config = open_source(str(tiny)).config
    kept = reach_of(family, config, FIXED, False, "equation")
    found = calibrate(ResidentTeacher(teacher, family), samples, SETTINGS, quiet, reach=kept)
    assert found.tensors.keys() < whole.tensors.keys()
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in found.tensors.items())
    assert found.rows == {name: whole.rows[name] for name in found.rows}
    matrices = [t for name, t in found.tensors.items() if name.startswith("far.") and ".cross." in name]
    assert len(matrices) == sum(moment_counts(family, config, 4, kept).far.values())
    for bank in (lambda s: closed_form_bank(s, 1e-4, FIXED_PLAN), lambda s: {"adapters": interval_adapters(s, 1e-4, 1, 2)}):
        made, wanted = bank(found), bank(whole)
        assert made.keys() == wanted.keys()
        assert all(torch.equal(made[k][n], wanted[k][n]) for k in wanted for n in wanted[k])


def test_nothing_within_a_block_is_looked_at_for_intervals_alone(teacher: Any, family: Family, samples: Samples) -> None:
    kept = reach_of(family, family.tiny_config, PlanSettings(intervals=[[1, 2]], text_stream="none", ffn="none"), False, "equation")
    resident = ResidentTeacher(teacher, family)
    seen: list[Any] = []
    sweep = resident.sweep
    resident.sweep = lambda *args, **given: seen.append(given["inside"]) or sweep(*args, **given)  # type: ignore[method-assign]
    calibrate(resident, samples, SETTINGS, quiet, reach=kept)
    assert seen == [(), (), ()]


def test_no_edit_that_needs_them_means_no_far_moments(teacher: Any, family: Family, samples: Samples) -> None:
    wanted = PlanSettings(intervals="none", text_stream="none", ffn="none", modulation_rank=4)
    kept = reach_of(family, family.tiny_config, wanted, False, "equation")
    assert kept.is_empty
    stats = calibrate(ResidentTeacher(teacher, family), samples, SETTINGS, quiet, reach=kept)
    assert not [name for name in (*stats.tensors, *stats.rows) if name.startswith(("far.", "ffn."))]
    assert "temb" in stats.rows


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (CompressionPlan.of("qwen_image", 6, [], [3]), "plan.text_stream: block 3 is 1 blocks from its reference 2"),
        (CompressionPlan.of("qwen_image", 6, [], [], None, False, [(3, "text")]), "plan.ffn: block 3, stream text"),
    ],
)
def test_an_edit_without_moments_is_refused_with_the_way_out(
    plan: CompressionPlan, message: str, teacher: Any, family: Family, samples: Samples
) -> None:
    kept = reach_of(family, family.tiny_config, PlanSettings(intervals=[[1, 2]], text_stream="none", ffn="none"), False, "equation")
    stats = calibrate(ResidentTeacher(teacher, family), samples, SETTINGS, quiet, reach=kept)
    with pytest.raises(PlanError, match=message) as caught:
        closed_form_bank(stats, 1e-4, plan)
    assert "fixed by hand" in str(caught.value)


@pytest.mark.slow
def test_a_plan_edited_into_what_was_not_calibrated_is_refused(tiny: Path, tmp_path: Path) -> None:
    recipe = {
        "model": {"path": str(tiny)},
        "calibrate": {"source": "noise", "samples": 64, "longest": 3},
        "analyze": {"probes": 16, "trials": 0, "supernet_steps": 0},
        "plan": {"intervals": [[1, 2]], "text_stream": "none", "ffn": "none", "modulation_rank": "none"},
        "distill": {"steps": 1, "width_steps": 1, "finetune_steps": 1, "batch": 2},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    command = ["compress", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "out"), "--until", "analyze"]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    plan = tmp_path / "out" / "plan.json"
    edited = CompressionPlan.of("qwen_image", 6, [(1, 2)], [], None, True, [(3, "image")])
    plan.write_text(edited.to_json())
    done = CliRunner().invoke(cli.app, command)
    assert isinstance(done.exception, PlanError)
    assert "plan.ffn: block 3, stream image" in str(done.exception)


def test_sums_lie_in_files_where_memory_is_short(
    whole: CalibrationStats, teacher: Any, family: Family, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppclc.analysis.moments.LARGE_BYTES", 8 * 32**2)
    nbytes = 8 * moment_counts(family, teacher.config, SETTINGS.longest).matrices * 32**2
    for free, files in ((4 * nbytes, False), (4 * nbytes - 8, True)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert calibrate_pass.lies_in_files(nbytes) == files
        folder = tmp_path / str(files)
        folder.mkdir()
        found = calibrate(ResidentTeacher(teacher, family), samples, SETTINGS, quiet, folder)
        assert (mapped_sums(folder) > 0) == (files and sys.platform == "linux")
        assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in found.tensors.items())
        if os.name == "posix":
            assert not list(folder.iterdir())  # gone with the last use of them, however a run ends
        del found
        assert not mapped_sums(folder)


def mapped_sums(folder: Path) -> int:
    """Sums in files of a folder that this process has mapped; where the system does not tell, 0."""
    maps = Path("/proc/self/maps")
    return sum(str(folder) in line and ".sum" in line for line in maps.read_text("utf-8").splitlines()) if maps.exists() else 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_the_disk_holds_no_sum_twice(
    teacher: Any, family: Family, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the record is written, each sum's own file goes as soon as it is in there."""
    monkeypatch.setattr("ppclc.analysis.moments.LARGE_BYTES", 8 * 32**2)
    monkeypatch.setattr("ppclc.records.LARGE_BYTES", 8 * 32**2)
    monkeypatch.setattr(calibrate_pass, "lies_in_files", lambda _: True)
    left: list[int] = []
    real = records.file_order

    def watched(tensors: Any) -> Iterator[str]:
        for name in real(tensors):
            left.append(mapped_sums(tmp_path))
            yield name

    monkeypatch.setattr(records, "file_order", watched)
    made = Store(tmp_path / "out").make(
        CalibrationStats, "calibrate", 1, {}, (), lambda work: calibrate(ResidentTeacher(teacher, family), samples, SETTINGS, quiet, work)
    )
    header, written = left[: len(left) // 2], left[len(left) // 2 :]
    assert header[0] == header[-1] == written[0] > 10
    assert written[-1] <= 1
    assert sorted(written, reverse=True) == written
    assert mapped_sums(tmp_path) == 0
    assert made.tensors
    assert len(list((tmp_path / "out" / "records").iterdir())) == 1


def test_lots_are_brought_one_after_the_other_and_waited_for() -> None:
    copies, taken, go = HostCopies(), list[tuple[Place, float]](), threading.Event()

    def take(place: Place, value: torch.Tensor) -> None:
        assert threading.current_thread() is not threading.main_thread()
        go.wait(10)
        taken.append((place, value.item()))

    places: list[Place] = [("a", 0, 0), ("b", 0, 0), ("c", 0, 0)]
    copies.bring(((p, Taken(torch.tensor(float(n)))) for n, p in enumerate(places[:2])), take)
    assert not taken  # not waited for
    go.set()
    copies.bring([(places[2], Taken(torch.tensor(2.0)))], take)
    assert [p for p, _ in taken][:2] == places[:2]
    copies.wait()
    assert taken == [(p, float(n)) for n, p in enumerate(places)]
    copies.bring([], take)
    copies.wait()


def test_sums_are_whole_when_they_are_there() -> None:
    """The other half of a symmetric one, and outer products in float64, are made when a sum is brought, and not before."""
    sums, place, x = DeviceSums(), ("a", 0, 0), torch.randn(20, 6)
    sums.add(place, None, x, None)
    sums.add_outer(place, torch.ones(6, dtype=torch.float64), torch.full((6,), 2.0, dtype=torch.float64))
    lot = list(sums.taken())
    assert [(p, t.sums_DE.dtype) for p, t in lot] == [(place, torch.float32)]
    found = dict[Place, torch.Tensor]()
    copies = HostCopies()
    copies.bring(lot, found.__setitem__)
    copies.wait()
    assert found[place].dtype == torch.float64
    assert torch.allclose(found[place], x.double().T @ x.double() + 2, rtol=1e-5, atol=1e-5)


def test_what_goes_wrong_on_the_way_is_raised_where_it_is_waited_for() -> None:
    copies = HostCopies()

    def full(place: Place, value: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    copies.bring([(("a", 0, 0), Taken(torch.zeros(1)))], full)
    with pytest.raises(OSError, match="No space left"):
        copies.wait()
    copies.wait()  # told once
