"""Second moments, the kernels themselves, under Triton's interpreter: TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from ppclc import kernels
from ppclc.analysis.ffn_maps import FfnMoments
from ppclc.kernels import moments

if not kernels.interpreted():
    pytest.skip("TRITON_INTERPRET=1 runs it", allow_module_level=True)

import itertools

from ppclc.kernels import moments_triton
from ppclc.kernels.moments_triton import WHOLE, Config, pieces_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EXACT = 1e-6
"""Of sums in float32; what is centred is rounded once more in 16 bits."""
CENTRED = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: EXACT}
SIZES = ((100, 64, 64), (37, 100, 72), (70, 200, 136), (1, 64, 80))
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_chosen", "triton")


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def drawn(rows: int, width: int, other: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, y, and sums that are not zero before."""
    torch.manual_seed(rows)
    before = torch.randn(width, width)
    return torch.randn(rows, width).to(dtype), torch.randn(rows, other).to(dtype), before + before.T, torch.randn(width, other)


@dtypes
@pytest.mark.parametrize(("rows", "width", "other"), SIZES)
def test_moments_are_added_to_what_is_there(rows: int, width: int, other: int, dtype: torch.dtype) -> None:
    x, y, second, cross = drawn(rows, width, other, dtype)
    wanted = second + x.double().T @ x.double(), cross + x.double().T @ y.double()
    moments.add_moments(second, cross, x, y)
    assert distance(moments.symmetric(second), wanted[0]) < EXACT
    assert distance(cross, wanted[1]) < EXACT


@dtypes
def test_masked_rows_do_not_count_whatever_they_hold(dtype: torch.dtype) -> None:
    x, y, second, cross = drawn(50, 72, 64, dtype)
    mask = torch.rand(50) > 0.4
    kept = x[mask].double(), y[mask].double()
    wanted = second + kept[0].T @ kept[0], cross + kept[0].T @ kept[1]
    x[~mask], y[~mask] = torch.nan, torch.inf
    moments.add_moments(second, cross, x, y, mask)
    assert distance(moments.symmetric(second), wanted[0]) < EXACT
    assert distance(cross, wanted[1]) < EXACT


@dtypes
def test_centres_are_taken_away_before_products(dtype: torch.dtype) -> None:
    """Of a mean fifty times the spread float32 sums of raw rows would leave a tenth of a per cent."""
    x, y, second, cross = drawn(60, 64, 64, dtype)
    x, y = (x.float() + 50).to(dtype), (y.float() - 50).to(dtype)
    centres = x.double().mean(0).float(), y.double().mean(0).float()
    a, b = x.double() - centres[0].double(), y.double() - centres[1].double()
    wanted = second + a.T @ a, cross + a.T @ b
    moments.add_moments(second, cross, x, y, None, centres)
    assert distance(moments.symmetric(second), wanted[0]) < CENTRED[dtype]
    assert distance(cross, wanted[1]) < CENTRED[dtype]


def test_either_sum_alone() -> None:
    x, y, second, cross = drawn(40, 64, 96, torch.float32)
    both = second.clone(), cross.clone()
    moments.add_moments(both[0], both[1], x, y)
    moments.add_moments(second, None, x)
    moments.add_moments(None, cross, x, y)
    assert distance(moments.symmetric(second), moments.symmetric(both[0]).double()) < EXACT
    assert distance(cross, both[1].double()) < EXACT


def test_views_and_extreme_values() -> None:
    x, _, _second, _ = drawn(40, 128, 64, torch.float16)
    wide = (x * 6e4).clamp(-65504, 65504)
    view = wide[::2, 32:96]
    sums = torch.zeros(64, 64)
    moments.add_moments(sums, None, view)
    assert distance(moments.symmetric(sums), view.double().T @ view.double()) < EXACT
    turned = wide.T[:40]  # no row of it is contiguous
    sums = torch.zeros(40, 40)
    moments.add_moments(sums, None, turned)
    assert distance(moments.symmetric(sums), turned.double().T @ turned.double()) < EXACT
    tiny = torch.full((8, 64), 2.0**-24, dtype=torch.float16)  # the least number above zero
    sums = torch.zeros(64, 64)
    moments.add_moments(sums, None, tiny)
    assert distance(moments.symmetric(sums), tiny.double().T @ tiny.double()) < EXACT


def test_a_row_that_is_not_a_number_shows() -> None:
    x, _, second, _ = drawn(20, 64, 64, torch.float32)
    x[3, 5] = torch.nan
    moments.add_moments(second, None, x)
    whole = moments.symmetric(second)
    assert whole[5].isnan().all()
    assert whole[:, 5].isnan().all()
    assert whole.isnan().sum() == 2 * 64 - 1


@pytest.mark.parametrize("shares", [True, False])
def test_descriptors_give_what_pointers_give(shares: bool) -> None:
    x, y, second, cross = drawn(100, 256, 512, torch.float16)
    wanted = second.clone(), cross.clone()
    moments_triton.run(wanted[0], wanted[1], x, y, config=Config(64, 128, 32, copies=False, shares=shares))
    moments_triton.run(second, cross, x, y, config=Config(64, 128, 32, copies=True, shares=shares))
    assert distance(second.triu(), wanted[0].triu().double()) < EXACT
    assert distance(cross, wanted[1].double()) < EXACT


@pytest.mark.parametrize(("width", "other", "at_once"), [(64, 64, 132), (3072, 3072, 132), (6144, 100, 108), (200, 136, 4), (100, 72, 1)])
def test_pieces_cover_every_tile_once_and_no_program_has_more_than_its_share(width: int, other: int, at_once: int) -> None:
    config = Config(128, 256, 64)
    pieces, starts = pieces_of(width, other, config, True, True, at_once, torch.device("cpu"))
    parts: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for row, column, which, first, last in pieces.tolist():
        parts.setdefault((row, column, which), []).append((first, last))
    down, across, others = -(-width // 128), -(-width // 256), -(-other // 256)
    wanted = {(i, j, 0) for i in range(down) for j in range(across) if any(256 * j + n >= 128 * i for n in range(256))}
    wanted |= {(i, j, 1) for i in range(down) for j in range(others)}
    assert parts.keys() == wanted
    for spans in parts.values():
        spans.sort()
        assert spans[0][0] == 0
        assert spans[-1][1] == WHOLE
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    loads = [
        sum(last - first for *_, first, last in pieces[a:b].tolist()) for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False)
    ]
    assert sum(loads) == len(wanted) * WHOLE
    dealt = loads[len(wanted) // at_once * at_once :]
    assert not dealt or max(dealt) - min(dealt) <= 1


@dtypes
def test_difference_its_energy_and_sums(dtype: torch.dtype) -> None:
    x, _, _, _ = drawn(70, 200, 64, dtype)
    before = torch.randn(70, 200).to(dtype)
    d, total, energy = moments.difference(x, before)
    wanted = x.double() - before.double()
    assert d.dtype == dtype
    assert distance(d, wanted) < CENTRED[dtype]
    assert (total - x.double().sum(0)).abs().max() < 1e-4
    assert energy.item() == pytest.approx(d.double().square().sum().item(), rel=1e-6)


@dtypes
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 200])
def test_sums_of_rows(rows: int, dtype: torch.dtype) -> None:
    """Of pieces in float32, however many rows are left over, and whatever lies beside the columns."""
    x = (torch.randn(rows, 48) + 100).to(dtype)[:, :40]
    total = moments.sum_of_rows(x)
    assert total.dtype == torch.float64
    assert (total - x.double().sum(0)).abs().max() <= 2e-6 * 100 * max(rows, 1)


def test_networks_sums_are_those_of_their_plain_formulation() -> None:
    """`mid` far from zero, as states are; what is added comes as two states' difference, rounded."""
    mid = (torch.randn(1, 130, 64) + 20).to(torch.bfloat16)
    output = (mid + torch.randn(1, 130, 64)).to(torch.bfloat16)
    made = []
    for way in ("triton", "torch"):
        with kernels.switched(way):  # type: ignore[arg-type]
            found = FfnMoments()
            found.add("image", 3, mid, output)
            made.append(found.tensors)
    by_kernel, plain = made
    assert by_kernel.keys() == plain.keys()
    for name, wanted in plain.items():
        limit = 1e-3 if "cross" in name or "square" in name else 1e-9  # what is centred is rounded once more
        assert distance(by_kernel[name], wanted) < limit, name
