"""What `ppclc export` takes of models that need not fit in memory.

    python -m benchmarks.large_export [--blocks 4 60] [--dtype bfloat16] [--out out/large_export]

Qwen-Image at its own widths, bfloat16: with few blocks of random numbers, with 60 (40.9 GB, the published model) of zeros in a sparse file. Each is
exported to ONNX in a process of its own, which is watched every 20 ms. peak_rss: its largest resident set, mapped files included; peak_anonymous:
memory of its own alone (RssAnon). before: the same of a process that has imported all that it needs. graph_bytes: of `model.onnx` without weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.results_file import write_results
from benchmarks.slicing import published, write_teacher
from ppclc import plugins
from ppclc.families import Family
from ppclc.loading.classes import model_outline

SPARSE_BEYOND = 8
IMPORTS = (
    "import ppclc.commands, torch.onnx, onnxscript.optimizer, diffusers.models.transformers.transformer_qwenimage, time; time.sleep(3)"
)


def write_sparse(folder: Path, family: Family, config: dict[str, Any]) -> None:
    """A checkpoint of zeros that takes no disk: a header, and a hole behind it."""
    model = model_outline(family, config).to(torch.bfloat16)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    described = {k: v for k, v in model.config.items() if not k.startswith("_")} | {"_class_name": family.class_name}
    (folder / "config.json").write_text(json.dumps(described), "utf-8")


def watched(command: list[str]) -> dict[str, float]:
    """Peaks and time of a process."""
    start, peak = time.perf_counter(), {"peak_rss": 0, "peak_anonymous": 0}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        handle = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text("utf-8")
                anonymous = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)
                peak["peak_rss"] = max(peak["peak_rss"], handle.memory_info().rss)
                peak["peak_anonymous"] = max(peak["peak_anonymous"], anonymous)
            except (OSError, psutil.Error):
                pass
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command}: exit code {process.returncode}")
    return {**peak, "seconds": time.perf_counter() - start}


def main() -> None:
    """Write the checkpoints, export each, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 60])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("out/large_export"))
    options = parser.parse_args()
    family: Family = plugins.load("families", "qwen_image")
    results: dict[str, Any] = {"before": watched([sys.executable, "-c", IMPORTS]), "models": {}}
    for blocks in options.blocks:
        home, made = options.out / f"model-{blocks}", options.out / f"onnx-{blocks}"
        for folder in (home, made):
            shutil.rmtree(folder, ignore_errors=True)
        config = published(family, blocks)
        if blocks > SPARSE_BEYOND:
            write_sparse(home / "transformer", family, config)
        else:
            write_teacher(home / "transformer", family, config)
        command = [sys.executable, "-m", "ppclc", "export", str(home), "-o", str(made), "--dtype", options.dtype]
        measured = watched(command)
        weights = sum(f.stat().st_size for f in (home / "transformer").glob("*.safetensors"))
        receipt = json.loads((made / "export.json").read_text("utf-8"))
        measured |= {
            "weight_bytes": weights,
            "graph_bytes": (made / "transformer" / "model.onnx").stat().st_size,
            "added_rss": measured["peak_rss"] - results["before"]["peak_rss"],
            "added_anonymous": measured["peak_anonymous"] - results["before"]["peak_anonymous"],
            "sparse": blocks > SPARSE_BEYOND,
            "phases": receipt["seconds"],
        }
        results["models"][str(blocks)] = measured
        print(blocks, {k: v for k, v in measured.items() if k != "phases"}, flush=True)
        for folder in (home, made):
            shutil.rmtree(folder, ignore_errors=True)
    print(write_results("large-export", results))


if __name__ == "__main__":
    main()
