"""How large a sample of a recipe's data is, before anything is encoded."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ppclc.costs.blocks import default_size
from ppclc.data.cache import TEXT, open_cache
from ppclc.data.encoding import kind_at
from ppclc.errors import PpclcError
from ppclc.loading.sources import Source, json_object, part_config
from ppclc.publishing.pipelines import pipeline_of
from ppclc.recipe import Recipe

PIXELS, TEXT_TOKENS = 16, 512
"""Of a token's side, and of a prompt, where neither the pipeline nor encoded samples tell: what published pipelines have, and take at most."""


def sample_size(recipe: Recipe, source: Source) -> dict[str, int]:
    """Batch, image grid and text length of a sample: of the user's data as far as can be told before they are encoded, else of a task's and of noise."""
    wanted, size = recipe.calibrate, default_size(source.family)
    if source.task is not None or wanted.source == "noise" or (wanted.source == "auto" and wanted.path is None):
        return size
    height, width = (wanted.resolution, wanted.resolution) if isinstance(wanted.resolution, int) else wanted.resolution
    try:
        if wanted.path and (kind_at(wanted.path) if wanted.source == "auto" else wanted.source) == "cached":
            cache = open_cache(wanted.path, source)
            return size | dict(zip(("height", "width"), cache.grid, strict=True)) | {"text": cache.shards[0].shapes[TEXT][1]}
    except PpclcError:  # the data are not here: a configuration and a resolution are enough to plan with
        pass
    side = _pixels_per_token(source)
    return size | {"height": max(1, height // side), "width": max(1, width // side), "text": _text_tokens(source)}


def _pixels_per_token(source: Source) -> int:
    root, encoders = pipeline_of(source), source.family.encoders
    if root is None or encoders is None or not Path(root).is_dir():
        return PIXELS
    try:
        return encoders.pixels_per_token(part_config(root, encoders.image_parts[0]))
    except PpclcError:
        return PIXELS


def _text_tokens(source: Source) -> int:
    """Where a family's texts are filled up to a length that tokenizers tell, that; else what texts of a few sentences have at most."""
    root, encoders = pipeline_of(source), source.family.encoders
    if encoders is None or encoders.text_tokens is None:
        return TEXT_TOKENS
    longest = {}
    for part in (p for p in encoders.text_parts if p.startswith("tokenizer")):
        with suppress(PpclcError, KeyError, TypeError, ValueError, OverflowError):
            longest[part] = int(json_object(Path(root or "") / part / "tokenizer_config.json")["model_max_length"])
    return max(1, encoders.text_tokens(longest))
