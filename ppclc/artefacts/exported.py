"""Artefacts as transformers: what an export wrote stands in for the model in a plain diffusers pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppclc import families, plugins
from ppclc.artefacts.receipts import read_export, runner_of
from ppclc.backends import Backend, Session, Tensors
from ppclc.errors import OutputError, RecipeError, VerificationError
from ppclc.loading.classes import DTYPES


class ExportedTransformer(nn.Module):
    """An artefact that is called as its family's class in diffusers is.

    Put it into a pipeline that was loaded without a transformer: `pipeline = QwenImagePipeline.from_pretrained(FOLDER, transformer=None)`, then
    `pipeline.transformer = load_exported(EXPORT)`. It has no parameters; the result lies where `hidden_states` lay, in their dtype.
    """

    def __init__(self, config: Mapping[str, Any], dtype: str, session: Session, inputs: list[str]) -> None:
        super().__init__()
        from diffusers.configuration_utils import FrozenDict

        self.family = families.of_config(config, "config.json")
        self.config, self.dtype, self.session, self.inputs = FrozenDict(config), DTYPES[dtype], session, inputs
        self.place: torch.Tensor
        self.register_buffer("place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the pipeline was brought, by which it places its own tensors; the artefact runs where its back end does."""
        return self.place.device

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """A block; pipelines name their calls by it, for caches that an artefact has not."""
        yield

    def forward(self, hidden_states: torch.Tensor, return_dict: bool = True, **given: Any) -> Any:
        """The artefact's output, as a tuple or as diffusers' output class.

        Raises:
            VerificationError: arguments that the artefact cannot stand for, or one that it needs is not there.
        """
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        known = {"hidden_states": hidden_states} | {name: value for name, value in given.items() if value is not None}
        known |= self.family.exported_inputs(self.config, known)
        if lacking := [name for name in self.inputs if name not in known]:
            raise VerificationError(f"{type(self).__name__}: {lacking[0]} was not given; the artefact takes {', '.join(self.inputs)}")
        if not isinstance(known["hidden_states"], torch.Tensor):
            raise VerificationError(f"{type(self).__name__}: hidden_states is no tensor")
        inputs: Tensors = {name: known[name] for name in self.inputs}
        output = self.session.run(inputs).to(hidden_states.device, hidden_states.dtype)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def load_exported(folder: str | Path, backend: str | None = None, **options: Any) -> ExportedTransformer:
    """The artefact in a folder that `ppclc export` wrote, in the back end that runs it, or another that does; options: of its `load`.

    Raises:
        OutputError: there is no export, or it is not whole.
        RecipeError: an option that the back end has not.
        UnavailableError: as the back end's `load` does.
    """
    home = Path(folder)
    export = read_export(home)
    try:
        config = json.loads((home / "transformer" / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{home}: no readable transformer/config.json ({error}); export the model again") from None
    plugin: Backend = plugins.load("backends", backend or runner_of(export))
    if others := options.keys() - plugin.run_options.keys():
        raise RecipeError(f"{min(others)}: {plugin.name} has no such option; it has {', '.join(plugin.run_options) or 'none'}")
    session = plugin.load(home, _Absent(), **options)
    return ExportedTransformer(config, export.dtype, session, export.inputs)


class _Absent:
    """A model that is not there: an artefact runs without it."""

    @property
    def reference(self) -> Any:
        raise VerificationError("this back end runs the model itself, which an export does not hold")

    @property
    def module(self) -> Any:
        return self.reference
