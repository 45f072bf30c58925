"""Every back end over the families with all edits: how far what it writes is from eager, and what TensorRT-RTX makes of it.

    python -m benchmarks.backends [--families qwen_image flux flux2 sd3]

The models of `tests/contracts/test_backends.py`: teacher, depth, width, modulation, and a student with all edits. ONNX in float32, bfloat16 and float16
in ONNX Runtime against eager in the same dtype, the worst over the family's sizes and, in 16 bits, loud channels; engines of the bfloat16 graph by TensorRT-RTX,
without a GPU. `speed`: of the float32 ONNX model over the teacher's, and the ratio of their operations, for sixteen samples.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.results_file import write_results
from ppclc import plugins
from ppclc.benching.roofline import work_of
from ppclc.benching.targets import session_target
from ppclc.passes.bench import run_bench
from tests.contracts.test_backends import ROLES, SMALL, in_dtype, lower

SIZE = {"batch": 4, "height": 16, "width": 16, "text": 64}
RUNS = 40


def main() -> None:
    """Export all, compare, time, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(SMALL))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, speeds = [], []
    for family in options.families:
        front = plugins.load("families", family)
        with tempfile.TemporaryDirectory() as home:
            targets, flops = [], {}
            inputs: Any = None
            for role in (*ROLES, "all"):
                row: dict[str, Any] = {"family": family, "role": role}
                for dtype in ("float32", "bfloat16", "float16"):
                    folder = Path(home) / f"{role}-{dtype}"
                    export = lower(family, role, dtype, "onnx", folder)
                    assert export.parity is not None
                    row[dtype] = export.parity.model_dump()
                graph = str(Path(home) / f"{role}-bfloat16")
                engine = lower(family, role, "bfloat16", "tensorrt", Path(home) / f"{role}-engine", graph=graph, library="tensorrt_rtx")
                kept = ("attention_fused", "attention_total", "float32_products", "build_peak_bytes", "library", "library_version")
                row["tensorrt"] = {k: engine.options[k] for k in kept} | {"build_s": engine.seconds["build"], "bytes": engine.bytes}
                model = in_dtype(family, role, "float32")
                lowered = front.lowered(model)
                inputs = lowered.inputs(**SIZE) if inputs is None else inputs
                targets.append(session_target(role, "onnxruntime", Path(home) / f"{role}-float32", lowered, "cpu", None))
                config = {"_class_name": type(model).__name__, **model.config}
                flops[role] = work_of(front, config, inputs, torch.float32).flops
                print(row, flush=True)
                rows.append(row)
            timed = run_bench(targets, inputs, SIZE, RUNS, "cpu", "float32")
            p50 = {r.target: r.p50_ms for r in timed.rows}
            for role in ("depth", "width", "modulation"):
                speed = {"speed": p50["teacher"] / p50[role], "operations": flops["teacher"] / flops[role]}
                speeds.append({"family": family, "role": role, **speed})
                print(speeds[-1], flush=True)
    print(write_results("backends", {"rows": rows, "speeds": speeds, "size": SIZE, "runs": RUNS}))


if __name__ == "__main__":
    main()
