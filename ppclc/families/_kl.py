"""The VAE of FLUX.1 and Stable Diffusion 3: latents shifted and scaled, as their pipelines do.

Source: diffusers' `FluxPipeline` and `StableDiffusion3Pipeline`, at their ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def encoded(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) of images (B, 3, H, W) in -1..1: the mode, shifted and scaled."""
    latents = vae.encode(images.to(vae.dtype)).latent_dist.mode()
    made: torch.Tensor = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return made


def decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in 0..1 of latents (B, C, h, w)."""
    images: torch.Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    return (images.float() / 2 + 0.5).clamp(0, 1)


def pixels_per_token(vae_config: Mapping[str, Any]) -> int:
    """Side of the square of pixels that one token stands for: the VAE halves once a stage but the first, patches once more."""
    return int(2 ** len(vae_config["block_out_channels"]))
