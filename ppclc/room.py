"""What training a whole model takes of a device, and whether the device has it: told before hours are spent on what comes before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ppclc.analysis.search import AnalyzeSettings
from ppclc.analysis.trials import STATE_BYTES
from ppclc.costs.predictions import activation_bytes, by_depth
from ppclc.data_size import sample_size
from ppclc.errors import PpclcError, UnavailableError, memory_lacks
from ppclc.loading.classes import DTYPES, count_parameters, model_outline, predicted_parameters
from ppclc.loading.sources import Source
from ppclc.machine.devices import Ranks, total_bytes
from ppclc.plan import CompressionPlan
from ppclc.recipe import Recipe
from ppclc.screens.words import bytes_text
from ppclc.training.trainer import state_bytes

SHARE = 0.9
"""Of a device's memory, what weights in training may take."""

STREAMED = "distill.teacher: streamed"
WAYS = {
    "start": ("a smaller calibrate.resolution",),
    "calibrate": ("a smaller calibrate.resolution",),
    "analyze": ("fewer analyze.probes", "a smaller calibrate.resolution"),
    "distill": ("a smaller distill.batch or distill.local_batch", "distill.gradient_checkpointing"),
    "verify": ("a smaller calibrate.resolution",),
    "bench": ("a smaller bench.size",),
}
"""By pass, the keys of a recipe that make it take less memory."""


@contextmanager
def memory_told(step: str, recipe: Recipe) -> Iterator[None]:
    """A pass of a run, or its `start`, in which memory that runs out is told with the keys that make it take less. Raises UnavailableError then."""
    try:
        yield
    except Exception as error:
        if isinstance(error, PpclcError) or not (lacking := memory_lacks(error)):
            raise
        streamed = recipe.distill.teacher == "streamed"
        ways = [*WAYS.get(step, ()), *(["a smaller distill.chunk"] if streamed and step == "distill" else [])]
        ways += [STREAMED] if not streamed and step in ("calibrate", "analyze", "distill", "verify") else []
        wanted = f"; wanted {', or '.join(ways)}" if ways else ""
        raise UnavailableError(f"{step}: {lacking}{wanted}; what is done is kept, and the same command goes on from there") from error


def analysis_here(recipe: Recipe, source: Source, device: str) -> AnalyzeSettings:
    """Section `analyze` as teacher and device allow it: without supernet and trials, which train whole models, where those have no room.

    By all of the device's memory and not by what is free of it, so that a run that goes on decides as it did before.
    """
    settings = recipe.analysis
    if not settings.learns or not recipe.target.is_given:
        return settings
    family, config, dtype = source.family, source.config, recipe.model.dtype
    need = count_parameters(model_outline(family, config)) * (DTYPES[dtype].itemsize + STATE_BYTES)
    there = SHARE * total_bytes(device)
    if need <= there and torch.device(device).type != "cpu":
        size = sample_size(recipe, source) | {"batch": recipe.distill.batch}
        whole = CompressionPlan.of(family.name, family.num_blocks(config))
        need += by_depth(family, config, whole, lambda c: activation_bytes(family, c, dtype, size, training=True))
    return settings if need <= there else settings.untrained()


def check_resident(recipe: Recipe, source: Source, device: str) -> None:
    """Raise UnavailableError for a teacher that is to stay on a GPU whose memory is less than its weights."""
    if device == "cpu" or recipe.distill.teacher != "resident":
        return
    need = count_parameters(model_outline(source.family, source.config)) * DTYPES[recipe.model.dtype].itemsize
    if need > (there := total_bytes(device)):
        raise UnavailableError(
            f"distill.teacher = 'resident': its weights take {bytes_text(need)} in {recipe.model.dtype}, the GPU has {bytes_text(there)}; wanted {STREAMED}"
        )


def check_finetune(recipe: Recipe, source: Source, plan: CompressionPlan, ranks: Ranks) -> None:
    """Raise UnavailableError for a fine-tune whose weights, gradients and moments a GPU cannot hold beside its teacher."""
    settings = recipe.distill
    if ranks.device == "cpu" or plan.is_empty or not settings.finetune_steps:
        return
    student = predicted_parameters(source.family, source.config, plan)
    resident = settings.teacher == "resident"
    teacher = count_parameters(model_outline(source.family, source.config)) * DTYPES[recipe.model.dtype].itemsize if resident else 0
    need = student * (4 + state_bytes(settings)) // (ranks.world if ranks.sharded else 1)
    there = total_bytes(ranks.device)
    if need + teacher > SHARE * there:
        beside = f" beside {bytes_text(teacher)} of its teacher" if resident else ""
        ways = ["distill.finetune_steps: 0", "more GPUs with --use_fsdp (docs/many-devices.md)"]
        ways += ["distill.optimizer: adamw8bit"] if settings.optimizer == "adamw" else []
        ways += [STREAMED] if resident else []
        raise UnavailableError(
            f"distill.finetune_steps = {settings.finetune_steps}: training the whole student takes {bytes_text(need)}{beside} and more for what it "
            f"computes, the GPU has {bytes_text(there)}; wanted {', or '.join(ways)}"
        )
