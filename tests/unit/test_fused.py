"""Models whose blocks run through kernels: the same numbers, names and gradients; and the operators that they run through, without a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ppclc import kernels, plugins
from ppclc.families import Family
from ppclc.kernels import fused as fusing
from ppclc.kernels import modulation, qk_norm_rope
from ppclc.kernels.fused import STOCK, fuse, unfuse
from ppclc.loading.classes import empty_model, model_class
from ppclc.models import apply_plan, blocks_of, save_model
from ppclc.plan import CompressionPlan

EDITED = ("qwen_image", "flux", "flux2", "sd3")
FAMILIES = (*EDITED, "longcat_image", "chroma", "hunyuan_image")


@pytest.fixture(autouse=True)
def never_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels are taken wherever they could be; on the CPU their operators run the references. Gives the names that were asked for and taken."""
    asked: list[str] = []

    def takes(name: str, *tensors: torch.Tensor) -> bool:
        if torch.compiler.is_exporting() or not all(t.dtype in kernels.DTYPES for t in tensors):
            return False
        asked.append(name)
        return True

    for module in (modulation, qk_norm_rope, fusing):
        monkeypatch.setattr(module, "takes", takes)
    return asked


def _model(name: str, **config: Any) -> tuple[Family, Any]:
    """A tiny model with random weights that matter, stock."""
    family: Family = plugins.load("families", name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        full = {"_class_name": family.class_name, **family.tiny_config, **config}
        model = model_class(family, full).from_config(full)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return family, unfuse(model).eval().requires_grad_(False)


def _student(name: str) -> tuple[Family, Any]:
    """A student with every kind of edit."""
    family, model = _model(name)
    blocks = family.num_blocks({**model.config})
    plan = CompressionPlan.of(family.name, blocks, [], text_stream=[2], ffn=[(1, "image"), (0, "text")], dead_code=False)
    generator = torch.Generator().manual_seed(1)
    width = model.inner_dim
    maps = {"weight": torch.randn(width, width, generator=generator) / 8, "bias": torch.randn(width, generator=generator)}
    bank = {plan.ffn_key(e.block, e.stream): maps for e in plan.ffn}
    bank |= {plan.text_key(e.block): {f"{m}.{k}": v for m in ("text_in", "text_out") for k, v in maps.items()} for e in plan.text_stream}
    return family, unfuse(apply_plan(model, plan, bank))


MAKERS: dict[str, Callable[[str], tuple[Family, Any]]] = {"stock": _model, "student": _student}
MODELS = [*((n, "stock") for n in FAMILIES), *((n, "student") for n in EDITED)]
each_model = pytest.mark.parametrize(("name", "kind"), MODELS)
DAILY = ("qwen_image", "flux", "sd3")
each_model_in_time = pytest.mark.parametrize(
    ("name", "kind"), [pytest.param(*p, marks=() if p[0] in DAILY else pytest.mark.long) for p in MODELS]
)
"""As `each_model`, of tests that take seconds: what is made like others is left to the long ones."""


def _inputs(family: Family, model: Any, dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    given = family.example_inputs({**model.config}, batch=2, generator=torch.Generator().manual_seed(3)) | more
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and k == "hidden_states" else v for k, v in given.items()} | {
        "return_dict": False
    }


@each_model
def test_fused_models_compute_the_same_to_the_bit_and_take_every_kernel(name: str, kind: str, taken: list[str]) -> None:
    family, model = MAKERS[kind](name)
    inputs = _inputs(family, model)
    with torch.no_grad():
        wanted = model(**inputs)[0]
        assert not taken
        got = fuse(copy.deepcopy(model), family.fused())(**inputs)[0]
    assert torch.equal(got, wanted)
    assert set(taken) == {"layer_norm_modulate", "gated_residual", "qk_norm_rope"}


@each_model
def test_where_no_kernel_is_taken_a_fused_model_runs_as_it_was(name: str, kind: str) -> None:
    family, model = MAKERS[kind](name)
    inputs = _inputs(family, model)
    with torch.no_grad():
        wanted = model(**inputs)[0]
        with kernels.switched("torch"):
            got = fuse(model, family.fused())(**inputs)[0]
    assert torch.equal(got, wanted)


def test_masked_text_is_masked_in_fused_attention(taken: list[str]) -> None:
    family, model = _model("qwen_image")
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    inputs = _inputs(family, model, encoder_hidden_states_mask=mask)
    with torch.no_grad():
        wanted, whole = model(**inputs)[0], model(**_inputs(family, model))[0]
        got = fuse(model, family.fused())(**inputs)[0]
    assert torch.equal(got, wanted)
    assert not torch.equal(got, whole)
    assert "qk_norm_rope" in taken


def test_modulation_by_token_falls_back_to_the_stock_block(taken: list[str]) -> None:
    family, model = _model("qwen_image", zero_cond_t=True)
    inputs = _inputs(family, model, **family.example_inputs({**model.config}, batch=2, references=1))
    with torch.no_grad():
        wanted = model(**inputs)[0]
        got = fuse(model, family.fused())(**inputs)[0]
    assert torch.equal(got, wanted)
    assert "layer_norm_modulate" not in taken


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_rounds_as_the_stock_model(name: str, dtype: torch.dtype, taken: list[str]) -> None:
    family, model = _model(name)
    model = model.to(dtype)
    precise = ("img_ids", "txt_ids", *(() if name == "hunyuan_image" else ("timestep",)))  # whose embedding of time does not cast
    inputs = {k: v.to(dtype) if isinstance(v, torch.Tensor) and k not in precise else v for k, v in _inputs(family, model).items()}
    with torch.no_grad():
        wanted = model(**inputs)[0]
        got = fuse(model, family.fused())(**inputs)[0]
    assert got.dtype == dtype
    assert torch.equal(got, wanted)
    assert "qk_norm_rope" in taken


@each_model
def test_gradients_flow_through_fused_blocks(name: str, kind: str, taken: list[str]) -> None:
    family, model = MAKERS[kind](name)
    inputs = _inputs(family, model)
    gradients = []
    for one in (model, fuse(copy.deepcopy(model), family.fused())):
        one.requires_grad_(True)
        one(**inputs)[0].square().mean().backward()
        gradients.append({n: p.grad for n, p in one.named_parameters()})
    stock, own = gradients
    assert stock.keys() == own.keys()
    for parameter, wanted in stock.items():
        assert (wanted is None) == (own[parameter] is None), parameter
        if wanted is not None:
            torch.testing.assert_close(own[parameter], wanted, rtol=2e-4, atol=2e-6, msg=lambda m, p=parameter: f"{p}: {m}")
    assert "layer_norm_modulate" in taken


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # the stock norm of queries, under autocast
@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_precision_trains_fused_blocks(name: str, taken: list[str]) -> None:
    """Products in bfloat16, weights and sums in float32, as `training` has it: as near as what bfloat16 itself loses."""
    family, model = _model(name)
    inputs, found = _inputs(family, model), []
    for one, precise in ((model, True), (model, False), (fuse(copy.deepcopy(model), family.fused()), False)):
        one.requires_grad_(True).zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            loss = one(**inputs)[0].float().square().mean()
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None]))
    exact, stock, own = found
    assert own.dtype == torch.float32
    assert (own - exact).norm() < 1.5 * (stock - exact).norm()
    assert "gated_residual" in taken


@pytest.mark.slow
@each_model_in_time
def test_fused_models_compile_without_a_break(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, model = MAKERS[kind](name)
    fuse(model, family.fused())
    monkeypatch.setattr(kernels, "lacks", lambda: "")
    monkeypatch.setattr(kernels, "interpreted", lambda: True)
    monkeypatch.setattr(kernels, "_chosen", "triton")
    for module in (modulation, qk_norm_rope):  # their operators run the references
        monkeypatch.setattr(module, "runs", lambda _: False)
    inputs, graphs = _inputs(family, model), []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        wanted = model(**inputs)[0]
        for block in blocks_of(model, family):
            block.compile(backend=backend, fullgraph=True)
        got = model(**inputs)[0]
    torch._dynamo.reset()
    assert torch.equal(got, wanted)
    assert graphs
    names = " ".join(str(n.target) for g in graphs for n in g.graph.nodes)
    assert all(f"ppclc.{kernel}" in names for kernel in ("layer_norm_modulate", "gated_residual", "qk_norm_rope"))


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if name != "hunyuan_image"]
)  # which diffusers' checkpointing does not know how to call
def test_checkpointed_blocks_give_the_same_gradients(name: str, taken: list[str]) -> None:
    family, model = _model(name)
    fuse(model, family.fused()).requires_grad_(True).train()
    inputs, found = _inputs(family, model), []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(**inputs)[0].square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.slow
@each_model
def test_what_is_fused_keeps_its_names_and_can_be_undone(name: str, kind: str, tmp_path: Any) -> None:
    family, model = MAKERS[kind](name)
    before = {n: type(m) for n, m in model.named_modules()}
    processors = {n: type(p) for n, p in model.attn_processors.items()}
    state = {n: t.data_ptr() for n, t in model.state_dict().items()}
    assert fuse(model, family.fused()) is model
    blocks = blocks_of(model, family)
    assert all(STOCK in type(b).__dict__ and STOCK in type(b.attn.processor).__dict__ for b in blocks)
    assert {n: t.data_ptr() for n, t in model.state_dict().items()} == state
    assert {n: type(m).__name__ for n, m in model.named_modules()} == {n: t.__name__ for n, t in before.items()}
    assert all(isinstance(m, before[n]) for n, m in model.named_modules())
    copied = copy.deepcopy(model)
    assert all(STOCK in type(b).__dict__ for b in blocks_of(copied, family))
    assert unfuse(copied) is copied
    assert {n: type(m) for n, m in copied.named_modules()} == before
    assert {n: type(p) for n, p in copied.attn_processors.items()} == processors
    assert all(STOCK in type(b).__dict__ for b in blocks)


def test_models_are_fused_as_they_are_made(make_teacher: Callable[..., Any], tmp_path: Any) -> None:
    from ppclc import load_model

    teacher = make_teacher(2)
    family: Family = plugins.load("families", "qwen_image")
    teacher.save_pretrained(tmp_path / "teacher")
    plan = CompressionPlan.of(family.name, 2, [(0, 1)])
    student = apply_plan(teacher, plan)
    save_model(student, plan, tmp_path / "student")
    models = [
        load_model(tmp_path / "teacher"),
        student,
        load_model(tmp_path / "student" / "transformer"),
        empty_model(family, {"_class_name": family.class_name, **family.tiny_config}),
    ]
    for model in models:
        assert all(STOCK in type(block).__dict__ for block in blocks_of(model, family))
    assert not any(STOCK in type(block).__dict__ for block in blocks_of(teacher, family))


@pytest.mark.parametrize("hooks", [1, 2])
def test_hooks_on_a_norms_input_are_called_and_its_kernel_is_taken(hooks: int, taken: list[str]) -> None:
    """What they put in the input's place is what is normed, as where the norm itself is called; hooks that want more are left to the norm."""
    norm, x = torch.nn.LayerNorm(8, elementwise_affine=False), torch.randn(2, 3, 8)
    scale, shift = torch.randn(2, 2, 8).unbind()
    told: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _, args: told.append(args[0]))
    for _ in range(hooks - 1):
        norm.register_forward_pre_hook(lambda _, args: 2 * args[0] + args[0].square())
    plain = modulation.modulate(norm(x), scale, shift)
    assert "layer_norm_modulate" not in taken
    assert torch.equal(fusing.modulated(norm, x, scale, shift), plain)
    assert taken == ["layer_norm_modulate"]
    assert told == [x, x]
    taken.clear()
    norm.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs), with_kwargs=True)
    assert torch.equal(fusing.modulated(norm, x, scale, shift), plain)
    assert not taken


@pytest.mark.slow
@each_model_in_time
def test_whoever_listens_to_a_norm_is_told_and_changes_nothing(name: str, kind: str, taken: list[str]) -> None:
    """Each norm by itself, with a batch of two: modulations have a row a sample and states one a token."""
    family, model = MAKERS[kind](name)
    inputs, fused = _inputs(family, model), fuse(copy.deepcopy(model), family.fused())
    norms = [n for n, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm) or "norm" in type(m).__name__.lower()]
    assert len(norms) > 10
    for norm in norms:
        told: list[list[torch.Tensor]] = []
        for one in (model, fused):
            told.append([])
            hook = one.get_submodule(norm).register_forward_hook(lambda _, args, out, told=told[-1]: told.extend([*args[:1], out]))
            with torch.no_grad():
                told[-1].append(one(**inputs)[0])
            hook.remove()
        for plain, by_kernel in zip(*told, strict=True):
            if isinstance(plain, torch.Tensor):
                assert torch.equal(plain, by_kernel), norm


@pytest.mark.slow
@each_model_in_time
def test_what_is_exported_has_no_kernel_in_it(name: str, kind: str, taken: list[str]) -> None:
    family, model = MAKERS[kind](name)
    lowered = family.lowered(fuse(model, family.fused()))
    assert not any(STOCK in type(part).__dict__ for part in lowered.module.modules())
    inputs = lowered.inputs(**lowered.sizes[0])
    with torch.no_grad():
        exported = torch.export.export(lowered.module, (), inputs)
    assert not [n for n in exported.graph.nodes if "ppclc" in str(n.target)]
    assert not taken
    assert all(STOCK in type(block).__dict__ for block in blocks_of(model, family))


def test_a_fused_model_that_is_exported_itself_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fused model gets there, but a block's own export would still ask `takes`, which says no."""
    monkeypatch.setattr(kernels, "lacks", lambda: "")
    monkeypatch.setattr(kernels, "interpreted", lambda: True)
    monkeypatch.setattr(kernels, "_chosen", "triton")

    class Chain(torch.nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return modulation.gated_residual(x, scale, modulation.layer_norm_modulate(x, scale, scale))

    graph = torch.export.export(Chain(), (torch.randn(1, 3, 8), torch.randn(1, 8))).graph
    assert not [n for n in graph.nodes if "ppclc" in str(n.target)]


def _chain(dtype: torch.dtype = torch.float32, batch: int = 2, tokens: int = 5, width: int = 24) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    shapes = ((batch, tokens, width), (batch, width), (batch, width), (batch, tokens, width))
    return [torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_what_pytorch_expects_of_them(dtype: torch.dtype) -> None:
    x, scale, shift, y = _chain(dtype)
    strided = torch.randn(2, 24, 5, dtype=dtype).transpose(1, 2).requires_grad_()
    ops = torch.ops.ppclc
    torch.library.opcheck(ops.layer_norm_modulate, (x, scale, shift, 1e-6))
    torch.library.opcheck(ops.layer_norm_modulate, (strided, scale, shift, 1e-6))
    torch.library.opcheck(ops.gated_residual, (x, scale, y))
    torch.library.opcheck(ops.gated_residual, (strided, scale, y))
    plain = [t.detach() for t in (x, scale, y)]
    for sums in (True, False):
        torch.library.opcheck(ops.layer_norm_modulate_backward, (plain[2], plain[0], plain[1], 1e-6, sums))
        torch.library.opcheck(ops.gated_residual_backward, (plain[0], plain[1], plain[2], sums))
    heads = torch.randn(2, 5, 3, 8, dtype=dtype)
    out = torch.empty(2, 7, 3, 8, dtype=dtype)[:, 2:]
    torch.library.opcheck(ops.qk_norm_rope, (heads, torch.randn(8, dtype=dtype), torch.randn(5, 4), torch.randn(5, 4), 1e-6, True, out))


def test_mixed_dtypes_come_out_as_the_plain_formula_promotes_them() -> None:
    x, scale, shift, y = (t.detach() for t in _chain())
    half = [t.bfloat16() for t in (scale, shift)]
    assert torch.ops.ppclc.layer_norm_modulate(x, *half, 1e-6).dtype == torch.float32
    assert torch.ops.ppclc.gated_residual(x.bfloat16(), half[0], y).dtype == torch.float32
    torch.library.opcheck(torch.ops.ppclc.layer_norm_modulate, (x, *half, 1e-6))
    torch.library.opcheck(torch.ops.ppclc.gated_residual, (x.bfloat16(), half[0], y))


def test_gradients_in_closed_form_are_those_of_autograd() -> None:
    x, scale, shift, y = _chain(torch.float64)
    eps = 1e-6
    assert torch.autograd.gradcheck(lambda *t: torch.ops.ppclc.layer_norm_modulate(*t, eps), (x, scale, shift))
    assert torch.autograd.gradcheck(torch.ops.ppclc.gated_residual, (x, scale, y))
    grad = torch.randn_like(x)
    wanted = torch.autograd.grad(modulation.layer_norm_modulate_reference(x, scale, shift, eps), (x, scale, shift), grad)
    got = torch.autograd.grad(torch.ops.ppclc.layer_norm_modulate(x, scale, shift, eps), (x, scale, shift), grad)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_references_are_the_formulas_of_diffusers_to_the_bit() -> None:
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.normalization import RMSNorm
    from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, scale, shift, y = (t.detach() for t in _chain(dtype, width=96))
        normed = torch.nn.LayerNorm(96, elementwise_affine=False, eps=1e-6)(x)
        for s, h in ((scale, shift), (scale[:, None], shift[:, None])):
            assert torch.equal(modulation.layer_norm_modulate(x, s, h, 1e-6), normed * (1 + scale[:, None]) + shift[:, None])
            assert torch.equal(modulation.gated_residual(x, s, y), x + scale[:, None] * y)
        heads, angles = torch.randn(2, 33, 3, 128).to(dtype), 30 * torch.randn(33, 64)
        freqs = torch.polar(torch.ones_like(angles), angles)
        norm, other = RMSNorm(128, 1e-6).to(dtype), torch.nn.RMSNorm(128, 1e-6).to(dtype)
        norm.weight.data = other.weight.data = torch.rand(128).to(dtype) + 0.5
        cos, sin = (f.repeat_interleave(2, dim=1) for f in (freqs.real, freqs.imag))
        rounded = qk_norm_rope.qk_norm_rope(heads, norm.weight, freqs.real, freqs.imag, 1e-6, rounded=True)
        single = qk_norm_rope.qk_norm_rope(heads, norm.weight, cos[:, ::2], sin[:, ::2], 1e-6)
        with torch.no_grad():
            assert torch.equal(rounded, apply_rotary_emb_qwen(norm(heads), freqs, use_real=False))
            assert torch.equal(single, apply_rotary_emb(other(heads), (cos, sin), sequence_dim=1))


def test_rows_by_token_are_left_to_the_plain_formula(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, _, y = (t.detach() for t in _chain())
    rows = torch.randn(2, 5, 24)
    normed = torch.nn.functional.layer_norm(x, (24,), eps=1e-6)
    assert torch.equal(modulation.layer_norm_modulate(x, rows, rows, 1e-6), normed * (1 + rows) + rows)
    assert torch.equal(modulation.gated_residual(x, rows, y), x + rows * y)
    shared = torch.randn(1, 1, 24)
    torch.testing.assert_close(modulation.gated_residual(x, shared, y), x + shared * y, rtol=0, atol=0)


def test_heads_are_written_where_they_are_asked_for(taken: list[str]) -> None:
    x, weight = torch.randn(2, 5, 3, 8), torch.randn(8)
    cos, sin = torch.randn(5, 4), torch.randn(5, 4)
    whole = torch.full((2, 9, 3, 8), torch.nan)
    given = qk_norm_rope.qk_norm_rope(x, weight, cos, sin, out=whole[:, 3:8])
    assert given.data_ptr() == whole[:, 3:8].data_ptr()
    assert torch.equal(whole[:, 3:8], qk_norm_rope.qk_norm_rope_reference(x, weight, cos, sin))
    assert whole[:, :3].isnan().all()
    assert whole[:, 8:].isnan().all()


def test_queries_that_learn_take_no_kernel(taken: list[str]) -> None:
    x, weight = torch.randn(1, 4, 2, 8, requires_grad=True), torch.randn(8)
    qk_norm_rope.qk_norm_rope(x, weight, torch.randn(4, 4), torch.randn(4, 4)).sum().backward()
    assert x.grad is not None
    assert not taken
