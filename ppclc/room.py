"""What training a whole model takes of a device, and whether the device has it: told before hours are spent on what comes before."""

from __future__ import annotations

from ppclc.classes import DTYPES, count_parameters, model_outline, predicted_parameters
from ppclc.devices import Ranks, total_bytes
from ppclc.errors import UnavailableError
from ppclc.plan import CompressionPlan
from ppclc.recipe import Recipe
from ppclc.search import AnalyzeSettings
from ppclc.sources import Source
from ppclc.training import state_bytes
from ppclc.trials import STATE_BYTES

SHARE = 0.9
"""Of a device's memory, what weights in training may take."""


def analysis_here(recipe: Recipe, source: Source, device: str) -> AnalyzeSettings:
    """Section `analyze` as teacher and device allow it: without supernet and trials, which train whole models, where those have no room.

    By all of the device's memory and not by what is free of it, so that a run that goes on decides as it did before.
    """
    settings = recipe.analysis
    if not settings.learns or not recipe.target.is_given:
        return settings
    parameters = count_parameters(model_outline(source.family, source.config))
    need = parameters * (DTYPES[recipe.model.dtype].itemsize + STATE_BYTES)
    return settings if need <= SHARE * total_bytes(device) else settings.untrained()


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
        beside = f" beside {teacher / 1e9:.0f} GB of its teacher" if resident else ""
        ways = ["distill.finetune_steps: 0", "more GPUs with --use_fsdp (docs/many-devices.md)"]
        ways += ["distill.optimizer: adamw8bit"] if settings.optimizer == "adamw" else []
        ways += ["distill.teacher: streamed"] if resident else []
        raise UnavailableError(
            f"distill.finetune_steps = {settings.finetune_steps}: training the whole student takes {need / 1e9:.0f} GB{beside} and more for what it "
            f"computes, the GPU has {there / 1e9:.0f} GB; wanted {', or '.join(ways)}"
        )
