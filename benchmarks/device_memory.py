"""What a run takes of a GPU's memory, counted where there is none, beside what it reckons with.

    python -m benchmarks.device_memory [--side 32] [--batch 4]

Three blocks of Qwen-Image at their own width with random weights, in bfloat16, on an emulated GPU: memory is counted there as a GPU's
allocator would count it, without what it keeps for later and what operators take for themselves. A forward of the verdict, and two local
steps of an interval, the second with the optimizer's moments. states: in multiples of a batch's state, all tokens of both streams.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import emulated_cuda
from benchmarks.results_file import write_results
from ppclc.costs.blocks import width_of
from ppclc.data.samples import STATES as FORWARD_STATES
from ppclc.data.samples import Sample, Share, moved
from ppclc.loading.classes import model_class
from ppclc.loading.published import published_config
from ppclc.loading.sources import Source
from ppclc.passes import verify
from ppclc.passes.distill import STATES, DistillSettings, distill_edits, training_bytes
from ppclc.plan import CompressionPlan
from ppclc.teachers import ResidentTeacher
from ppclc.training.local_edits import Teaching, interval_edit

BLOCKS, TEXT, BYTES = 3, 256, 2
MEMORY = 64 * 2**30


@dataclass
class Noise:
    """Samples of one size, as `ppclc.data.samples.Samples` gives them."""

    source: Source
    side: int

    @property
    def tokens(self) -> int:
        """Of both streams."""
        return self.side**2 + TEXT

    def draw(self, count: int, generator: torch.Generator, _: Share | None = None) -> Sample:
        """So many samples."""
        given = self.source.family.example_inputs(self.source.config, count, self.side, self.side, TEXT, generator)
        return given.pop("hidden_states"), given.pop("timestep"), given


def random_model(source: Source) -> Any:
    """A model with small random weights, on the CPU in bfloat16."""
    small = lambda weight, **_: weight.data.normal_(0, 0.02)  # noqa: E731
    torch.set_default_dtype(torch.bfloat16)
    try:
        with mock.patch("torch.nn.init.kaiming_uniform_", small):
            model = model_class(source.family, source.config).from_config(source.config)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


@contextmanager
def peaks(device: emulated_cuda.Device) -> Iterator[list[dict[str, int]]]:
    """Of every backward in the block: bytes held before it, and the peaks until then and in it, over what was held at the start."""
    found: list[dict[str, int]] = []
    before, backward = device.held(), torch.Tensor.backward

    def watched(loss: torch.Tensor, *args: Any, **more: Any) -> None:
        row = {"held": device.held() - before, "forward": device.peak() - before}
        device.reset_peak()
        backward(loss, *args, **more)
        found.append(row | {"backward": device.peak() - before})
        device.reset_peak()

    device.reset_peak()
    with mock.patch.object(torch.Tensor, "backward", watched):
        yield found


def main() -> None:
    """Count and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32, help="tokens along an image's side")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    device = emulated_cuda.start()
    device.limit(MEMORY)
    family, config = published_config("Qwen/Qwen-Image")
    source = Source("Qwen/Qwen-Image", Path(), config | {"num_layers": BLOCKS}, family)
    teacher = ResidentTeacher(random_model(source).to("cuda"), family)
    samples, settings = Noise(source, args.side), DistillSettings(steps=2, local_batch=args.batch)
    state = samples.tokens * args.batch * width_of(source.config) * BYTES

    drawn = moved(samples.draw(args.batch, torch.Generator().manual_seed(0)), "cuda")
    device.reset_peak()
    before = device.held()
    verify.answers(teacher.model, [drawn], None, drawn[2], 1, "cuda", source)
    rows: dict[str, Any] = {"state_bytes": state, "forward": {"states": (device.peak() - before) / state, "reckoned": FORWARD_STATES}}
    print(rows)

    plan = CompressionPlan.of(family.name, BLOCKS, [(0, 1)], text_stream=[], ffn=[], dead_code=False)
    teaching = Teaching(family, source.config, teacher.block_tensors)
    edit = interval_edit(teaching, plan, plan.intervals[0], lambda: dict(teacher.block_tensors(0)), settings.weights)
    parameters = sum(p.numel() for p in edit.build().parameters())
    with peaks(device) as found, tempfile.TemporaryDirectory() as work:
        list(distill_edits(teacher, [edit], 2, samples, settings, lambda *_: None, [Path(work)], device="cuda"))  # type: ignore[arg-type]
    held = {0: 4, 1: 12}  # weights in float32, and moments from the first step's end; a copy in 16 bits is made in each forward
    rows["training"] = [
        {
            "forward_states": (row["forward"] - (held[step] + 2) * parameters) / state,
            "peak_bytes_a_parameter": max(row["forward"], row["backward"]) / parameters,
            "peak_bytes": max(row["forward"], row["backward"]),
            "reckoned_bytes": training_bytes(edit.build(), settings) + STATES * state,
            "reckoned_states": STATES,
        }
        for step, row in enumerate(found)
    ]
    print(rows)
    print(write_results("device-memory", {"tokens": samples.tokens, "batch": args.batch, "parameters": parameters, **rows}))


if __name__ == "__main__":
    main()
