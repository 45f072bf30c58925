"""Configurations of published models, so that a plan or a price needs nothing from a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ppclc import plugins
from ppclc.families import Family
from ppclc.loading.classes import stock_config
from ppclc.loading.sources import Source, open_source


def published() -> dict[str, Family]:
    """The family of every published model whose configuration ppclc brings, by hub id."""
    families: list[Family] = [plugins.load("families", name) for name in plugins.names("families")]
    return {name: family for family in families for name in family.published}


def published_config(name: str) -> tuple[Family, dict[str, Any]]:
    """Family and configuration of a published model. Raises KeyError for one that is not known here."""
    family = published()[name]
    return family, stock_config(family) | dict(family.published[name]) | {"_class_name": family.class_name}


def open_outline(path: str, revision: str | None = None, variant: str | None = None) -> Source:
    """A model of which the configuration is enough: as `open_source`, but a published one that lies nowhere here is known by its name.

    Raises:
        ModelError: as `open_source` does.
    """
    if path not in published() or revision is not None or variant is not None or Path(path).expanduser().exists():
        return open_source(path, revision, variant)
    family, config = published_config(path)
    note = f"{path}: its configuration as ppclc brings it; nothing was fetched"
    return Source(path, Path(path), config, family, notes=(note,))
