"""The embedded teacher: coloured digits on black, with its data, its judge and its training.

A task plug-in: everything outside meets it through `PLUGIN` alone (`ppclc.quality.Task`).
"""

from __future__ import annotations

from ppclc.scenes.task import PLUGIN

__all__ = ["PLUGIN"]
