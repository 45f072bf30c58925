"""Classes of models by their configuration: built without memory, counted, filled with random weights; no file is read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ppclc.errors import ModelError, PlanError
from ppclc.families import Family
from ppclc.kernels.fused import fuse
from ppclc.plan import CompressionPlan
from ppclc.student_tensors import student_config as edited_config
from ppclc.students.parts import travelling_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _class(name: str) -> Any:
    module, _, attribute = name.rpartition(":")
    return getattr(import_module(module), attribute)


def model_class(family: Family, config: Mapping[str, Any]) -> Any:
    """The class that a configuration asks for: diffusers' own, or the family's width-edited one."""
    return _class(family.class_names.get(str(config.get("_class_name")), f"diffusers:{family.class_name}"))


def stock_config(family: Family) -> dict[str, Any]:
    """The configuration that the family's stock class has where nobody says otherwise."""
    import inspect

    parameters = inspect.signature(_class(f"diffusers:{family.class_name}").__init__).parameters
    return {n: p.default for n, p in parameters.items() if p.default is not p.empty}


def empty_model(family: Family, config: Mapping[str, Any], where: str = "config.json") -> Any:
    """The model with parameters on the meta device: names, shapes and counts, no memory.

    Raises:
        ModelError: the configuration cannot be built.
    """
    from accelerate import init_empty_weights

    return _built(family, config, where, init_empty_weights(include_buffers=False))


def model_outline(family: Family, config: Mapping[str, Any], where: str = "config.json") -> Any:
    """As `empty_model`, with buffers on the meta device too: their values, which some classes take seconds for, are not computed."""
    return _built(family, config, where, torch.device("meta"))


def _built(family: Family, config: Mapping[str, Any], where: str, within: AbstractContextManager[Any]) -> Any:
    try:
        with within:
            model = model_class(family, config).from_config({k: v for k, v in config.items() if k != "auto_map"})
    except (TypeError, ValueError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(f"{where}: cannot be built as a model of {family.name}: {error}") from None
    return fuse(model, family.fused())


Pool = dict[tuple[str, tuple[int, ...]], torch.Tensor]
"""Tensors by name and shape, which models share."""


def random_model(family: Family, config: Mapping[str, Any], dtype: str = "float32", pool: Pool | None = None, device: str = "cpu") -> Any:
    """A model of that configuration with random weights, in evaluation mode, fit for timing and for nothing else.

    Weights are made on the device in their dtype, and nowhere else before. Tensors that `pool` has by name and shape are shared with it,
    the others are put there: models that are timed side by side take the memory of one.

    Raises:
        ModelError: the configuration cannot be built.
    """
    model = empty_model(family, config)
    pool = {} if pool is None else pool
    noise = (0.02 * torch.randn(2**16, generator=torch.Generator().manual_seed(0))).to(device, DTYPES[dtype])
    state = {}
    for name, tensor in model.state_dict().items():
        key = (name, tuple(tensor.shape))
        if key not in pool:
            pool[key] = _repeated(noise, tensor.numel()).reshape(tensor.shape)
        state[name] = pool[key]
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device).eval().requires_grad_(False)


def _repeated(noise: torch.Tensor, count: int) -> torch.Tensor:
    """So many numbers of noise over and over: to draw billions would take longer than what is timed."""
    found = noise.new_empty(count)
    whole = count - count % len(noise)
    found[:whole].view(-1, len(noise))[:] = noise
    found[whole:] = noise[: count - whole]
    return found


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, each once."""
    return sum(p.numel() for p in model.parameters())


def student_config(family: Family, config: Mapping[str, Any], plan: CompressionPlan) -> dict[str, Any]:
    """Configuration of the student, `_class_name` included. Raises PlanError when the plan is of another model."""
    if plan.family != family.name:
        raise PlanError(f"plan: family = {plan.family!r}, but the model is of {family.name!r}")
    if plan.num_blocks != family.num_blocks(config):
        raise PlanError(f"plan: num_blocks = {plan.num_blocks}, but the model has {family.num_blocks(config)} blocks")
    if family.is_edited(config):
        raise PlanError("plan: the model is an edited student already; plans are made for its teacher")
    return edited_config(family, config, plan) | {"_class_name": family.class_of(plan)}


def predicted_parameters(family: Family, config: Mapping[str, Any], plan: CompressionPlan) -> int:
    """Exact parameter count of the student, from the configuration alone."""
    return count_parameters(model_outline(family, student_config(family, config, plan)))


def travelling_class(where: str) -> str:
    """The text of a student's class, `module:Class`, as it travels: one module, with the parts that it shares with others in front."""
    return travelling_file(_class(where))[1]
