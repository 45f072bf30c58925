"""Large linear maps in 8-bit floating point (E4M3): weights stored so, activations rounded to it, by scales that calibration found.

The field's way to FP8 in TensorRT: explicit QuantizeLinear and DequantizeLinear around the products, everything else in bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ppclc.families import Family, Lowered

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of E4M3's numbers. Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022, table 1."""
ARITHMETIC = "bfloat16"
"""What the rest of such a model computes in."""


class Float8Linear(nn.Module):
    """A linear map whose weight is stored in E4M3 with one scale, and whose input is rounded to E4M3 with another.

    In eager the same numbers as in an ONNX graph: quotients are rounded and kept within E4M3's range, products are those of the rounded numbers.
    """

    def __init__(self, linear: nn.Linear, largest_input: float) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = (weight.abs().amax().float() / LARGEST).clamp(min=1e-12).to(weight.dtype)
        self.weight8: torch.Tensor
        self.weight_scale: torch.Tensor
        self.input_scale: torch.Tensor
        self.zero: torch.Tensor
        self.register_buffer("weight8", rounded(weight, scale))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("input_scale", torch.tensor(max(largest_input / LARGEST, 1e-12), dtype=weight.dtype, device=weight.device))
        self.register_buffer("zero", torch.zeros((), dtype=FLOAT8, device=weight.device))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            given = _symbol("QuantizeLinear", x, self.input_scale, self.zero, FLOAT8)
            given = _symbol("DequantizeLinear", given, self.input_scale, self.zero, x.dtype)
            weight = _symbol("DequantizeLinear", self.weight8, self.weight_scale, self.zero, x.dtype)
        else:
            given = rounded(x, self.input_scale).to(x.dtype) * self.input_scale
            weight = self.weight8.to(x.dtype) * self.weight_scale
        return nn.functional.linear(given, weight, self.bias)


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A tensor over its scale in E4M3, what lies beyond its range at its end."""
    return (x.float() / scale.float()).clamp(-LARGEST, LARGEST).to(FLOAT8)


def _symbol(operator: str, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    found: torch.Tensor = torch.onnx.ops.symbolic(operator, (x, scale, zero), dtype=dtype, shape=x.shape)
    return found


def large_linears(family: Family, config: Mapping[str, Any], module: nn.Module) -> dict[str, nn.Linear]:
    """Linear maps within the blocks of a lowered module by path, but for modulations, which are a vector a sample, and closed-form maps."""
    found = {}
    for block in range(family.num_blocks(config)):
        group, number = family.place(config, block)
        start = f"model.{group.path}.{number}"
        small = {*family.modulations, *group.text_modules, *group.ffn_modules.values()}
        for name, part in module.get_submodule(start).named_modules():
            if isinstance(part, nn.Linear) and not any(name == s or name.startswith(f"{s}.") for s in small):
                found[f"{start}.{name}"] = part
    return found


def largest_inputs(lowered: Lowered, paths: Iterable[str], batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The largest magnitude that enters each linear map, over batches of the lowered module's inputs."""
    seen = dict.fromkeys(paths, 0.0)

    def note(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            seen[path] = max(seen[path], float(given[0].detach().abs().amax()))

        return hook

    hooks = [lowered.module.get_submodule(path).register_forward_pre_hook(note(path)) for path in seen]
    try:
        with torch.no_grad():
            for batch in batches:
                lowered.module(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def in_float8(
    lowered: Lowered, family: Family, config: Mapping[str, Any], batches: Iterable[Mapping[str, Any]]
) -> tuple[Lowered, dict[str, Any]]:
    """A lowered bfloat16 model with its large linear maps in E4M3, which is its own reference, and what was done.

    The lowered module is changed in place; its tensors, which are the model's, are not.
    """
    linears = large_linears(family, config, lowered.module)
    batches = list(batches)
    largest = largest_inputs(lowered, linears, batches)
    for path, linear in linears.items():
        parent, _, name = path.rpartition(".")
        setattr(lowered.module.get_submodule(parent), name, Float8Linear(linear, largest[path]))

    def reference(inputs: dict[str, Any]) -> Any:
        return lowered.module(**inputs)

    told = {"linear_maps": len(linears), "format": "E4M3, a scale a tensor", "calibration_batches": len(batches)}
    return dataclasses.replace(lowered, reference=reference), told
