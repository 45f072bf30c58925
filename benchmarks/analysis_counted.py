"""What the analysis asks of a GPU beside the teacher's forwards, counted where there is none.

    python -m benchmarks.analysis_counted [--free-gb 30]

Qwen-Image at its own width, bfloat16, samples of 1328 x 1328 pixels with 512 text tokens, as many of them together as `calibrate` takes: its
`Calibration`, as it is, on tensors that have shapes and no values. What 24 blocks take beyond 12 is a block's share, the window of far moments
being full by then. Each operator reads, writes and multiplies so much; at rates that were measured on an H100
(benchmarks/results/2026-11-26-nvidia-h100-80gb-hbm3-2.json) that takes at least so long. A block's forward is taken as measured there.

A count is no measurement: it knows nothing of caches, of a host that is late with launches, or of what a kernel does badly.
to_host: what is read back, and so waited for, while samples pass, and what is brought to the CPU beside them.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.fake_cuda import Calls, Counted, fake_cuda, fake_sample, put
from benchmarks.results_file import write_results
from ppclc.analysis.moments import Moments
from ppclc.costs.blocks import width_of
from ppclc.data.samples import Sample
from ppclc.loading.classes import empty_model
from ppclc.loading.published import published_config
from ppclc.passes.calibrate import CalibrateSettings, Calibration, Piece, by_timestep, far_every
from ppclc.teachers import ResidentTeacher

BLOCKS = (12, 24)
HEIGHT, WIDTH, TEXT = 83, 83, 512
BYTES_PER_S = 3.02e12
FLOP_PER_S = {torch.bfloat16: 668e12, torch.float32: 50e12, torch.float64: 50e12}
"""bfloat16: of the moments' kernel as measured, 212 GFLOP in 318 us. The others: three quarters of the data sheet's 67, without tensor cores."""
LEAST_S = 2e-6
"""Of any operator, however small."""
TO_HOST_PER_S = 5e9
"""Bytes brought to the CPU and added up there, which a thread does beside the GPU. A guess: a PCIe 5 bus moves ten times as much."""
FORWARD_S = 4.53e-3
"""Of a block and a sample, with kernels."""


def seconds(calls: Calls) -> float:
    """The least that operators take: by bytes, by products, by their number, whichever is longest."""
    products = sum(n / FLOP_PER_S[dtype] for dtype, n in calls.flops.items())
    return max(calls.nbytes / BYTES_PER_S, products, calls.count * LEAST_S)


def teacher_of(blocks: int) -> ResidentTeacher:
    """A teacher without memory."""
    family, config = published_config("Qwen/Qwen-Image")
    config = config | {"num_layers": blocks}
    model = empty_model(family, config, "Qwen-Image").eval().requires_grad_(False)
    return ResidentTeacher(model, family)


def drawn(samples: int) -> Sample:
    """Noise, on the CPU."""
    family, config = published_config("Qwen/Qwen-Image")
    given = family.example_inputs(config, samples, HEIGHT, WIDTH, TEXT, torch.Generator().manual_seed(0))
    return by_timestep((given.pop("hidden_states"), given.pop("timestep"), given))


def counted(blocks: int, free_bytes: int) -> dict[str, Any]:
    """Operators of forwards, near moments and far ones for a teacher of so many blocks, and how many samples pass together."""
    settings, samples, teacher = CalibrateSettings(), drawn(64), teacher_of(blocks)
    with fake_cuda(free_bytes):
        put(teacher, torch.bfloat16)
        part = teacher.parts(fake_sample(samples))[0]
        near, far = (Piece(part, 0, is_far) for is_far in (False, True))

        def summed(*pieces: Piece) -> Counted:
            made = Calibration(teacher, settings.longest, Moments(), len(pieces), lambda *_: None, settings.tokens)
            found = Counted()
            with found:
                made.add(pieces)
                made.moments.copies.wait()
            return found

        with Counted() as forwards:
            for _, sweep in teacher.sweep([part], range(blocks + 1)):
                sweep.states.clear()
        made = Calibration(teacher, settings.longest, Moments(), 1, lambda *_: None, settings.tokens)
        together = made.far_together(far)
        found = {"near": summed(near).less(forwards), "far": summed(*[far] * together).less(forwards, together)}
        return {"samples": len(near), "together": together, **found}


def main() -> None:
    """Count and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--free-gb", type=float, default=39, help="of the GPU's memory, what 41 GB of weights leave of 80")
    free = int(parser.parse_args().free_gb * 1e9)
    few, many = (counted(blocks, free) for blocks in BLOCKS)
    samples, together, more = many["samples"], many["together"], BLOCKS[1] - BLOCKS[0]
    every = far_every(CalibrateSettings().samples)
    rows: dict[str, Any] = {"forward_ms_a_block_and_sample": 1e3 * FORWARD_S, "samples_a_piece": samples, "far_pieces_together": together}
    for kind in ("near", "far"):
        of = more * samples * (together if kind == "far" else 1)
        calls = many[kind].less(few[kind])
        by_name: dict[str, Calls] = {}
        for (name, _), c in calls.calls.items():
            by_name.setdefault(name, Calls()).add(c)
        brought = (sum(n for _, n in many[kind].to_host) - sum(n for _, n in few[kind].to_host)) / of
        rows[kind] = {
            "ms_a_block_and_sample": 1e3 * sum(map(seconds, calls.calls.values())) / of,
            "operators": {
                name: {"count": c.count / of, "gbytes": c.nbytes / of / 1e9, "gflop": sum(c.flops.values()) / of / 1e9}
                for name, c in by_name.items()
                if c.count
            },
            "to_host_bytes": brought,
            "to_host_ms": 1e3 * brought / TO_HOST_PER_S,
        }
    near, far = rows["near"]["ms_a_block_and_sample"] / 1e3, rows["far"]["ms_a_block_and_sample"] / 1e3
    rows |= {
        "far_every": every,
        "near_share_of_forward": near / FORWARD_S,
        "analysis_share_of_forward": (near + (far - near) / every) / FORWARD_S,
        "waits_of_a_piece": len(many["near"].to_host),
        "sums_on_the_device_bytes": 4 * 2 * (2 * 60 + 1) * width_of(published_config("Qwen/Qwen-Image")[1]) ** 2,
    }
    print(
        write_results(
            "analysis-counted", {"rates": {"bytes_per_s": BYTES_PER_S, "bfloat16_flop_per_s": FLOP_PER_S[torch.bfloat16]}, **rows}
        )
    )
    print(f"near {100 * rows['near_share_of_forward']:.1f} %, with far {100 * rows['analysis_share_of_forward']:.1f} % of the forwards")


if __name__ == "__main__":
    main()
