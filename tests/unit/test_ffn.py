"""Linear feed-forward networks: the closed form against plain least squares, the student against its block written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from ppclc.analysis.ffn_maps import FfnMoments, ffn_map, linear_map
from ppclc.errors import ModelError, PlanError
from ppclc.families import Family
from ppclc.loading.classes import count_parameters, empty_model, predicted_parameters, student_config
from ppclc.models import apply_plan, load_model, save_model
from ppclc.plan import CompressionPlan
from tests.tracing import linear_ffns, replaced, trace

NAME = "qwen_image"
Banks = Callable[..., dict[str, dict[str, torch.Tensor]]]


def run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs, return_dict=False)[0]
    return out


def deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------- the closed form


def rows_of(count: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated rows whose mean is far from zero, and a nonlinear function of them."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=g, dtype=torch.float64)
    x = torch.randn(count, width, generator=g, dtype=torch.float64) @ mixing + 3 * torch.randn(width, generator=g, dtype=torch.float64)
    return x, torch.tanh(x @ mixing.T / width) + 0.7


def moments_of(mid: torch.Tensor, added: torch.Tensor, batches: int = 1) -> FfnMoments:
    moments = FfnMoments()
    for m, a in zip(mid.chunk(batches), added.chunk(batches), strict=True):
        moments.add("image", 0, m[None], (m + a)[None])
    return moments


def fitted(moments: FfnMoments, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    square, cross, mid, added = (moments.tensors[f"ffn.image.{n}.0"] for n in ("square", "cross", "sum", "added"))
    return linear_map(square, cross, mid, added, moments.rows["ffn.image"], ridge)


@pytest.mark.parametrize("batches", [1, 5])
def test_without_a_ridge_it_is_least_squares_on_the_raw_rows(batches: int) -> None:
    mid, added = rows_of(400, 12)
    weight, bias = fitted(moments_of(mid, added, batches), 0.0)
    wanted = np.linalg.lstsq(np.column_stack([mid.numpy(), np.ones(400)]), added.numpy(), rcond=None)[0]
    assert np.abs(weight.numpy().T - wanted[:-1]).max() <= 1e-8
    assert np.abs(bias.numpy() - wanted[-1]).max() <= 1e-8


def test_a_ridge_is_least_squares_with_as_many_rows_of_zeros_behind_the_centred_ones() -> None:
    mid, added = rows_of(300, 8)
    centred, ridge = mid - mid.mean(0), 0.05
    penalty = ridge * (centred.square().sum() / 8).item()
    left = np.vstack([centred.numpy(), math.sqrt(penalty) * np.eye(8)])
    right = np.vstack([(added - added.mean(0)).numpy(), np.zeros((8, 8))])
    wanted = np.linalg.lstsq(left, right, rcond=None)[0]
    weight, bias = fitted(moments_of(mid, added, 3), ridge)
    assert np.abs(weight.numpy().T - wanted).max() <= 1e-10
    # The constant is free of the ridge: the map meets the mean, whatever the pull towards zero.
    assert (mid.mean(0) @ weight.T + bias - added.mean(0)).abs().max() <= 1e-12
    far = fitted(moments_of(mid, added), 1e9)
    assert far[0].abs().max() <= 1e-8
    assert (far[1] - added.mean(0)).abs().max() <= 1e-6


def test_a_mean_far_above_the_spread_does_not_drown_float32_rows() -> None:
    mid, _ = rows_of(2000, 6)
    weight = torch.randn(6, 6, dtype=torch.float64) / 6
    mid = (mid - mid.mean(0)).float().double() + 4096  # exact in float32, and so is what follows for the purpose
    mid = mid.float().double()
    added = (mid - 4096) @ weight.T
    moments = FfnMoments()
    moments.add("image", 0, mid.float()[None], (mid + added)[None])
    found, _ = fitted(moments, 1e-12)
    assert (found - weight).abs().max() <= 5e-5
    rows = mid.float()
    raw = (rows.T @ rows).double() - 2000 * torch.outer(mid.mean(0), mid.mean(0))
    exact = (mid - mid.mean(0)).T @ (mid - mid.mean(0))
    assert deviation(raw, exact) > 1e-2  # what float32 products of the raw rows would have given


def test_a_state_that_stands_still_gives_a_constant() -> None:
    moments = FfnMoments()
    mid = torch.ones(1, 50, 4)
    moments.add("image", 0, mid, mid + 0.25)
    entry = ffn_map(moments.tensors, moments.rows, 0, "image", 1e-4)
    assert torch.equal(entry["weight"], torch.zeros(4, 4))
    assert torch.equal(entry["bias"], torch.full((4,), 0.25))


def test_masked_rows_and_the_size_of_batches_do_not_matter() -> None:
    mid, added = (x.float().reshape(6, 20, 5) for x in rows_of(120, 5))
    mask = torch.arange(20)[None] < torch.tensor([20, 3, 11, 7, 1, 16])[:, None]
    noisy = torch.where(mask[..., None], mid, 1e3 * torch.randn(mid.shape))
    found = FfnMoments()
    found.add("text", 0, noisy[:2], noisy[:2] + added[:2], mask[:2])
    found.add("text", 0, noisy[2:], noisy[2:] + added[2:], mask[2:].long())
    wanted = FfnMoments()
    wanted.add("text", 0, mid[mask][None], (mid + added)[mask][None])
    assert found.rows == wanted.rows == {"ffn.text": 58}
    assert found.tensors.keys() == wanted.tensors.keys() == {f"ffn.text.{n}.0" for n in ("sum", "added", "square", "cross")}
    for name, tensor in wanted.tensors.items():
        assert tensor.dtype == torch.float64
        assert deviation(found.tensors[name], tensor) <= 1e-6, name


# ------------------------------------------------------------------------------------ what the states are


@pytest.mark.slow
def test_mids_are_the_states_between_attention_and_the_networks(teacher: Any, family: Family, inputs: dict[str, Any]) -> None:
    """Taking a block's networks away leaves the state after attention as its output."""
    seen = trace(teacher, family, inputs, mids=True)
    assert trace(teacher, family, inputs).mids == {}
    assert {s: len(m) for s, m in seen.mids.items()} == {"image": 6, "text": 6}
    for i, block in enumerate(teacher.transformer_blocks):
        bare = copy.deepcopy(block)
        for mlp in (bare.img_mlp, bare.txt_mlp):
            mlp.net[2].weight.zero_()
            mlp.net[2].bias.zero_()
        text, image = bare(hidden_states=seen.states["image"][i], encoder_hidden_states=seen.states["text"][i], **seen.shared[i])
        assert torch.equal(seen.mids["image"][i], image)
        assert torch.equal(seen.mids["text"][i], text)
    assert torch.equal(seen.velocity, run(teacher, inputs))
    short = trace(teacher, family, inputs, last=2, mids=True)
    assert [len(m) for m in short.mids.values()] == [3, 3]
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in teacher.modules())


def moments_on(model: Any, family: Family, inputs: dict[str, Any]) -> FfnMoments:
    seen, moments = trace(model, family, inputs, mids=True), FfnMoments()
    for stream, mids in seen.mids.items():
        for block, mid in enumerate(mids):
            if mid is not None:
                moments.add(stream, block, mid, seen.states[stream][block + 1])
    return moments


def plant_linear_network(block: Any, stream: str) -> None:
    """Make one block's feed-forward part an affine function of the state after attention, whatever the timestep."""
    short, width = {"image": "img", "text": "txt"}[stream], block.dim
    linear = getattr(block, f"{short}_mod")[1]
    linear.weight[3 * width :] = 0
    setattr(block, f"{short}_norm2", torch.nn.Identity())
    setattr(block, f"{short}_mlp", torch.nn.Linear(width, width))
    getattr(block, f"{short}_mlp").requires_grad_(False).weight.mul_(0.5)


@pytest.mark.parametrize("stream", ["image", "text"])
def test_a_planted_linear_network_is_reproduced(make_teacher: Callable[..., Any], family: Family, stream: str) -> None:
    model = make_teacher(4, seed=4)
    inputs = family.example_inputs(model.config, batch=48, generator=torch.Generator().manual_seed(2))
    plant_linear_network(model.transformer_blocks[1], stream)
    moments = moments_on(model, family, inputs)
    plan = CompressionPlan.of(NAME, 4, ffn=[(1, stream)])
    entry = ffn_map(moments.tensors, moments.rows, 1, stream, 1e-9)
    student = apply_plan(model, plan, {f"ffn-1-{stream}": entry})
    wanted = run(model, inputs)
    assert deviation(run(student, inputs), wanted) <= 1e-5
    # By formula, at the constant modulation: gate (A (x (1 + scale) + shift) + a).
    block, short = model.transformer_blocks[1], {"image": "img", "text": "txt"}[stream]
    shift, scale, gate = getattr(block, f"{short}_mod")[1].bias[3 * block.dim :].chunk(3)
    mlp = getattr(block, f"{short}_mlp")
    assert deviation(entry["weight"], gate[:, None] * mlp.weight * (1 + scale)) <= 1e-4
    assert deviation(entry["bias"], gate * (mlp.weight @ shift + mlp.bias)) <= 1e-4
    # It counts: without its map the student is another model.
    off = {f"ffn-1-{stream}": {"weight": entry["weight"] * 0, "bias": entry["bias"] * 0}}
    assert deviation(run(apply_plan(model, plan, off), inputs), wanted) > 1e-3


def test_a_network_behind_a_closed_gate_is_reproduced_by_zeros(make_teacher: Callable[..., Any], family: Family) -> None:
    model = make_teacher(4, seed=5)
    inputs = family.example_inputs(model.config, batch=8, generator=torch.Generator().manual_seed(2))
    linear, width = model.transformer_blocks[2].img_mod[1], model.inner_dim
    linear.weight[5 * width :] = 0
    linear.bias[5 * width :] = 0
    moments = moments_on(model, family, inputs)
    entry = ffn_map(moments.tensors, moments.rows, 2, "image", 1e-4)
    assert not entry["weight"].any()
    assert not entry["bias"].any()
    student = apply_plan(model, CompressionPlan.of(NAME, 4, ffn=[(2, "image")]), {"ffn-2-image": entry})
    assert deviation(run(student, inputs), run(model, inputs)) <= 1e-6


def test_the_closed_form_beats_leaving_the_network_out(teacher: Any, family: Family) -> None:
    """On data that it was not fitted on; a real network is not linear, so no more can be asked of it."""
    fit, test = (family.example_inputs(teacher.config, batch=64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    moments, wanted = moments_on(teacher, family, fit), run(teacher, test)
    for place in ((1, "image"), (1, "text"), (4, "image")):
        entry = ffn_map(moments.tensors, moments.rows, *place, 1e-4)
        with linear_ffns(teacher, family, {place: (entry["weight"], entry["bias"])}):
            error = deviation(run(teacher, test), wanted)
        with linear_ffns(teacher, family, {place: (torch.zeros(32, 32), torch.zeros(32))}):
            assert error < 0.7 * deviation(run(teacher, test), wanted)


# -------------------------------------------------------------------------------------------- the student


def plain_block(
    w: dict[str, torch.Tensor], heads: int, image: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, freqs: Any, maps: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block written out, with `h + (W h + b)` for the streams that `maps` names."""
    length = text.shape[1]
    chunks = {
        s: functional.linear(functional.silu(temb), w[f"{s}_mod.1.weight"], w[f"{s}_mod.1.bias"]).chunk(6, -1) for s in ("img", "txt")
    }
    states = {"img": image, "txt": text}

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()

    def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return norm(x) * (1 + scale[:, None]) + shift[:, None]

    def heads_of(stream: str, names: tuple[str, str | None]) -> torch.Tensor:
        x = modulated(states[stream], *chunks[stream][:2])
        y = functional.linear(x, w[f"attn.{names[0]}.weight"], w[f"attn.{names[0]}.bias"]).unflatten(-1, (heads, -1))
        if names[1] is None:
            return y
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"attn.{names[1]}.weight"]
        cos, sin = (f[:, None] for f in freqs[stream])
        even, odd = y[..., 0::2], y[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    q = torch.cat([heads_of("txt", ("add_q_proj", "norm_added_q")), heads_of("img", ("to_q", "norm_q"))], 1)
    k = torch.cat([heads_of("txt", ("add_k_proj", "norm_added_k")), heads_of("img", ("to_k", "norm_k"))], 1)
    v = torch.cat([heads_of("txt", ("add_v_proj", None)), heads_of("img", ("to_v", None))], 1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    attended = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
    for stream, part, out in (("txt", attended[:, :length], "to_add_out"), ("img", attended[:, length:], "to_out.0")):
        shift, scale, gate = chunks[stream][3:]
        h = states[stream] + chunks[stream][2][:, None] * functional.linear(part, w[f"attn.{out}.weight"], w[f"attn.{out}.bias"])
        if stream in maps:
            h = h + h @ maps[stream]["weight"].T + maps[stream]["bias"]
        else:
            hidden = functional.linear(modulated(h, shift, scale), w[f"{stream}_mlp.net.0.proj.weight"], w[f"{stream}_mlp.net.0.proj.bias"])
            hidden = functional.gelu(hidden, approximate="tanh")
            h = h + gate[:, None] * functional.linear(hidden, w[f"{stream}_mlp.net.2.weight"], w[f"{stream}_mlp.net.2.bias"])
        states[stream] = h
    return states["txt"], states["img"]


@pytest.mark.slow
@pytest.mark.parametrize("ffn", [["image"], ["text"], ["image", "text"]])
def test_a_student_s_block_is_the_block_written_out_in_float64(teacher: Any, family: Family, random_bank: Banks, ffn: list[str]) -> None:
    plan = CompressionPlan.of(NAME, 6, ffn=[(2, s) for s in ffn])
    bank = random_bank(teacher, plan)
    # The module made for export has no float32 inside; the block is the student's own.
    block = family.lowered(apply_plan(teacher, plan, bank)).module.model.transformer_blocks[2]
    for module in block.modules():
        module._apply(lambda t: t.double(), recurse=False)
    weights = {k: v.double() for k, v in teacher.transformer_blocks[2].state_dict().items()}
    g = torch.Generator().manual_seed(3)
    image, text, temb = (torch.randn(2, n, 32, generator=g, dtype=torch.float64) for n in (7, 4, 1))
    freqs = {s: [f(torch.randn(n, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64)) for f in (torch.cos, torch.sin)]
             for s, n in (("img", 7), ("txt", 4))}  # fmt: skip
    maps = {{"image": "img", "text": "txt"}[s]: {k: v.double() for k, v in bank[f"ffn-2-{s}"].items()} for s in ffn}
    wanted = plain_block(weights, 2, image, text, temb[:, 0], freqs, maps)
    with torch.no_grad():
        found = block(
            hidden_states=image,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=None,
            temb=temb[:, 0],
            image_rotary_emb=(tuple(freqs["img"]), tuple(freqs["txt"])),
        )
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float64
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


PLACES = [(0, "text"), (2, "image"), (2, "text"), (5, "image")]


def test_the_teacher_with_linear_networks_is_the_student(teacher: Any, family: Family, inputs: dict[str, Any], random_bank: Banks) -> None:
    plan = CompressionPlan.of(NAME, 6, ffn=PLACES)
    bank = random_bank(teacher, plan)
    maps = {place: (bank[plan.ffn_key(*place)]["weight"], bank[plan.ffn_key(*place)]["bias"]) for place in PLACES}
    wanted = run(apply_plan(teacher, plan, bank), inputs)
    with linear_ffns(teacher, family, maps):
        assert deviation(run(teacher, inputs), wanted) <= 1e-5
    # The last block's text is read by nothing, so its network has no say.
    with linear_ffns(teacher, family, maps | {(5, "text"): maps[5, "image"]}):
        assert deviation(run(teacher, inputs), wanted) <= 1e-5


def test_linear_networks_and_left_out_blocks_go_together(teacher: Any, family: Family, inputs: dict[str, Any], random_bank: Banks) -> None:
    """A student block of an interval starts as its first block, with that block's own network made linear."""
    plan = CompressionPlan.of(NAME, 6, [(2, 4)], ffn=[(2, "image"), (2, "text")])
    bank = random_bank(teacher, plan)
    maps = {(2, s): (bank[f"ffn-2-4-{s}"]["weight"], bank[f"ffn-2-4-{s}"]["bias"]) for s in ("image", "text")}
    with linear_ffns(teacher, family, maps), replaced(teacher, family, {3: None, 4: None}):
        found = run(teacher, inputs)
    assert deviation(found, run(apply_plan(teacher, plan, bank), inputs)) <= 1e-5


def test_a_distilled_block_gives_all_but_its_network(make_teacher: Callable[..., Any], teacher: Any, random_bank: Banks) -> None:
    other = {k: v.clone() for k, v in make_teacher(1, seed=9).transformer_blocks[0].state_dict().items()}
    plan = CompressionPlan.of(NAME, 6, [(2, 3)], ffn=[(2, "image")])
    bank = random_bank(teacher, plan) | {"interval-2-3": other}
    block = apply_plan(teacher, plan, bank).transformer_blocks[2]
    assert not {k for k in block.state_dict() if k.startswith("img_mlp")}
    assert torch.equal(block.img_mod[1].weight, other["img_mod.1.weight"][: 3 * 32])
    assert torch.equal(block.img_mod[1].bias, other["img_mod.1.bias"][: 3 * 32])
    assert torch.equal(block.img_ffn.weight, bank["ffn-2-3-image"]["weight"])
    assert torch.equal(block.txt_mlp.net[2].weight, other["txt_mlp.net.2.weight"])
    # The network's tensors are not even read.
    lean = {k: v for k, v in other.items() if not k.startswith("img_mlp")}
    again = apply_plan(teacher, plan, bank | {"interval-2-3": lean}).state_dict()
    assert all(torch.equal(again[f"transformer_blocks.2.{k}"], v) for k, v in block.state_dict().items())


def test_a_smaller_modulation_takes_the_same_half(teacher: Any, inputs: dict[str, Any], random_bank: Banks) -> None:
    """At full rank the projection changes nothing, so students with and without it are one."""
    width = teacher.inner_dim
    projected = CompressionPlan.of(NAME, 6, [(1, 2)], [4], width, True, PLACES[:1] + PLACES[3:])
    stock = CompressionPlan.of(NAME, 6, [(1, 2)], [4], None, True, PLACES[:1] + PLACES[3:])
    bank = random_bank(teacher, projected)
    assert deviation(run(apply_plan(teacher, projected, bank), inputs), run(apply_plan(teacher, stock, bank), inputs)) <= 1e-5


def test_tokens_with_a_timestep_of_their_own_keep_it(make_teacher: Callable[..., Any], family: Family, random_bank: Banks) -> None:
    """The variant for editing modulates reference images as at timestep zero: two modulations a block, chosen by token."""
    model = make_teacher(3, zero_cond_t=True)
    inputs = family.example_inputs(model.config, batch=2, height=4, width=4, generator=torch.Generator().manual_seed(1))
    inputs["img_shapes"] = [[(1, 2, 4), (1, 2, 4)]] * 2
    plan = CompressionPlan.of(NAME, 3, ffn=[(0, "image"), (1, "text")])
    bank = random_bank(model, plan)
    maps = {(e.block, e.stream): tuple(bank[plan.ffn_key(e.block, e.stream)][n] for n in ("weight", "bias")) for e in plan.ffn}
    with linear_ffns(model, family, maps):
        assert deviation(run(apply_plan(model, plan, bank), inputs), run(model, inputs)) <= 1e-5


@pytest.mark.parametrize("rank", [None, 4])
def test_what_goes_is_what_was_counted(teacher: Any, family: Family, random_bank: Banks, rank: int | None) -> None:
    """Of each network: both its linears, three of six chunks of modulation; one map comes in."""
    plan = CompressionPlan.of(NAME, 6, [], [4], rank, False, PLACES)
    whole = CompressionPlan.of(NAME, 6, [], [4], rank)
    lean = apply_plan(teacher, plan, random_bank(teacher, plan))
    width = teacher.inner_dim
    mlp, modulation = (4 * width * width + 4 * width) + (4 * width * width + width), 3 * width * ((rank or width) + 1)
    saved = len(PLACES) * (mlp + modulation - width * width - width)
    config = {"_class_name": type(teacher).__name__, **teacher.config}
    assert count_parameters(lean) == predicted_parameters(family, config, plan) == predicted_parameters(family, config, whole) - saved


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("intervals", [[], [(2, 3)]])
def test_every_tensor_of_a_student_learns(
    teacher: Any, inputs: dict[str, Any], random_bank: Banks, rank: int | None, intervals: list[tuple[int, int]]
) -> None:
    plan = CompressionPlan.of(NAME, 6, intervals, [4], rank, True, [(0, "text"), (1, "image"), (2, "image"), (2, "text"), (5, "image")])
    student = apply_plan(teacher, plan, random_bank(teacher, plan)).requires_grad_(True).train()
    student(**inputs, return_dict=False)[0].square().mean().backward()
    assert not [n for n, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert sum("_ffn." in n for n, _ in student.named_parameters()) == 10


@pytest.mark.parametrize(
    ("plan", "refused"),
    [
        (CompressionPlan.of(NAME, 6, dead_code=True, ffn=[(5, "text")]), 5),
        (CompressionPlan.of(NAME, 6, [], [4, 5], None, True, [(3, "text"), (2, "image")]), 3),
        (CompressionPlan.of(NAME, 6, [(3, 5)], [], 4, True, [(1, "text"), (3, "text")]), 3),
    ],
)
def test_text_networks_that_dead_code_removes_are_refused(teacher: Any, family: Family, plan: CompressionPlan, refused: int) -> None:
    config = {"_class_name": type(teacher).__name__, **teacher.config}
    with pytest.raises(PlanError, match=rf"plan\.ffn: block {refused}, text: .*left out, or dead_code: false") as caught:
        predicted_parameters(family, config, plan)
    assert caught.value.exit_code == 2
    predicted_parameters(family, config, plan.model_copy(update={"dead_code": False}))


def test_maps_that_the_bank_lacks_and_configurations_that_lie_are_refused(teacher: Any, family: Family, random_bank: Banks) -> None:
    plan = CompressionPlan.of(NAME, 6, [(2, 3)], ffn=[(2, "text")])
    with pytest.raises(PlanError, match="the bank holds no 'ffn-2-3-text'"):
        apply_plan(teacher, plan, {"ffn-2-text": {}})
    config = {"_class_name": type(teacher).__name__, **teacher.config}
    edited = student_config(family, config, CompressionPlan.of(NAME, 6, [], [4], None, True, [(2, "text"), (4, "image")]))
    assert (edited["linear_ffn_image_blocks"], edited["linear_ffn_text_blocks"]) == ([4], [2])
    for key, blocks, words in (
        ("linear_ffn_image_blocks", [6], r"linear_ffn_image_blocks = \[6\]: wanted blocks within 0\.\.5"),
        ("linear_ffn_text_blocks", [2, 4], r"linear_ffn_text_blocks = \[2, 4\]: blocks \[4\] compute no text after attention"),
        ("linear_ffn_text_blocks", [5], r"blocks \[5\] compute no text after attention"),
    ):
        with pytest.raises(ModelError, match=words):
            empty_model(family, edited | {key: blocks})


# ------------------------------------------------------------------------------- the published layout, counted

PUBLISHED = {"num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584}
SPANS = [(3, 4), (5, 7), (8, 10), (11, 12), (15, 24), (25, 27), (29, 30), (42, 43), (45, 47), (48, 49), (52, 53), (54, 55), (56, 57)]
D = 3072
"""Width of Qwen-Image."""


def square(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


BLOCK = 2 * square(D, 6 * D) + 8 * square(D, D) + 4 * 128 + 2 * (square(D, 4 * D) + square(4 * D, D))
FFN = square(D, 4 * D) + square(4 * D, D) + square(D, 3 * D) - square(D, D)
"""What one linear network saves: both linears and half the modulation go, one map comes."""


@pytest.mark.slow
def test_the_published_layout_is_counted_to_the_parameter(family: Family) -> None:
    """Source: arXiv 2511.16156, the edits printed for Qwen-Image's "10B"; text groups are all that the intervals leave of them."""
    config = {
        "_class_name": family.class_name,
        **family.tiny_config,
        **PUBLISHED,
        "in_channels": 64,
        "out_channels": 16,
        "axes_dims_rope": (16, 56, 56),
    }
    teacher = predicted_parameters(family, config, CompressionPlan.of(NAME, 60))
    assert BLOCK == 339_831_296  # printed: 339.83 M
    depth = CompressionPlan.of(NAME, 60, SPANS)
    assert predicted_parameters(family, config, depth) == teacher - 25 * BLOCK
    text = [b for b in depth.kept if b in (36, 37, 40, 41) or b >= 50]
    assert len(text) == 11
    ffn = [(2, "image"), (2, "text"), (58, "image"), (59, "image")]
    plan = CompressionPlan.of(NAME, 60, SPANS, text, None, False, ffn)
    # A mapped block: all of its text half but keys and values, for one map in, and one out at the end of a run that text is read after.
    mapped = square(D, 6 * D) + 2 * square(D, D) + 128 + square(D, 4 * D) + square(4 * D, D) - square(D, D)
    runs = 3  # [36, 37], [40, 41], and the last: without dead-code removal its map out stays
    wanted = teacher - 25 * BLOCK - 11 * mapped + runs * square(D, D) - len(ffn) * FFN
    assert predicted_parameters(family, config, plan) == wanted == 10_027_823_808  # printed: 10.60 B, not saying what stays
    with pytest.raises(PlanError, match="ffn: got block 58, text: its text stream is mapped"):
        CompressionPlan.of(NAME, 60, SPANS, text, None, False, [*ffn, (58, "text")])


def test_linear_networks_survive_the_disk_in_half_precision(teacher: Any, tmp_path: Any, random_bank: Banks) -> None:
    model = copy.deepcopy(teacher)
    for module in model.modules():
        module._apply(lambda t: t.to(torch.bfloat16), recurse=False)
    plan = CompressionPlan.of(NAME, 6, [(3, 4)], ffn=[(1, "image"), (3, "text")])
    student = apply_plan(model, plan, random_bank(teacher, plan))
    save_model(student, plan, tmp_path)
    again = load_model(tmp_path, "bfloat16").state_dict()
    assert all(torch.equal(again[k], v) for k, v in student.state_dict().items())
    assert again.keys() == student.state_dict().keys()
