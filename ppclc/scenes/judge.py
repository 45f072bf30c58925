"""The judge: a small classifier of digits and colours, trained on real digits, and what it measures.

It never sees the teacher. A crop is one of ten digits or none of them, and has one of six colours;
a scene is right when every crop that its prompt names has the digit and the colour named there.

Shape suffixes: B batch, C channel, H height, W width, F feature.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from ppclc.scenes.data import COLOURS, NUMBERS, Scenes, Split, digits, draw_scenes, random_scenes

WEIGHTS = Path(__file__).parent / "weights" / "judge.safetensors"
NO_DIGIT = len(NUMBERS)
FEATURES = 64


class Judge(nn.Module):
    """Digit logits (B, 11), colour logits (B, 6) and features (B, 64) of crops (B, 3, 8, 8) in -1..1."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, FEATURES),
            nn.GELU(),
        )
        self.digit = nn.Linear(FEATURES, NO_DIGIT + 1)
        self.colour = nn.Linear(FEATURES, len(COLOURS))

    def forward(self, crops_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        features = self.body(crops_BCHW)
        return self.digit(features), self.colour(features), features


@cache
def load_judge() -> Judge:
    """The shipped judge, in evaluation mode."""
    judge = Judge()
    judge.load_state_dict(load_file(WEIGHTS))
    return judge.eval().requires_grad_(False)


def crops(images_BCHW: torch.Tensor, scenes: Scenes) -> tuple[torch.Tensor, torch.Tensor]:
    """The two crops (B, 2, 3, 8, 8) that each prompt speaks of, and which of them it names (B, 2).

    A single digit stands in the middle; its second crop is a repetition that counts for nothing.
    """
    left, middle, right = (images_BCHW[..., c : c + 8] for c in (0, 4, 8))
    single = (scenes.numbers_B2[:, 1] < 0)[:, None, None, None]
    return torch.stack([torch.where(single, middle, left), torch.where(single, middle, right)], 1), scenes.numbers_B2 >= 0


@torch.no_grad()
def scenes_right(judge: Judge, images_BCHW: torch.Tensor, scenes: Scenes) -> torch.Tensor:
    """Whether each scene shows what its prompt says, (B,) bool."""
    pictures, named = crops(images_BCHW, scenes)
    digit, colour, _ = judge(pictures.flatten(0, 1))
    right = (digit.argmax(-1).view(-1, 2) == scenes.numbers_B2) & (colour.argmax(-1).view(-1, 2) == scenes.colours_B2)
    every: torch.Tensor = (right | ~named).all(1)
    return every


@torch.no_grad()
def scene_features(judge: Judge, images_BCHW: torch.Tensor) -> torch.Tensor:
    """Features (B, 128) of whole scenes: those of the left half beside those of the right."""
    return torch.cat([judge(images_BCHW[..., :8])[2], judge(images_BCHW[..., 8:])[2]], 1)


def frechet_distance(a_BF: torch.Tensor, b_BF: torch.Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, in float64.

    The trace of the square root comes from the singular values of the product of square roots, so
    that no complex number arises. Source: arXiv 1706.08500, equation 6.
    """
    moments = []
    for features in (a_BF, b_BF):
        x = features.double().numpy()
        moments.append((x.mean(0), np.cov(x, rowvar=False)))
    (mean_a, cov_a), (mean_b, cov_b) = moments
    cross = np.linalg.svd(_square_root(cov_a) @ _square_root(cov_b), compute_uv=False).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _square_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    root: np.ndarray = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return root


def warp(images_BCHW: torch.Tensor, generator: torch.Generator, strength: float) -> torch.Tensor:
    """Images turned, scaled and moved a little at random: at strength 1 by up to 12 degrees, 10 %, 0.7 pixels.

    Images are in 0..1 on black; bicubic, clamped.
    """
    b, _, height, width = images_BCHW.shape
    u = (torch.rand(b, 4, generator=generator) * 2 - 1) * strength
    angle, scale = u[:, 0] * 0.21, 1 + u[:, 1] * 0.1
    matrix = torch.stack(
        [
            torch.stack([torch.cos(angle) / scale, -torch.sin(angle) / scale, u[:, 2] * 1.4 / width], 1),
            torch.stack([torch.sin(angle) / scale, torch.cos(angle) / scale, u[:, 3] * 1.4 / height], 1),
        ],
        1,
    )
    grid = functional.affine_grid(matrix, list(images_BCHW.shape), align_corners=False)
    return functional.grid_sample(images_BCHW, grid, mode="bicubic", align_corners=False).clamp(0, 1)


def train_judge(steps: int = 3000, seed: int = 0) -> Judge:
    """A judge trained on the training split alone: warped digits, contrast, slight noise, and crops that hold none."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    judge = Judge().train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        pictures, numbers, colours = _judge_batch(generator)
        digit, colour, _ = judge(pictures)
        known = numbers != NO_DIGIT
        loss = functional.cross_entropy(digit, numbers, label_smoothing=0.05)
        loss = loss + functional.cross_entropy(colour[known], colours[known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval().requires_grad_(False)


def _judge_batch(generator: torch.Generator, size: int = 192) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pictures, labels = digits("train")
    rows = torch.randint(len(labels), (size,), generator=generator)
    colours = torch.randint(len(COLOURS), (size,), generator=generator)
    palette = torch.tensor(list(COLOURS.values()))
    crop = pictures[rows][:, None] * palette[colours][:, :, None, None]
    crop = warp(crop, generator, 1.0) * (0.8 + 0.3 * torch.rand(size, 1, 1, 1, generator=generator))
    # Crops that hold no digit: the seam between two digits, and black.
    seams = (draw_scenes(random_scenes(size // 8, generator), "train", generator) + 1) / 2
    two = seams[..., :4].flatten(1).amax(1) > 0.1
    none = torch.cat([seams[two][..., 4:12], torch.zeros(4, 3, 8, 8)])
    crop = torch.cat([crop, none])
    crop = crop + 0.05 * torch.randn(crop.shape, generator=generator)
    numbers = torch.cat([labels[rows], torch.full((len(none),), NO_DIGIT)])
    return crop * 2 - 1, numbers, torch.cat([colours, torch.zeros(len(none), dtype=torch.int64)])


@torch.no_grad()
def held_out_accuracy(judge: Judge, split: Split = "judge") -> dict[str, float]:
    """Share of real held-out digits whose number, and whose colour, the judge reads rightly (six colours each)."""
    pictures, labels = digits(split)
    number = colour = 0.0
    for i, rgb in enumerate(COLOURS.values()):
        digit, tint, _ = judge(pictures[:, None] * torch.tensor(rgb)[:, None, None] * 2 - 1)
        number += (digit.argmax(-1) == labels).float().mean().item() / len(COLOURS)
        colour += (tint.argmax(-1) == i).float().mean().item() / len(COLOURS)
    return {"digit": number, "colour": colour}


def save_judge(judge: Judge, path: Path = WEIGHTS) -> None:
    """Write the judge's weights as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), path)
