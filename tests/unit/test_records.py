"""The Store makes each record once, and nothing half-written is ever read."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ppclc.errors import OutputError, UnavailableError
from ppclc.records import (
    Distilled,
    Job,
    Measured,
    Record,
    Store,
    StoredTensors,
    digest_of,
    disk_errors,
    measured,
    read_record,
    whole_folder,
    write_record,
    write_tensors,
    write_text,
)

WEIGHTS = {"a": torch.arange(6, dtype=torch.float64).reshape(2, 3) / 7, "b": torch.tensor([True, False])}


def a_record() -> Distilled:
    return Distilled(edit="interval-3-4", steps=2, losses=[(1, 1 / 3), (2, 1e-300)], tensors=WEIGHTS)


class Builder:
    """Counts how often it is called."""

    def __init__(self, record: Record | None = None) -> None:
        self.calls, self.record = 0, record or a_record()

    def __call__(self, work: Path) -> Any:
        self.calls += 1
        assert work.is_dir()
        return self.record


def make(store: Store, build: Callable[[Path], Any], settings: Any = None, version: int = 1, inputs: tuple[Record, ...] = ()) -> Distilled:
    return store.make(Distilled, "distill", version, settings or {"steps": 2}, inputs, build)


def test_a_record_is_made_once_and_read_bit_for_bit(tmp_path: Path) -> None:
    build = Builder()
    first = make(Store(tmp_path), build)
    store = Store(tmp_path)
    second = make(store, build)
    assert build.calls == 1
    assert (second.edit, second.losses, second.digest) == (first.edit, [(1, 1 / 3), (2, 1e-300)], first.digest)
    for name, tensor in WEIGHTS.items():
        assert second.tensors[name].dtype == tensor.dtype
        assert torch.equal(second.tensors[name], tensor)
    assert [(s.name, s.reused) for s in store.stages] == [("distill", True)]
    assert [p.name for p in (tmp_path / "records").iterdir()] == [f"distill-{first.digest}"]


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"steps": 3}},
        {"version": 2},
        {"inputs": (Measured(values={}, digest="a1"),)},
        {"inputs": (Measured(values={}, digest="a2"),)},
    ],
    ids=["settings", "version", "input", "other input"],
)
def test_what_a_record_depends_on_makes_it_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    build, store = Builder(), Store(tmp_path)
    digests = {make(store, build).digest, make(store, build, inputs=(Measured(values={}, digest="a0"),)).digest}
    digests.add(make(store, build, **change).digest)
    assert build.calls == 3
    assert len(digests) == 3
    make(store, build)
    assert build.calls == 3


def test_digest_sees_every_value_and_no_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    variants = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": None}, {"a": True}, {"a": [1]}, {"b": 1}]
    assert len({digest_of(v) for v in variants}) == len(variants)


def test_a_record_that_is_no_longer_valid_is_made_anew(tmp_path: Path) -> None:
    build, store = Builder(), Store(tmp_path)
    make(store, build)
    store.make(Distilled, "distill", 1, {"steps": 2}, (), build, valid=lambda r: r.steps > 2)
    assert build.calls == 2
    assert store.stages[0].reused is False


def test_a_build_that_raises_leaves_no_record_but_keeps_its_work(tmp_path: Path) -> None:
    def broken(work: Path) -> Distilled:
        (work / "checkpoint").write_text("half", "utf-8")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        make(Store(tmp_path), broken)
    assert not [p for p in (tmp_path / "records").iterdir() if not p.name.startswith(".")]

    def resumed(work: Path) -> Distilled:
        assert (work / "checkpoint").read_text("utf-8") == "half"
        return a_record()

    made = make(Store(tmp_path), resumed)
    assert [p.name for p in (tmp_path / "records").iterdir()] == [f"distill-{made.digest}"]


def test_a_draft_left_by_a_kill_is_not_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.folder("distill", store.digest("distill", 1, {"steps": 2}))
    draft = folder.parent / f".{folder.name}.draft"
    draft.mkdir(parents=True)
    write_record(Distilled(edit="half", steps=0, losses=[]), draft)
    (draft / "stray").write_text("x", "utf-8")
    build = Builder()
    assert make(store, build).edit == "interval-3-4"
    assert build.calls == 1
    assert sorted(p.name for p in folder.iterdir()) == ["record.json", "stage.json", "tensors.safetensors"]
    assert not draft.exists()


def test_a_record_of_another_kind_or_damaged_says_what_to_remove(tmp_path: Path) -> None:
    made = make(Store(tmp_path), Builder())
    folder = tmp_path / "records" / f"distill-{made.digest}"
    with pytest.raises(OutputError, match=r"(?s)no readable Measured record.*remove the folder"):
        read_record(Measured, folder)
    for damage in (b"{", b"\xff\xfe"):
        (folder / "record.json").write_bytes(damage)
        with pytest.raises(OutputError, match="remove the folder"):
            make(Store(tmp_path), Builder())


def test_a_record_whose_cost_is_not_known_any_more_is_taken_all_the_same(tmp_path: Path) -> None:
    made = make(Store(tmp_path), Builder())
    for damage in ("", "[]", '{"name": "distill", "sec'):
        (tmp_path / "records" / f"distill-{made.digest}" / "stage.json").write_text(damage, "utf-8")
        store, build = Store(tmp_path), Builder()
        assert make(store, build).edit == made.edit
        assert build.calls == 0
        assert (store.stages[0].seconds, store.stages[0].reused) == (0.0, True)


def test_damaged_tensors_of_a_record_say_what_to_remove(tmp_path: Path) -> None:
    made = make(Store(tmp_path), Builder())
    tensors = tmp_path / "records" / f"distill-{made.digest}" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-9])
    with pytest.raises(OutputError, match="remove the folder"):
        make(Store(tmp_path), Builder())


def test_whole_folder_leaves_the_old_one_when_the_body_raises(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with whole_folder(folder) as draft:
        (draft / "weights").write_text("old", "utf-8")
        (draft / "gone").write_text("old", "utf-8")

    def interrupted() -> None:
        with whole_folder(folder) as draft:
            (draft / "weights").write_text("new", "utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {p.name: p.read_text("utf-8") for p in folder.iterdir()} == {"weights": "old", "gone": "old"}
    with whole_folder(folder) as draft:
        (draft / "weights").write_text("new", "utf-8")
    assert {p.name: p.read_text("utf-8") for p in folder.iterdir()} == {"weights": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "plan.json", "old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ppclc.records.os.replace", full)
    with pytest.raises(UnavailableError, match="the disk is full; make room, or give another folder with -o") as caught:
        write_text(tmp_path / "plan.json", "new")
    assert caught.value.exit_code == 3
    assert str(tmp_path / "plan.json") in str(caught.value)
    assert (tmp_path / "plan.json").read_text("utf-8") == "old"


def test_a_full_disk_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UnavailableError) as caught:
            make(Store(tmp_path), Builder())
    assert caught.value.exit_code == 3
    assert not [p for p in (tmp_path / "records").iterdir() if not p.name.startswith(".")]
    build = Builder()
    make(Store(tmp_path), build)
    assert build.calls == 1


def test_a_file_that_may_not_be_so_large_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr("ppclc.records.os.replace", too_large)
    with pytest.raises(UnavailableError, match=r"larger than its file system or this shell's limit \(ulimit -f\) allows") as caught:
        write_text(tmp_path / "plan.json", "new")
    assert caught.value.exit_code == 3


def test_a_full_disk_is_told_from_what_safetensors_says(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    with pytest.raises(UnavailableError, match="the disk is full"), disk_errors(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_tensors_are_written_as_the_library_reads_them(tmp_path: Path) -> None:
    """Every dtype, odd sizes, one number, none at all, and memory that is not in order."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    tensors = {f"t{n}": (100 * torch.randn(3, 2 * n + 1)).to(dtype) for n, dtype in enumerate(dtypes)}
    tensors |= {"truth": torch.tensor([True, False, True]), "number": torch.tensor(3.5), "none": torch.zeros(0, 4)}
    tensors["turned"] = torch.arange(12.0).reshape(3, 4).T
    path = tmp_path / "t.safetensors"
    write_tensors(path, tensors, {"losses": "[1, 2]"})
    again = load_file(path)
    assert again.keys() == tensors.keys()
    assert all(again[k].dtype == v.dtype and again[k].shape == v.shape and torch.equal(again[k], v) for k, v in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"losses": "[1, 2]"}
    first = path.read_bytes()
    write_tensors(path, dict(reversed(tensors.items())), {"losses": "[1, 2]"})
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_folder_that_cannot_be_written_is_the_users_to_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way", "utf-8")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        build = Builder()
        with pytest.raises(OutputError, match=r"cannot be written.*give another folder with -o") as caught:
            make(Store(out), build)
        assert caught.value.exit_code == 2
        assert build.calls == 0

    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(OutputError, match="Permission denied"):
        make(Store(tmp_path / "new"), Builder())


def test_stages_of_one_name_add_up_and_are_reused_only_together(tmp_path: Path) -> None:
    first = Store(tmp_path)
    for n in range(2):
        first.make(Distilled, f"edit{n}", 1, {}, (), Builder(), stage="distill")
    assert [s.name for s in first.stages] == ["distill"]
    second = Store(tmp_path)
    second.make(Distilled, "edit0", 1, {}, (), Builder(), stage="distill")
    assert second.stages[0].reused
    second.make(Distilled, "edit9", 1, {}, (), Builder(), stage="distill")
    assert not second.stages[0].reused


def test_tensors_that_stay_on_disk_are_read_when_asked_for(tmp_path: Path) -> None:
    """Of a record that was just made, as of one that is found again: equal bits, and not the same memory twice."""
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4).to(torch.bfloat16)}
    record = Distilled(edit="edit", steps=1, losses=[], tensors=tensors)
    for _ in range(2):
        made = Store(tmp_path).make(Distilled, "edit", 1, {}, (), lambda _: record)
        assert isinstance(made.tensors, StoredTensors)
        assert list(made.tensors) == ["a", "b"]
        assert all(torch.equal(made.tensors[k], v) and made.tensors[k].dtype == v.dtype for k, v in tensors.items())
        assert made.tensors["a"].data_ptr() != made.tensors["a"].data_ptr()
        with pytest.raises(KeyError):
            made.tensors["c"]


def test_records_are_written_as_they_come(tmp_path: Path) -> None:
    """So that what many edits take in memory is what one takes."""
    jobs = [Job(f"edit{n}", 1, {}, ()) for n in range(3)]
    there: list[int] = []

    def build(left: list[int], works: list[Path]) -> Iterator[Distilled]:
        for n in left:
            yield Distilled(edit=f"edit{n}", steps=1, losses=[], tensors={"a": torch.full((2,), float(n))})
            there.append(len(list((tmp_path / "records").glob("edit*/record.json"))))

    made = Store(tmp_path).make_all(Distilled, jobs, build, "distill")
    assert there == [1, 2, 3]
    assert [m.tensors["a"][0].item() for m in made] == [0, 1, 2]


def test_measured_sees_time_and_the_memory_of_the_block() -> None:
    import time

    before = measured("idle")
    with before as idle:
        pass
    with measured("busy", every_s=0.005) as busy:
        held = torch.ones(32 * 2**20)  # 128 MiB
        time.sleep(0.05)
    del held
    assert 0.05 <= busy[0].seconds < 5
    assert busy[0].peak_rss_bytes - idle[0].peak_rss_bytes > 100 * 2**20
