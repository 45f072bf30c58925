"""A teacher's LoRA for its student: merged before the cut or fitted and merged after it, the model is the same; every scheme, every refusal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers,
    _convert_non_diffusers_qwen_lora_to_diffusers,
)
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ppclc import cli, plugins
from ppclc.errors import ModelError, OutputError, PlanError, PpclcError
from ppclc.families import Family
from ppclc.loading.classes import stock_config
from ppclc.loras.keys import names_of
from ppclc.loras.parts import CUT, KEPT, LINEAR, MAPPED, NO_BASIS, PROJECTED, REMOVED, UNREAD, Modules, shapes_of
from ppclc.loras.remap import remap
from ppclc.models import apply_plan, save_model
from ppclc.plan import CompressionPlan

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
FAMILIES = ("qwen_image", "flux", "sd3")
RANK = 3
TOLERANCE = 1e-5
OUTPUTS = ("to_out.0", "to_add_out", "net.2", "proj_out")
"""Last maps of what a block adds to its states, in the three families."""
WIDTHS: dict[str, dict[str, Any]] = {
    "qwen_image": {"intervals": [(1, 2)], "text_stream": [4], "modulation_rank": 6, "dead_code": True, "ffn": [(0, "image"), (1, "text")]},
    "flux": {"intervals": [(1, 2), (4, 5)], "text_stream": [3], "modulation_rank": 6, "ffn": [(0, "image"), (1, "text")]},
    "sd3": {"intervals": [(1, 2)], "text_stream": [3], "modulation_rank": 6, "dead_code": True, "ffn": [(0, "image"), (1, "text")]},
}


def linears(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def plant(model: Any, wanted: Callable[[str], bool] = lambda name: True, rank: int = RANK, seed: int = 7) -> Pairs:
    """Random factors for a model's maps, of an effect that shows."""
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, module in linears(model).items():
        out, *inputs = module.weight.shape
        if wanted(name):
            up = torch.randn(out, rank, *[1 for _ in inputs[1:]], generator=g)
            pairs[name] = torch.randn(rank, *inputs, generator=g) / math.prod(inputs) ** 0.5, 0.2 * up
    return pairs


def delta(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (up.flatten(1).double() @ down.flatten(1).double()).reshape(len(up), *down.shape[1:])


def merge(model: Any, deltas: Mapping[str, torch.Tensor], biases: Mapping[str, torch.Tensor] | None = None) -> Any:
    """The model with changes added to its weights, and to its biases."""
    maps = linears(model)
    for name, change in deltas.items():
        maps[name].weight.data += change.to(maps[name].weight)
    for name, change in (biases or {}).items():
        if bool(change.any()):
            maps[name].bias.data += change.to(maps[name].bias)
    return model


def copied(model: Any) -> Any:
    twin = type(model).from_config(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.eval().requires_grad_(False)


def diffusers_file(path: Path, pairs: Pairs, prefix: str = "transformer.", metadata: dict[str, str] | None = None) -> Path:
    tensors = {}
    for name, (down, up) in pairs.items():
        tensors |= {f"{prefix}{name}.lora_A.weight": down.clone(), f"{prefix}{name}.lora_B.weight": up.clone()}
    save_file(tensors, path, metadata)
    return path


def read(path: Path, prefix: str = "transformer.", scales: Mapping[str, float] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Changes of weights and biases in a diffusers file, by an own reading of it."""
    tensors = load_file(path)
    names = [k.removeprefix(prefix).removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")]
    deltas, biases = {}, {}
    for name in names:
        down, up = (tensors.pop(f"{prefix}{name}.lora_{x}.weight") for x in "AB")
        alpha = tensors.pop(f"{prefix}{name}.alpha", torch.tensor(float(len(down))))
        scale = (scales or {}).get(name, alpha.item() / len(down))
        deltas[name] = scale * delta(down, up)
        if f"{prefix}{name}.lora_B.bias" in tensors:
            biases[name] = scale * tensors.pop(f"{prefix}{name}.lora_B.bias").double()
    assert not tensors
    return deltas, biases


def run(model: Any, family: Family) -> torch.Tensor:
    inputs = family.example_inputs(model.config, batch=2, generator=torch.Generator().manual_seed(1))
    out: torch.Tensor = model(**inputs, return_dict=False)[0]
    return out


def teacher_of(name: str, **config: Any) -> tuple[Family, Any]:
    family: Family = plugins.load("families", name)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        kind = getattr(diffusers, family.class_name)
        sizes = {"num_layers": 5} if name == "qwen_image" else {}
        model = kind(**{**family.tiny_config, **sizes, **config})
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return family, model.eval().requires_grad_(False)


def plan_of(family: Family, model: Any, **edits: Any) -> CompressionPlan:
    return CompressionPlan.of(family.name, family.num_blocks(model.config), **edits)


def saved(model: Any, plan: CompressionPlan, out: Path, bank: Any = None) -> tuple[Any, Path]:
    """A plan's student as a run leaves it, with the calibration's mean, and where its plan.json lies."""
    student = apply_plan(model, plan, bank)
    save_model(student, plan, out / "model")
    if bank:
        record = out / "records" / "calibrate-0123"
        record.mkdir(parents=True)
        (record / "record.json").write_text(json.dumps({"rows": {"temb": 4}}))
        save_file({"temb.sum": 4 * bank["modulation"]["mean"].double()[None]}, record / "tensors.safetensors")
    return student, out / "model" / "transformer" / "plan.json"


def same(a: Any, b: Any) -> None:
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys()
    for name, value in x.items():
        assert (value - y[name]).abs().max() <= TOLERANCE, name


# -- what it is for the student ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_depth_student_with_its_lora_is_the_teacher_with_its(name: str, tmp_path: Path) -> None:
    """Blocks that go add nothing in the teacher; of two groups, both lose one."""
    family, model = teacher_of(name)
    intervals = [(2, 3), (4, 5)] if len(family.groups) > 1 else [(2, 3)]
    plan = plan_of(family, model, intervals=intervals)
    gone = tuple(family.prefix(model.config, b) for b in range(plan.num_blocks) if b not in plan.kept)
    for part, module in linears(model).items():
        if part.startswith(gone) and part.endswith(OUTPUTS):
            module.weight.data.zero_()
            module.bias.data.zero_()
    student, plan_file = saved(model, plan, tmp_path)
    assert (run(student, family) - run(model, family)).abs().max() <= TOLERANCE

    pairs = plant(model, lambda n: not n.startswith(gone))
    document = remap(diffusers_file(tmp_path / "a.safetensors", pairs), plan_file, None, None)
    wanted = run(merge(copied(model), {n: delta(*p) for n, p in pairs.items()}), family)
    deltas, biases = read(tmp_path / "a-student.safetensors")
    got = run(merge(student, deltas), family)
    assert (wanted - run(model, family)).abs().max() > 0.1
    assert (got - wanted).abs().max() <= TOLERANCE * max(1.0, float(wanted.abs().max()))
    assert (document["kept"], document["dropped"], document["norm_kept"], biases) == (len(pairs), 0, 1.0, {})
    assert document["checked_against"] == "student"
    # Bit for bit the same factors.
    assert sorted(d.sum().item() for d in deltas.values()) == sorted(delta(*p).sum().item() for p in pairs.values())


@pytest.mark.slow
@pytest.mark.parametrize("model_given", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_merging_before_the_cut_is_merging_after_it(name: str, model_given: bool, tmp_path: Path, random_bank: Any) -> None:
    """All edits at once; every map of the teacher is changed, those that go as well."""
    family, model = teacher_of(name)
    plan = plan_of(family, model, **WIDTHS[name])
    bank = random_bank(model, plan)
    student, plan_file = saved(model, plan, tmp_path, bank)
    pairs = plant(model)
    model.save_pretrained(tmp_path / "teacher")
    given = str(tmp_path / "teacher") if model_given else None
    document = remap(diffusers_file(tmp_path / "a.safetensors", pairs), plan_file, tmp_path / "b.safetensors", given)
    deltas, biases = read(tmp_path / "b.safetensors")
    same(merge(student, deltas, biases), apply_plan(merge(model, {n: delta(*p) for n, p in pairs.items()}), plan, bank))
    assert document["modulation_mean"] == "calibration"
    outcomes = {o: row["modules"] for o, row in document["outcomes"].items()}
    assert {KEPT, PROJECTED, REMOVED, MAPPED, LINEAR} <= outcomes.keys() <= {KEPT, PROJECTED, REMOVED, MAPPED, LINEAR, UNREAD}
    assert sum(outcomes.values()) == document["modules"] == document["kept"] + document["dropped"] == len(pairs)
    assert biases.keys() == deltas.keys()  # PEFT gives all of them a bias or none


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_are_cut_where_there_is_no_rank(name: str, tmp_path: Path, random_bank: Any) -> None:
    family, model = teacher_of(name)
    plan = plan_of(family, model, **WIDTHS[name] | {"modulation_rank": None})
    bank = random_bank(model, plan)
    student, plan_file = saved(model, plan, tmp_path, bank)
    pairs = plant(model)
    document = remap(diffusers_file(tmp_path / "a.safetensors", pairs), plan_file, None, None)
    deltas, biases = read(tmp_path / "a-student.safetensors")
    same(merge(student, deltas), apply_plan(merge(model, {n: delta(*p) for n, p in pairs.items()}), plan, bank))
    assert document["outcomes"][CUT]["modules"] >= 2
    assert 0 < document["outcomes"][CUT]["norm_kept"] < document["outcomes"][CUT]["norm_share"]
    assert not biases


def test_a_block_that_becomes_the_last_of_sd3_has_its_text_modulation_turned(tmp_path: Path) -> None:
    family, model = teacher_of("sd3")
    plan = plan_of(family, model, intervals=[(3, 4)])
    student, plan_file = saved(model, plan, tmp_path)
    pairs = plant(model)
    document = remap(diffusers_file(tmp_path / "a.safetensors", pairs), plan_file, None, None)
    same(
        merge(student, read(tmp_path / "a-student.safetensors")[0]),
        apply_plan(merge(model, {n: delta(*p) for n, p in pairs.items()}), plan),
    )
    assert document["outcomes"][UNREAD]["modules"] == 3  # to_add_out and two of the network
    assert document["outcomes"][CUT]["modules"] == 1


def test_a_plan_alone_takes_second_attentions_wherever_they_are(tmp_path: Path) -> None:
    _, model = teacher_of("sd3")
    plan_file = tmp_path / "by-hand" / "plan.json"
    plan_file.parent.mkdir()
    plan_file.write_text('{"family": "sd3", "num_blocks": 5, "intervals": [{"first": 1, "last": 2}]}')
    pairs = plant(model)
    assert any(".attn2." in name for name in pairs)
    document = remap(diffusers_file(tmp_path / "a.safetensors", pairs), plan_file, None, None)
    assert document["checked_against"] is None
    kept = [name for name in read(tmp_path / "a-student.safetensors")[0] if ".attn2." in name]
    assert {name.split(".")[1] for name in kept} == {"0", "1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux2", "chroma", "aura_flow", "hunyuan_image", "longcat_image"])
def test_other_families_lose_blocks_alike(name: str, tmp_path: Path) -> None:
    family, model = teacher_of(name)
    plan = plan_of(family, model, intervals=[(1, 2), (5, 7)], **({"modulation_rank": 5} if family.modulations else {}))
    basis = torch.linalg.qr(torch.randn(32, 32))[0]
    bank = {"modulation": {"basis": basis, "mean": torch.randn(32)}} if family.modulations else {}
    student, plan_file = saved(model, plan, tmp_path, bank)
    pairs = plant(model)
    remap(diffusers_file(tmp_path / "a.safetensors", pairs), plan_file, None, None)
    changed = merge(model, {n: delta(*p) for n, p in pairs.items()})
    same(merge(student, *read(tmp_path / "a-student.safetensors")), apply_plan(changed, plan, bank))


@pytest.mark.slow
def test_a_modulation_shared_by_all_blocks_is_put_into_the_basis(tmp_path: Path) -> None:
    family, model = teacher_of("flux2")
    plan = plan_of(family, model, modulation_rank=5)
    bank = {"modulation": {"basis": torch.linalg.qr(torch.randn(32, 32))[0], "mean": torch.randn(32)}}
    student, plan_file = saved(model, plan, tmp_path, bank)
    pairs = plant(model, lambda n: "modulation" in n)
    remap(diffusers_file(tmp_path / "a.safetensors", pairs), plan_file, None, None)
    same(
        merge(student, *read(tmp_path / "a-student.safetensors")),
        apply_plan(merge(model, {n: delta(*p) for n, p in pairs.items()}), plan, bank),
    )


def test_without_a_calibration_the_mean_is_the_shortest_that_the_basis_allows(tmp_path: Path, random_bank: Any) -> None:
    family, model = teacher_of("qwen_image")
    plan = plan_of(family, model, modulation_rank=6)
    bank = random_bank(model, plan)
    student, _ = saved(model, plan, tmp_path / "run", bank)
    save_model(student, plan, tmp_path / "alone")
    pairs = plant(model, lambda n: "_mod." in n)
    document = remap(diffusers_file(tmp_path / "a.safetensors", pairs), tmp_path / "alone" / "transformer" / "plan.json", None, None)
    assert document["modulation_mean"] == "basis"
    basis = bank["modulation"]["basis"][:, :6].double()
    mean = basis @ basis.T @ bank["modulation"]["mean"].double()
    deltas, biases = read(tmp_path / "a-student.safetensors")
    for name, pair in pairs.items():
        assert (deltas[name] - delta(*pair) @ basis).abs().max() <= TOLERANCE
        assert (biases[name] - delta(*pair) @ mean).abs().max() <= TOLERANCE


def test_without_weights_modulations_of_a_rank_are_dropped(tmp_path: Path, random_bank: Any) -> None:
    family, model = teacher_of("qwen_image")
    plan = plan_of(family, model, modulation_rank=6, intervals=[(1, 2)])
    (tmp_path / "plan.json").write_text(plan.to_json())
    document = remap(diffusers_file(tmp_path / "a.safetensors", plant(model)), tmp_path / "plan.json", None, None)
    assert document["outcomes"][NO_BASIS]["modules"] == 8
    assert document["checked_against"] is None
    assert document["modulation_mean"] is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_share_that_is_kept_is_that_of_the_whole_matrices(dtype: torch.dtype, tmp_path: Path, random_bank: Any) -> None:
    family, model = teacher_of("flux")
    plan = plan_of(family, model, **WIDTHS["flux"])
    bank = random_bank(model, plan)
    _, plan_file = saved(model, plan, tmp_path, bank)
    pairs = {n: (a.to(dtype), b.to(dtype)) for n, (a, b) in plant(model).items()}
    alphas = {n: torch.tensor(float(1 + i % 4)) for i, n in enumerate(pairs)}
    tensors = load_file(diffusers_file(tmp_path / "a.safetensors", pairs)) | {f"transformer.{n}.alpha": a for n, a in alphas.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    document = remap(tmp_path / "a.safetensors", plan_file, tmp_path / "b.safetensors", None)
    project = (lambda u: u @ u.T)(bank["modulation"]["basis"][:, :6].double())
    whole, kept = 0.0, 0.0
    left = {"norm1.linear": {0: [0, 1, 2], 1: range(6), 3: range(6)}, "norm1_context.linear": {0: range(6), 1: [0, 1, 2]}}
    student = apply_plan(model, plan, bank)
    for n, pair in pairs.items():
        full = alphas[n].item() / RANK * delta(*pair)
        whole += full.square().sum().item()
        place = family.block_of(model.config, n)
        if place is None:
            kept += full.square().sum().item()
        elif place[0] in plan.kept:
            block, part = place
            if part == "norm.linear":
                kept += (full @ project).square().sum().item()
            elif part in left:
                rows = [full[32 * c : 32 * c + 32] for c in left[part].get(block, [])]
                kept += sum((r @ project).square().sum().item() for r in rows)
            elif family.prefix(student.config, plan.student_block(block)) + part in linears(student):
                kept += full.square().sum().item()
    assert document["norm_kept"] == pytest.approx(kept / whole, rel=1e-6)
    assert sum(r["norm_share"] for r in document["outcomes"].values()) == pytest.approx(1)
    assert 0 < document["on_intervals"]["norm_kept"] < document["norm_kept"]
    assert all(t.dtype == dtype for t in load_file(tmp_path / "b.safetensors").values())


# -- schemes ------------------------------------------------------------------------------------------------------------


def fused(pairs: Pairs, size: int, singles: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """FLUX's maps under Black Forest Labs' names: one first factor for all, the second ones above each other."""
    found = {}
    for stream, q, proj, ff, mod in (
        ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1"),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context"),
    ):
        for n in range(size):
            block, old = f"transformer_blocks.{n}", f"double_blocks.{n}.{stream}"
            found[f"{old}_attn.qkv"] = pairs[f"{block}.attn.{q[0]}"][0], torch.cat([pairs[f"{block}.attn.{p}"][1] for p in q])
            rows = {"attn.proj": f"attn.{proj}", "mlp.0": f"{ff}.net.0.proj", "mlp.2": f"{ff}.net.2", "mod.lin": f"{mod}.linear"}
            found |= {f"{old}_{a}": pairs[f"{block}.{b}"] for a, b in rows.items()}
    for n in range(singles):
        block = f"single_transformer_blocks.{n}"
        parts = [pairs[f"{block}.{p}"] for p in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        found[f"single_blocks.{n}.linear1"] = parts[0][0], torch.cat([up for _, up in parts])
        found[f"single_blocks.{n}.linear2"] = pairs[f"{block}.proj_out"]
        found[f"single_blocks.{n}.modulation.lin"] = pairs[f"{block}.norm.linear"]
    return found | {"img_in": pairs["x_embedder"], "final_layer.linear": pairs["proj_out"]}


SPELLINGS = {
    "diffusers": ("transformer.", ".lora_A.weight", ".lora_B.weight", False),
    "peft": ("base_model.model.", ".lora_A.weight", ".lora_B.weight", False),
    "bare": ("", ".lora_A.default.weight", ".lora_B.default.weight", False),
    "old": ("transformer.", ".lora.down.weight", ".lora.up.weight", False),
    "comfyui": ("diffusion_model.", ".lora_A.weight", ".lora_B.weight", False),
    "comfyui_down_up": ("diffusion_model.", ".lora_down.weight", ".lora_up.weight", False),
    "kohya": ("lora_unet_", ".lora_down.weight", ".lora_up.weight", True),
    "onetrainer": ("lora_transformer_", ".lora_down.weight", ".lora_up.weight", True),
}


def spelled(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], spelling: str, alpha: float) -> dict[str, torch.Tensor]:
    prefix, down, up, flat = SPELLINGS[spelling]
    found = {}
    for name, (a, b) in pairs.items():
        stem = prefix + (name.replace(".", "_") if flat else name)
        found |= {stem + down: a.clone(), stem + up: b.clone(), f"{stem}.alpha": torch.tensor(alpha)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_scheme_is_written_back_as_it_was(name: str, spelling: str, tmp_path: Path) -> None:
    """Names moved by hand: block 2 of the first group is its 1 in the student, and so on; factors and alpha bit for bit."""
    family, model = teacher_of(name)
    plan = plan_of(family, model, intervals=[(1, 2)])
    (_, plan_file), pairs = saved(model, plan, tmp_path), plant(model)
    save_file(spelled(pairs, spelling, 2.0), tmp_path / "a.safetensors")
    document = remap(tmp_path / "a.safetensors", plan_file, tmp_path / "b.safetensors", None)

    def moved(n: str) -> str:
        for old, new in ((3, 2), (4, 3)):
            if n.startswith(f"transformer_blocks.{old}."):
                return n.replace(f".{old}.", f".{new}.", 1)
        return n

    wanted = spelled({moved(n): p for n, p in pairs.items() if not n.startswith("transformer_blocks.2.")}, spelling, 2.0)
    got = load_file(tmp_path / "b.safetensors")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(t, got[k]) for k, t in wanted.items())
    assert document["schemes"] == [
        {"peft": "diffusers", "bare": "diffusers", "old": "diffusers"}.get(spelling, spelling.split("_")[0])
    ] or (spelling == "onetrainer" and document["schemes"] == ["kohya"])


@pytest.mark.parametrize("spelling", ["comfyui", "comfyui_down_up", "kohya"])
def test_the_first_names_of_flux_are_written_back_as_they_were(spelling: str, tmp_path: Path) -> None:
    family, model = teacher_of("flux")
    plan = plan_of(family, model, intervals=[(1, 2), (4, 6)])
    _, plan_file = saved(model, plan, tmp_path)
    pairs = plant(model)
    save_file(spelled(fused(pairs, 4, 4), spelling, 2.0), tmp_path / "a.safetensors")
    document = remap(tmp_path / "a.safetensors", plan_file, tmp_path / "b.safetensors", None)
    numbers = {"transformer_blocks": {0: 0, 1: 1, 3: 2}, "single_transformer_blocks": {0: 0, 3: 1}}
    kept = {f"{g}.{new}.{n.split('.', 2)[2]}": p for n, p in pairs.items() for g in numbers if n.startswith(f"{g}.")
            for old, new in numbers[g].items() if n.startswith(f"{g}.{old}.")}  # fmt: skip
    wanted = spelled(fused(kept | {n: pairs[n] for n in ("x_embedder", "proj_out")}, 3, 2), spelling, 2.0)
    got = load_file(tmp_path / "b.safetensors")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(t, got[k]) for k, t in wanted.items())
    assert document["outcomes"][REMOVED]["modules"] == 14 + 2 * 6
    # What diffusers reads of two-stream blocks is the change of each of its own maps.
    read_back = _convert_kohya_flux_lora_to_diffusers(
        {k: v for k, v in got.items() if "single" not in k and "final" not in k and k.startswith("lora")}
    )
    for n in (n for n in kept if n.startswith("transformer_blocks.") and read_back):
        a, b = (read_back[f"transformer.{n}.lora_{x}.weight"] for x in "AB")
        shared = n.replace("to_k", "to_q").replace("to_v", "to_q").replace("add_k_proj", "add_q_proj").replace("add_v_proj", "add_q_proj")
        assert (delta(a, b) - 2 / 3 * delta(kept[shared][0], kept[n][1])).abs().max() < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["comfyui", "comfyui_down_up", "kohya"])
def test_diffusers_reads_what_was_written_for_qwen_image(spelling: str, tmp_path: Path) -> None:
    family, model = teacher_of("qwen_image")
    student, plan_file = saved(model, plan_of(family, model, intervals=[(0, 1)]), tmp_path)
    pairs = plant(model)
    save_file(spelled(pairs, spelling, 1.5), tmp_path / "a.safetensors")
    remap(tmp_path / "a.safetensors", plan_file, tmp_path / "b.safetensors", None)
    tensors = _convert_non_diffusers_qwen_lora_to_diffusers(load_file(tmp_path / "b.safetensors"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "c.safetensors")
    changed = merge(model, {n: 0.5 * delta(*p) for n, p in pairs.items()})
    same(merge(student, read(tmp_path / "c.safetensors")[0]), apply_plan(changed, plan_of(family, model, intervals=[(0, 1)])))


@pytest.mark.parametrize("spelling", ["comfyui", "kohya"])
def test_a_fused_map_of_which_a_part_is_gone_keeps_its_rows(spelling: str, tmp_path: Path, random_bank: Any) -> None:
    """Text queries of a mapped block are gone; readers that cut in three still find keys and values where they were."""
    family, model = teacher_of("flux")
    plan = plan_of(family, model, text_stream=[2])
    _, plan_file = saved(model, plan, tmp_path, random_bank(model, plan))
    pairs = {n: p for n, p in fused(plant(model), 4, 4).items() if n == "double_blocks.2.txt_attn.qkv"}
    save_file(spelled(pairs, spelling, 2.0), tmp_path / "a.safetensors")
    document = remap(tmp_path / "a.safetensors", plan_file, tmp_path / "b.safetensors", None)
    (down, up), got = pairs["double_blocks.2.txt_attn.qkv"], load_file(tmp_path / "b.safetensors")
    wanted = spelled({"double_blocks.2.txt_attn.qkv": (down, torch.cat([torch.zeros(32, RANK), up[32:]]))}, spelling, 2.0)
    assert all(torch.equal(t, got[k]) for k, t in wanted.items())
    assert document["outcomes"][MAPPED]["modules"] == 1
    kept = delta(down, up[32:]).square().sum() / delta(down, up).square().sum()
    assert document["norm_kept"] == pytest.approx(kept.item())


def test_the_first_rows_of_linear1_may_stand_alone(tmp_path: Path) -> None:
    family, model = teacher_of("flux")
    _, plan_file = saved(model, plan_of(family, model, intervals=[(4, 5)]), tmp_path)
    down, up = torch.randn(2, 32), torch.randn(96, 2)
    save_file(spelled({"single_blocks.2.linear1_qkv": (down, up)}, "comfyui", 2.0), tmp_path / "a.safetensors")
    remap(tmp_path / "a.safetensors", plan_file, None, None)
    assert torch.equal(load_file(tmp_path / "a-student.safetensors")["diffusion_model.single_blocks.1.linear1_qkv.lora_B.weight"], up)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_bias_is_spelled_as_its_scheme_has_it(spelling: str, tmp_path: Path, random_bank: Any) -> None:
    """Weight and bias as diffusers (scale times both, one for every adapter, no alpha) or ComfyUI (a bias that no scale touches) take them."""
    family, model = teacher_of("qwen_image")
    plan = plan_of(family, model, modulation_rank=6)
    bank = random_bank(model, plan)
    student, plan_file = saved(model, plan, tmp_path, bank)
    pairs = plant(model, lambda n: n.endswith(("img_mod.1", "to_q")))
    save_file(spelled(pairs, spelling, 1.5), tmp_path / "a.safetensors")
    document = remap(tmp_path / "a.safetensors", plan_file, None, None)
    got = load_file(tmp_path / "a-student.safetensors")
    prefix, down, up, flat = SPELLINGS[spelling]
    changed = merge(model, {n: 0.5 * delta(*p) for n, p in pairs.items()})
    peft = spelling in ("diffusers", "peft", "bare", "old")
    deltas, biases = {}, {}
    for n in pairs:
        stem = prefix + (n.replace(".", "_") if flat else n)
        scale = got[f"{stem}.alpha"].item() / RANK if f"{stem}.alpha" in got else 1.0
        deltas[n] = scale * delta(got[stem + down], got[stem + up])
        bias = got.get(stem + up.replace("weight", "bias") if peft else f"{stem}.diff_b")
        if bias is not None:
            biases[n] = scale * bias if peft else bias
    assert len(biases) == (10 if peft else 5)
    assert not peft or not any(k.endswith(".alpha") for k in got)
    same(merge(student, deltas, biases), apply_plan(changed, plan, bank))
    assert document["biases"] == 5


def test_a_bias_that_the_lora_has_itself_goes_along(tmp_path: Path, random_bank: Any) -> None:
    family, model = teacher_of("qwen_image")
    plan = plan_of(family, model, modulation_rank=6, ffn=[(0, "image")])
    bank = random_bank(model, plan)
    student, plan_file = saved(model, plan, tmp_path, bank)
    pairs = plant(model, lambda n: "blocks.0.img_mod" in n or "to_q" in n)
    biases = {n: torch.randn(len(p[1])) for n, p in pairs.items()}
    tensors = spelled(pairs, "diffusers", 1.5) | {f"transformer.{n}.lora_B.bias": b for n, b in biases.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    remap(tmp_path / "a.safetensors", plan_file, None, None)
    changed = merge(model, {n: 0.5 * delta(*p) for n, p in pairs.items()}, {n: 0.5 * b for n, b in biases.items()})
    same(merge(student, *read(tmp_path / "a-student.safetensors")), apply_plan(changed, plan, bank))


def test_parts_of_text_encoders_pass_by(tmp_path: Path) -> None:
    family, model = teacher_of("sd3")
    _, plan_file = saved(model, plan_of(family, model, intervals=[(1, 2)]), tmp_path)
    more = {f"{p}.lora_A.weight": torch.randn(2, 4) for p in ("text_encoder.text_model.q", "text_encoder_2.x", "text_encoders.clip_l.x")}
    more |= {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(4),
        "text_encoder.q.lora_linear_layer.up.weight": torch.ones(2),
    }
    save_file(spelled(plant(model), "diffusers", 2.0) | more, tmp_path / "a.safetensors")
    assert remap(tmp_path / "a.safetensors", plan_file, None, None)["passed_tensors"] == 5
    got = load_file(tmp_path / "a-student.safetensors")
    assert all(torch.equal(t, got[k]) for k, t in more.items())


@pytest.mark.parametrize("name", plugins.names("families"))
def test_names_are_one_module_s_each(name: str) -> None:
    """Underscores for dots tell every module of every family apart, and first names cover what they are there for."""
    family: Family = plugins.load("families", name)
    config = {**stock_config(family), **family.tiny_config, "_class_name": family.class_name}
    names = names_of(family, config, shapes_of(family, config))
    assert len({n.replace(".", "_") for n in names}) == len(names)
    first = {n for n, row in names.items() if row.modules != (n,)}
    in_blocks = sum(size * len(g.original) for g, size in zip(family.groups, family.sizes(config), strict=True))
    unmodulated = 4 * 2 + 4 * 1 if name == "chroma" else 0  # its blocks have no modulation of their own
    assert len(first) == in_blocks + len(family.original) - unmodulated


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_has_the_teacher_s_shape_but_for_modulations(name: str) -> None:
    family, model = teacher_of(name)
    config = {"_class_name": type(model).__name__, **model.config}
    modules = Modules.of(family, config, plan_of(family, model, **WIDTHS[name]), "all")
    for module, shape in modules.teacher.items():
        own, _, outcome = modules.place(module)
        assert outcome != KEPT or modules.modulation(module) or modules.student[own] == shape


# -- settings and metadata ------------------------------------------------------------------------------------------------


def test_peft_s_settings_move_with_the_blocks_and_scale(tmp_path: Path, random_bank: Any) -> None:
    family, model = teacher_of("qwen_image")
    plan = plan_of(family, model, intervals=[(1, 2)], modulation_rank=6)
    bank = random_bank(model, plan)
    student, plan_file = saved(model, plan, tmp_path, bank)
    pairs = plant(model, lambda n: n.startswith("transformer_blocks."))
    settings = {
        "transformer.r": RANK,
        "transformer.lora_alpha": 6,
        "transformer.target_modules": ["to_q", "transformer_blocks.2.attn.to_k", "transformer_blocks.4.attn.to_k"],
        "transformer.alpha_pattern": {"transformer_blocks.3.attn.to_q": 1.5, "transformer_blocks.2.attn.to_q": 9, "to_v": 12},
    }
    diffusers_file(tmp_path / "a.safetensors", pairs, metadata={"lora_adapter_metadata": json.dumps(settings), "mine": "yes"})
    remap(tmp_path / "a.safetensors", plan_file, None, None)
    with safe_open(tmp_path / "a-student.safetensors", "pt") as file:
        metadata = file.metadata()
    moved = json.loads(metadata["lora_adapter_metadata"])
    assert moved["transformer.alpha_pattern"] == {"transformer_blocks.2.attn.to_q": 1.5, "to_v": 12}
    assert moved["transformer.target_modules"] == ["to_q", "transformer_blocks.3.attn.to_k"]
    assert moved["transformer.lora_bias"] is True
    assert metadata["mine"] == "yes"
    assert len(metadata["ppclc_plan"]) == 16

    def scale(n: str, odd: str) -> float:
        return {True: 2.0, n == odd: 0.5, n == "transformer_blocks.2.attn.to_q" != odd: 3.0, n.endswith("to_v"): 4.0}[True]

    changed = merge(model, {n: scale(n, "transformer_blocks.3.attn.to_q") * delta(*p) for n, p in pairs.items()})
    got = load_file(tmp_path / "a-student.safetensors")
    scales = {k.removeprefix("transformer.").removesuffix(".lora_A.weight"): 0.0 for k in got if k.endswith("lora_A.weight")}
    scales = {n: {True: 2.0, n == "transformer_blocks.2.attn.to_q": 0.5, n.endswith("to_v"): 4.0}[True] for n in scales}
    same(merge(student, *read(tmp_path / "a-student.safetensors", scales=scales)), apply_plan(changed, plan, bank))


def test_settings_beside_a_peft_folder_are_multiplied_in(tmp_path: Path) -> None:
    family, model = teacher_of("qwen_image")
    student, plan_file = saved(model, plan_of(family, model, intervals=[(1, 2)]), tmp_path)
    pairs = plant(model)
    (tmp_path / "lora").mkdir()
    diffusers_file(tmp_path / "lora" / "adapter_model.safetensors", pairs, "base_model.model.")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 12, "use_rslora": True}))
    document = remap(tmp_path / "lora", plan_file, None, None)
    assert Path(document["out"]) == tmp_path / "lora" / "adapter_model-student.safetensors"
    changed = merge(model, {n: 12 / RANK**0.5 * delta(*p) for n, p in pairs.items()})
    got = merge(student, read(Path(document["out"]), "base_model.model.")[0])
    wanted = apply_plan(changed, plan_of(family, model, intervals=[(1, 2)]))
    assert all(torch.allclose(t, wanted.state_dict()[k], atol=1e-5, rtol=1e-5) for k, t in got.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_loads_it_with_peft(name: str, tmp_path: Path, random_bank: Any) -> None:
    pytest.importorskip("peft")
    family, model = teacher_of(name)
    plan = plan_of(family, model, **WIDTHS[name])
    bank = random_bank(model, plan)
    student, plan_file = saved(model, plan, tmp_path, bank)
    pairs = plant(model)
    remap(diffusers_file(tmp_path / "a.safetensors", pairs), plan_file, None, None)
    student.load_lora_adapter(load_file(tmp_path / "a-student.safetensors"), prefix="transformer")
    wanted = run(apply_plan(merge(model, {n: delta(*p) for n, p in pairs.items()}), plan, bank), family)
    assert (run(student, family) - wanted).abs().max() <= TOLERANCE * max(1.0, float(wanted.abs().max()))


# -- refusals -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A student's plan.json and a LoRA for its teacher. Read only."""
    family, model = teacher_of("qwen_image")
    _, plan_file = saved(model, plan_of(family, model, intervals=[(1, 2)]), tmp_path_factory.mktemp("small"))
    return plan_file, spelled(plant(model, lambda n: "attn" in n), "diffusers", 2.0)


BLOCK = "transformer.transformer_blocks.0.attn"


def swap(changes: Mapping[str, Any]) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in changes.items():
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value

    return change


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "another model": (
        lambda t: [t.update({k.replace("attn.", "self."): t.pop(k)}) for k in list(t)],
        ["no LoRA of qwen_image", "QwenImageTransformer2DModel"],
    ),
    "a module more": (swap({f"transformer.mine.lora_{x}.weight": torch.ones(3, 3) for x in "AB"}), ["transformer.mine", "no such module"]),
    "a block too many": (
        swap({f"transformer.transformer_blocks.7.attn.to_q.lora_{x}.weight": torch.ones(32, 32) for x in "AB"}),
        ["block 7", "has 5"],
    ),
    "another width": (
        swap({f"{BLOCK}.to_q.lora_A.weight": torch.ones(3, 48), f"{BLOCK}.to_q.lora_B.weight": torch.ones(48, 3)}),
        ["[48, 48]", "[32, 32]", "to_q"],
    ),
    "no second factor": (swap({f"{BLOCK}.to_q.lora_B.weight": None}), ["to_q", "no lora_B.weight"]),
    "no first factor": (swap({f"{BLOCK}.to_q.lora_A.weight": None}), ["to_q", "no lora_A.weight"]),
    "alpha alone": (swap({f"{BLOCK}.to_q.lora_A.weight": None, f"{BLOCK}.to_q.lora_B.weight": None}), ["to_q", "wanted both"]),
    "two ranks": (swap({f"{BLOCK}.to_q.lora_A.weight": torch.ones(2, 32)}), ["rank 2", "rank 3"]),
    "rank 0": (swap({f"{BLOCK}.to_q.lora_A.weight": torch.ones(0, 32), f"{BLOCK}.to_q.lora_B.weight": torch.ones(32, 0)}), ["[0, 32]"]),
    "NaN": (swap({f"{BLOCK}.to_q.lora_A.weight": torch.full((3, 32), math.nan)}), ["to_q.lora_A.weight", "NaN"]),
    "infinite alpha": (swap({f"{BLOCK}.to_q.alpha": torch.tensor(math.inf)}), ["to_q.alpha", "infinite"]),
    "a list of alphas": (swap({f"{BLOCK}.to_q.alpha": torch.ones(3)}), ["to_q.alpha", "one number"]),
    "whole numbers": (swap({f"{BLOCK}.to_q.lora_A.weight": torch.ones(3, 32, dtype=torch.int64)}), ["to_q.lora_A.weight", "floating"]),
    "LoKr": (swap({f"{BLOCK}.to_q.lokr_w1": torch.ones(2, 2)}), [f"{BLOCK}.to_q.lokr_w1", "LoKr"]),
    "LoHa": (swap({f"{BLOCK}.to_q.hada_w1_a": torch.ones(2, 2)}), [f"{BLOCK}.to_q.hada_w1_a", "LoHa"]),
    "DoRA": (swap({f"{BLOCK}.to_q.dora_scale": torch.ones(2, 2)}), [f"{BLOCK}.to_q.dora_scale", "DoRA"]),
    "DoRA by PEFT": (swap({f"{BLOCK}.to_q.lora_magnitude_vector": torch.ones(32)}), ["lora_magnitude_vector", "DoRA"]),
    "a difference": (swap({f"{BLOCK}.to_q.diff": torch.ones(32, 32)}), [f"{BLOCK}.to_q.diff", "full difference"]),
    "a bias's difference": (swap({f"{BLOCK}.to_q.diff_b": torch.ones(32)}), [f"{BLOCK}.to_q.diff_b", "full difference"]),
    "anything": (swap({"hello": torch.ones(2)}), ["hello", "not a key of a LoRA"]),
    "two styles of one factor": (swap({f"{BLOCK}.to_q.lora_down.weight": torch.ones(3, 32)}), ["to_q", "two spellings"]),
    "two prefixes": (
        swap({f"diffusion_model.transformer_blocks.0.attn.to_q.lora_{x}.weight": torch.ones(32, 32) for x in "AB"}),
        ["transformer_blocks.0.attn.to_q", "two spellings"],
    ),
    "nothing stays": (
        lambda t: [t.pop(k) for k in list(t) if not k.startswith("transformer.transformer_blocks.2.")],
        ["nothing of it is left", REMOVED],
    ),
    "nothing": (lambda t: t.clear(), ["nothing"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_lora_is_refused_in_one_message(case: str, small: Any, tmp_path: Path) -> None:
    plan_file, tensors = small
    change, words = REFUSED[case]
    changed = dict(tensors)
    change(changed)
    save_file(changed, tmp_path / "a.safetensors")
    with pytest.raises(ModelError) as error:
        remap(tmp_path / "a.safetensors", plan_file, None, None)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'a.safetensors'}: ")
    assert "\n" not in message
    for word in words:
        assert word in message
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.slow
def test_numbers_without_bounds_do_no_harm(tmp_path: Path, random_bank: Any) -> None:
    family, model = teacher_of("qwen_image")
    _, depth = saved(model, plan_of(family, model, intervals=[(1, 2)]), tmp_path / "depth")
    file, pairs = tmp_path / "a.safetensors", plant(model, lambda n: "img_mod" in n)
    huge = {k: torch.tensor(1e300, dtype=torch.float64) if k.endswith("alpha") else t for k, t in spelled(pairs, "diffusers", 1.0).items()}
    save_file(huge, file)
    assert remap(file, depth, None, None)["norm_kept"] is None
    (tmp_path / "a-student.safetensors").unlink()
    # With a bias alpha has to be multiplied in, which the factors' own dtype does not hold.
    plan = plan_of(family, model, modulation_rank=6)
    _, ranked = saved(model, plan, tmp_path / "ranked", random_bank(model, plan))
    with pytest.raises(ModelError, match=r"beyond what torch\.float32 holds"):
        remap(file, ranked, None, None)
    for settings in ({"lora_alpha": math.inf}, {"lora_alpha": 10**400}, {"alpha_pattern": {"(": 1}}, ["r"], {"lora_alpha": "x"}):
        diffusers_file(file, pairs, metadata={"lora_adapter_metadata": json.dumps(settings)})
        with pytest.raises(ModelError, match="cannot be read as PEFT's settings"):
            remap(file, depth, None, None)
    diffusers_file(file, pairs, metadata={"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})})
    with pytest.raises(ModelError, match="use_dora = true: is DoRA"):
        remap(file, depth, None, None)
    assert not (tmp_path / "a-student.safetensors").exists()


def test_a_lora_of_nothing_is_written_without_shares(tmp_path: Path) -> None:
    family, model = teacher_of("qwen_image")
    _, plan_file = saved(model, plan_of(family, model, intervals=[(1, 2)]), tmp_path)
    pairs = {n: (a, torch.zeros_like(b)) for n, (a, b) in plant(model).items()}
    document = remap(diffusers_file(tmp_path / "a.safetensors", pairs), plan_file, None, None)
    assert document["norm_kept"] is None
    assert document["kept"] > 0


def test_damaged_files_and_pickles_are_refused(small: Any, tmp_path: Path) -> None:
    plan_file, tensors = small
    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    whole = file.read_bytes()
    for content in (whole[:-5], whole[: len(whole) // 3], b"", b"PK\x03\x04 a pickle", b"\xff" * 64):
        file.write_bytes(content)
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            remap(file, plan_file, None, None)
    for name, words in (("a.bin", "pickle"), ("none.safetensors", "no such file"), (".", "holds no LoRA")):
        if name == "a.bin":
            (tmp_path / name).write_bytes(whole)
        with pytest.raises(ModelError, match=words):
            remap(tmp_path / name, plan_file, None, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.safetensors"]


def test_bad_plans_are_refused(small: Any, tmp_path: Path) -> None:
    plan_file, tensors = small
    save_file(tensors, tmp_path / "a.safetensors")
    good = json.loads(plan_file.read_text())
    for changes, words in (
        ({"format": 2}, "format"),
        ({"kept": [0, 1]}, "kept"),
        ({"family": "no_such"}, "no_such"),
        ({"family": "flux"}, "which blocks are of transformer_blocks"),
    ):
        (tmp_path / "plan.json").write_text(json.dumps(good | changes))
        with pytest.raises(PlanError, match=words):
            remap(tmp_path / "a.safetensors", tmp_path / "plan.json", None, None)
    with pytest.raises(PlanError, match=r"wanted a plan\.json"):
        remap(tmp_path / "a.safetensors", tmp_path / "none.json", None, None)
    _, other = teacher_of("flux")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(PlanError, match="is of 'flux'"):
        remap(tmp_path / "a.safetensors", plan_file, None, str(tmp_path / "other"))
    _, other = teacher_of("qwen_image", num_layers=4)
    other.save_pretrained(tmp_path / "four")
    with pytest.raises(PlanError, match="has 4 blocks"):
        remap(tmp_path / "a.safetensors", plan_file, None, str(tmp_path / "four"))
    with pytest.raises(ModelError):
        remap(tmp_path / "a.safetensors", plan_file, None, str(tmp_path / "nowhere"))
    assert not list(tmp_path.glob("*-student*"))


def test_shapes_are_checked_against_the_given_teacher_also_in_blocks_that_go(small: Any, tmp_path: Path) -> None:
    plan_file, tensors = small
    _, model = teacher_of("qwen_image")
    model.save_pretrained(tmp_path / "teacher")
    key = "transformer.transformer_blocks.2.attn.to_q.lora_A.weight"
    save_file(tensors | {key: torch.ones(RANK, 48)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="another model's"):
        remap(tmp_path / "a.safetensors", plan_file, None, str(tmp_path / "teacher" / "config.json"))
    document = remap(tmp_path / "a.safetensors", plan_file, None, None)
    assert document["dropped"] == 8


def test_a_basis_of_another_plan_is_refused(tmp_path: Path, random_bank: Any) -> None:
    family, model = teacher_of("qwen_image")
    plan = plan_of(family, model, modulation_rank=6)
    _, plan_file = saved(model, plan, tmp_path, random_bank(model, plan))
    plan_file.write_text(plan_of(family, model, modulation_rank=5).to_json())
    with pytest.raises(ModelError, match=r"modulation_basis\.weight has shape \[6, 32\], wanted \[5, 32\]"):
        remap(diffusers_file(tmp_path / "a.safetensors", plant(model)), plan_file, None, None)


def test_only_its_own_files_are_written_over(small: Any, tmp_path: Path) -> None:
    plan_file, tensors = small
    file, out = tmp_path / "a.safetensors", tmp_path / "new" / "b.safetensors"
    save_file(tensors, file)
    for _ in range(2):
        remap(file, plan_file, out, None)
    with pytest.raises(ModelError, match="was made for a student already"):
        remap(out, plan_file, None, None)
    before = file.read_bytes()
    for bad, words in ((file, "LoRA itself"), (tmp_path / "new", "safetensors"), (tmp_path / "b.bin", "safetensors")):
        with pytest.raises(OutputError, match=words):
            remap(file, plan_file, bad, None)
    for content in (b"mine", before):
        (tmp_path / "mine.safetensors").write_bytes(content)
        with pytest.raises(OutputError, match="is there already"):
            remap(file, plan_file, tmp_path / "mine.safetensors", None)
        assert (tmp_path / "mine.safetensors").read_bytes() == content
    with pytest.raises(OutputError):
        remap(file, plan_file, file / "b.safetensors", None)
    assert file.read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == ["b.safetensors"]


@pytest.mark.slow
def test_the_plan_of_a_run_finds_the_run_s_student(tmp_path: Path) -> None:
    family, model = teacher_of("flux")
    plan = plan_of(family, model, intervals=[(1, 2)])
    saved(model, plan, tmp_path)
    (tmp_path / "plan.json").write_text(plan.to_json())
    file = diffusers_file(tmp_path / "a.safetensors", plant(model))
    assert remap(file, tmp_path / "plan.json", None, None)["checked_against"] == "student"
    # Not the student of another plan, which lies there too.
    (tmp_path / "plan.json").write_text(plan_of(family, model, intervals=[(0, 1)]).to_json())
    with pytest.raises(PlanError, match="which blocks are of"):
        remap(file, tmp_path / "plan.json", None, None)


@pytest.mark.slow
def test_the_command_says_what_it_did(small: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_file, tensors = small
    save_file(tensors, tmp_path / "a.safetensors")

    def ppclc(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["ppclc", "lora", "remap", str(tmp_path / "a.safetensors"), "--plan", str(plan_file), *args])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    code, out, err = ppclc("--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert (document["kept"], document["dropped"]) == (32, 8)
    assert document["on_intervals"]["modules"] == 8
    code, out, err = ppclc()
    assert code == 0
    assert "block removed" in out
    assert "32 of 40 modules are left" in out
    code, out, err = ppclc("-o", str(tmp_path / "a.safetensors"))
    assert (code, out) == (2, "")
    assert err.startswith("ppclc: ")
    assert err.count("\n") == 1


PARTS = st.sampled_from(
    ["transformer", "transformer_blocks", "0", "4", "9", "attn", "to_q", "img_mod", "1", "lora_A", "lora_B", "weight", "alpha", "bias", "diff",
     "lora_unet_transformer_blocks_0_attn_to_q", "diffusion_model", "lora_down", "lora_up", "lokr_w1", "default", "lora", "down", "text_encoder", "", "é"]
)  # fmt: skip
STEMS = st.sampled_from(
    ["transformer.transformer_blocks.0.attn.to_q", "transformer_blocks.2.attn.to_q", "diffusion_model.img_in", "lora_unet_img_in",
     "transformer.transformer_blocks.4.img_mod.1", "base_model.model.transformer_blocks.3.txt_mod.1", "transformer.proj_out", "lora_te_x"]
)  # fmt: skip
KEYS = st.one_of(
    st.lists(PARTS, min_size=1, max_size=7).map(".".join),
    st.tuples(STEMS, st.sampled_from(["lora_A.weight", "lora_B.weight", "alpha", "lora_B.bias", "lora_down.weight", "lora_up.weight"])).map(
        ".".join
    ),
    st.text(max_size=12),
)
SHAPES = st.one_of(
    st.sampled_from([(), (3, 32), (32, 3), (192, 3), (3, 12), (32,), (12, 3)]), st.lists(st.integers(0, 4), max_size=5).map(tuple)
)
DTYPES = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint16, torch.complex64]
)
METADATA = st.one_of(st.none(), st.dictionaries(st.sampled_from(["lora_adapter_metadata", "ppclc", "format"]), st.one_of(
    st.text(max_size=8), st.dictionaries(st.sampled_from(["r", "lora_alpha", "alpha_pattern", "transformer.target_modules", "use_dora"]), st.one_of(
        st.integers(), st.none(), st.text(max_size=4), st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
    )).map(json.dumps),
)))  # fmt: skip


ADAPTERS = st.lists(st.tuples(STEMS, st.sampled_from([("A", "B"), ("down", "up")]), SHAPES, SHAPES, DTYPES), max_size=3)
FITTING = {"attn.to_q": ((3, 32), (32, 3)), "_mod.1": ((3, 32), (192, 3)), "img_in": ((3, 12), (32, 3)), "proj_out": ((3, 32), (12, 3))}


@pytest.mark.slow
@given(
    fitting=st.lists(st.tuples(STEMS, st.sampled_from([("A", "B"), ("down", "up")])), max_size=2),
    adapters=ADAPTERS,
    more=st.dictionaries(KEYS, st.tuples(SHAPES, DTYPES), max_size=2),
    metadata=METADATA,
    whole=st.sampled_from([True, True, True, False]),
    cut=st.integers(0, 300),
)
def test_no_file_makes_it_crash(
    small: Any, tmp_path_factory: Any, fitting: Any, adapters: Any, more: Any, metadata: Any, whole: bool, cut: int
) -> None:
    """Nothing but our own errors, and no file beside the LoRA after one."""
    folder = tmp_path_factory.mktemp("fuzz")
    file = folder / "a.safetensors"
    tensors = {name: row for name, row in more.items() if name != "__metadata__"}
    for stem, names in fitting:
        adapters = [*adapters, *((stem, names, *shapes, torch.float32) for end, shapes in FITTING.items() if stem.endswith(end))]
    for stem, names, *shapes, dtype in adapters:
        tensors |= {f"{stem}.lora_{name}.weight": (shape, dtype) for name, shape in zip(names, shapes, strict=True)}
    save_file({name: torch.ones(shape).to(dtype) for name, (shape, dtype) in tensors.items()}, file, metadata)
    if not whole:
        file.write_bytes(file.read_bytes()[: -1 - cut])
    try:
        remap(file, small[0], None, None)
    except PpclcError as error:
        message = str(error)
    else:
        message = ""
    event("refused" if message else "written")
    assert (str(file) in message) == bool(message)
    assert [p.name for p in folder.iterdir() if p != file] == ([] if message else ["a-student.safetensors"])
