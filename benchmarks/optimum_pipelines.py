"""Exports in the pipelines of optimum-onnx, which needs an environment of its own: do they draw what diffusers draws here?

    python -m venv optimum && optimum/bin/pip install torch "optimum-onnx[onnxruntime]==0.1.0" "transformers<4.58" "diffusers==0.36.0"
    python -m benchmarks.optimum_pipelines --python optimum/bin/python [--out out/optimum]

Tiny FLUX.1 and SD3 models, teacher and a student with every edit, are exported to ONNX here and laid into pipeline folders (`transformer/model.onnx` and
`config.json` as `ppclc export` wrote them). The other Python loads each with `ORTFluxPipeline` or `ORTStableDiffusion3Pipeline.from_pretrained(FOLDER)` and samples
two steps from given embeddings and noise; here diffusers does the same with the model itself. Latents are compared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file

from benchmarks.results_file import write_results
from ppclc.models import apply_plan
from ppclc.passes.export import export_model
from ppclc.plan import CompressionPlan
from tests.contracts.test_families import random_bank, subject_of

KINDS = {"flux": ("FluxPipeline", "ORTFluxPipeline"), "sd3": ("StableDiffusion3Pipeline", "ORTStableDiffusion3Pipeline")}
PARTS = {
    "flux": ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    "sd3": ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
}
CHILD = """
import json, sys, importlib.metadata, torch
from safetensors.torch import load_file, save_file
import optimum.onnxruntime as ort
folder, kind, given, out = sys.argv[1:5]
pipeline = getattr(ort, kind).from_pretrained(folder)
pipeline.set_progress_bar_config(disable=True)
tensors = load_file(given)
more = json.loads(sys.argv[5])
latents = pipeline(**tensors, **more, output_type="latent").images
save_file({"latents": latents.contiguous()}, out)
print(json.dumps({n: importlib.metadata.version(n) for n in ("optimum-onnx", "optimum", "transformers", "diffusers", "onnxruntime", "torch")}))
"""


def model_of(name: str, role: str) -> tuple[Any, Any]:
    """A family and its tiny teacher, or a student with every edit."""
    subject = subject_of(name)
    if role == "teacher":
        return subject.family, subject.model
    cut = [(3, 4)] if name == "sd3" else [(0, 1)]
    plan = CompressionPlan.of(name, subject.length, cut, [2], 4, subject.family.has_dead_code, [(0, "image"), (0, "text")])
    return subject.family, apply_plan(subject.model, plan, random_bank(subject, plan))


def inputs_of(name: str, config: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What both pipelines are given: embeddings and noise, and the rest."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        "prompt_embeds": torch.randn(1, 7, config.joint_attention_dim, generator=g),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, generator=g),
    }
    if name == "flux":
        tensors["latents"] = torch.randn(1, 8, config.in_channels, generator=g)
    else:
        tensors["latents"] = torch.randn(1, config.in_channels, 4, 8, generator=g)
    return tensors, {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.5 if name == "flux" else 0.0}


def main() -> None:
    """Export, sample on both sides, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of the environment with optimum-onnx")
    parser.add_argument("--out", type=Path, default=Path("out/optimum"))
    options = parser.parse_args()
    results: dict[str, Any] = {"rows": []}
    for name, (kind, theirs) in KINDS.items():
        for role in ("teacher", "student"):
            family, model = model_of(name, role)
            folder = options.out / f"{name}-{role}"
            shutil.rmtree(folder, ignore_errors=True)
            export = export_model(model, family, "onnx", "float32", folder / "export", "-")
            shutil.move(folder / "export" / "transformer", folder / "transformer")
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
            scheduler.save_pretrained(folder / "scheduler")
            index = {"_class_name": kind, "_diffusers_version": diffusers.__version__, **{part: [None, None] for part in PARTS[name]}}
            index |= {"scheduler": ["diffusers", type(scheduler).__name__], "transformer": ["diffusers", family.class_name]}
            (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
            tensors, more = inputs_of(name, model.config)
            save_file(tensors, folder / "given.safetensors")
            parts = dict.fromkeys(PARTS[name]) | {"scheduler": scheduler, "transformer": model}
            pipeline = getattr(diffusers, kind)(**parts)
            pipeline.set_progress_bar_config(disable=True)
            wanted = pipeline(**tensors, **more, output_type="latent").images
            command = [
                str(options.python),
                "-c",
                CHILD,
                str(folder),
                theirs,
                str(folder / "given.safetensors"),
                str(folder / "got.safetensors"),
            ]
            done = subprocess.run([*command, json.dumps(more)], capture_output=True, text=True, check=False)
            row: dict[str, Any] = {"family": name, "role": role, "pipeline": theirs, "exit_code": done.returncode}
            if done.returncode == 0:
                got = load_file(folder / "got.safetensors")["latents"]
                row |= {
                    "max_abs": (got - wanted).abs().max().item(),
                    "scale": wanted.abs().max().item(),
                    "parity": export.parity.model_dump(),
                }
                results["environment"] = json.loads(done.stdout.splitlines()[-1])
            else:
                row["error"] = done.stderr.strip().splitlines()[-1]
            print(row, flush=True)
            results["rows"].append(row)
    print(write_results("optimum-pipelines", results))


if __name__ == "__main__":
    main()
