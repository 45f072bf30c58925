"""RMSNorm with rotary embedding, the kernel itself, under Triton's interpreter: TRITON_INTERPRET=1."""

from __future__ import annotations

import copy

import pytest
import torch

from ppclc import kernels, plugins
from ppclc.families import Family
from ppclc.kernels.fused import fuse, unfuse
from ppclc.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from ppclc.loading.classes import model_class

if not kernels.interpreted():
    pytest.skip("TRITON_INTERPRET=1 runs it", allow_module_level=True)

UNIT = {torch.bfloat16: 2**-7, torch.float16: 2**-11, torch.float32: 2**-22}
"""Half a unit in the last place; of float32, what a sum over a head loses besides. Of bfloat16 a whole one: the interpreter cuts, a GPU rounds."""
dtypes = pytest.mark.parametrize("dtype", list(UNIT))


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_chosen", "triton")


def _drawn(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """x, weight, cos and sin."""
    generator, (_, S, _, D) = torch.Generator().manual_seed(sum(shape)), shape
    angles = 20 * torch.randn(S, D // 2, generator=generator)
    weight = 0.5 + torch.rand(D, generator=generator)
    return [torch.randn(shape, generator=generator).to(dtype), weight.to(dtype), angles.cos(), angles.sin()]


def _poisoned(x: torch.Tensor) -> torch.Tensor:
    return torch.full(x.shape, torch.nan, dtype=x.dtype)


def _exact(given: list[torch.Tensor], eps: float = 1e-6) -> torch.Tensor:
    return qk_norm_rope_reference(*(t.double() for t in given), eps)


def _assert_near(got: torch.Tensor, given: list[torch.Tensor], roundings: int) -> None:
    """Within some roundings of a float64 result; a rotation mixes a pair, so that what its norm lost counts."""
    wanted = _exact(given)
    pair = wanted.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(*wanted.shape[:-1], wanted.shape[-1] // 2, 2).flatten(-2)
    assert ((got.double() - wanted).abs() <= roundings * UNIT[got.dtype] * pair * 1.5 + 1e-7).all()


@dtypes
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 2, 64), (1, 2, 11, 72), (1, 2, 3, 96), (1, 1, 24, 128), (1, 2, 1, 16)])
def test_heads_are_normed_and_rotated(shape: tuple[int, int, int, int], rounded: bool, dtype: torch.dtype) -> None:
    given = _drawn(shape, dtype)
    out = _poisoned(given[0])
    assert qk_norm_rope(*given, rounded=rounded, out=out) is out
    _assert_near(out, given, 3 if rounded else 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])  # the interpreter does not round to bfloat16
@pytest.mark.parametrize("rounded", [False, True])
def test_roundings_are_those_of_the_plain_formula(rounded: bool, dtype: torch.dtype) -> None:
    """Nearly every value to the bit: sums of another order may differ in float32, and so round otherwise now and then."""
    given = _drawn((1, 3, 8, 128), dtype)
    got, wanted = qk_norm_rope(*given, rounded=rounded), qk_norm_rope_reference(*given, rounded=rounded)
    if dtype == torch.float32:
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    else:
        assert (got == wanted).float().mean() > 0.99


def test_views_are_read_and_written_where_they_lie() -> None:
    _, weight, cos, sin = _drawn((2, 3, 2, 64), torch.float32)
    linear = torch.randn(2, 3, 3 * 128)  # queries, keys and values of one map
    key = linear[..., 128:256].unflatten(-1, (2, 64))
    freqs = torch.complex(cos, sin)
    joint = torch.full((2, 8, 2, 64), torch.nan)
    qk_norm_rope(key, weight, freqs.real, freqs.imag, rounded=True, out=joint[:, 5:])
    torch.testing.assert_close(joint[:, 5:], qk_norm_rope_reference(key, weight, cos, sin, rounded=True), rtol=1e-5, atol=1e-6)
    assert joint[:, :5].isnan().all()
    doubled = cos.repeat_interleave(2, dim=1), sin.repeat_interleave(2, dim=1)
    got = qk_norm_rope(key, weight, doubled[0][:, ::2], doubled[1][:, ::2])
    torch.testing.assert_close(got, qk_norm_rope_reference(key, weight, cos, sin), rtol=1e-5, atol=1e-6)


@dtypes
def test_one_cosine_for_all_tokens_turns_nothing(dtype: torch.dtype) -> None:
    x, weight, _, _ = _drawn((2, 3, 2, 64), dtype)
    one, zero = torch.ones(1).expand(3, 32), torch.zeros(1).expand(3, 32)
    out = _poisoned(x)
    qk_norm_rope(x, weight, one, zero, out=out)
    normed = torch.nn.functional.rms_norm(x.double(), (64,), weight.double(), 1e-6)
    torch.testing.assert_close(out.double(), normed, rtol=2 * UNIT[dtype], atol=1e-6)


@dtypes
def test_extreme_heads(dtype: torch.dtype) -> None:
    x, weight, cos, sin = _drawn((1, 1, 4, 64), dtype)
    x[0, 0, 0] *= 1e4 / x[0, 0, 0].abs().max().float()
    x[0, 0, 1] *= 1e-4
    x[0, 0, 2] = 0
    out = _poisoned(x)
    qk_norm_rope(x, weight, cos, sin, out=out)
    assert out.isfinite().all()
    assert (out[0, 0, 2] == 0).all()
    _assert_near(out, [x, weight, cos, sin], 2)


def test_a_head_of_nan_is_alone() -> None:
    given = _drawn((1, 3, 4, 64), torch.float32)
    given[0][0, 1, 2, 5] = torch.nan
    got = qk_norm_rope(*given)
    assert got[0, 1, 2].isnan().all()
    assert got.isnan().sum() == 64


@pytest.mark.parametrize("name", ["qwen_image", "flux", "flux2", "sd3", "longcat_image", "chroma", "hunyuan_image"])
def test_a_whole_model_through_kernels(name: str) -> None:
    family: Family = plugins.load("families", name)
    counts = {g.count_key: 1 for g in family.groups}
    config = {"_class_name": family.class_name, **family.tiny_config, **counts}
    model = unfuse(model_class(family, config).from_config(config)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    inputs = family.example_inputs({**model.config}, height=2, width=2, text=3) | {"return_dict": False}
    with torch.no_grad():
        wanted = model(**inputs)[0]
        got = fuse(copy.deepcopy(model), family.fused())(**inputs)[0]
    assert not torch.equal(got, wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
