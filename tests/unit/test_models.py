"""Students against their teacher: bit for bit where they must be equal, by formula where they are narrower."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from ppclc.errors import ModelError, PlanError
from ppclc.families import Family
from ppclc.loading.classes import count_parameters, predicted_parameters
from ppclc.loading.sources import open_source
from ppclc.models import apply_plan, left_out, load_model, save_model
from ppclc.plan import CompressionPlan
from ppclc.records import file_digest
from tests.tracing import trace

Banks = Callable[..., dict[str, dict[str, torch.Tensor]]]

NAME = "qwen_image"
PLANS = {
    "empty": CompressionPlan.of(NAME, 6),
    "depth": CompressionPlan.of(NAME, 6, [(1, 2), (4, 5)]),
    "rank": CompressionPlan.of(NAME, 6, modulation_rank=5),
    "text": CompressionPlan.of(NAME, 6, text_stream=[1, 2, 5]),
    "dead code": CompressionPlan.of(NAME, 6, modulation_rank=5, dead_code=True),
    "all": CompressionPlan.of(NAME, 6, [(1, 2)], [3, 5], 4, True),
    "text to the end": CompressionPlan.of(NAME, 6, [(0, 1)], [3, 4, 5], None, True),
    "ffn": CompressionPlan.of(NAME, 6, ffn=[(0, "text"), (2, "image"), (2, "text"), (5, "image")]),
    "ffn and all": CompressionPlan.of(NAME, 6, [(1, 2)], [3, 5], 4, True, [(0, "text"), (1, "image"), (3, "image"), (5, "image")]),
    "adapters": CompressionPlan.of(NAME, 6, [(0, 1), (3, 5)], adapters=[(0, 1), (3, 5)]),
    # Of a whole block, of one that lost its text to a map, of one that emits no text.
    "adapters and all": CompressionPlan.of(NAME, 6, [(0, 1), (2, 3), (4, 5)], [2], 4, True, [(0, "image")], [(0, 1), (2, 3), (4, 5)]),
}


def run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs, return_dict=False)[0]
    return out


def config_of(model: Any) -> dict[str, Any]:
    return {"_class_name": type(model).__name__, **model.config}


def deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_the_tiny_teacher_is_one_on_which_every_part_counts(teacher: Any, inputs: dict[str, Any]) -> None:
    """Otherwise the tests below could pass on a model that ignores what they edit."""
    before = run(teacher, inputs)
    for name in ("img_mod.1.weight", "txt_mod.1.weight", "attn.to_add_out.weight", "txt_mlp.net.2.weight", "img_mlp.net.2.weight"):
        broken = copy.deepcopy(teacher)
        broken.transformer_blocks[2].get_parameter(name).data.mul_(0.5)
        assert deviation(run(broken, inputs), before) > 1e-4, name


def test_empty_plan_is_the_teacher_bit_for_bit(teacher: Any, inputs: dict[str, Any]) -> None:
    student = apply_plan(teacher, PLANS["empty"])
    assert type(student) is QwenImageTransformer2DModel
    assert torch.equal(run(student, inputs), run(teacher, inputs))
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}


@pytest.mark.parametrize("spans", [[(0, 1)], [(1, 2), (4, 5)], [(0, 5)], [(2, 4)]])
def test_depth_slicing_is_deleting_the_blocks(teacher: Any, inputs: dict[str, Any], spans: list[tuple[int, int]]) -> None:
    student = apply_plan(teacher, CompressionPlan.of(NAME, 6, spans))
    by_hand = copy.deepcopy(teacher)
    gone = {b for first, last in spans for b in range(first + 1, last + 1)}
    by_hand.transformer_blocks = torch.nn.ModuleList(b for i, b in enumerate(by_hand.transformer_blocks) if i not in gone)
    assert type(student) is QwenImageTransformer2DModel
    assert student.config.num_layers == 6 - len(gone)
    assert student.state_dict().keys() == by_hand.state_dict().keys()
    assert torch.equal(run(student, inputs), run(by_hand, inputs))


def test_a_distilled_block_stands_where_its_interval_stood(teacher: Any, inputs: dict[str, Any], make_teacher: Callable[..., Any]) -> None:
    other = make_teacher(1, seed=9).transformer_blocks[0]
    student = apply_plan(teacher, CompressionPlan.of(NAME, 6, [(2, 3)]), {"interval-2-3": other.state_dict()})
    by_hand = copy.deepcopy(teacher)
    by_hand.transformer_blocks[2] = copy.deepcopy(other)
    del by_hand.transformer_blocks[3]
    assert torch.equal(run(student, inputs), run(by_hand, inputs))


def test_modulation_at_full_rank_is_the_teacher(teacher: Any, inputs: dict[str, Any], random_bank: Banks) -> None:
    plan = CompressionPlan.of(NAME, 6, modulation_rank=teacher.inner_dim)
    student = apply_plan(teacher, plan, random_bank(teacher, plan))
    assert deviation(run(student, inputs), run(teacher, inputs)) < 1e-5


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_modulation_at_rank_r_is_the_projection_by_formula(teacher: Any, inputs: dict[str, Any], random_bank: Banks, rank: int) -> None:
    """`W s + b ~ (W B)(B'(s - mean)) + (W mean + b)`: projecting `s` inside the teacher's own maps is the reference."""
    plan = CompressionPlan.of(NAME, 6, modulation_rank=rank)
    bank = random_bank(teacher, plan)
    basis, mean = bank["modulation"]["basis"][:, :rank].double(), bank["modulation"]["mean"].double()

    class Projected(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, s: torch.Tensor) -> torch.Tensor:
            s = s.double()
            near = mean + (s - mean) @ basis @ basis.T
            return (near @ self.linear.weight.double().T + self.linear.bias.double()).float()

    reference = copy.deepcopy(teacher)
    for block in reference.transformer_blocks:
        block.img_mod[1], block.txt_mod[1] = Projected(block.img_mod[1]), Projected(block.txt_mod[1])
    wanted = run(reference, inputs)
    assert deviation(run(apply_plan(teacher, plan, bank), inputs), wanted) < 1e-5
    assert deviation(run(teacher, inputs), wanted) > 1e-2


def test_dead_code_changes_nothing_and_removes_what_was_counted(teacher: Any, inputs: dict[str, Any], random_bank: Banks) -> None:
    width, rank = teacher.inner_dim, 5
    bank = random_bank(teacher, PLANS["rank"])
    whole = apply_plan(teacher, PLANS["rank"], bank)
    lean = apply_plan(teacher, PLANS["dead code"], bank)
    assert (run(lean, inputs) - run(whole, inputs)).abs().max() <= 1e-6
    # Of the last block: text query with its norm, text output, text MLP (4x), four of six chunks of the text modulation.
    head = teacher.config.attention_head_dim
    linear = width * width + width
    mlp = (4 * width * width + 4 * width) + (4 * width * width + width)
    counted = 2 * linear + head + mlp + 4 * width * (rank + 1)
    assert count_parameters(whole) - count_parameters(lean) == counted


def plant_text_relation(model: Any, first: int, last: int) -> dict[str, torch.Tensor]:
    """Make the text streams of blocks first..last follow from block first's by one diagonal map; returns it.

    Text gates are zero, so the text state stands still; shift and scale of all of them are constants.
    """
    width = model.inner_dim
    g = torch.Generator().manual_seed(2)
    shift, scale = torch.randn(2, last - first + 1, width, generator=g) / 2
    for n, block in enumerate(model.transformer_blocks[first : last + 1]):
        linear = block.txt_mod[1]
        linear.weight[: 2 * width] = 0
        for chunk in (2, 5):  # both gates
            linear.weight[chunk * width : (chunk + 1) * width] = 0
            linear.bias[chunk * width : (chunk + 1) * width] = 0
        linear.bias[:width], linear.bias[width : 2 * width] = shift[min(n, 1)], scale[min(n, 1)]
    ratio = (1 + scale[1]) / (1 + scale[0])
    return {"text_in.weight": ratio.diag(), "text_in.bias": shift[1] - ratio * shift[0]}


@pytest.mark.parametrize(("reference", "mapped"), [(2, [3]), (2, [3, 4]), (4, [5]), (3, [4, 5])])
@pytest.mark.parametrize("dead_code", [True, False])
def test_blocks_with_planted_text_maps_are_the_teacher(
    make_teacher: Callable[..., Any], family: Family, inputs: dict[str, Any], reference: int, mapped: list[int], dead_code: bool
) -> None:
    model = make_teacher(6, seed=3)
    width = model.inner_dim
    maps = plant_text_relation(model, reference, mapped[-1])
    maps |= {"text_out.weight": torch.eye(width), "text_out.bias": torch.zeros(width)}
    plan = CompressionPlan.of(NAME, 6, [], mapped, None, dead_code)
    bank = {plan.text_key(b): maps for b in mapped}
    wanted = run(model, inputs)
    assert deviation(run(apply_plan(model, plan, bank), inputs), wanted) < 1e-5
    # The maps count: without their bias the student is another model.
    off = {k: maps | {"text_in.bias": maps["text_in.bias"] + 0.3} for k in bank}
    assert deviation(run(apply_plan(model, plan, off), inputs), wanted) > 1e-4


def test_text_out_feeds_the_full_block_after_a_run(teacher: Any, inputs: dict[str, Any], random_bank: Banks) -> None:
    """By hand: blocks 2 and 3 get keys and values from maps of block 1's modulated text, block 4 the map of block 1's text."""
    plan = CompressionPlan.of(NAME, 6, [], [2, 3])
    bank = random_bank(teacher, plan)
    maps = [{k: v.double() for k, v in bank[f"text-{b}-{b}-1-1"].items()} for b in (2, 3)]
    reference = copy.deepcopy(teacher)
    seen: dict[str, torch.Tensor] = {}
    blocks = reference.transformer_blocks
    original = blocks[1]._modulate
    calls: list[torch.Tensor] = []

    def spy(x: torch.Tensor, *args: Any) -> Any:
        result = original(x, *args)
        calls.append(result[0])
        return result

    blocks[1]._modulate = spy

    def keep_text(_: Any, args: Any, output: Any) -> None:
        seen["z"], seen["h"] = calls[1].double(), output[0].double()

    def text_input(m: dict[str, torch.Tensor]) -> Callable[..., Any]:
        def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mapped = seen["z"] @ m["text_in.weight"].T + m["text_in.bias"]
            return args, kwargs | {"encoder_hidden_states": mapped.float()}

        return hook

    def text_output(_: Any, args: Any, output: Any) -> Any:
        return (seen["h"] @ maps[1]["text_out.weight"].T + maps[1]["text_out.bias"]).float(), output[1]

    blocks[1].register_forward_hook(keep_text)
    blocks[2].attn.register_forward_pre_hook(text_input(maps[0]), with_kwargs=True)
    blocks[3].attn.register_forward_pre_hook(text_input(maps[1]), with_kwargs=True)
    blocks[3].register_forward_hook(text_output)
    assert deviation(run(apply_plan(teacher, plan, bank), inputs), run(reference, inputs)) < 1e-5


@st.composite
def plans(draw: st.DrawFn) -> CompressionPlan:
    edges = [0, *sorted(draw(st.sets(st.integers(1, 5), max_size=4))), 6]
    spans = [(a, b - 1) for a, b in itertools.pairwise(edges) if b - a > 1 and draw(st.booleans())]
    kept = CompressionPlan.of(NAME, 6, spans).kept
    text = draw(st.sets(st.sampled_from(kept[1:]))) if len(kept) > 1 else set()
    rank = draw(st.none() | st.integers(1, 32))
    full = [k for k in kept if k not in text]
    places = [(k, "image") for k in kept] + [(k, "text") for k in full[:-1]]
    # The last full block's text network is there only where something reads text after it, or dead code stays.
    ffn = draw(st.lists(st.sampled_from(places), max_size=3, unique=True))
    adapters = [span for span in spans if draw(st.booleans())]
    dead = bool(text or rank or ffn or adapters) and draw(st.booleans())
    return CompressionPlan.of(NAME, 6, spans, sorted(text), rank, dead, ffn, adapters)


@pytest.mark.slow
@settings(max_examples=12)
@given(plan=plans())
def test_predicted_parameters_are_the_real_ones(
    plan: CompressionPlan, teacher: Any, family: Family, inputs: dict[str, Any], random_bank: Banks
) -> None:
    student = apply_plan(teacher, plan, random_bank(teacher, plan))
    assert count_parameters(student) == predicted_parameters(family, config_of(teacher), plan)
    assert bool(torch.isfinite(run(student, inputs)).all())
    if plan.dead_code:  # What dead-code removal leaves out had no say.
        whole = plan.model_copy(update={"dead_code": False})
        bank = random_bank(teacher, whole)
        assert (run(student, inputs) - run(apply_plan(teacher, whole, bank), inputs)).abs().max() <= 2e-6
        assert count_parameters(student) < predicted_parameters(family, config_of(teacher), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_saved_students_come_back_bit_for_bit(name: str, teacher: Any, inputs: dict[str, Any], tmp_path: Path, random_bank: Banks) -> None:
    plan = PLANS[name]
    student = apply_plan(teacher, plan, random_bank(teacher, plan))
    files = save_model(student, plan, tmp_path)
    for path in (tmp_path, tmp_path / "transformer"):
        again = load_model(path)
        assert type(again) is type(student)
        assert torch.equal(run(again, inputs), run(student, inputs))
    assert files == {f: file_digest(tmp_path / f) for f in files}
    assert CompressionPlan.read(tmp_path / "transformer" / "plan.json") == plan
    kinds = {Path(f).suffix for f in files}
    assert kinds == {".json", ".safetensors", *([".py"] if plan.has_width_edits else [])}
    config = json.loads((tmp_path / "transformer" / "config.json").read_text("utf-8"))
    assert config["num_layers"] == len(plan.kept)
    assert ("auto_map" in config) == plan.has_width_edits
    if not plan.has_width_edits:
        stock = QwenImageTransformer2DModel.from_pretrained(tmp_path / "transformer")
        assert torch.equal(run(stock.eval(), inputs), run(student, inputs))


def test_other_dtypes_survive_the_round_trip(teacher: Any, tmp_path: Path, random_bank: Banks) -> None:
    model = copy.deepcopy(teacher)
    for module in model.modules():  # `model.to` warns of parts that it would keep in float32; there are none
        module._apply(lambda t: t.to(torch.bfloat16), recurse=False)
    student = apply_plan(model, PLANS["all"], random_bank(teacher, PLANS["all"]))
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    save_model(student, PLANS["all"], tmp_path)
    again = load_model(tmp_path, "bfloat16").state_dict()
    for key, tensor in student.state_dict().items():
        assert torch.equal(again[key], tensor), key


@pytest.mark.slow
@settings(max_examples=8)
@given(plan=plans())
def test_any_plan_s_student_survives_the_disk(
    plan: CompressionPlan, teacher: Any, inputs: dict[str, Any], random_bank: Banks, tmp_path: Path
) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    student = apply_plan(teacher, plan, random_bank(teacher, plan))
    save_model(student, plan, folder)
    again = load_model(folder)
    wanted = student.state_dict()
    assert again.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(run(again, inputs), run(student, inputs))
    assert CompressionPlan.read(folder / "transformer" / "plan.json") == plan == CompressionPlan.from_json(plan.to_json())


FRESH = """
import json, sys
sys.modules["ppclc"] = None
import torch
from diffusers import AutoModel
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    config = json.load(open(folder + "/transformer/config.json"))
    # diffusers refuses trust_remote_code where there is no code to trust: a stock student.
    model = AutoModel.from_pretrained(folder + "/transformer", trust_remote_code="auto_map" in config).eval()
    inputs = torch.load(folder + "/inputs.pt")
    with torch.no_grad():
        torch.save(model(**inputs, return_dict=False)[0], folder + "/output.pt")
    print(type(model).__name__, any(m == "ppclc" or m.startswith("ppclc.") for m, v in sys.modules.items() if v))
"""


@pytest.mark.slow
def test_students_load_where_ppclc_is_not_installed(teacher: Any, inputs: dict[str, Any], tmp_path: Path, random_bank: Banks) -> None:
    wanted = {}
    for name in ("depth", "ffn and all", "text to the end", "adapters and all"):
        folder = tmp_path / name.replace(" ", "_")
        student = apply_plan(teacher, PLANS[name], random_bank(teacher, PLANS[name]))
        save_model(student, PLANS[name], folder)
        torch.save(inputs, folder / "inputs.pt")
        wanted[folder] = run(student, inputs)
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, wanted)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pruned = "PrunedQwenImageTransformer2DModel False"
    assert done.stdout.split("\n")[:4] == ["QwenImageTransformer2DModel False", pruned, pruned, pruned]
    for folder, output in wanted.items():
        assert torch.equal(torch.load(folder / "output.pt"), output), folder.name


@pytest.mark.slow
def test_apply_plan_leaves_the_teacher_as_it_was(teacher: Any, inputs: dict[str, Any], random_bank: Banks) -> None:
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    output = run(teacher, inputs)
    for plan in PLANS.values():
        student = apply_plan(teacher, plan, random_bank(teacher, plan))
        for parameter in student.parameters():
            parameter.data.fill_(7)
    after = teacher.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert torch.equal(run(teacher, inputs), output)
    assert teacher.config.num_layers == 6


@pytest.mark.parametrize("name", PLANS)
def test_padded_text_has_no_say(name: str, teacher: Any, inputs: dict[str, Any], random_bank: Banks) -> None:
    model = apply_plan(teacher, PLANS[name], random_bank(teacher, PLANS[name]))
    text = inputs["encoder_hidden_states"]
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    mask[:, 3:] = False
    output = run(model, inputs | {"encoder_hidden_states_mask": mask})
    noisy = torch.where(mask[..., None], text, 5 * torch.randn(text.shape))
    assert torch.equal(run(model, inputs | {"encoder_hidden_states": noisy, "encoder_hidden_states_mask": mask}), output)
    assert deviation(run(model, inputs | {"encoder_hidden_states": text[:, :3]}), output) < 1e-5
    assert deviation(run(model, inputs), output) > 1e-4


def test_plans_of_other_models_are_refused(teacher: Any, family: Family) -> None:
    with pytest.raises(PlanError, match="num_blocks = 5, but the model has 6 blocks"):
        apply_plan(teacher, CompressionPlan.of(NAME, 5, [(0, 1)]))
    with pytest.raises(PlanError, match="family = 'flux', but the model is of 'qwen_image'"):
        predicted_parameters(family, config_of(teacher), CompressionPlan.of("flux", 6))
    with pytest.raises(PlanError, match="the bank holds no 'modulation'"):
        apply_plan(teacher, PLANS["rank"])
    with pytest.raises(PlanError, match=r"the bank holds no 'text-1-1-0-0'"):
        apply_plan(teacher, PLANS["text"], {"modulation": {}})


def test_ranks_above_the_width_and_students_as_teachers_are_refused(teacher: Any, random_bank: Banks) -> None:
    plan = CompressionPlan.of(NAME, 6, modulation_rank=33)
    with pytest.raises(PlanError, match="modulation_rank = 33: wanted at most the width, 32"):
        apply_plan(teacher, plan, random_bank(teacher, plan))
    student = apply_plan(teacher, PLANS["rank"], random_bank(teacher, PLANS["rank"]))
    with pytest.raises(PlanError, match="an edited student already"):
        apply_plan(student, PLANS["empty"])


def test_trace_keeps_the_states_that_blocks_pass_on(teacher: Any, family: Family, inputs: dict[str, Any]) -> None:
    seen = trace(teacher, family, inputs)
    assert torch.equal(seen.velocity, run(teacher, inputs))
    assert seen.temb is not None
    text = teacher.txt_in(teacher.txt_norm(inputs["encoder_hidden_states"]))
    assert torch.equal(seen.states["text"][0], text)
    assert torch.equal(seen.states["image"][0], teacher.img_in(inputs["hidden_states"]))
    for i, block in enumerate(teacher.transformer_blocks):
        out = block(hidden_states=seen.states["image"][i], encoder_hidden_states=seen.states["text"][i], **seen.shared[i])
        assert torch.equal(out[0], seen.states["text"][i + 1])
        assert torch.equal(out[1], seen.states["image"][i + 1])
    short = trace(teacher, family, inputs, last=2)
    assert [len(s) for s in short.states.values()] == [4, 4]
    assert torch.equal(short.states["image"][3], seen.states["image"][3])


@pytest.mark.slow
def test_blocks_that_were_left_out_are_put_back_even_after_an_error(teacher: Any, family: Family, inputs: dict[str, Any]) -> None:
    before, modules = run(teacher, inputs), list(teacher.transformer_blocks)
    without = run(apply_plan(teacher, CompressionPlan.of(NAME, 6, [(1, 3)])), inputs)
    with left_out(teacher, family, {2, 3}):
        assert torch.equal(run(teacher, inputs), without)
    with pytest.raises(RuntimeError, match="inside"), left_out(teacher, family, {0}):
        raise RuntimeError("inside")
    assert list(teacher.transformer_blocks) == modules
    assert torch.equal(run(teacher, inputs), before)


def test_a_source_knows_itself_by_its_content(teacher: Any, teacher_folder: Path, tmp_path: Path) -> None:
    digest = open_source(str(teacher_folder)).digest()
    other = copy.deepcopy(teacher)
    other.save_pretrained(tmp_path / "same")
    assert open_source(str(tmp_path / "same")).digest() == digest
    other.proj_out.bias.data[0] += 1
    other.save_pretrained(tmp_path / "other")
    assert open_source(str(tmp_path / "other")).digest() != digest
    with pytest.raises(ModelError, match="builtin:nothing: no such model; there is builtin:two-digits"):
        open_source("builtin:nothing")


def test_shards_are_loaded_by_their_index(teacher: Any, inputs: dict[str, Any], tmp_path: Path) -> None:
    teacher.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(open_source(str(tmp_path)).weight_files()) > 2
    assert torch.equal(run(load_model(tmp_path), inputs), run(teacher, inputs))
