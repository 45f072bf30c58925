"""Rectified flow: the path between data and noise, its loss, and the Euler sampler.

Convention of diffusers' FlowMatchEulerDiscreteScheduler, for every family: `x_t = (1 - t) x_0 + t
noise`, the model predicts the velocity `noise - x_0`, and is told `t` in 0..1 as `timestep`, or a thousand times that
where its family says so.

Shape suffixes: B batch, S token, C channel. Latents are (B, S, C) where a family packs them, else (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ppclc import families

Velocity = Callable[..., Any]
"""A transformer: called with `hidden_states`, `timestep`, a conditioning and `return_dict=False`."""
Conditioning = Mapping[str, Any]
"""What a transformer takes besides `hidden_states` and `timestep`, by the names of its forward."""


def logit_normal_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (B,) in 0..1, the logistic of a standard normal. Source: arXiv 2403.03206, section 3.1."""
    return torch.sigmoid(torch.randn(count, generator=generator))


def interpolate(data_BSC: torch.Tensor, noise_BSC: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
    """The point `x_t` of the straight path at each sample's own timestep."""
    t = timestep_B.reshape(-1, *[1] * (data_BSC.dim() - 1))
    return (1 - t) * data_BSC + t * noise_BSC


def inputs_for(model: Velocity, x_BSC: torch.Tensor, timestep_B: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
    """Keyword arguments of a transformer's forward on the model's own device, floating-point tensors in its dtype."""
    dtype, device = getattr(model, "dtype", x_BSC.dtype), getattr(model, "device", x_BSC.device)
    given = {"hidden_states": x_BSC, "timestep": timestep_B * families.timestep_scale(model), **conditioning}
    tensors = {k: v.to(device) for k, v in given.items() if isinstance(v, torch.Tensor)}
    return given | {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def predict(model: Velocity, x_BSC: torch.Tensor, timestep_B: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """The model's velocity at `x_t`, in the dtype and on the device of `x_t`; only as many tokens as `x_t` has."""
    velocity: torch.Tensor = model(**inputs_for(model, x_BSC, timestep_B, conditioning), return_dict=False)[0]
    return velocity[:, : x_BSC.shape[1]].to(x_BSC)


def guided(
    model: Velocity,
    x_BSC: torch.Tensor,
    timestep_B: torch.Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning,
    guidance: float,
) -> torch.Tensor:
    """Classifier-free guided velocity; guidance 1 is the conditional one alone, in one call.

    Source: arXiv 2207.12598, in the form `v_u + g (v_c - v_u)`.
    """
    velocity = predict(model, x_BSC, timestep_B, conditioning)
    if guidance == 1:
        return velocity
    without = predict(model, x_BSC, timestep_B, unconditional)
    return without + guidance * (velocity - without)


@torch.no_grad()
def sample(
    model: Velocity, noise_BSC: torch.Tensor, conditioning: Conditioning, unconditional: Conditioning, guidance: float, steps: int
) -> torch.Tensor:
    """Data (B, S, C) from noise by `steps` equal Euler steps from t = 1 to t = 0."""
    x = noise_BSC
    for i in range(steps):
        timestep = torch.full((len(x),), 1 - i / steps, dtype=x.dtype, device=x.device)
        velocity = guided(model, x, timestep, conditioning, unconditional, guidance)
        # Inpainting models have an image and its mask behind the latents, in features that stay as they are.
        kept = x[..., velocity.shape[-1] :]
        x = x[..., : velocity.shape[-1]] - velocity / steps
        x = torch.cat([x, kept], dim=-1) if kept.shape[-1] else x
    return x
