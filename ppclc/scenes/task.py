"""The task of the embedded teacher: what it is calibrated on, and how its scenes are judged."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ppclc.data import flow
from ppclc.machine.devices import cores
from ppclc.quality import MeasureSettings, paired_quality
from ppclc.records import Quality
from ppclc.scenes import data, judge

WEIGHTS = Path(__file__).parent / "weights"
BATCH = 256
BOOTSTRAPS = 40
LOSS_DRAWS = 4


def conditioning(embeddings_BTE: torch.Tensor) -> dict[str, Any]:
    """The keyword arguments of the transformer's forward for prompt embeddings (B, 5, 32)."""
    return {"encoder_hidden_states": embeddings_BTE, "img_shapes": [[(1, *data.GRID)]] * len(embeddings_BTE)}


@dataclass(frozen=True)
class TwoDigits:
    """Scenes of one or two coloured digits."""

    name: str = "two-digits"
    model_folder: Path = WEIGHTS / "two_digits"

    def batch(self, count: int, generator: torch.Generator, split: str) -> tuple[torch.Tensor, dict[str, Any]]:
        """Tokens (B, 32, 12) of real scenes and their conditioning, one prompt in ten dropped.

        Half of the scenes of the training split are slightly warped, as they were for the teacher.
        """
        scenes = data.random_scenes(count, generator)
        images = data.draw_scenes(scenes, split, generator)  # type: ignore[arg-type]
        if split == "train":
            warped = judge.warp((images + 1) / 2, generator, 0.5) * 2 - 1
            plain = torch.rand(count, generator=generator) < 0.5
            images = torch.where(plain[:, None, None, None], images, warped)
        kept = torch.rand(count, generator=generator) >= 0.1
        return data.patchify(images), conditioning(data.embed_prompts(scenes) * kept[:, None, None])

    def measure(
        self, model: Any, settings: MeasureSettings, progress: Callable[[float], None]
    ) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
        """Per-scene outcomes of a model on the judging split.

        Tensors, seeds one after the other: `right_g<g>` (N,) 0 or 1, `features_g<g>` (N, 128),
        `flow_loss` (N,), `velocity` (N, 32, 12) at `flow_loss`'s first draw.
        """
        jobs: list[tuple[int, Callable[[], dict[str, torch.Tensor]]]] = []
        for seed in settings.seeds:
            jobs += [((1 if g == 1 else 2) * settings.steps, partial(self.judged, model, settings, seed, g)) for g in settings.guidance]
            jobs.append((LOSS_DRAWS, partial(self._losses, model, settings, seed)))
        outcomes: dict[str, list[torch.Tensor]] = {}
        done, total = 0, sum(cost for cost, _ in jobs)
        # Side by side: each job has a generator of its own, and their order here is fixed. A teacher that comes block by block runs one at a time.
        with ThreadPoolExecutor(cores() if isinstance(model, torch.nn.Module) else 1) as pool:
            for (cost, _), future in zip(jobs, [pool.submit(job) for _, job in jobs], strict=True):
                for name, value in future.result().items():
                    outcomes.setdefault(name, []).append(value)
                done += cost
                progress(done / total)
        tensors = {name: torch.cat(parts) for name, parts in outcomes.items()}
        values = {n: [p.double().mean().item() for p in parts] for n, parts in outcomes.items() if parts[0].dim() == 1}
        return tensors, values

    def compare(self, teacher: dict[str, torch.Tensor], student: dict[str, torch.Tensor], settings: MeasureSettings) -> dict[str, Quality]:
        """Scene accuracy and Frechet distance by guidance; held-out flow-matching loss and velocity error where they were measured."""
        table: dict[str, Quality] = {}
        seeds = list(settings.seeds)
        for g in settings.guidance:
            right = f"right_g{g:g}"
            table[f"scene_accuracy_g{g:g}"] = paired_quality(teacher[right], student[right], seeds, "%", "higher", 100)
        real = judge.scene_features(judge.load_judge(), self._real(max(settings.scenes, 2048)))
        for g in settings.guidance:
            features = f"features_g{g:g}"
            table[f"frechet_distance_g{g:g}"] = _frechet_quality(teacher[features], student[features], real, seeds)
        if "flow_loss" not in teacher:
            return table
        table["flow_loss"] = paired_quality(teacher["flow_loss"], student["flow_loss"], seeds, "mean squared error", "lower")
        distance = (student["velocity"] - teacher["velocity"]).double().square().sum((1, 2))
        energy = teacher["velocity"].double().square().sum((1, 2)).mean()
        error, noise = distance.mean() / energy, distance.std() / energy / len(distance) ** 0.5
        table["velocity_error"] = Quality(
            teacher=0.0,
            student=error.item(),
            drop_percent=100 * error.item(),
            ci95=(100 * (error - 1.96 * noise).item(), 100 * (error + 1.96 * noise).item()),
            n=len(distance),
            seeds=seeds,
            noise=noise.item(),
            unit="share of the teacher's velocity energy",
            better="lower",
        )
        return table

    def preview(self, model: Any, count: int, seed: int, guidance: float, steps: int) -> tuple[torch.Tensor, list[str]]:
        """Images (B, 3, 8, 16) in 0..1 and their prompts."""
        images, scenes = self._generate(model, count, seed, guidance, steps)
        return (images.clamp(-1, 1) + 1) / 2, scenes.names()

    def judged(self, model: Any, settings: MeasureSettings, seed: int, guidance: float) -> dict[str, torch.Tensor]:
        """The scenes of one seed and guidance alone: `right_g<g>` (N,) and `features_g<g>` (N, 128)."""
        images, scenes = self._generate(model, settings.scenes, seed, guidance, settings.steps)
        trained = judge.load_judge()
        return {
            f"right_g{guidance:g}": judge.scenes_right(trained, images, scenes).float(),
            f"features_g{guidance:g}": judge.scene_features(trained, images),
        }

    def _generate(self, model: Any, count: int, seed: int, guidance: float, steps: int) -> tuple[torch.Tensor, data.Scenes]:
        generator = torch.Generator().manual_seed(9_000_000 + seed)
        scenes = data.random_scenes(count, generator)
        noise = torch.randn(count, data.TOKENS, data.TOKEN_CHANNELS, generator=generator)
        embeddings = data.embed_prompts(scenes)
        parts = []
        for i in range(0, count, BATCH):
            known = embeddings[i : i + BATCH]
            blank = conditioning(torch.zeros_like(known))
            parts.append(flow.sample(model, noise[i : i + BATCH], conditioning(known), blank, guidance, steps))
        return data.unpatchify(torch.cat(parts)), scenes

    @torch.no_grad()
    def _losses(self, model: Any, settings: MeasureSettings, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(8_000_000 + seed)
        scenes = data.random_scenes(settings.scenes, generator)
        tokens = data.patchify(data.draw_scenes(scenes, "judge", generator))
        embeddings = data.embed_prompts(scenes)
        losses, velocities = [], []
        for draw in range(LOSS_DRAWS):
            noise = torch.randn(tokens.shape, generator=generator)
            t = flow.logit_normal_timesteps(len(tokens), generator)
            x = flow.interpolate(tokens, noise, t)
            velocity = torch.cat(
                [
                    flow.predict(model, x[i : i + BATCH], t[i : i + BATCH], conditioning(embeddings[i : i + BATCH]))
                    for i in range(0, len(x), BATCH)
                ]
            )
            losses.append((velocity - (noise - tokens)).square().mean((1, 2)))
            if draw == 0:
                velocities.append(velocity)
        return {"flow_loss": torch.stack(losses).mean(0), "velocity": velocities[0]}

    def _real(self, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7_000_000)
        scenes = data.random_scenes(count, generator)
        return data.draw_scenes(scenes, "judge", generator)


def _frechet_quality(teacher: torch.Tensor, student: torch.Tensor, real: torch.Tensor, seeds: list[int]) -> Quality:
    """Frechet distance of both to real held-out scenes; interval and noise from a paired bootstrap over scenes."""
    own, other = judge.frechet_distance(teacher, real), judge.frechet_distance(student, real)
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(BOOTSTRAPS):
        rows = torch.randint(len(teacher), (len(teacher),), generator=generator)
        pairs.append((judge.frechet_distance(teacher[rows], real), judge.frechet_distance(student[rows], real)))
    t, s = torch.tensor(pairs, dtype=torch.float64).T
    drop = 100 * (other - own) / own
    half = 196 * (s / t).std().item()
    return Quality(
        teacher=own,
        student=other,
        drop_percent=drop,
        ci95=(drop - half, drop + half),
        n=len(teacher),
        seeds=seeds,
        noise=s.std().item(),
        unit="squared feature distance",
        better="lower",
    )


PLUGIN = TwoDigits()
