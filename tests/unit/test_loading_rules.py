"""By which rules the field's loaders find a student's size, each written down here apart from ppclc (docs/loading.md names their sources)."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from ppclc.families import Family
from ppclc.models import apply_plan, load_model, save_model
from ppclc.plan import CompressionPlan
from ppclc.publishing.comfyui import write_single_file
from tests.contracts.test_families import subject_of

PLANS = {
    "qwen_image": CompressionPlan.of("qwen_image", 4, [(1, 2)]),
    "flux": CompressionPlan.of("flux", 8, [(0, 1), (4, 6)]),
    "sd3": CompressionPlan.of("sd3", 5, [(1, 2)]),
    "sd3, to the end": CompressionPlan.of("sd3", 5, [(3, 4)]),
}
COUNTS = {"qwen_image": [3], "flux": [3, 2], "sd3": [4], "sd3, to the end": [4]}
"""Blocks that stay, by group."""

Cut = tuple[str, Family, Any, Path]


@pytest.fixture(params=PLANS)
def cut(request: pytest.FixtureRequest, tmp_path: Path) -> Cut:
    """A plan's name, its family, its student, and the folder that it lies in."""
    plan = PLANS[request.param]
    subject = subject_of(plan.family)
    student = apply_plan(subject.model, plan)
    save_model(student, plan, tmp_path)
    return request.param, subject.family, student, tmp_path


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "transformer" / "config.json").read_text("utf-8"))
    return found


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in (folder / "transformer").glob("*.safetensors") for k, v in load_file(file).items()}


def contiguous(keys: Iterable[str], prefix: str) -> int:
    """ComfyUI: the first N of which no key begins with `prefix.N.`"""
    known = set(keys)
    return next(n for n in itertools.count() if not any(key.startswith(f"{prefix}.{n}.") for key in known))


def highest(keys: Iterable[str], prefix: str) -> int:
    """What a loader finds that looks for the last number instead."""
    return 1 + max(int(m[1]) for key in keys if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", key)))


# -- diffusers: num_layers in config.json ----------------------------------------------------------------------------


def test_diffusers_places_every_tensor_by_config_alone(cut: Cut) -> None:
    name, family, student, folder = cut
    model, info = getattr(diffusers, config_of(folder)["_class_name"]).from_pretrained(
        folder, subfolder="transformer", output_loading_info=True, local_files_only=True
    )
    assert {k: v for k, v in info.items() if v} == {}
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys()
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert type(model).__name__ == family.class_name
    assert [int(model.config[g.count_key]) for g in family.groups] == COUNTS[name]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in student.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("change", [1, -1])
def test_a_wrong_count_would_be_seen(cut: Cut, change: int) -> None:
    """The rule above has teeth: with another `num_layers` diffusers misses tensors or has too many."""
    _, family, _, folder = cut
    key = family.groups[0].count_key
    config = config_of(folder)
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {key: config[key] + change}), "utf-8")
    given = {"subfolder": "transformer", "output_loading_info": True, "local_files_only": True, "low_cpu_mem_usage": False}
    try:
        _, info = getattr(diffusers, config["_class_name"]).from_pretrained(folder, **given)
    except RuntimeError as error:  # the last block of SD3 has other shapes than the rest
        assert "size mismatch" in str(error)  # noqa: PT017
    else:
        assert info["missing_keys"] or info["unexpected_keys"]


# -- ComfyUI: contiguous numbers in the keys -------------------------------------------------------------------------


def test_numbers_have_no_gap(cut: Cut) -> None:
    name, family, _, folder = cut
    keys = tensors_of(folder).keys()
    for group, count in zip(family.groups, COUNTS[name], strict=True):
        assert contiguous(keys, group.path) == highest(keys, group.path) == count


def test_comfyui_counts_the_student_of_qwen_image(tmp_path: Path) -> None:
    plan = PLANS["qwen_image"]
    save_model(apply_plan(subject_of("qwen_image").model, plan), plan, tmp_path)
    for keys in (tensors_of(tmp_path), load_file(write_single_file(tmp_path, tmp_path / "a.safetensors"))):
        assert "txt_norm.weight" in keys
        assert keys["img_in.weight"].shape[1] == config_of(tmp_path)["in_channels"]
        assert contiguous(keys, "transformer_blocks") == highest(keys, "transformer_blocks") == 3


def test_comfyui_counts_the_student_of_flux(tmp_path: Path) -> None:
    plan = PLANS["flux"]
    save_model(apply_plan(subject_of("flux").model, plan), plan, tmp_path)
    keys = load_file(write_single_file(tmp_path, tmp_path / "a.safetensors"))
    assert {"double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight", "guidance_in.in_layer.weight"} <= keys.keys()
    assert "txt_norm.weight" not in keys
    assert contiguous(keys, "double_blocks") == highest(keys, "double_blocks") == 3
    assert contiguous(keys, "single_blocks") == highest(keys, "single_blocks") == 2
    assert keys["vector_in.in_layer.weight"].shape[1] == config_of(tmp_path)["pooled_projection_dim"]


# -- TensorRT-Model-Connect: counts in config.json -------------------------------------------------------------------


def test_model_connect_reads_the_counts_of_the_weights(cut: Cut) -> None:
    """It builds as many blocks as `num_layers` and `num_single_layers` say: they are plain numbers, and those of the weights."""
    name, family, _, folder = cut
    config, keys = config_of(folder), tensors_of(folder).keys()
    counts = [config[key] for key in ("num_layers", "num_single_layers") if key in config]
    assert counts == COUNTS[name] == [contiguous(keys, g.path) for g in family.groups]
    assert all(type(count) is int for count in counts)


# -- 5 GB shards -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_large_weights_are_sharded_with_an_index_that_diffusers_follows(cut: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    name, family, student, folder = cut
    assert not list((folder / "transformer").glob("*.index.json"))
    monkeypatch.setattr("ppclc.loading.checkpoints.SHARD_SIZE", "60KB")
    save_model(student, PLANS[name], folder / "sharded")
    home = folder / "sharded" / "transformer"
    index = json.loads((home / "diffusion_pytorch_model.safetensors.index.json").read_text("utf-8"))
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    assert all(re.fullmatch(r"diffusion_pytorch_model-\d{5}-of-\d{5}\.safetensors", shard) for shard in shards)
    assert all(name in load_file(home / shard) for name, shard in index["weight_map"].items())
    model, info = getattr(diffusers, family.class_name).from_pretrained(home, output_loading_info=True, local_files_only=True)
    assert {k: v for k, v in info.items() if v} == {}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in student.state_dict().items())


def test_shards_hold_five_gigabytes() -> None:
    from ppclc.loading.checkpoints import SHARD_SIZE

    assert SHARD_SIZE == "5GB"


# -- saved again -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_student_saved_again_is_the_student(cut: Cut) -> None:
    _, _, student, folder = cut
    load_model(folder).save_pretrained(folder / "again")
    again = load_model(folder / "again")
    assert type(again) is type(student)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in student.state_dict().items())
    a, b = ({k: v for k, v in json.loads(m.to_json_string()).items() if k != "_name_or_path"} for m in (again, student))
    assert a == b


@pytest.mark.slow
def test_a_class_that_travels_loads_as_the_card_says(tmp_path: Path) -> None:
    """Of a bare transformer: by `AutoModel` and the subfolder; saved again it does so too."""
    plan = CompressionPlan.of("qwen_image", 4, [(1, 2)], modulation_rank=4)
    model = subject_of("qwen_image").model
    bank = {"modulation": {"basis": torch.eye(model.inner_dim), "mean": torch.zeros(model.inner_dim)}}
    student = apply_plan(model, plan, bank)
    save_model(student, plan, tmp_path)
    found = diffusers.AutoModel.from_pretrained(str(tmp_path), subfolder="transformer", trust_remote_code=True)
    found.save_pretrained(tmp_path / "again" / "transformer")
    again = diffusers.AutoModel.from_pretrained(str(tmp_path / "again"), subfolder="transformer", trust_remote_code=True)
    for other in (found, again, load_model(tmp_path / "again")):
        assert type(other).__name__ == type(student).__name__
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in student.state_dict().items())
    assert {p.name for p in (tmp_path / "again" / "transformer").iterdir()} == {
        p.name for p in (tmp_path / "transformer").iterdir() if p.name != "plan.json"
    }
