"""Files for ComfyUI, written and read: bit for bit the student's, by diffusers' own conversion of them, and refused where they cannot be."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ppclc import cli, commands, plugins
from ppclc.compiler import compress
from ppclc.data.samples import open_samples
from ppclc.errors import ModelError, PlanError
from ppclc.families import rotary_axes
from ppclc.loading.checkpoints import WEIGHTS
from ppclc.loading.classes import empty_model
from ppclc.loading.single_files import cuts_of, recognise, stacked_shapes
from ppclc.loading.sources import open_source
from ppclc.loading.weight_files import WeightFiles
from ppclc.models import apply_plan, load_model, save_model
from ppclc.plan import CompressionPlan
from ppclc.publishing import comfyui
from ppclc.publishing.comfyui import check_layout, write_single_file
from ppclc.recipe import parse_recipe
from ppclc.screens.display import Display
from ppclc.teachers import ResidentTeacher, StreamedTeacher
from tests.contracts.test_families import subject_of

PREFIX = "model.diffusion_model."
PLANS = {
    "flux": CompressionPlan.of("flux", 8, [(1, 2), (5, 7)]),
    "qwen_image": CompressionPlan.of("qwen_image", 4, [(0, 1)]),
}


def converted(path: Path, width: int) -> dict[str, torch.Tensor]:
    """A FLUX.1 file as diffusers converts it. The width stands in its function as a number, of which tiny models have another."""
    text = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert text.count("inner_dim = 3072") == 1
    scope: dict[str, Any] = {"torch": torch}
    exec(text.replace("inner_dim = 3072", f"inner_dim = {width}"), scope)
    result: dict[str, torch.Tensor] = scope["convert_flux_transformer_checkpoint_to_diffusers"](load_file(path))
    return result


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def student_of(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A sliced student in `folder/transformer`."""
    plan = PLANS[name]
    student = apply_plan(subject_of(name, **changes).model, plan).to(dtype)
    save_model(student, plan, folder)
    return student


@pytest.fixture(params=PLANS)
def sliced(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Path]:
    """A family, its student, and the file for ComfyUI."""
    student = student_of(request.param, tmp_path)
    return request.param, student, write_single_file(tmp_path, tmp_path / "comfyui" / "small.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_flux_file_is_the_student_by_diffusers_own_conversion(tmp_path: Path, dtype: torch.dtype) -> None:
    student = student_of("flux", tmp_path, dtype)
    file = write_single_file(tmp_path, tmp_path / "a.safetensors")
    assert same(converted(file, student.inner_dim), dict(student.state_dict()))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("changes", [{"guidance_embeds": False}, {"out_channels": 6}, {"num_attention_heads": 3}])
def test_other_configurations_of_flux_come_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    student = student_of("flux", tmp_path, **changes)
    file = write_single_file(tmp_path, tmp_path / "a.safetensors")
    source = open_source(str(file))
    assert {k: source.config[k] for k in student.config if not k.startswith("_")} == {
        k: v for k, v in student.config.items() if not k.startswith("_")
    }
    assert same(dict(load_model(file).state_dict()), dict(student.state_dict()))


def test_the_qwen_image_file_has_the_names_of_diffusers(tmp_path: Path) -> None:
    student = student_of("qwen_image", tmp_path)
    assert same(load_file(write_single_file(tmp_path, tmp_path / "a.safetensors")), dict(student.state_dict()))


def test_what_was_written_is_read_back_bit_for_bit_with_equal_outputs(sliced: tuple[str, Any, Path]) -> None:
    name, student, file = sliced
    again = load_model(file)
    assert type(again) is type(student)
    assert same(dict(again.state_dict()), dict(student.state_dict()))
    inputs = subject_of(name).inputs
    with torch.no_grad():
        assert torch.equal(again(**inputs, return_dict=False)[0], student(**inputs, return_dict=False)[0])
    assert json.loads(json.dumps(dict(again.config)))["num_layers"] == student.config.num_layers


def test_a_prefix_changes_nothing_and_other_parts_are_left_and_told(sliced: tuple[str, Any, Path], tmp_path: Path) -> None:
    _, student, file = sliced
    whole = {PREFIX + k: v for k, v in load_file(file).items()}
    whole |= {"first_stage_model.decoder.conv_in.weight": torch.ones(3), "text_encoders.t5xxl.position_ids": torch.arange(4)}
    save_file(whole, tmp_path / "checkpoint.safetensors")
    source = open_source(str(tmp_path / "checkpoint.safetensors"))
    assert same(dict(load_model(tmp_path / "checkpoint.safetensors").state_dict()), dict(student.state_dict()))
    assert len(source.notes) == 1
    assert "2 tensors beside the transformer's are not read, first_stage_model.decoder.conv_in.weight first" in source.notes[0]
    assert not open_source(str(file)).notes
    bare = {k.removeprefix(PREFIX): v for k, v in whole.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    assert same(dict(load_model(tmp_path / "bare.safetensors").state_dict()), dict(student.state_dict()))
    streamed = WeightFiles(source, torch.float32, torch.device("cpu"))
    assert same(dict(streamed), dict(student.state_dict()))


def test_a_single_file_can_be_a_streamed_teacher(sliced: tuple[str, Any, Path]) -> None:
    name, student, file = sliced
    source = open_source(str(file))
    samples = open_samples("noise", source, student, "train")
    resident, streamed = ResidentTeacher(student, source.family), StreamedTeacher(source, "float32")
    drawn = [samples.draw(2, torch.Generator().manual_seed(3))]
    for a, b in zip(resident.velocities(drawn), streamed.velocities(drawn), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    for n in range(source.family.num_blocks(source.config)):
        assert same(dict(resident.block_tensors(n)), dict(streamed.block_tensors(n))), (name, n)
    assert same(dict(resident.tensors()), dict(streamed.tensors()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_that_of_the_folder(tmp_path: Path, dtype: torch.dtype) -> None:
    student_of("flux", tmp_path, dtype)
    file = write_single_file(tmp_path, tmp_path / "a.safetensors")
    assert same(dict(load_model(file).state_dict()), dict(load_model(tmp_path).state_dict()))
    kind = str(dtype).removeprefix("torch.")
    assert same(dict(load_model(file, kind).state_dict()), dict(load_model(tmp_path, kind).state_dict()))


def test_sharded_weights_make_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppclc.loading.checkpoints.SHARD_SIZE", "100KB")
    student = student_of("flux", tmp_path)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    assert (tmp_path / "transformer" / f"{WEIGHTS}.index.json").is_file()
    file = write_single_file(tmp_path, tmp_path / "a.safetensors")
    assert same(dict(load_model(file).state_dict()), dict(student.state_dict()))


def test_no_more_than_a_tensor_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student_of("flux", tmp_path)
    alive: list[Any] = []
    most = 0
    plain = comfyui.read_at

    def counted(place: Any) -> torch.Tensor:
        import weakref

        nonlocal most
        tensor = plain(place)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(comfyui, "read_at", counted)
    write_single_file(tmp_path, tmp_path / "a.safetensors")
    assert len(alive) > 50
    assert most <= 2  # the one before goes when the next has been read


def test_a_write_that_stops_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student_of("qwen_image", tmp_path)
    file = write_single_file(tmp_path, tmp_path / "c" / "a.safetensors")
    before = file.read_bytes()

    def broken(*_: Any) -> None:
        raise OSError("gone")

    monkeypatch.setattr("ppclc.loading.checkpoints._Writer.move", broken)
    with pytest.raises(OSError, match="gone"):
        write_single_file(tmp_path, file)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == ["a.safetensors"]


def test_edit_2511_keeps_what_tells_it_from_the_others(tmp_path: Path) -> None:
    """No shape says that references are modulated at timestep 0: ComfyUI reads it from the name of an empty tensor."""
    student = student_of("qwen_image", tmp_path, zero_cond_t=True)
    file = write_single_file(tmp_path, tmp_path / "a.safetensors")
    with safe_open(file, "pt") as handle:
        assert set(handle.keys()) - student.state_dict().keys() == {"__index_timestep_zero__"}
    again = load_model(file)
    assert again.config.zero_cond_t is True
    assert same(dict(again.state_dict()), dict(student.state_dict()))


def test_layered_is_known_by_its_embedding(tmp_path: Path) -> None:
    student = student_of("qwen_image", tmp_path, use_additional_t_cond=True, use_layer3d_rope=True)
    again = load_model(write_single_file(tmp_path, tmp_path / "a.safetensors"))
    assert again.config.use_layer3d_rope is True
    assert same(dict(again.state_dict()), dict(student.state_dict()))


def test_axes_are_the_published_ones() -> None:
    assert rotary_axes(128) == (16, 56, 56)
    assert rotary_axes(16) == (4, 6, 6)
    assert all(sum(rotary_axes(d)) == d and all(a % 2 == 0 for a in rotary_axes(d)) for d in range(8, 257, 2))


# -- what is refused -------------------------------------------------------------------------------------------------


def test_students_that_comfyui_has_no_class_for_are_refused(tmp_path: Path) -> None:
    flux, sd3 = (plugins.load("families", n) for n in ("flux", "sd3"))
    with pytest.raises(PlanError, match="--comfyui: the plan has edits that change the class"):
        check_layout(flux, CompressionPlan.of("flux", 8, text_stream=[2]))
    with pytest.raises(PlanError, match="--comfyui: no file for ComfyUI is known of sd3, wanted one of flux, qwen_image"):
        check_layout(sd3, CompressionPlan.of("sd3", 5, [(1, 2)]))
    assert check_layout(flux, PLANS["flux"]) is flux.single_file
    subject_of("sd3").model.save_pretrained(tmp_path / "transformer")
    with pytest.raises(ModelError, match="wanted the folder of a stock model of flux"):
        write_single_file(tmp_path, tmp_path / "a.safetensors")


Change = Callable[[dict[str, torch.Tensor]], Any]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("txt_in.bias"), "1 tensors are missing, txt_in.bias first; wanted all that its own blocks and widths call for"),
        (lambda t: t.pop("img_in.weight"), "looks like flux, but 'img_in.weight' is missing"),
        (lambda t: t.update({"lora.up": torch.ones(2)}), "1 tensors are not in the class, lora.up first"),
        (lambda t: t.update({"double_blocks.5.img_attn.qkv.bias": torch.ones(2)}), "double_blocks.5.img_attn.qkv.bias first"),
        (lambda t: t.update({"img_in.bias": torch.ones(5)}), r"tensor img_in.bias has shape \[5\], wanted \[32\]"),
        (lambda t: t.update({"scaled_fp8": torch.ones(0)}), "is quantized, scaled_fp8 is a scale"),
        (
            lambda t: t.update({"double_blocks.0.img_attn.qkv.scale_weight": torch.ones(1)}),
            "is quantized, double_blocks.0.img_attn.qkv.scale",
        ),
        (lambda t: t.pop("vector_in.in_layer.weight"), "its tensors are of no single file that ppclc reads: wanted flux or qwen_image"),
        (lambda t: t["img_in.bias"].fill_(float("nan")), "x_embedder.bias holds NaN"),
    ],
)
def test_files_that_are_not_whole_are_refused(tmp_path: Path, change: Change, words: str) -> None:
    student_of("flux", tmp_path)
    tensors = load_file(write_single_file(tmp_path, tmp_path / "a.safetensors"))
    change(tensors)
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match=words):
        load_model(tmp_path / "b.safetensors")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"not one")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        open_source(str(tmp_path / "a.safetensors"))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"a \.safetensors file, or builtin"):
        open_source(str(tmp_path / "a.gguf"))


def test_weights_in_diffusers_names_are_given_by_their_folder(tmp_path: Path) -> None:
    student_of("flux", tmp_path)
    with pytest.raises(ModelError, match="in diffusers' layout is given by its folder"):
        open_source(str(tmp_path / "transformer" / WEIGHTS))


def test_integers_are_no_weights(tmp_path: Path) -> None:
    student_of("flux", tmp_path)
    tensors = load_file(write_single_file(tmp_path, tmp_path / "a.safetensors"))
    tensors["img_in.bias"] = tensors["img_in.bias"].to(torch.int8)
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match=r"img_in.bias is stored as torch.int8, wanted one of"):
        WeightFiles(open_source(str(tmp_path / "b.safetensors")), torch.float32, torch.device("cpu"))


# -- as a teacher, and by the command line ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_single_file_is_compressed_and_cut_for_comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """File in, file out: the teacher streamed from a file for ComfyUI, its student written as one by the command itself."""
    student_of("qwen_image", tmp_path / "first")
    file = write_single_file(tmp_path / "first", tmp_path / "teacher.safetensors")
    out = tmp_path / "out"
    recipe = {
        "model": {"path": str(file)},
        "calibrate": {"source": "noise", "samples": 64, "longest": 2},
        "analyze": {"probes": 16, "trials": 0, "supernet_steps": 0},
        "target": {"parameters": 0.75},
        "plan": {"text_stream": "none", "ffn": "none", "modulation_rank": "none"},
        "distill": {"steps": 2, "width_steps": 2, "finetune_steps": 2, "batch": 4, "teacher": "streamed"},
    }
    compress(parse_recipe(recipe, "r"), "r", out, Display(0, -1), until="slice")
    assert sorted(p.name for p in (out / "model").iterdir()) == ["README.md", "recipe.yaml", "transformer"]
    assert "base_model" not in (out / "model" / "README.md").read_text("utf-8")
    monkeypatch.setattr("sys.argv", ["ppclc", "slice", str(out), "--plan", str(out / "plan.json"), "--comfyui", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    document = json.loads(capsys.readouterr().out)
    [home] = (out / "sizes").iterdir()
    [written] = (home / "comfyui").iterdir()
    assert written.name == f"out-{home.name}.safetensors"
    assert same(dict(load_model(written).state_dict()), dict(load_model(home).state_dict()))
    assert sum(t.numel() for t in load_file(written).values()) == document["student"]["parameters"]


def test_inspect_tells_what_it_leaves(tmp_path: Path) -> None:
    student = student_of("flux", tmp_path)
    tensors = load_file(write_single_file(tmp_path, tmp_path / "a.safetensors"))
    save_file({PREFIX + k: v for k, v in tensors.items()} | {"vae.x": torch.ones(1)}, tmp_path / "b.safetensors")
    told = commands.inspect(str(tmp_path / "b.safetensors"), check=True)
    assert (told["family"], told["groups"]) == ("flux", {"transformer_blocks": 3, "single_transformer_blocks": 2})
    assert told["parameters"] == sum(p.numel() for p in student.parameters())
    assert told["notes"] == [f"{tmp_path / 'b.safetensors'}: 1 tensors beside the transformer's are not read, vae.x first"]


@pytest.mark.slow
@pytest.mark.parametrize(("guidance", "count"), [(True, 780), (False, 776)])
def test_the_published_file_of_flux_is_met_in_names_and_shapes(guidance: bool, count: int) -> None:
    """FLUX.1 dev and schnell at their own size, from shapes alone: as many tensors as their files have, and the configuration back from them."""
    family = plugins.load("families", "flux")
    published = {"_class_name": family.class_name, "guidance_embeds": guidance, "num_layers": 19, "num_single_layers": 38}
    ours = {n: tuple(t.shape) for n, t in empty_model(family, published).state_dict().items()}
    there = stacked_shapes(cuts_of(family.single_file, ours), ours)
    assert len(there) == count
    assert there["double_blocks.0.img_attn.qkv.weight"] == (9216, 3072)
    assert there["single_blocks.37.linear1.weight"] == (21504, 3072)
    assert there["single_blocks.37.linear2.weight"] == (3072, 15360)
    assert there["final_layer.adaLN_modulation.1.weight"] == (6144, 3072)
    found = recognise({PREFIX + n: s for n, s in there.items()}, "flux1.safetensors")
    assert found.config["axes_dims_rope"] == (16, 56, 56)
    model = empty_model(family, found.config)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == ours
    assert model.config.guidance_embeds is guidance
