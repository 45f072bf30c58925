"""ppclc: a model-compression compiler for multi-modal diffusion transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["CompressionPlan", "PpclcError", "__version__", "apply_plan", "load_exported", "load_model"]

if TYPE_CHECKING:
    from ppclc.artefacts.exported import load_exported
    from ppclc.errors import PpclcError
    from ppclc.models import apply_plan, load_model
    from ppclc.plan import CompressionPlan


def __getattr__(name: str) -> Any:
    """Public names on first use, so that importing ppclc loads no torch."""
    from importlib import import_module

    homes = {
        "CompressionPlan": "plan",
        "PpclcError": "errors",
        "apply_plan": "models",
        "load_exported": "artefacts.exported",
        "load_model": "models",
    }
    if name not in homes:
        raise AttributeError(f"module 'ppclc' has no attribute {name!r}")
    return getattr(import_module(f"ppclc.{homes[name]}"), name)
