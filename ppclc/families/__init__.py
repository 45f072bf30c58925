"""Front ends: what a family of transformers looks like, as data and a few functions.

A family is one file here with a `PLUGIN`. Blocks are numbered through all groups in forward order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ppclc import plugins
from ppclc.errors import ModelError
from ppclc.plan import CompressionPlan

Tensors = Mapping[str, Any]
Bank = Mapping[str, Tensors]
"""Tensors by edit: `interval-3-4` a block's state, `interval-3-4-adapted` that and its adapters, `text-9-9-8-8` and `ffn-2-image`
the maps, `modulation` basis and mean. An adapter is `image_adapter.weight` (D, D) and `.bias` (D,), or of `text`."""


@dataclass(frozen=True)
class Group:
    """A run of like blocks: where it hangs, the configuration key that counts it, its calling convention.

    `streams` names the keyword that carries each stream into a block; `outputs` the order in which a
    block returns them.
    """

    name: str
    path: str
    count_key: str
    streams: Mapping[str, str]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Part(Mapping[str, Any]):
    """The tensors whose names begin with a prefix, by the rest of their names; none is read before it is asked for."""

    tensors: Tensors
    prefix: str

    def __getitem__(self, name: str) -> Any:
        return self.tensors[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.tensors if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Lowered:
    """A module that torch.export can take, its example inputs, and their dynamic axes by name.

    `inputs(**sizes)` makes inputs of other sizes; `reference(inputs)` answers with the eager model.
    """

    module: Any
    inputs: Callable[..., dict[str, Any]]
    dynamic: Mapping[str, Mapping[int, str]]
    ranges: Mapping[str, tuple[int, int]]
    sizes: tuple[Mapping[str, int], ...]
    reference: Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Encoders:
    """How a family's pipeline turns prompts and images into what its transformer takes.

    pipeline_class: diffusers' class. text_parts, image_parts: the parts of `model_index.json` that
    each needs; no other is loaded. encode_prompts: pipeline and prompts to conditioning tensors by
    the names of forward, a row a prompt. encode_images: pipeline and images (B, 3, H, W) in -1..1 to
    packed latents (B, S, C). pixels_per_token: the VAE's configuration to the side, in pixels, of the
    square that one token stands for.
    """

    pipeline_class: str
    text_parts: tuple[str, ...]
    image_parts: tuple[str, ...]
    encode_prompts: Callable[[Any, list[str]], dict[str, Any]]
    encode_images: Callable[[Any, Any], Any]
    pixels_per_token: Callable[[Mapping[str, Any]], int]


def no_grid_inputs(batch: int, height: int, width: int, text: int) -> dict[str, Any]:
    """Nothing: a forward that takes no positions."""
    return {}


@dataclass(frozen=True)
class Family:
    """All that ppclc knows of one family.

    class_name: diffusers' class. student_class: `module:Class` of the width-edited student.
    student_config: stock configuration and plan to the student's. student_tensor: one tensor of a
    student by its name, from the teacher's and the bank. time_embedding: module whose output is
    `temb`. text_input: block, text state and temb to the modulated state that feeds keys and values.
    text_key: name in the bank of a text-stream edit's maps.
    example_inputs: forward's keyword arguments for a configuration, batch, image grid, text length.
    lowered: a model made ready for torch.export. ffn_inputs: by stream, the module within a block whose
    input is the state after the attention residual; a stream that is not there takes no ffn edit.
    ffn_modules: by stream, the module of a student's block that is the linear map in the network's place.
    text_modules: the maps of a student's block whose text stream is gone, that of keys and values first.
    text_tensors: the inputs of forward that stand for a prompt, without masks. grid_inputs: what
    forward takes besides, by batch, image grid in tokens and text length. encoders: the way from
    prompts and images to tensors, None where there is none yet.
    """

    name: str
    class_name: str
    groups: tuple[Group, ...]
    student_class: str
    student_config: Callable[[Mapping[str, Any], CompressionPlan], dict[str, Any]]
    student_tensor: Callable[[str, CompressionPlan, Tensors, Bank], Any]
    time_embedding: str
    text_input: Callable[[Any, Any, Any], Any]
    text_key: Callable[[CompressionPlan, int], str]
    example_inputs: Callable[..., dict[str, Any]]
    lowered: Callable[[Any], Lowered]
    tiny_config: Mapping[str, Any]
    ffn_inputs: Mapping[str, str] = field(default_factory=dict)
    ffn_modules: Mapping[str, str] = field(default_factory=dict)
    text_modules: tuple[str, ...] = ()
    text_tensors: tuple[str, ...] = ("encoder_hidden_states",)
    grid_inputs: Callable[[int, int, int, int], dict[str, Any]] = no_grid_inputs
    encoders: Encoders | None = None

    @property
    def student_class_name(self) -> str:
        """Name of the width-edited class, as `_class_name` gives it."""
        return self.student_class.partition(":")[2]

    def num_blocks(self, config: Mapping[str, Any]) -> int:
        """Blocks of all groups together."""
        return sum(int(config[g.count_key]) for g in self.groups)


def of_config(config: Mapping[str, Any], where: str) -> Family:
    """The family that knows this configuration's `_class_name`. Raises ModelError when none does."""
    class_name = config.get("_class_name")
    families: list[Family] = [plugins.load("families", name) for name in plugins.names("families")]
    for family in families:
        if class_name in (family.class_name, family.student_class_name):
            return family
    known = ", ".join(f.class_name for f in families)
    raise ModelError(f"{where}: _class_name = {class_name!r}: no family knows this class; known are {known}")
