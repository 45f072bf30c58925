"""Training of the embedded teacher and of its judge: `python -m ppclc.scenes.train` (`make teacher`).

The teacher learns rectified flow on scenes of the training split: logit-normal timesteps, half of
the digits slightly warped so that 1,197 of them are not learnt by heart, one prompt in ten dropped,
AdamW under a cosine to zero, exponential moving average of the weights. What is written is the
average; every line of the log says how it does on the split of choices.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional

from ppclc.data import flow
from ppclc.scenes import data, judge
from ppclc.scenes.task import PLUGIN, conditioning

CONFIG: dict[str, Any] = {
    "patch_size": data.PATCH,
    "in_channels": data.TOKEN_CHANNELS,
    "out_channels": data.CHANNELS,
    "num_layers": 12,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": data.EMBEDDING,
    "axes_dims_rope": (4, 6, 6),
}


def flow_loss(model: Any, tokens: torch.Tensor, prompts: flow.Conditioning, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the velocity at logit-normal timesteps."""
    t = flow.logit_normal_timesteps(len(tokens), generator)
    noise = torch.randn(tokens.shape, generator=generator)
    velocity = flow.predict(model, flow.interpolate(tokens, noise, t), t, prompts)
    return functional.mse_loss(velocity, noise - tokens)


@torch.no_grad()
def assess(model: Any, split: data.Split, count: int, seed: int) -> dict[str, float]:
    """Held-out flow-matching loss and scene accuracy at guidance 1 on one split."""
    generator = torch.Generator().manual_seed(seed)
    scenes = data.random_scenes(count, generator)
    tokens = data.patchify(data.draw_scenes(scenes, split, generator))
    prompts = conditioning(data.embed_prompts(scenes))
    loss = sum(flow_loss(model, tokens, prompts, generator).item() for _ in range(4)) / 4
    noise = torch.randn(tokens.shape, generator=generator)
    images = data.unpatchify(flow.sample(model, noise, prompts, {}, 1, 10))
    right = judge.scenes_right(judge.load_judge(), images, scenes).float().mean().item()
    return {"flow_loss": loss, "scene_accuracy_g1": right}


def train_teacher(
    steps: int, batch: int, learning_rate: float, seed: int, out: Path, start_from: Path | None = None, stop_after: int | None = None
) -> None:
    """Train and write the averaged weights to `out/transformer` at every assessment; from weights, or from nothing.

    `steps` sets the cosine; with `stop_after` training ends on its way.
    """
    from diffusers import QwenImageTransformer2DModel
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = QwenImageTransformer2DModel(**CONFIG)
    if start_from:
        model.load_state_dict(load_file(start_from / "transformer" / "diffusion_pytorch_model.safetensors"))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    warmup = 300
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, i / steps)))
    )
    start, losses = time.perf_counter(), []
    with (out / "training.jsonl").open("w") as log:
        last = min(steps, stop_after or steps)
        for step in range(1, last + 1):
            loss = flow_loss(model, *PLUGIN.batch(batch, generator, "train"), generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            losses.append(loss.item())
            if step % 500 == 0 or step == last:
                averaged: Any = average.module
                averaged.save_pretrained(out / "transformer")
                row = {"step": step, "seconds": round(time.perf_counter() - start), "loss": sum(losses) / len(losses)}
                row |= assess(averaged, "choose", 1024, 1)
                losses = []
                print(json.dumps(row), file=log, flush=True)
                print(json.dumps(row), flush=True)


def main() -> None:
    """Train the judge, then the teacher, into the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=11000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PLUGIN.model_folder)
    parser.add_argument("--start-from", type=Path, help="go on from the weights in this folder, with a schedule of its own")
    parser.add_argument("--stop-after", type=int, help="end at this step of the schedule")
    parser.add_argument("--keep-judge", action="store_true", help="train the teacher alone, with the judge that is there")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.keep_judge:
        trained = judge.train_judge()
        judge.save_judge(trained)
        print("judge, held-out digits:", json.dumps(judge.held_out_accuracy(trained)), flush=True)
    train_teacher(options.steps, options.batch, options.learning_rate, options.seed, options.out, options.start_from, options.stop_after)


if __name__ == "__main__":
    main()
