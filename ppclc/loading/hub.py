"""Files of a model on the Hugging Face hub: those that are needed of a revision and a variant and no others, in the hub's own cache.

The hub's client reads `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE`. Pipelines often hold more than a model needs: every variant of the
weights, and the original checkpoint of the same size in the root.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ppclc.errors import ModelError, first_line

ID = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS = re.compile(
    r"[\w-]+?(\.(?P<early>\w+))?(-\d{5}-of-\d{5})?(\.(?P<late>\w+))?\.safetensors(?P<index>\.index(\.(?P<indexed>\w+))?\.json)?"
)
"""A weight file or an index, with its variant where diffusers and transformers write it: before or after the shard's number, or after `index`."""
DESCRIBED = (".json", ".txt", ".jinja", ".model", ".py")


def fetch(name: str, revision: str | None = None, variant: str | None = None, parts: Sequence[str] = ()) -> Path:
    """The folder in the hub's cache of a model's transformer and what describes it, and of these other parts of its pipeline.

    Without a connection what is in the cache is taken.

    Raises:
        ModelError: not to be had, or no such variant.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = [file.rfilename for file in HfApi().model_info(name, revision=revision).siblings or []]
    except Exception as error:  # the hub's client raises many kinds; all mean that it tells nothing
        known = in_cache(name, revision)
        if known is None:
            raise _refusal(name, revision, error) from None
        return known
    wanted = needed(names, variant, parts, name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[glob.escape(n) for n in wanted]))
    except Exception as error:
        raise _refusal(name, revision, error) from None


def in_cache(name: str, revision: str | None) -> Path | None:
    """The folder of a model that was fetched before, whole or in part; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    for config in ("transformer/config.json", "config.json"):
        found = try_to_load_from_cache(name, config, revision=revision)
        if isinstance(found, str):
            return Path(found.removesuffix(config))
    return None


def _refusal(name: str, revision: str | None, error: Exception) -> ModelError:
    at = f" at revision {revision!r}" if revision else ""
    return ModelError(
        f"{name}: no such folder, and not to be had from the hub{at} ({first_line(error)}); give a local folder, or check the id, HF_TOKEN and HF_HUB_OFFLINE"
    )


def needed(names: Sequence[str], variant: str | None, parts: Sequence[str] = (), where: str = "the model") -> list[str]:
    """Of a repository's files those that a transformer's loading reads, and that of parts of its pipeline. Parts are taken without a variant.

    Raises:
        ModelError: weights of other variants alone.
    """
    home = PurePosixPath("transformer" if "transformer/config.json" in names else "")
    paths = [PurePosixPath(name) for name in names]
    own = [path for path in paths if path.parent == home and WEIGHTS.fullmatch(path.name)]
    if own and not any(variant_of(path.name) == variant for path in own):
        there = sorted({variant_of(path.name) or "one without a variant" for path in own})
        raise ModelError(f"{where}: no {f'variant {variant!r}' if variant else 'weights without a variant'}; there is {', '.join(there)}")

    def is_needed(path: PurePosixPath) -> bool:
        if path in own:
            return variant_of(path.name) == variant
        if path.parent == home or str(path.parent) in parts:
            described = path.suffix in DESCRIBED or (bool(WEIGHTS.fullmatch(path.name)) and variant_of(path.name) is None)
        else:
            described = False
        return described or (
            str(path.parent) == "." and (path.suffix == ".json" or path.name == "README.md" or path.name.startswith("LICENSE"))
        )

    return [str(path) for path in paths if is_needed(path)]


def variant_of(file_name: str) -> str | None:
    """The variant of a weight file or an index by its name, None for none."""
    match = WEIGHTS.fullmatch(file_name)
    return None if match is None else match["early"] or match["late"] or match["indexed"]
