"""Triton code of the moments: `S += X'X` and `C += X'Y` as one launch over tiles, of S those of the upper triangle alone.

The tiles that would not fill the device once more are dealt out over all of its processors along the rows ("stream-K", arXiv 2301.03598). Every piece is
added to what is there by reductions in the L2 cache, so that several programs may add to one tile: in the order in which they end, so that
the last bit of such a tile may differ between runs.

Shape suffixes: N rows, D and E widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ppclc.kernels import interpreted
from ppclc.kernels.tuning import launch

GROUP = 8
"""Rows of tiles that run beside each other, so that they share columns in the L2 cache."""
WHOLE = 1024
"""Parts of the rows in which the table tells where a piece of a tile begins and ends: so it holds for any number of rows."""


@dataclass(frozen=True)
class Config:
    """Tiles of `m` by `n` results, `k` rows at a time.

    copies: rows come by tensor descriptors, the bulk copy engine where there is one, or by pointers. shares: whether the last tiles are
    dealt out over all processors.
    """

    m: int = 128
    n: int = 256
    k: int = 64
    warps: int = 8
    stages: int = 4
    copies: bool = True
    shares: bool = True


HOPPER = Config()
"""16-bit rows on compute capability 9.0. Source: ours, a sweep on an H100."""
BLACKWELL = Config(128, 128, 64, 8, 4)
"""16-bit rows on newer ones: larger tiles spill registers there. Never run."""
POINTERS = Config(128, 128, 32, 8, 3, copies=False)
"""16-bit rows elsewhere, or of widths that descriptors do not take."""
SINGLE, SMALL_SINGLE = Config(128, 64, 32, 4, 3, copies=False), Config(64, 64, 32, 4, 3, copies=False)
"""float32, as three products of TF32 each: on compute capability 9.0, and elsewhere, where the larger tile spills registers."""
CHUNK = 64
"""Of differences: rows of a program."""
DIFFERENCES = (
    (1024, 4, 4, 1),
    (1024, 8, 4, 1),
    (1024, 8, 8, 1),
    (2048, 4, 8, 1),
    (512, 8, 4, 1),
    (1024, 4, 4, 3),
    (1024, 8, 8, 2),
    (512, 8, 4, 3),
)
"""Of differences: columns, rows at once, warps, and how many such reads are under way, that are tried."""


@triton.jit
def _tile(x, y, row, column, first, last, rows, width_x, width_y, stride_x, stride_y,
          COPIES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Sum over rows of `x_m y_n`, (M, N) in float32."""
    sums = tl.zeros((M, N), dtype=tl.float32)
    if COPIES:
        for k in tl.range(first, last):
            a = x.load([k * K, row * M])
            b = y.load([k * K, column * N])
            sums = tl.dot(a.T, b, sums)
    else:
        m, n = row * M + tl.arange(0, M), column * N + tl.arange(0, N)
        for k in tl.range(first, last):
            r = (k * K + tl.arange(0, K)).to(tl.int64)
            a = tl.load(x + r[:, None] * stride_x + m[None, :], mask=(r < rows)[:, None] & (m < width_x)[None, :], other=0.0)
            b = tl.load(y + r[:, None] * stride_y + n[None, :], mask=(r < rows)[:, None] & (n < width_y)[None, :], other=0.0)
            sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION)
    return sums


@triton.jit
def _add(target, sums, row, column, width_m, width_n, M: tl.constexpr, N: tl.constexpr):
    """Add a tile to a matrix of contiguous rows."""
    m, n = (row * M + tl.arange(0, M)).to(tl.int64), column * N + tl.arange(0, N)
    tl.atomic_add(target + m[:, None] * width_n + n[None, :], sums, mask=(m < width_m)[:, None] & (n < width_n)[None, :], sem="relaxed")


@triton.jit
def moments_kernel(
    x, x_right, y, second, cross, pieces, starts, rows, width_x, width_y, stride_x, stride_y,
    COPIES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The pieces of one program. A piece: row and column of its tile, 0 for S and 1 for C, and from where to where in the rows."""
    program, steps = tl.program_id(0), tl.cdiv(rows, K)
    for piece in tl.range(tl.load(starts + program), tl.load(starts + program + 1)):
        place = pieces + piece * 5
        row, column, which = tl.load(place), tl.load(place + 1), tl.load(place + 2)
        first, last = tl.load(place + 3) * steps // PARTS, tl.load(place + 4) * steps // PARTS
        if last > first:
            if which == 0:
                sums = _tile(x, x_right, row, column, first, last, rows, width_x, width_x, stride_x, stride_x, COPIES, M, N, K, PRECISION)
                _add(second, sums, row, column, width_x, width_x, M, N)
            else:
                sums = _tile(x, y, row, column, first, last, rows, width_x, width_y, stride_x, stride_y, COPIES, M, N, K, PRECISION)
                _add(cross, sums, row, column, width_x, width_y, M, N)


@triton.jit
def prepare_kernel(x, mask, centre, out, stride, width, HAS_MASK: tl.constexpr, HAS_CENTRE: tl.constexpr, BLOCK: tl.constexpr):
    """A piece of one row less its centre; zeros where the mask is zero."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    counts = inside
    if HAS_MASK:
        counts = inside & (tl.load(mask + row) != 0)
    value = tl.load(x + row * stride + columns, mask=counts, other=0.0)
    if HAS_CENTRE:
        value = value.to(tl.float32) - tl.load(centre + columns, mask=counts, other=0.0)
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def difference_kernel(
    x, before, out, sums, energies, rows, stride_x, stride_before,
    width: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some columns of a chunk of rows: their difference, the sum of each column, the energy of the difference. TOGETHER: rows that are read at once."""
    part, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total, energy = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
    for start in tl.range(0, CHUNK, TOGETHER, num_stages=STAGES):
        row = part * CHUNK + start + tl.arange(0, TOGETHER)
        inside = (row < rows)[:, None] & (columns < width)[None, :]
        a = tl.load(x + row[:, None] * stride_x + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(before + row[:, None] * stride_before + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        d = (a - b).to(out.dtype.element_ty)
        tl.store(out + row[:, None] * width + columns[None, :], d, mask=inside)
        total += tl.sum(a, 0)
        energy += tl.sum(d.to(tl.float32) * d.to(tl.float32), 0)
    tl.store(sums + part * width + columns, total, mask=columns < width)
    tl.store(energies + part * tl.num_programs(1) + tl.program_id(1), tl.sum(energy, 0))


def difference(x_ND: torch.Tensor, before_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`x - before` (N, D) in their dtype, the sum of `x` over rows and the energy of the difference in float64."""
    x_ND, before_ND = _prepared(x_ND, None, None), _prepared(before_ND, None, None)
    (rows, width), device = x_ND.shape, x_ND.device
    out = torch.empty((rows, width), dtype=x_ND.dtype, device=device)
    parts = triton.cdiv(rows, CHUNK)
    sums = torch.empty((parts, width), dtype=torch.float32, device=device)
    # As many as the narrowest pieces need; what wider ones leave over adds nothing.
    energies = torch.zeros((parts * triton.cdiv(width, min(DIFFERENCES)[0]),), dtype=torch.float32, device=device)
    launch(
        difference_kernel,
        [({"BLOCK": block, "TOGETHER": together, "STAGES": stages}, warps) for block, together, warps, stages in DIFFERENCES],
        lambda config: (parts, triton.cdiv(width, config["BLOCK"])),
        (width, x_ND.dtype),
        (x_ND, before_ND, out, sums, energies, rows, x_ND.stride(0), before_ND.stride(0)),
        {"width": width, "CHUNK": CHUNK},
        zeroed=("energies",),
    )
    return out, sums.sum(0, dtype=torch.float64), energies.sum(dtype=torch.float64)


def run(
    second_DD: torch.Tensor | None,
    cross_DE: torch.Tensor | None,
    x_ND: torch.Tensor,
    y_NE: torch.Tensor | None,
    mask_N: torch.Tensor | None = None,
    centres: Sequence[torch.Tensor] = (),
    config: Config | None = None,
) -> None:
    """Add the moments of rows in place; either sum may be missing. Masked rows are left out of x, which leaves them out of both sums."""
    x_ND = _prepared(x_ND, mask_N, centres[0] if centres else None)
    y_NE = x_ND if y_NE is None or cross_DE is None else _prepared(y_NE, mask_N, centres[1] if len(centres) > 1 else None)
    if interpreted() and x_ND.dtype == torch.bfloat16:  # whose products the interpreter gets wrong
        x_ND, y_NE = x_ND.float(), y_NE.float()
    (rows, width), other, device = x_ND.shape, y_NE.shape[1], x_ND.device
    if not rows:
        return
    config = config or config_for(x_ND, y_NE)
    pieces, starts = pieces_of(width, other, config, second_DD is not None, cross_DE is not None, processors(device), device)
    x, x_right, y = x_ND, x_ND, y_NE
    if config.copies:
        x, x_right, y = (_descriptor(t, config.k, side) for t, side in ((x_ND, config.m), (x_ND, config.n), (y_NE, config.n)))
    second, cross = (second_DD, cross_DE) if second_DD is not None else (cross_DE, cross_DE)
    cross = second if cross is None else cross  # a sum that is not there is never added to
    precision = "tf32x3" if x_ND.dtype == torch.float32 else "ieee"
    moments_kernel[(len(starts) - 1,)](
        x, x_right, y, second, cross, pieces, starts, rows, width, other, x_ND.stride(0), y_NE.stride(0),
        COPIES=config.copies, M=config.m, N=config.n, K=config.k, PRECISION=precision, PARTS=WHOLE,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def config_for(x_ND: torch.Tensor, y_NE: torch.Tensor) -> Config:
    """How rows of these tensors are multiplied."""
    major = torch.cuda.get_device_capability(x_ND.device)[0] if x_ND.is_cuda else 0
    if x_ND.dtype == torch.float32:
        return SINGLE if major == 9 else SMALL_SINGLE
    described = all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in (x_ND, y_NE))
    best = {9: HOPPER}.get(major, BLACKWELL if major > 9 else POINTERS)
    return best if described and min(x_ND.shape[1], y_NE.shape[1]) >= best.n else POINTERS


@cache
def pieces_of(
    width: int, other: int, config: Config, has_second: bool, has_cross: bool, at_once: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces of work, int32 (pieces, 5), and where each program's begin among them, (programs + 1,).

    As many tiles as fill all processors some times over are taken whole. What is left is dealt out evenly over the processors, along the rows.
    """
    m, n, down = config.m, config.n, -(-width // config.m)
    tiles = [(i, j, 0) for i in range(down) for j in range(-(-width // n)) if (j + 1) * n > i * m] if has_second else []
    tiles += [(i, j, 1) for i in range(down) for j in range(-(-other // n))] if has_cross else []
    tiles.sort(key=lambda t: (t[2], t[0] // GROUP, t[1], t[0]))
    whole = len(tiles) // at_once * at_once if config.shares else len(tiles)
    programs = [[(*tile, 0, WHOLE)] for tile in tiles[:whole]]
    left, dealt = tiles[whole:], 0
    for number in range(at_once if left else 0):
        end, mine = round((number + 1) * len(left) * WHOLE / at_once), []
        while dealt < end:
            tile, start = divmod(dealt, WHOLE)
            stop = min(WHOLE, start + end - dealt)
            mine.append((*left[tile], start, stop))
            dealt += stop - start
        programs.append(mine)
    starts = list(accumulate(map(len, programs), initial=0))
    pieces = [piece for program in programs for piece in program]
    return torch.tensor(pieces, dtype=torch.int32, device=device), torch.tensor(starts, dtype=torch.int32, device=device)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _prepared(x_ND: torch.Tensor, mask_N: torch.Tensor | None, centre_D: torch.Tensor | None) -> torch.Tensor:
    if x_ND.stride(-1) != 1:
        x_ND = x_ND.contiguous()
    if mask_N is None and centre_D is None:
        return x_ND
    rows, width = x_ND.shape
    out, block = torch.empty((rows, width), dtype=x_ND.dtype, device=x_ND.device), min(1024, triton.next_power_of_2(width))
    prepare_kernel[(rows, triton.cdiv(width, block))](
        x_ND, mask_N if mask_N is None else mask_N.bool().contiguous(), centre_D if centre_D is None else centre_D.float().contiguous(),
        out, x_ND.stride(0), width, HAS_MASK=mask_N is not None, HAS_CENTRE=centre_D is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def _descriptor(x: torch.Tensor, down: int, across: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [down, across])


Variant = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]
"""Name, kernel, signature, constants and options: what compiling one without a GPU takes."""


def variants() -> list[Variant]:
    """Every configuration that may be run; those of one generation of GPUs have it in their name."""
    halves = [
        (name, config, dtype)
        for name, config in (("hopper", HOPPER), ("blackwell", BLACKWELL), ("pointers", POINTERS))
        for dtype in ("bf16", "fp16")
    ]
    found = [_moments_variant(*row) for row in (*halves, ("hopper", SINGLE, "fp32"), ("small", SMALL_SINGLE, "fp32"))]
    for dtype in ("bf16", "fp16", "fp32"):
        rows = dict.fromkeys(("x", "before", "out"), f"*{dtype}") | dict.fromkeys(("sums", "energies"), "*fp32")
        signature = rows | dict.fromkeys(("rows", "stride_x", "stride_before"), "i32")
        for block, together, warps, stages in DIFFERENCES:
            constants: dict[str, Any] = {"width": 3072, "CHUNK": CHUNK, "BLOCK": block, "TOGETHER": together, "STAGES": stages}
            name = f"difference-{dtype}-{block}-{together}-{warps}-{stages}"
            found.append((name, difference_kernel, signature, constants, {"num_warps": warps}))
        signature = {"x": f"*{dtype}", "mask": "*i1", "centre": "*fp32", "out": f"*{dtype}", "stride": "i32", "width": "i32"}
        constants = {"HAS_MASK": True, "HAS_CENTRE": True, "BLOCK": 1024}
        found.append((f"prepare-{dtype}", prepare_kernel, signature, constants, {"num_warps": 4}))
    return found


def _moments_variant(name: str, config: Config, dtype: str) -> Variant:
    rows = [f"tensordesc<{dtype}[{config.k},{side}]>" if config.copies else f"*{dtype}" for side in (config.m, config.n, config.n)]
    signature = dict(zip(("x", "x_right", "y"), rows, strict=True)) | {
        "second": "*fp32",
        "cross": "*fp32",
        "pieces": "*i32",
        "starts": "*i32",
    }
    signature |= dict.fromkeys(("rows", "width_x", "width_y", "stride_x", "stride_y"), "i32")
    constants: dict[str, Any] = {"COPIES": config.copies, "M": config.m, "N": config.n, "K": config.k, "PARTS": WHOLE}
    constants["PRECISION"] = "tf32x3" if dtype == "fp32" else "ieee"
    return f"moments-{name}-{dtype}", moments_kernel, signature, constants, {"num_warps": config.warps, "num_stages": config.stages}
