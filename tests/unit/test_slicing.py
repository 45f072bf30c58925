"""Students out of a teacher's files: bytes moved, edits made a tensor at a time, whole or not at all, and checked afterwards."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ppclc import commands
from ppclc.errors import ModelError, OutputError, PlanError, PpclcError, RecipeError
from ppclc.families import Family
from ppclc.loading import checkpoints
from ppclc.loading.checkpoints import WEIGHTS, Made, Place, held, places_in, places_of, write_checkpoint
from ppclc.loading.sources import open_source
from ppclc.loading.weight_files import WeightFiles
from ppclc.models import apply_plan, load_model
from ppclc.passes.slice import slice_student
from ppclc.plan import CompressionPlan
from ppclc.records import file_digest
from ppclc.slicing import check_weights, recorded_digests, student_pieces

NAME = "qwen_image"
DEPTH = CompressionPlan.of(NAME, 6, [(1, 2), (4, 5)])
RANK = CompressionPlan.of(NAME, 6, [(1, 2)], modulation_rank=8)
Banks = Callable[[Any, CompressionPlan], dict[str, Any]]


def plan_file(plan: CompressionPlan, folder: Path) -> Path:
    path = folder / "plan.json"
    path.write_text(plan.to_json(), "utf-8")
    return path


def cast_folder(folder: Path, dtype: torch.dtype, to: Path) -> Path:
    """A copy of a model's folder in another dtype."""
    shutil.copytree(folder, to)
    file = to / "transformer" / WEIGHTS
    save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return to


# ------------------------------------------------------------------------------------------------------- moved bytes


def test_bytes_that_stay_are_never_decoded(teacher_folder: Path, tmp_path: Path) -> None:
    """A NaN's payload comes through: nothing read the tensor as numbers."""
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    place = open_source(str(folder)).places()["transformer_blocks.3.attn.to_q.weight"]
    odd = (0x7FC0DEAD).to_bytes(4, "little")
    with place.file.open("r+b") as file:
        file.seek(place.start)
        file.write(odd)
    slice_student(open_source(str(folder)), "float32", DEPTH, {}, {}, tmp_path / "student")
    moved = places_in(tmp_path / "student" / "transformer" / WEIGHTS)["transformer_blocks.2.attn.to_q.weight"]
    with moved.file.open("rb") as file:
        file.seek(moved.start)
        assert file.read(4) == odd
    with pytest.raises(ModelError, match=r"transformer_blocks.2.attn.to_q.weight holds NaN"):
        check_weights(open_source(str(tmp_path / "student")))


@pytest.mark.slow
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_files_stays_unless_another_is_asked_for(
    stored: torch.dtype, teacher_folder: Path, tmp_path: Path, random_bank: Banks
) -> None:
    source = open_source(str(cast_folder(teacher_folder, stored, tmp_path / "teacher")))
    for dtype in (str(stored).removeprefix("torch."), "float32"):
        teacher = load_model(source.path, dtype)
        bank = random_bank(teacher, RANK)
        slice_student(source, dtype, RANK, bank, {}, tmp_path / dtype)
        again = load_file(tmp_path / dtype / "transformer" / WEIGHTS)
        wanted = apply_plan(teacher, RANK, bank).state_dict()
        assert all(torch.equal(tensor, wanted[name]) and tensor.dtype == wanted[name].dtype for name, tensor in again.items())


def test_trained_tensors_are_written_as_they_are(teacher: Any, teacher_folder: Path, tmp_path: Path) -> None:
    source, trained = open_source(str(teacher_folder)), {n: t + 1 for n, t in apply_plan(teacher, DEPTH).state_dict().items()}
    slice_student(source, "float32", DEPTH, {}, trained, tmp_path / "student")
    again = load_model(tmp_path / "student").state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in again.items())
    with pytest.raises(PlanError, match="trained tensors are those of another plan"):
        slice_student(source, "float32", RANK, {}, trained, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def refuse(*_: int) -> int:
    raise OSError(errno.EXDEV, "not between these")


@pytest.mark.slow
@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=8),
    moved=st.lists(st.booleans(), min_size=8, max_size=8),
    chunk=st.sampled_from([1, 7, 64, 4096]),
    dtypes=st.lists(st.sampled_from(["float32", "bfloat16", "int8"]), min_size=8, max_size=8),
    by_system=st.booleans(),
)
def test_any_mixture_of_pieces_is_the_library_s_own_file(
    sizes: list[int], moved: list[bool], chunk: int, dtypes: list[str], by_system: bool, tmp_path: Path
) -> None:
    """Moved or made, in pieces of any size: the bytes are those of `safetensors.torch.save_file`."""
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    tensors = {f"t{i}": torch.randint(-99, 99, (size,)).to(getattr(torch, dtypes[i])) for i, size in enumerate(sizes)}
    save_file(tensors, folder / "from.safetensors", metadata={"format": "pt"})
    places = places_in(folder / "from.safetensors", checkpoints.STATES)
    pieces = {n: places[n] if moved[i] else held(t) for i, (n, t) in enumerate(tensors.items())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "CHUNK_BYTES", chunk)
        patch.setattr(checkpoints, "COPY_BYTES", chunk)
        if not by_system:  # other file systems, other systems
            patch.setattr(os, "copy_file_range", refuse)
        digests = write_checkpoint(folder / "to", pieces)
    assert (folder / "to" / WEIGHTS).read_bytes() == (folder / "from.safetensors").read_bytes()
    assert digests == {WEIGHTS: file_digest(folder / "from.safetensors")}


def test_a_file_that_becomes_shorter_meanwhile_is_told_of(teacher_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    source = open_source(str(folder))
    pieces = student_pieces(source, WeightFiles(source, torch.float32, torch.device("cpu")), DEPTH, {})
    assert all(isinstance(piece, Place) for piece in pieces.values())
    file = folder / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=f"{WEIGHTS}: ends too early"):
        write_checkpoint(tmp_path / "to", pieces)
    file.unlink()
    with pytest.raises(ModelError, match=f"{WEIGHTS}: cannot be read"):
        write_checkpoint(tmp_path / "to", pieces)


def test_edits_that_come_out_as_no_numbers_are_refused(teacher: Any, teacher_folder: Path, tmp_path: Path, random_bank: Banks) -> None:
    bank = random_bank(teacher, RANK)
    bank["modulation"]["basis"][0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"the student's .* comes out with NaN or infinite values"):
        slice_student(open_source(str(teacher_folder)), "float32", RANK, bank, {}, tmp_path / "student")
    assert not (tmp_path / "student").exists()


# ------------------------------------------------------------------------------------------------------- check after


def test_checksums_travel_in_the_plan_and_are_verified(teacher_folder: Path, tmp_path: Path) -> None:
    student = slice_student(open_source(str(teacher_folder)), "float32", DEPTH, {}, {}, tmp_path / "student")
    home = tmp_path / "student" / "transformer"
    recorded = recorded_digests(home)
    assert recorded == {name: file_digest(home / name) for name in (WEIGHTS, "config.json")}
    assert CompressionPlan.read(home / "plan.json") == DEPTH
    assert student.files == {f"transformer/{n}": d for n, d in recorded.items()} | {
        "transformer/plan.json": file_digest(home / "plan.json")
    }
    assert commands.inspect(str(tmp_path / "student"), check=True)["checked"]
    place = places_in(home / WEIGHTS)["transformer_blocks.0.attn.to_q.weight"]
    with place.file.open("r+b") as file:  # the least of changes, which no other check could see
        file.seek(place.start)
        byte = file.read(1)
        file.seek(place.start)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ModelError, match=rf"{WEIGHTS}: not as it was written, by the SHA-256 in .*plan.json"):
        commands.inspect(str(tmp_path / "student"), check=True)


@pytest.mark.parametrize("files", [{"../config.json": "0" * 64}, {"config.json": "abc"}, [1], {"config.json": None}])
def test_plans_that_list_what_is_no_checksum_are_refused(files: Any, teacher_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    document = json.loads(CompressionPlan.of(NAME, 6).to_json()) | {"files": files}
    (folder / "transformer" / "plan.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(ModelError, match=r"plan.json: files = .*: wanted the SHA-256 of files beside it"):
        commands.inspect(str(folder), check=True)


# ------------------------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_a_model_is_cut_by_a_plan_without_a_run(teacher: Any, teacher_folder: Path, tmp_path: Path) -> None:
    folder = cast_folder(teacher_folder, torch.bfloat16, tmp_path / "teacher")
    document = commands.slice_size(str(folder), None, plan_file(DEPTH, tmp_path), tmp_path / "out", [], -1)
    assert set(document) == {"teacher", "student", "plan", "gates"}
    assert document["student"]["blocks"] == 4
    wanted = apply_plan(load_model(folder, "bfloat16"), DEPTH).state_dict()
    again = load_model(tmp_path / "out", "bfloat16").state_dict()
    assert again.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.items())
    weights = tmp_path / "out" / "transformer" / WEIGHTS
    assert document["student"]["bytes"] == weights.stat().st_size
    commands.slice_size(str(folder), None, plan_file(DEPTH, tmp_path), tmp_path / "out", [], -1)  # an earlier size is replaced


def test_what_a_model_alone_cannot_be_cut_to_is_refused_before_anything_is_written(teacher_folder: Path, tmp_path: Path) -> None:
    model, out = str(teacher_folder), tmp_path / "out"
    with pytest.raises(RecipeError, match="a model and no run"):
        commands.slice_size(model, 0.5, None, out, [], -1)
    with pytest.raises(RecipeError, match=r"--plan plan[.]json, and -o"):
        commands.slice_size(model, None, plan_file(DEPTH, tmp_path), None, [], -1)
    for plan, words in (
        (RANK, "modulation follow from calibration"),
        (CompressionPlan.of(NAME, 6, [(1, 2)], adapters=[(1, 2)]), "adapters follow from calibration"),
        (CompressionPlan.of(NAME, 7, [(1, 2)]), "num_blocks = 7, but the model has 6 blocks"),
        (CompressionPlan.of("flux", 6, [(1, 2)]), "family = 'flux', but the model is of 'qwen_image'"),
    ):
        with pytest.raises(PlanError, match=words):
            commands.slice_size(model, None, plan_file(plan, tmp_path), out, [], -1)
    with pytest.raises(OutputError, match="holds no run of ppclc compress"):
        commands.slice_size(str(tmp_path / "nothing"), 0.5, None, out, [], -1)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("keep", "utf-8")
    with pytest.raises(OutputError, match=r"holds something else than a size, mine[.]txt"):
        commands.slice_size(model, None, plan_file(DEPTH, tmp_path), out, [], -1)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_a_model_that_is_not_whole_leaves_nothing_behind(teacher_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text("utf-8").replace('"num_layers": 6', '"num_layers": 5'), "utf-8")
    plan = plan_file(CompressionPlan.of(NAME, 5, [(1, 2)]), tmp_path)
    with pytest.raises(ModelError, match="num_layers = 5, but the weights hold 6 blocks"):
        commands.slice_size(str(folder), None, plan, tmp_path / "out", [], -1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "teacher"]


# ------------------------------------------------------------------------------------------------------- any bytes


HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5) | st.sampled_from(["F32", "BF16", "../x", 1e999]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.mark.slow
@settings(max_examples=150)
@given(header=HEADERS, length=st.none() | st.integers(0, 2**64 - 1), data=st.binary(max_size=64), raw=st.none() | st.binary(max_size=80))
def test_no_bytes_crash_the_reader(header: Any, length: int | None, data: bytes, raw: bytes | None, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    file = tmp_path / WEIGHTS
    file.write_bytes(raw if raw is not None else (len(text) if length is None else length).to_bytes(8, "little") + text + data)
    try:
        places = places_of([file])
    except PpclcError:
        return
    assert all(place.start + place.bytes <= file.stat().st_size for place in places.values())


@pytest.mark.slow
@settings(max_examples=100)
@given(index=HEADERS | st.fixed_dictionaries({"weight_map": HEADERS}) | st.just("deep"))
def test_no_index_and_no_plan_crash_the_reader(index: Any, teacher_folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "transformer"
    if not home.exists():
        shutil.copytree(teacher_folder / "transformer", home)
    text = "[" * 100_000 if index == "deep" else json.dumps(index)
    (home / f"{WEIGHTS}.index.json").write_text(text, "utf-8")
    plan = tmp_path / "any.json"
    plan.write_text(text, "utf-8")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(PpclcError):
        open_source(str(tmp_path)).places()
    with pytest.raises(PpclcError):
        commands.slice_size(str(tmp_path), None, plan, tmp_path / "out", [], -1)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_made_pieces_know_their_size(family: Family) -> None:
    assert Made(torch.bfloat16, (3, 4), lambda: torch.zeros(3, 4)).bytes == 24
    assert held(torch.zeros(5, dtype=torch.float64)).bytes == 40
