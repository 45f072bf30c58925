"""Teachers run block by block: the same bits from memory, from files, and from the whole model; and never more than a block of memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import streamed as benchmark
from ppclc.data import flow
from ppclc.data.samples import Sample, Samples
from ppclc.errors import ModelError
from ppclc.families import Family
from ppclc.loading.checkpoints import WEIGHTS
from ppclc.loading.classes import DTYPES
from ppclc.loading.sources import open_source
from ppclc.loading.weight_files import WeightFiles
from ppclc.models import apply_plan, block_state, blocks_of, load_source
from ppclc.plan import CompressionPlan
from ppclc.quality import SampledDistance
from ppclc.student_tensors import student_tensor
from ppclc.teachers import TEXT_INPUT, ResidentTeacher, StreamedTeacher, Teacher
from tests.tracing import trace

BLOCKS = 6
BLOCK = "transformer_blocks.5.attn.to_q.weight"
SMALL = ["--batches", "2", "--batch", "1", "--side", "4", "--sweeps", "1"]
KINDS = ("resident", "streamed", "sharded")


@pytest.fixture(scope="module")
def folders(teacher: Any, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shared teacher in one file, and in many."""
    sharded: Path = tmp_path_factory.mktemp("sharded")
    teacher.save_pretrained(sharded / "transformer", max_shard_size="100KB")
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 5
    return {"resident": teacher_folder, "streamed": teacher_folder, "sharded": sharded}


@pytest.fixture(scope="module")
def make(folders: dict[str, Path]) -> Callable[[str, str], tuple[Any, Teacher]]:
    """`make(kind, dtype)`: the whole model as `load_source` gives it, and a teacher of that kind."""

    def made(kind: str, dtype: str = "float32") -> tuple[Any, Teacher]:
        source = open_source(str(folders[kind]))
        model = load_source(source, dtype)
        return model, ResidentTeacher(model, source.family) if kind == "resident" else StreamedTeacher(source, dtype)

    return made


def batches(family: Family, config: Any, mask: bool = True) -> list[Sample]:
    """Three batches that differ in size, grid and text length, the last two with masks."""
    made: list[Sample] = []
    for n, (batch, height, width, text) in enumerate([(2, 4, 8, 5), (1, 2, 2, 3), (3, 6, 4, 9)]):
        given = family.example_inputs(config, batch, height, width, text, torch.Generator().manual_seed(n))
        if mask and n:
            keep = torch.arange(text)[None] < torch.tensor([text, 2, 1])[:batch, None]
            given["encoder_hidden_states_mask"] = keep.float() if n == 2 else keep
        made.append((given.pop("hidden_states"), given.pop("timestep"), given))
    return made


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_a_trace(kind: str, dtype: str, family: Family, make: Callable[..., Any]) -> None:
    model, teacher = make(kind, dtype)
    assert (teacher.num_blocks, teacher.dtype, teacher.config["num_layers"]) == (BLOCKS, DTYPES[dtype], BLOCKS)
    samples = batches(family, model.config)
    seen = [trace(model, family, flow.inputs_for(model, *sample)) for sample in samples]
    numbers = []
    for number, sweep in teacher.sweep(samples, range(BLOCKS + 1)):
        numbers.append(number)
        for n, states in enumerate(sweep.states[number]):
            assert states.keys() == seen[n].states.keys()
            assert all(equal(states[s], seen[n].states[s][number]) for s in states)
    assert numbers == list(range(BLOCKS + 1))
    for shared, one in (
        (s, o) for all_of, seen_of in zip(sweep.shared, seen, strict=True) for s, o in zip(all_of, seen_of.shared, strict=True)
    ):
        assert shared.keys() == one.keys()
        assert equal(shared["temb"], one["temb"])
        mask = one["encoder_hidden_states_mask"]
        assert equal(shared["encoder_hidden_states_mask"], mask) if mask is not None else shared["encoder_hidden_states_mask"] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_velocities_are_those_of_the_whole_model(kind: str, dtype: str, family: Family, make: Callable[..., Any]) -> None:
    model, teacher = make(kind, dtype)
    samples = batches(family, model.config)
    with torch.no_grad():
        wanted = [flow.predict(model, *sample) for sample in samples]
    assert all(equal(a, b) for a, b in zip(teacher.velocities(samples), wanted, strict=True))
    assert all(equal(flow.predict(teacher, *sample), v) for sample, v in zip(samples, wanted, strict=True))
    assert teacher.velocities([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_modulated_text_comes_where_it_is_asked_for(kind: str, family: Family, make: Callable[..., Any]) -> None:
    model, teacher = make(kind, "float32")
    samples = batches(family, model.config)
    seen = [trace(model, family, flow.inputs_for(model, *sample)) for sample in samples]
    for number, sweep in teacher.sweep(samples, [0, 2, 5, 6], text_inputs={2, 5}):
        for one, states in zip(seen, sweep.states[number], strict=True):
            assert (TEXT_INPUT in states) == (number in (2, 5))
            assert equal(states["text"], one.states["text"][number])
            if TEXT_INPUT in states:
                wanted = family.groups[0].text_input(blocks_of(model, family)[number], one.states["text"][number], one.shared[number])
                assert equal(states[TEXT_INPUT], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_is_the_models_own_forward(kind: str, family: Family, make: Callable[..., Any]) -> None:
    model, teacher = make(kind, "float32")
    x, t, given = batches(family, model.config)[2]
    with torch.no_grad():
        wanted = model(hidden_states=x, timestep=t, **given)
    assert equal(teacher(hidden_states=x, timestep=t, **given).sample, wanted.sample)
    assert equal(teacher(x, timestep=t, return_dict=False, **given)[0], wanted.sample)
    starts = [(x, given)]
    ours, whole = (SampledDistance.of_teacher(m, starts, 2).wanted[0] for m in (teacher, model))
    assert equal(ours, whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_points_of_a_trajectory_are_the_models_own(kind: str, family: Family, make: Callable[..., Any], folders: dict[str, Path]) -> None:
    model, teacher = make(kind, "bfloat16")
    x, _, given = batches(family, model.config)[2]
    source = open_source(str(folders[kind]))
    stop = torch.arange(len(x)) % 10
    drawn = [Samples("prompts", source, m, "train")._trajectory(x, given, stop) for m in (model, teacher)]
    assert equal(drawn[0][0], drawn[1][0])
    assert not equal(drawn[0][0], x)


# -- the sweep ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stops", [[], [0], [6], [3, 1], [2, 4, 5]])
def test_only_stops_are_kept_and_nothing_beyond_them_is_run(
    kind: str, stops: list[int], family: Family, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, teacher = make(kind, "float32")
    run, own = [], type(teacher)._run
    monkeypatch.setattr(type(teacher), "_run", lambda self, block, *rest: (run.append(block), own(self, block, *rest))[1])
    seen = [(number, sorted(sweep.states)) for number, sweep in teacher.sweep(batches(family, model.config), stops)]
    assert seen == [(stop, sorted(stops)[: n + 1]) for n, stop in enumerate(sorted(stops))]
    assert run == list(range(max(stops, default=0)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_caller_may_delete_states_train_in_between_and_ask_for_blocks(kind: str, family: Family, make: Callable[..., Any]) -> None:
    model, teacher = make(kind, "float32")
    samples = batches(family, model.config)
    wanted = trace(model, family, flow.inputs_for(model, *samples[0])).states["image"]
    for number, sweep in teacher.sweep(samples, [1, 2, 4]):
        states = sweep.states.pop(number)[0]
        assert equal(states["image"], wanted[number])
        states.clear()
        assert torch.is_grad_enabled()
        weight = teacher.block_tensors(5)["attn.to_q.weight"].requires_grad_()
        weight.sum().backward()
        assert equal(weight, blocks_of(model, family)[5].attn.to_q.weight)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_the_models_and_a_blocks_are_copies(kind: str, family: Family, make: Callable[..., Any]) -> None:
    for dtype in ("float32", "bfloat16"):
        model, teacher = make(kind, dtype)
        wanted = model.state_dict()
        assert set(teacher.tensors()) == set(wanted)
        assert all(equal(teacher.tensors()[k], v) for k, v in wanted.items())
        for tensor in teacher.block_tensors(2).values():
            tensor.zero_()
        mine, others = teacher.block_tensors(2), block_state(blocks_of(model, family)[2])
        assert mine.keys() == others.keys()
        assert all(equal(mine[k], v) for k, v in others.items())


@pytest.mark.parametrize("kind", KINDS)
def test_stops_that_are_not_there_are_refused(kind: str, make: Callable[..., Any]) -> None:
    _, teacher = make(kind, "float32")
    for stops, text_inputs in ([[7], []], [[-1], []], [[2], [3]], [[6], [6]]):
        with pytest.raises(ValueError, match=r"wanted stops in 0\.\.6"):
            next(teacher.sweep([], stops, text_inputs))


def test_a_resident_teacher_leaves_its_model_alone(teacher: Any, family: Family) -> None:
    blocks = list(teacher.transformer_blocks)
    ours = ResidentTeacher(teacher, family)
    for _ in ours.sweep(batches(family, teacher.config), [2]):
        assert list(teacher.transformer_blocks) == blocks
    assert ours.tensors()[BLOCK].data_ptr() == teacher.state_dict()[BLOCK].data_ptr()


# -- files -------------------------------------------------------------------------------------------------------------


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(home: Path) -> None:
        tensors = load_file(home / WEIGHTS)
        change(tensors)
        save_file(tensors, home / WEIGHTS, metadata={"format": "pt"})

    return edit


def cut(home: Path) -> None:
    (home / WEIGHTS).write_bytes((home / WEIGHTS).read_bytes()[:-1])


REFUSED_AT_ONCE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing": (edit_tensors(lambda t: t.pop(BLOCK)), ["1 tensors are missing", BLOCK]),
    "extra": (edit_tensors(lambda t: t.update({"lora.up": torch.ones(2)})), ["1 tensors are not in the class", "lora.up"]),
    "shape": (edit_tensors(lambda t: t.update({BLOCK: torch.ones(32, 31)})), [BLOCK, "shape [32, 31]", "wanted [32, 32]"]),
    "dtype": (edit_tensors(lambda t: t.update({BLOCK: t[BLOCK].to(torch.int8)})), [WEIGHTS, BLOCK, "stored as I8", "F32"]),
    "short": (cut, [WEIGHTS, "not a whole safetensors file"]),
    "gone": (lambda home: (home / WEIGHTS).unlink(), ["no weights"]),
    "outside": (edit_tensors(lambda t: t["proj_out.bias"].fill_(float("inf"))), [WEIGHTS, "proj_out.bias", "NaN or infinite"]),
}


@pytest.fixture
def broken(teacher_folder: Path, tmp_path: Path) -> Path:
    """A copy of the teacher that a test may break."""
    return Path(shutil.copytree(teacher_folder, tmp_path / "model"))


@pytest.mark.parametrize("name", REFUSED_AT_ONCE)
def test_bad_weights_are_refused_before_a_block_is_run(name: str, broken: Path) -> None:
    break_it, words = REFUSED_AT_ONCE[name]
    break_it(broken / "transformer")
    with pytest.raises(ModelError) as caught:
        StreamedTeacher(open_source(str(broken)), "float32")
    for word in [str(broken), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_not_finite_are_refused_with_their_block(value: str, dtype: str, broken: Path, family: Family) -> None:
    edit_tensors(lambda t: t[BLOCK].view(-1)[7:8].fill_(float(value)))(broken / "transformer")
    source = open_source(str(broken))
    teacher = StreamedTeacher(source, dtype)
    samples = batches(family, source.config)
    assert [number for number, _ in teacher.sweep(samples, [5])] == [5]
    for ask in (lambda: teacher.velocities(samples), lambda: teacher.block_tensors(5), lambda: teacher.tensors()[BLOCK]):
        with pytest.raises(ModelError, match=rf"{WEIGHTS}: tensor {BLOCK} holds NaN or infinite values"):
            ask()
    with pytest.raises(ModelError, match="NaN or infinite"):  # a block half read is not taken for whole
        teacher.velocities(samples)


def test_files_that_change_under_way_are_refused(broken: Path, family: Family) -> None:
    source = open_source(str(broken))
    teacher = StreamedTeacher(source, "float32")
    file = broken / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 4])
    with pytest.raises(ModelError, match=f"{WEIGHTS}: ends too early"):
        teacher.velocities(batches(family, source.config))
    file.unlink()
    with pytest.raises(ModelError, match=f"{WEIGHTS}: cannot be read"):
        teacher.velocities(batches(family, source.config))


def test_a_students_tensors_are_read_one_by_one(make: Callable[..., Any], family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a student's tensor is made of is read, and nothing else: a teacher's files may be larger than memory."""
    model, teacher = make("sharded", "float32")
    plan = CompressionPlan.of("qwen_image", BLOCKS, [(1, 2), (4, 5)])
    read, own = [], WeightFiles.read
    monkeypatch.setattr(WeightFiles, "read", lambda self, name, out: (read.append(name), own(self, name, out))[1])
    student = apply_plan(model, plan).state_dict()
    assert all(equal(student_tensor(family, teacher.config, plan, name, teacher.tensors(), {}), tensor) for name, tensor in student.items())
    # Weight and bias of a modulation are made together.
    assert len(read) == len(student) + sum("_mod." in name for name in student)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks(family: Family, tmp_path: Path) -> None:
    """In processes of their own: the local phase at two depths and of more intervals, and the bits of a resident teacher."""
    options = benchmark.parse(SMALL)
    for blocks in (4, 12):
        benchmark.write_teacher(tmp_path / str(blocks), family, benchmark.teacher_config(family, blocks, heads=8))
    files = {blocks: sum(f.stat().st_size for f in (tmp_path / str(blocks)).glob("*.safetensors")) for blocks in (4, 12)}
    block = (files[12] - files[4]) / 8
    shallow = benchmark.in_process("streamed", tmp_path / "4", options, steps=2)
    many = benchmark.parse([*SMALL, "--intervals", "6"])
    deep = benchmark.in_process("streamed", tmp_path / "12", many, steps=2)
    assert deep["peak_bytes"] < shallow["peak_bytes"] + block, "eight more blocks and four more edits take less than a block"
    resident = benchmark.in_process("resident", tmp_path / "12", many, steps=2)
    assert resident["peak_bytes"] > 12 * block
    assert resident["sha256"] == deep["sha256"]
