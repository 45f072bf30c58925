"""Scenes of coloured digits with prompts: the data of the embedded teacher.

Digits are the test half of the UCI "Optical Recognition of Handwritten Digits" set (Alpaydin and
Kaynak, 1998, CC BY 4.0), 1,797 grey images of 8x8, as scikit-learn ships them (`load_digits`).
They are split once, by a fixed seed, into three parts that never mix: `train` for weights,
`choose` for analysis and tuning, `judge` for the figures that are reported.

Shape suffixes: B batch, H height, W width, C channel, S image token, T text slot, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch

Split = Literal["train", "choose", "judge"]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "cyan": (0.0, 1.0, 1.0),
    "magenta": (1.0, 0.0, 1.0),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (*COLOURS, *NUMBERS, "and")

HEIGHT, WIDTH, CHANNELS, PATCH = 8, 16, 3, 2
GRID = (HEIGHT // PATCH, WIDTH // PATCH)
TOKENS, TOKEN_CHANNELS = GRID[0] * GRID[1], CHANNELS * PATCH * PATCH
SLOTS, EMBEDDING = 5, 32

SPLIT_SIZES: dict[Split, int] = {"train": 1197, "choose": 300, "judge": 300}
SINGLE_SHARE = 0.25
"""Share of scenes that hold one digit; the others hold two."""


@dataclass(frozen=True)
class Scenes:
    """A batch of prompts, as indices; an absent second digit is -1 in both of its columns.

    `colours_B2` and `numbers_B2` are int64. `names()` spells them out.
    """

    colours_B2: torch.Tensor
    numbers_B2: torch.Tensor

    def __len__(self) -> int:
        return len(self.numbers_B2)

    def __getitem__(self, rows: slice) -> Scenes:
        return Scenes(self.colours_B2[rows], self.numbers_B2[rows])

    def names(self) -> list[str]:
        """The prompts in words, e.g. `red seven and blue three`."""
        return [" and ".join(_phrases(c, n)) for c, n in zip(self.colours_B2.tolist(), self.numbers_B2.tolist(), strict=True)]


def _phrases(colours: list[int], numbers: list[int]) -> list[str]:
    palette = list(COLOURS)
    return [f"{palette[c]} {NUMBERS[n]}" for c, n in zip(colours, numbers, strict=True) if n >= 0]


@cache
def digits(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 8, 8) float32 in 0..1 and labels (N,) int64 of one split."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(20251116).permutation(len(labels))
    start = 0
    for name, size in SPLIT_SIZES.items():
        rows = order[start : start + size]
        start += size
        if name == split:
            pictures = torch.tensor(images[rows], dtype=torch.float32).reshape(-1, 8, 8) / 16
            return pictures, torch.tensor(labels[rows], dtype=torch.int64)
    raise ValueError(f"split = {split!r}: wanted one of {', '.join(SPLIT_SIZES)}")


def random_scenes(count: int, generator: torch.Generator) -> Scenes:
    """`count` prompts drawn uniformly over colours and numbers, one in four with a single digit."""
    colours = torch.randint(len(COLOURS), (count, 2), generator=generator)
    numbers = torch.randint(len(NUMBERS), (count, 2), generator=generator)
    single = torch.rand(count, generator=generator) < SINGLE_SHARE
    colours[single, 1] = -1
    numbers[single, 1] = -1
    return Scenes(colours, numbers)


def parse_prompt(text: str) -> Scenes:
    """The scene of one prompt in words. Raises ValueError for what the teacher has no words for."""
    palette = list(COLOURS)
    phrases = [phrase.split() for phrase in text.strip().lower().split(" and ")]
    if not 1 <= len(phrases) <= 2 or any(len(p) != 2 or p[0] not in palette or p[1] not in NUMBERS for p in phrases):
        raise ValueError(f"prompt {text!r}: wanted 'COLOUR NUMBER' or 'COLOUR NUMBER and COLOUR NUMBER', colours {', '.join(palette)}")
    colours = [palette.index(p[0]) for p in phrases] + [-1] * (2 - len(phrases))
    numbers = [NUMBERS.index(p[1]) for p in phrases] + [-1] * (2 - len(phrases))
    return Scenes(torch.tensor([colours]), torch.tensor([numbers]))


def draw_scenes(scenes: Scenes, split: Split, generator: torch.Generator) -> torch.Tensor:
    """Real images of the scenes, (B, 3, 8, 16) float32 in -1..1, with digits drawn from `split`."""
    pictures, labels = digits(split)
    rows_by_number = [torch.nonzero(labels == n).flatten() for n in range(10)]
    palette = torch.tensor(list(COLOURS.values()))
    canvas = torch.zeros(len(scenes), CHANNELS, HEIGHT, WIDTH)
    pick = torch.rand(len(scenes), 2, generator=generator)
    single = scenes.numbers_B2[:, 1] < 0
    for side in range(2):
        for number, rows in enumerate(rows_by_number):
            mine = torch.nonzero(scenes.numbers_B2[:, side] == number).flatten()
            chosen = pictures[rows[(pick[mine, side] * len(rows)).long()]]
            coloured = chosen[:, None] * palette[scenes.colours_B2[mine, side]][:, :, None, None]
            for column in (0, 4, 8):
                here = single[mine] if column == 4 else ~single[mine] & (side * 8 == column)
                canvas[mine[here], :, :, column : column + 8] = coloured[here]
    return canvas * 2 - 1


@cache
def _vocabulary() -> tuple[torch.Tensor, torch.Tensor]:
    """Word vectors (17, 32) and position vectors (5, 32), fixed by a seed."""
    generator = torch.Generator().manual_seed(7)
    words = torch.randn(len(WORDS), EMBEDDING, generator=generator)
    return words, torch.randn(SLOTS, EMBEDDING, generator=generator)


def embed_prompts(scenes: Scenes) -> torch.Tensor:
    """Prompt embeddings (B, 5, 32) float32: word vector plus position vector, zero in empty slots."""
    words, positions = _vocabulary()
    ids = torch.full((len(scenes), SLOTS), -1)
    ids[:, 0], ids[:, 1] = scenes.colours_B2[:, 0], len(COLOURS) + scenes.numbers_B2[:, 0]
    both = scenes.numbers_B2[:, 1] >= 0
    ids[both, 2] = len(WORDS) - 1
    ids[both, 3], ids[both, 4] = scenes.colours_B2[both, 1], len(COLOURS) + scenes.numbers_B2[both, 1]
    return torch.where(ids[..., None] >= 0, words[ids.clamp(min=0)] + positions, torch.zeros(()))


def patchify(images_BCHW: torch.Tensor) -> torch.Tensor:
    """Tokens (B, 32, 12) of images (B, 3, 8, 16): 2x2 patches, channel first within a token."""
    b = len(images_BCHW)
    x = images_BCHW.reshape(b, CHANNELS, GRID[0], PATCH, GRID[1], PATCH)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, TOKENS, TOKEN_CHANNELS)


def unpatchify(tokens_BSC: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, 8, 16) of tokens (B, 32, 12); the inverse of `patchify`."""
    b = len(tokens_BSC)
    x = tokens_BSC.reshape(b, GRID[0], GRID[1], CHANNELS, PATCH, PATCH)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, CHANNELS, HEIGHT, WIDTH)
