"""What every family must keep, over all that are there: a new file in `ppclc/families` is picked up by its being there."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ppclc import plugins
from ppclc.costs.predictions import activation_bytes
from ppclc.data.samples import open_samples
from ppclc.errors import PlanError
from ppclc.families import STREAMS, Family
from ppclc.loading import checkpoints
from ppclc.loading.classes import count_parameters, empty_model, model_class, predicted_parameters, travelling_class
from ppclc.loading.sources import Source, open_source
from ppclc.loading.weight_files import WeightFiles
from ppclc.models import apply_plan, block_state, blocks_of, groups_of, load_model, save_model
from ppclc.passes.slice import slice_student
from ppclc.plan import CompressionPlan
from ppclc.slicing import student_pieces
from ppclc.teachers import ResidentTeacher, StreamedTeacher
from tests.tracing import StandIn, linear_ffns, replaced, trace

FAMILIES = plugins.names("families")
EDITED = [name for name in FAMILIES if plugins.load("families", name).student_class]


@dataclass
class Subject:
    """A family, a tiny model of it with random weights, and inputs of two samples."""

    family: Family
    model: Any
    inputs: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return {"_class_name": self.family.class_name, **self.model.config}

    @property
    def length(self) -> int:
        return self.family.num_blocks(self.config)

    @property
    def width(self) -> int:
        return int(self.config["attention_head_dim"]) * int(self.config["num_attention_heads"])

    def starts(self) -> Iterator[tuple[int, int]]:
        """First block and size of every group."""
        first = 0
        for size in self.family.sizes(self.config):
            yield first, size
            first += size

    def plan(self, *args: Any, **kwargs: Any) -> CompressionPlan:
        return CompressionPlan.of(self.family.name, self.length, *args, **kwargs)


def subject_of(name: str, **changes: Any) -> Subject:
    family: Family = plugins.load("families", name)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(family, {"_class_name": family.class_name})(**{**family.tiny_config, **changes}).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return Subject(family, model, family.example_inputs(dict(model.config), batch=2, generator=generator))


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen_image-edit-2511": ("qwen_image", {"zero_cond_t": True}),
    "qwen_image-layered": ("qwen_image", {"use_layer3d_rope": True, "use_additional_t_cond": True}),
    "flux-schnell": ("flux", {"guidance_embeds": False}),
    "flux-fill": ("flux", {"in_channels": 12, "out_channels": 4}),
    "flux2-klein": ("flux2", {"guidance_embeds": False}),
    "sd3-medium": ("sd3", {"dual_attention_layers": (), "qk_norm": None}),
    "hunyuan_image-distilled": ("hunyuan_image", {"guidance_embeds": True}),
}
"""Other members of a family, by what their configurations differ in."""
SUBJECTS = {name: (name, {}) for name in FAMILIES} | VARIANTS


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    name, changes = SUBJECTS[request.param]
    return subject_of(name, **changes)


@pytest.fixture(params=[s for s, (name, _) in SUBJECTS.items() if name in EDITED])
def edited(request: pytest.FixtureRequest) -> Subject:
    """Of the families that take edits that change the class."""
    name, changes = SUBJECTS[request.param]
    return subject_of(name, **changes)


def run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs, return_dict=False)[0]
    return out


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.mark.slow
def test_what_a_forward_and_a_step_take_is_counted(subject: Subject) -> None:
    """Indices and masks among the inputs are not numbers of the model's dtype."""
    config = dict(subject.model.config)
    forward, step = (activation_bytes(subject.family, config, "bfloat16", training=training) for training in (False, True))
    assert 0 < forward < step


def random_bank(subject: Subject, plan: CompressionPlan) -> dict[str, Any]:
    """A bank with everything a plan may ask for."""
    g, width = torch.Generator().manual_seed(5), subject.width

    def maps(*names: str) -> dict[str, torch.Tensor]:
        found = {}
        for name in names:
            found[f"{name}.weight"] = torch.eye(width) + torch.randn(width, width, generator=g) / width**0.5
            found[f"{name}.bias"] = torch.randn(width, generator=g) / 10
        return found

    basis = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
    bank: dict[str, Any] = {"modulation": {"basis": basis, "mean": 0.1 * torch.randn(width, generator=g)}}
    bank |= {plan.text_key(e.block): maps("text_in", "text_out") for e in plan.text_stream}
    bank |= {plan.ffn_key(e.block, e.stream): {k.removeprefix("x."): v for k, v in maps("x").items()} for e in plan.ffn}
    for interval in plan.adapters:
        block = blocks_of(subject.model, subject.family)[interval.first]
        bank[plan.interval_key(interval)] = block_state(block) | maps("image_adapter", "text_adapter")
    return bank


def test_an_empty_plan_is_the_teacher(subject: Subject) -> None:
    student = apply_plan(subject.model, subject.plan())
    assert torch.equal(run(student, subject.inputs), run(subject.model, subject.inputs))


@pytest.mark.slow
def test_depth_slicing_is_deletion(subject: Subject, tmp_path: Path) -> None:
    """In every group, its end included; what is written is the stock class and comes back bit for bit."""
    for n, (first, size) in enumerate(subject.starts()):
        for span in {(first, first + 1), (first + 1, first + 2), (first + size - 2, first + size - 1), (first, first + size - 1)}:
            plan = subject.plan([span])
            student = apply_plan(subject.model, plan)
            assert type(student) is type(subject.model) or subject.family.depth_class
            with replaced(subject.model, subject.family, dict.fromkeys(range(span[0] + 1, span[1] + 1))):
                wanted = run(subject.model, subject.inputs)
            assert torch.equal(run(student, subject.inputs), wanted)
            assert not torch.equal(wanted, run(subject.model, subject.inputs))
            assert count_parameters(student) == predicted_parameters(subject.family, subject.config, plan)
            save_model(student, plan, tmp_path / f"{n}-{span}")
            assert torch.equal(run(load_model(tmp_path / f"{n}-{span}"), subject.inputs), wanted)


def test_intervals_over_the_end_of_a_group_are_refused(subject: Subject) -> None:
    for first, _ in list(subject.starts())[1:]:
        with pytest.raises(PlanError, match="wanted blocks of one group"):
            apply_plan(subject.model, subject.plan([(first - 1, first)]))


@pytest.mark.parametrize("size", [{"batch": 1, "height": 2, "width": 6, "text": 7}, {"batch": 3, "height": 4, "width": 4, "text": 1}])
def test_a_model_that_is_run_block_by_block_is_the_model(subject: Subject, size: dict[str, int]) -> None:
    """The calling convention of every group, what blocks get besides, and the way through stand-ins."""
    inputs = subject.family.example_inputs(subject.config, **size, generator=torch.Generator().manual_seed(3))
    wanted = run(subject.model, inputs)
    teacher = ResidentTeacher(subject.model, subject.family)
    assert torch.equal(teacher(**inputs, return_dict=False)[0], wanted)
    seen = trace(subject.model, subject.family, inputs)
    assert torch.equal(seen.velocity, wanted)
    tokens = size["height"] * size["width"]
    for number, (block, group) in enumerate(
        zip(blocks_of(subject.model, subject.family), groups_of(subject.model, subject.family), strict=True)
    ):
        before = {s: seen.states[s][number] for s in STREAMS}
        assert before["image"].shape[:2] == (size["batch"], tokens)
        assert before["text"].shape[1] == subject.family.text_tokens(inputs)
        with torch.no_grad():
            after = group.call(block, before, seen.shared[number])
        assert all(torch.equal(after[s], seen.states[s][number + 1]) for s in STREAMS)
    at = subject.length // 2
    stand_in = StandIn(groups_of(subject.model, subject.family)[at], lambda _: {s: seen.states[s][at + 1] for s in STREAMS})
    with replaced(subject.model, subject.family, {at: stand_in, **dict.fromkeys(range(at))}):
        assert torch.equal(run(subject.model, inputs), wanted)


def every_edit(subject: Subject) -> CompressionPlan:
    """A plan with every edit that the family takes: an interval of each group, last text streams, networks, rank, adapters."""
    family, config = subject.family, subject.config
    spans = [(first, first + 1) for first, size in subject.starts() if size > 2]
    texted = family.text_blocks(config)
    text = list(texted[-2:] if family.text_end == "read" else texted[-1:])
    ffn = [(0, s) for s in family.ffn_streams(config, 0)]
    rank = 4 if family.modulations else None
    return subject.plan(spans, text, rank, family.has_dead_code, ffn, spans[:1])


@pytest.mark.slow
def test_edits_survive_the_disk_and_are_counted(edited: Subject, tmp_path: Path) -> None:
    plan = every_edit(edited)
    bank = random_bank(edited, plan)
    student = apply_plan(edited.model, plan, bank)
    assert count_parameters(student) == predicted_parameters(edited.family, edited.config, plan) < count_parameters(edited.model)
    save_model(student, plan, tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(run(again, edited.inputs), run(student, edited.inputs))
    assert {k for k, v in again.state_dict().items() if not torch.equal(v, student.state_dict()[k])} == set()
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    student(**edited.inputs, return_dict=False)[0].square().sum().backward()
    assert [n for n, p in student.named_parameters() if p.grad is None] == [], "no tensor of a student is dead"


@pytest.mark.slow
def test_every_single_edit_changes_what_it_says(edited: Subject) -> None:
    """Each edit alone makes a smaller student whose output is another."""
    family, config = edited.family, edited.config
    texted = family.text_blocks(config)
    plans = [edited.plan(text_stream=[b]) for b in texted[1:]]
    places = [(b, s) for b in range(edited.length) for s in family.ffn_streams(config, b)]
    unread = (edited.length - 1, "text") if family.text_end == "dead" else None
    plans += [edited.plan(ffn=[place]) for place in places if place != unread]
    plans += [edited.plan(modulation_rank=4)] if family.modulations else []
    whole = run(edited.model, edited.inputs)
    for plan in plans:
        student = apply_plan(edited.model, plan, random_bank(edited, plan))
        assert count_parameters(student) < count_parameters(edited.model)
        assert torch.isfinite(run(student, edited.inputs)).all()
        assert not close(run(student, edited.inputs), whole)


def test_a_rank_of_the_whole_width_is_the_teacher(edited: Subject) -> None:
    """The class of students does what the stock class does, in other steps."""
    if not edited.family.modulations:
        pytest.skip("no modulation to be made smaller")
    plan = edited.plan(modulation_rank=edited.width)
    bank = {"modulation": random_bank(edited, plan)["modulation"]}
    assert close(run(apply_plan(edited.model, plan, bank), edited.inputs), run(edited.model, edited.inputs))


@pytest.mark.slow
def test_mapped_text_is_the_map_of_the_reference_block_s(edited: Subject) -> None:
    """Exact maps give the teacher back: a teacher whose text input does not change from one block to the next."""
    family, config = edited.family, edited.config
    texted = family.text_blocks(config)
    if not len(texted):
        pytest.skip("no text stream that may go")
    block = texted[-2]
    group = family.place(config, block)[0]
    seen = trace(edited.model, family, edited.inputs)
    assert group.text_input is not None
    inputs = [
        group.text_input(b, seen.states["text"][n], seen.shared[n]) for n, b in enumerate(blocks_of(edited.model, family)) if n in texted
    ]
    outputs = [seen.states["text"][n + 1] for n in texted]

    def exact(a: torch.Tensor, b: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
        x, y = a.flatten(0, 1).double(), b.flatten(0, 1).double()
        ones = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
        solution = torch.linalg.lstsq(ones, y, driver="gelsd").solution.float()
        return {f"{name}.weight": solution[:-1].T.contiguous(), f"{name}.bias": solution[-1]}

    # Ten tokens of width 32 are mapped exactly.
    maps = exact(inputs[block - 1], inputs[block], "text_in") | exact(outputs[block - 1], outputs[block], "text_out")
    plan = edited.plan(text_stream=[block])
    student = apply_plan(edited.model, plan, {plan.text_key(block): maps})
    difference = (run(student, edited.inputs) - run(edited.model, edited.inputs)).abs().max()
    assert difference <= 2e-4 * run(edited.model, edited.inputs).abs().max()


@pytest.mark.slow
def test_linear_networks_in_the_teacher_are_the_student_s(edited: Subject) -> None:
    """Where the states after attention are read is data of the family; the student says whether it is right."""
    family, config, width = edited.family, edited.config, edited.width
    places = [(b, s) for b in range(edited.length) for s in family.ffn_streams(config, b)]
    unread = (edited.length - 1, "text") if family.text_end == "dead" else None
    for place in [p for p in places if p != unread]:
        weight, bias = torch.randn(width, width) / width, torch.randn(width)
        plan = edited.plan(ffn=[place])
        student = apply_plan(edited.model, plan, {plan.ffn_key(*place): {"weight": weight, "bias": bias}})
        with linear_ffns(edited.model, family, {place: (weight, bias)}):
            assert close(run(edited.model, edited.inputs), run(student, edited.inputs))
        assert not torch.equal(run(edited.model, edited.inputs), run(student, edited.inputs))


@pytest.mark.slow
def test_adapters_are_linear_maps_in_front_of_the_block(edited: Subject, tmp_path: Path) -> None:
    """The teacher with the maps and one block in an interval's place says what the student is."""
    family, model, inputs = edited.family, edited.model, edited.inputs
    seen = trace(model, family, inputs)
    for (first, size), own in zip(edited.starts(), family.groups, strict=True):
        for at in {first, first + size - 2} if own.adapters else ():
            span = (at, at + 1)
            plan = edited.plan([span], adapters=[span])
            bank = random_bank(edited, plan)
            maps, group, block = bank[plan.interval_key(plan.intervals[0])], groups_of(model, family)[at], blocks_of(model, family)[at]
            student = apply_plan(model, plan, bank)

            def mapped(states: dict[str, torch.Tensor], block: Any = block, maps: Any = maps, group: Any = group, at: int = at) -> Any:
                given = {s: x @ maps[f"{s}_adapter.weight"].T + maps[f"{s}_adapter.bias"] for s, x in states.items()}
                return group.call(block, given, seen.shared[at])

            with replaced(model, family, {at: StandIn(group, mapped), at + 1: None}):
                wanted = run(model, inputs)
            assert close(run(student, inputs), wanted)
            assert count_parameters(student) == predicted_parameters(family, edited.config, plan)
            save_model(student, plan, tmp_path / str(at))
            assert torch.equal(run(load_model(tmp_path / str(at)), inputs), run(student, inputs))
            # A bank without the record gives the first block and the identity.
            assert close(run(apply_plan(model, plan), inputs), run(apply_plan(model, edited.plan([span])), inputs))


@pytest.mark.slow
def test_edits_that_a_family_does_not_take_are_refused(subject: Subject) -> None:
    family, config = subject.family, subject.config
    textless = [b for b in range(subject.length) if b not in family.text_blocks(config)]
    for block in [b for b in textless if b > 0]:
        with pytest.raises(PlanError, match="plan"):
            apply_plan(subject.model, subject.plan(text_stream=[block]), {})
    for block in range(subject.length):
        for stream in set(STREAMS) - set(family.ffn_streams(config, block)):
            with pytest.raises(PlanError, match="plan"):
                apply_plan(subject.model, subject.plan(ffn=[(block, stream)]), {})
    if not family.modulations:
        with pytest.raises(PlanError, match="plan"):
            apply_plan(subject.model, subject.plan(modulation_rank=4), {})


def test_the_lowered_module_equals_eager(subject: Subject) -> None:
    lowered = subject.family.lowered(subject.model)
    before = {k: v.clone() for k, v in subject.model.state_dict().items()}
    for size in lowered.sizes:
        inputs = lowered.inputs(**size)
        assert set(lowered.dynamic) == set(inputs)
        with torch.no_grad():
            assert (lowered.module(**inputs) - lowered.reference(inputs)).abs().max() <= 1e-5
    assert all(torch.equal(v, before[k]) for k, v in subject.model.state_dict().items()), "lowering leaves the model alone"


def test_counts_come_from_the_configuration(subject: Subject) -> None:
    assert count_parameters(empty_model(subject.family, subject.config)) == count_parameters(subject.model)


def test_samples_go_through_the_flow(subject: Subject) -> None:
    """Random latents of the family's shape, timesteps as its forward wants them, and the sampler's steps."""
    from ppclc.data import flow

    source = Source("tiny", Path(), subject.config, subject.family)
    samples = open_samples("noise", source, subject.model, "train")
    x, t, given = samples.draw(3, torch.Generator().manual_seed(0))
    assert x.shape[1:] == subject.family.latents(subject.config, 4, 8)
    velocity = flow.predict(subject.model, x, t, given)
    direct = run(subject.model, {"hidden_states": x, "timestep": t * subject.family.timestep_scale, **given})
    assert torch.equal(velocity, direct)
    drawn = flow.sample(subject.model, x, given, given, 1, 2)
    assert drawn.shape == x.shape
    assert torch.isfinite(drawn).all()


CLASSES = sorted({c for f in FAMILIES for c in plugins.load("families", f).class_names.values() if not c.startswith("diffusers:")})


@pytest.mark.parametrize("where", CLASSES)
def test_a_student_s_class_stands_alone(where: str) -> None:
    """It is copied into folders that are opened without ppclc, so it imports torch, diffusers and the standard library."""
    imported = set()
    for node in ast.walk(ast.parse(travelling_class(where))):
        if isinstance(node, ast.Import):
            imported |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= {"torch", "diffusers"}


@pytest.mark.slow
def test_a_streamed_teacher_gives_the_same_bits(subject: Subject, tmp_path: Path) -> None:
    """Blocks of every group and shape, read one at a time: states, text inputs and velocity are those of the model in memory."""
    subject.model.save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    samples = open_samples("noise", source, subject.model, "train")
    drawn = [samples.draw(2, torch.Generator().manual_seed(n)) for n in range(2)]
    texted = list(subject.family.text_blocks(subject.config))
    stops, inputs = range(subject.length + 1), texted[1::2]
    found = []
    for teacher in (ResidentTeacher(subject.model, subject.family), StreamedTeacher(source, "float32")):
        states = {}
        for number, sweep in teacher.sweep(drawn, stops, inputs):
            states[number] = sweep.states[number]
        found.append((states, teacher.velocities(drawn), [teacher.block_tensors(b) for b in range(subject.length)]))
    (resident, velocities, tensors), (streamed, other, read) = found
    for number, batches in resident.items():
        for n, batch in enumerate(batches):
            assert batch.keys() == streamed[number][n].keys() == {*STREAMS, *(["text_input"] if number in inputs else [])}
            assert all(torch.equal(x, streamed[number][n][s]) for s, x in batch.items())
    assert all(torch.equal(a, b) for a, b in zip(velocities, other, strict=True))
    assert all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(tensors, read, strict=True))


@pytest.mark.slow
def test_a_student_written_from_files_is_the_one_in_memory(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file to the byte, in one file and in shards; of a stock student those that diffusers writes; and what stays is only moved."""
    subject.model.save_pretrained(tmp_path / "teacher")
    source = open_source(str(tmp_path / "teacher"))
    edits = subject.family.name in EDITED
    for n, plan in enumerate([subject.plan([(0, 1)]), *([every_edit(subject)] if edits else [])]):
        bank = random_bank(subject, plan)
        student = apply_plan(subject.model, plan, bank)
        for size in ("5GB", "40KB"):
            monkeypatch.setattr(checkpoints, "SHARD_SIZE", size)
            wanted = save_model(student, plan, tmp_path / f"memory-{n}-{size}")
            made = slice_student(source, "float32", plan, bank, {}, tmp_path / f"files-{n}-{size}")
            assert made.files == wanted
            assert made.parameters == count_parameters(student)
            again = load_model(tmp_path / f"files-{n}-{size}").state_dict()
            assert all(torch.equal(t, again[k]) for k, t in student.state_dict().items())
            if type(student) is type(subject.model):
                student.save_pretrained(tmp_path / f"diffusers-{n}-{size}", max_shard_size=size)
                for file in (tmp_path / f"diffusers-{n}-{size}").iterdir():
                    assert file.read_bytes() == (tmp_path / f"files-{n}-{size}" / "transformer" / file.name).read_bytes()
        pieces = student_pieces(source, WeightFiles(source, torch.float32, torch.device("cpu")), plan, bank)
        made_anew = {name for name, piece in pieces.items() if isinstance(piece, checkpoints.Made)}
        own = {
            name for name, tensor in student.state_dict().items() if not any(same(tensor, t) for t in subject.model.state_dict().values())
        }
        assert own <= made_anew
        assert made_anew == set() if not plan.has_width_edits else len(made_anew) < len(pieces)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
