"""Front ends: what a family of transformers looks like, as data and a few functions.

A family is one file here with a `PLUGIN`. Blocks are numbered through all groups in forward order.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Literal

import torch

from ppclc import plugins
from ppclc.errors import ModelError
from ppclc.kernels.fused import unfuse
from ppclc.plan import CompressionPlan

Tensors = Mapping[str, Any]
States = dict[str, torch.Tensor]
"""States (B, tokens, D) by stream."""
STREAMS = ("image", "text")
Bank = Mapping[str, Tensors]
"""Tensors by edit: `interval-3-4` a block's state, `interval-3-4-adapted` that and its adapters, `text-9-9-8-8` and `ffn-2-image`
the maps, `modulation` basis and mean. An adapter is `image_adapter.weight` (D, D) and `.bias` (D,), or of `text`."""


@dataclass(frozen=True)
class Group:
    """A run of like blocks: where it hangs, the configuration key that counts it, its calling convention, what may be replaced.

    `streams` names the argument that carries each stream into a block; `outputs` the order in which a
    block returns them. `joined`, where it is not None, names the one argument that carries both streams in one
    sequence, text first, which is also all that a block returns. `positional` names the arguments that forward passes by
    position. `ffn_inputs`: by stream, the module within a block whose input is the state after the attention residual; a
    stream that is not there takes no ffn edit. `ffn_modules`: by stream, the module of a student's block that is the linear
    map in the network's place. `text_modules`: the maps of a student's block whose text stream is gone, that of keys
    and values first; none where text streams cannot go. `text_input`: block, text state and what the block gets besides to the
    modulated state that feeds its text keys and values. `adapters`: whether blocks take linear maps of each stream in front.
    `original_path`: where the blocks hang in the model as it was first published, empty where those names are diffusers' or are not
    known here; `original`: by a linear map's path within such a block, the maps of the same rows in diffusers' block, in order.
    """

    name: str
    path: str
    count_key: str
    streams: Mapping[str, str] = field(default_factory=lambda: {"image": "hidden_states", "text": "encoder_hidden_states"})
    outputs: tuple[str, ...] = ("text", "image")
    joined: str | None = None
    positional: tuple[str, ...] = ()
    ffn_inputs: Mapping[str, str] = field(default_factory=dict)
    ffn_modules: Mapping[str, str] = field(default_factory=dict)
    text_modules: tuple[str, ...] = ()
    text_input: Callable[[Any, torch.Tensor, Mapping[str, Any]], torch.Tensor] | None = None
    adapters: bool = True
    original_path: str = ""
    original: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any], text_tokens: int | None) -> tuple[States, dict[str, Any]]:
        """States by stream that a call of a block carries, and its other arguments. `text_tokens` is read where streams are joined."""
        shared = dict(zip(self.positional, args, strict=False)) | dict(kwargs)
        if self.joined is None:
            return {stream: shared.pop(name) for stream, name in self.streams.items()}, shared
        return self._split(shared.pop(self.joined), text_tokens), shared

    def call(self, block: Any, states: Mapping[str, torch.Tensor], shared: Mapping[str, Any]) -> States:
        """A block's output by stream, from its input by stream and its other arguments."""
        if self.joined is None:
            return self.states_of(block(**{name: states[stream] for stream, name in self.streams.items()}, **shared), states)
        return self.states_of(block(**{self.joined: self.output(states)}, **shared), states)

    def output(self, states: Mapping[str, torch.Tensor]) -> Any:
        """States as a block returns them."""
        return tuple(states[s] for s in self.outputs) if self.joined is None else torch.cat([states["text"], states["image"]], dim=1)

    def states_of(self, output: Any, before: Mapping[str, torch.Tensor]) -> States:
        """States by stream of what a block returned; text that is no longer computed stays as it was `before`."""
        if self.joined is not None:
            return self._split(output, before["text"].shape[1])
        found = dict(zip(self.outputs, output, strict=True))
        return {stream: before[stream] if found[stream] is None else found[stream] for stream in self.streams}

    def _split(self, sequence: torch.Tensor, text_tokens: int | None) -> States:
        assert text_tokens is not None
        return {"image": sequence[:, text_tokens:], "text": sequence[:, :text_tokens]}


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


FULL_PRECISION = ("img_ids", "txt_ids", "timestep", "guidance")
"""Inputs that stay float32 whatever a model computes in: 16 bits hold no position beyond 256, and a timestep is rounded where forward does it."""


def typed(given: Mapping[str, Any], dtype: torch.dtype, full: Sequence[str] = FULL_PRECISION) -> dict[str, Any]:
    """Inputs of forward as a model of that dtype takes them; those that `full` names stay float32."""

    def cast(name: str, value: Any) -> Any:
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floats and name not in full else value

    return {name: cast(name, value) for name, value in given.items()}


@dataclass(frozen=True)
class Lowered:
    """A module that torch.export can take, its example inputs, and their dynamic axes by name.

    `inputs(**sizes)` makes inputs of other sizes, in the model's dtype; `reference(inputs)` answers with the eager model.
    `sizes` are those that artefacts are compared at, batch, image grid in tokens and text length; `usual` is what engines
    are built for where nobody says otherwise: an image of 1024 x 1024 for the published VAEs.
    """

    module: Any
    inputs: Callable[..., dict[str, Any]]
    dynamic: Mapping[str, Mapping[int, str]]
    ranges: Mapping[str, tuple[int, int]]
    sizes: tuple[Mapping[str, int], ...]
    reference: Callable[[dict[str, Any]], Any]
    usual: Mapping[str, int] = field(default_factory=lambda: {"batch": 1, "height": 64, "width": 64, "text": 512})


class TensorResult(torch.nn.Module):
    """A transformer with a tensor as its result, sharing the model's tensors. Its inputs are those that diffusers' classes have; each takes some."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        img_ids: torch.Tensor | None = None,
        txt_ids: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        more = {
            "pooled_projections": pooled_projections,
            "encoder_attention_mask": encoder_attention_mask,
            "img_ids": img_ids,
            "txt_ids": txt_ids,
            "guidance": guidance,
        }
        out: torch.Tensor = self.model(
            hidden_states=hidden_states,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            **{name: value for name, value in more.items() if value is not None},
            return_dict=False,
        )[0]
        return out


class ExactTimesteps(torch.nn.Module):
    """diffusers' `Timesteps` with its frequencies as a constant: another runtime's exponential, times a thousand, is another phase."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        half = stock.num_channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - stock.downscale_freq_shift)
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", torch.exp(exponent), persistent=False)
        self.stock = stock

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        angles = self.stock.scale * (timesteps[:, None].float() * self.frequencies)
        parts = [torch.cos(angles), torch.sin(angles)] if self.stock.flip_sin_to_cos else [torch.sin(angles), torch.cos(angles)]
        return torch.nn.functional.pad(torch.cat(parts, dim=-1), (0, self.stock.num_channels % 2))


def exportable_copy(model: Any) -> Any:
    """A copy of a model that shares all of its tensors and may be changed for torch.export; its time embeddings are exact already.

    Its blocks are the plain formulation, without kernels.
    """
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    copied = unfuse(copy.deepcopy(model, memo=dict(shared)))
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Timesteps":
                setattr(parent, name, ExactTimesteps(child))
    return copied


AXES: Mapping[str, Mapping[int, str]] = {
    "hidden_states": {0: "batch", 1: "image_tokens"},
    "encoder_hidden_states": {0: "batch", 1: "text_tokens"},
    "encoder_attention_mask": {0: "batch", 1: "text_tokens"},
    "pooled_projections": {0: "batch"},
    "timestep": {0: "batch"},
    "guidance": {0: "batch"},
    "img_ids": {0: "image_tokens"},
    "txt_ids": {0: "text_tokens"},
}
"""Dynamic axes of forward's inputs, by the names that diffusers' classes share."""


def lowered_as_it_is(
    model: Any,
    example_inputs: Callable[..., dict[str, Any]],
    axes: Mapping[str, Mapping[int, str]] = AXES,
    sides: bool = False,
    exportable: Any = None,
    largest: int = 64,
    full: Sequence[str] = FULL_PRECISION,
) -> Lowered:
    """A model that torch.export takes nearly unchanged, with dynamic batch, image and text lengths; with `sides`, height and width for the image's.

    `exportable`: what stands for the model where more is to be changed than `exportable_copy` does. `largest`: side of the largest
    image grid that it has positions for. `full`: inputs that stay float32.
    """
    config = dict(model.config)
    side = min(64, largest)

    def inputs(batch: int, height: int, width: int, text: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(batch + 10 * height + 100 * width + 1000 * text)
        return typed(example_inputs(config, batch, height, width, text, generator), model.dtype, full)

    def reference(given: dict[str, Any]) -> torch.Tensor:
        out: torch.Tensor = model(**typed(given, model.dtype, full), return_dict=False)[0]
        return out

    image = {"height": (1, 512), "width": (1, 512)} if sides else {"image_tokens": (1, 65536)}
    return Lowered(
        module=TensorResult(exportable_copy(model) if exportable is None else exportable).eval(),
        inputs=inputs,
        dynamic={name: axes[name] for name in inputs(1, 2, 2, 2)},
        ranges={"batch": (1, 1024), **image, "text_tokens": (1, 4096)},
        sizes=(
            {"batch": 2, "height": 4, "width": 8, "text": 5},
            {"batch": 1, "height": 6, "width": 10, "text": 9},
            {"batch": 3, "height": 8, "width": 4, "text": 3},
        ),
        reference=reference,
        usual={"batch": 1, "height": side, "width": side, "text": 512},
    )


@dataclass(frozen=True)
class Encoders:
    """How a family's pipeline turns prompts and images into what its transformer takes.

    pipeline_classes: diffusers' classes with such parts, the usual one first. text_parts, image_parts: the parts of `model_index.json` that
    each needs; no other is loaded. encode_prompts: pipeline and prompts to conditioning tensors by
    the names of forward, a row a prompt. encode_images: pipeline and images (B, 3, H, W) in -1..1 to
    latents as the transformer takes them. decode: pipeline, latents and image grid in tokens to images (B, 3, H, W) in 0..1.
    pixels_per_token: the VAE's configuration to the side, in pixels, of the square that one token stands for. text_tokens: the longest text of
    each tokenizer to the text tokens of a sample, None where they follow from the prompts.
    """

    pipeline_classes: tuple[str, ...]
    text_parts: tuple[str, ...]
    image_parts: tuple[str, ...]
    encode_prompts: Callable[[Any, list[str]], dict[str, Any]]
    encode_images: Callable[[Any, Any], Any]
    decode: Callable[[Any, Any, tuple[int, int]], Any]
    pixels_per_token: Callable[[Mapping[str, Any]], int]
    text_tokens: Callable[[Mapping[str, int]], int] | None = None


def fused_by(module: str) -> Callable[[], Mapping[type, type]]:
    """By class of diffusers or of a student, the one that runs through kernels: `FUSED` of a module here, which brings those classes when it is asked for."""
    return lambda: import_module(f"{__name__}.{module}").FUSED


def no_grid_inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text: int) -> dict[str, Any]:
    """Nothing: a forward that takes no positions."""
    return {}


def unbatched_ids(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Positions without the batch that some pipelines give them, as diffusers' classes take them: those of the first sample."""
    return {name: given[name][0] for name in ("img_ids", "txt_ids") if name in given and given[name].ndim == 3}


def packed_latents(config: Mapping[str, Any], height: int, width: int) -> tuple[int, ...]:
    """A row of channels a token."""
    return (height * width, int(config["in_channels"]))


@dataclass(frozen=True)
class Cut:
    """Where a tensor lies within one of another name: its rows, first and behind the last, and whether its halves are swapped there."""

    name: str
    first: int
    last: int
    swapped: bool = False


@dataclass(frozen=True)
class Layout:
    """Another layout that models of a family are published in, read as ours.

    applies: whether a configuration is of it. config: that configuration to ours. tensor: one tensor of ours by name, from
    their configuration and tensors. unread: whether one of theirs has no tensor of ours that is it alone. cuts: where each
    tensor of ours lies, by name, in a layout that is no more than other names and tensors stacked in rows; empty for others.
    """

    applies: Callable[[Mapping[str, Any]], bool]
    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    tensor: Callable[[str, Mapping[str, Any], Tensors], torch.Tensor]
    unread: Callable[[str, Mapping[str, Any]], bool]
    cuts: Mapping[str, Cut] = field(default_factory=dict)


Shapes = Mapping[str, tuple[int, ...]]
"""Shapes by name, as a file's header tells them."""


@dataclass(frozen=True)
class SingleFile:
    """The one file that ComfyUI loads a family's transformer from, the stock class alone.

    applies: whether names and shapes are of it. config: what they tell of ours; the rest is as published. place: the name of
    a tensor of ours to the name there, and its number among those that are stacked there in rows. swapped: tensors there whose
    two halves stand in the other order. markers: from our configuration, names of empty tensors that say what no shape does.
    """

    applies: Callable[[Shapes], bool]
    config: Callable[[Shapes], dict[str, Any]]
    place: Callable[[str], tuple[str, int]] = lambda name: (name, 0)
    swapped: tuple[str, ...] = ()
    markers: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda config: ()


def counted(names: Iterable[str], path: str) -> int:
    """Blocks below a path that are numbered without a gap from 0, as ComfyUI counts them."""
    found = {name.removeprefix(f"{path}.").split(".")[0] for name in names if name.startswith(f"{path}.")}
    return next(n for n in itertools.count() if str(n) not in found)


def rotary_axes(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head by axis of its positions, which no tensor tells: 16, 56, 56 of the published 128, else in that proportion.

    Source: `axes_dims_rope` of FLUX.1 and Qwen-Image as published; the proportion for other widths is ours.
    """
    side = 2 * (head_dim * 7 // 32)
    return (head_dim - 2 * side, side, side)


@dataclass(frozen=True)
class Modulation:
    """A linear map of the time embedding whose output is cut into chunks of the width.

    stream: whose states it modulates, `both` where they are joined. ffn: the chunks that go with a feed-forward network
    made linear. input: the chunks, shift and scale, that are left of text whose state is only read by keys and values.
    Orders of chunks are those of the teacher's class; `input` gives the student's.
    """

    stream: str
    ffn: tuple[int, ...] = (3, 4, 5)
    input: tuple[int, ...] = (0, 1)


@dataclass(frozen=True)
class Family:
    """All that ppclc knows of one family.

    class_name: diffusers' class. student_class: `module:Class` of the width-edited student, depth_class: of one that only lacks
    blocks; empty where that stays the stock class, or where there is no such edit. text_end: what becomes of text after the
    last block that has a text stream: `read` by blocks of another group, `dead`: computed and read by nothing, `none`: not
    computed by the class. has_dead_code: whether a student can go without
    parts of that block whose result nothing reads. renumbered: configuration and plan to the
    student's values of keys that name blocks; restored: from the student's configuration and the plan, the teacher's values of those
    keys; true of the blocks that are left. time_embedding: module whose output `temb` (B, D) all modulation is a linear map
    of `SiLU(temb)` of, None where there is none such. basis_module: module of a student that projects it. modulations: by
    path within a block (or, with `modulated_outside`, within the model) the linear maps that read it. may_start: whether the
    student block of an interval, by configuration, first and last, can be a copy of a block. original: outside of blocks, diffusers'
    names of linear maps by those of the model as it was first published (`Group.original` has those of blocks).

    example_inputs: forward's keyword arguments for a configuration, batch, image grid, text length. lowered: a model made
    ready for torch.export. text_tensors: the inputs of forward that stand for a prompt, without masks. text_mask: the input
    that masks text, (B, T). text_tokens: length of the blocks' text states, from forward's inputs. timestep_scale: what
    forward's `timestep` is where the flow's is 1. latents: shape of one sample's latents by configuration and image grid in
    tokens. grid_inputs: what forward takes besides, by configuration, batch, image grid in tokens and text length. encoders: the
    way from prompts and images to tensors, None where there is none yet. layouts: others that students are published in.
    float16_overflow: where it is told that trained models overflow in float16; empty where none is known to.
    published: by hub id what a published model's configuration differs in from the class's defaults. Source: `config.json` of its transformer.
    exported_inputs: by configuration, what the exported module takes in the place of forward's arguments. Raises VerificationError for arguments
    that it cannot stand for.
    single_file: the one that ComfyUI loads, None where ppclc knows none. fused: by class of a block or of its attention's processor, one that
    computes the same through `ppclc.kernels` (`ppclc.kernels.fused`).
    """

    name: str
    class_name: str
    groups: tuple[Group, ...]
    example_inputs: Callable[..., dict[str, Any]]
    lowered: Callable[[Any], Lowered]
    tiny_config: Mapping[str, Any]
    student_class: str = ""
    depth_class: str = ""
    text_end: Literal["read", "dead", "none"] = "read"
    has_dead_code: bool = False
    renumbered: Callable[[Mapping[str, Any], CompressionPlan], dict[str, Any]] = lambda config, plan: {}
    restored: Callable[[Mapping[str, Any], CompressionPlan], dict[str, Any]] = lambda config, plan: {}
    time_embedding: str | None = None
    basis_module: str = ""
    modulations: Mapping[str, Modulation] = field(default_factory=dict)
    modulated_outside: bool = False
    may_start: Callable[[Mapping[str, Any], int, int, int], bool] = lambda config, first, last, start: True
    original: Mapping[str, str] = field(default_factory=dict)
    text_tensors: tuple[str, ...] = ("encoder_hidden_states",)
    text_mask: str = "encoder_hidden_states_mask"
    text_tokens: Callable[[Mapping[str, Any]], int] = lambda inputs: int(inputs["encoder_hidden_states"].shape[1])
    timestep_scale: float = 1.0
    latents: Callable[[Mapping[str, Any], int, int], tuple[int, ...]] = packed_latents
    grid_inputs: Callable[[Mapping[str, Any], int, int, int, int], dict[str, Any]] = no_grid_inputs
    encoders: Encoders | None = None
    float16_overflow: str = ""
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exported_inputs: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] = unbatched_ids
    layouts: tuple[Layout, ...] = ()
    single_file: SingleFile | None = None
    fused: Callable[[], Mapping[type, type]] = dict

    @property
    def class_names(self) -> dict[str, str]:
        """Classes of teachers and students by the names that `_class_name` gives them, each as `module:Class`."""
        own = [c for c in (self.student_class, self.depth_class) if c]
        return {self.class_name: f"diffusers:{self.class_name}"} | {c.partition(":")[2]: c for c in own}

    def class_of(self, plan: CompressionPlan) -> str:
        """Name of the class that a plan's student is of."""
        own = self.student_class if plan.has_width_edits else self.depth_class if plan.intervals else ""
        return own.partition(":")[2] or self.class_name

    def is_edited(self, config: Mapping[str, Any]) -> bool:
        """Whether a configuration is that of a student that brings its own class."""
        return config.get("_class_name") in self.class_names and config.get("_class_name") != self.class_name

    def mask_of(self, conditioning: Mapping[str, Any]) -> torch.Tensor | None:
        """The text's mask (B, T) among what a transformer takes, None where all of it counts."""
        return conditioning.get(self.text_mask)

    def sizes(self, config: Mapping[str, Any]) -> list[int]:
        """Blocks of each group."""
        return [int(config[g.count_key]) for g in self.groups]

    def num_blocks(self, config: Mapping[str, Any]) -> int:
        """Blocks of all groups together."""
        return sum(self.sizes(config))

    def place(self, config: Mapping[str, Any], block: int) -> tuple[Group, int]:
        """A block's group, and its number there. Raises IndexError for a block that is not there."""
        for group, size in zip(self.groups, self.sizes(config), strict=True):
            if block < size:
                return group, block
            block -= size
        raise IndexError(block)

    def prefix(self, config: Mapping[str, Any], block: int) -> str:
        """What the names of a block's tensors begin with."""
        group, number = self.place(config, block)
        return f"{group.path}.{number}."

    def block_of(self, config: Mapping[str, Any], name: str) -> tuple[int, str] | None:
        """The block that a tensor is of by its full name, and the rest of the name; None for one that is outside of blocks."""
        first = 0
        for group, size in zip(self.groups, self.sizes(config), strict=True):
            if name.startswith(f"{group.path}."):
                number, rest = name.removeprefix(f"{group.path}.").split(".", 1)
                return first + int(number), rest
            first += size
        return None

    def ffn_streams(self, config: Mapping[str, Any], block: int) -> tuple[str, ...]:
        """Streams whose feed-forward network a block has, and that can be made linear."""
        group, _ = self.place(config, block)
        textless = self.text_end == "none" and block == self.num_blocks(config) - 1
        return tuple(s for s in STREAMS if s in group.ffn_inputs and not (s == "text" and textless))

    def text_blocks(self, config: Mapping[str, Any]) -> range:
        """Blocks whose text stream may go: those of the one group that has maps for it."""
        first = 0
        for group, size in zip(self.groups, self.sizes(config), strict=True):
            if group.text_modules:
                return range(first, first + size)
            first += size
        return range(0)


@cache
def _known() -> dict[str, Family]:
    """Every family by the names of its classes."""
    found: dict[str, Family] = {}
    for name in plugins.names("families"):
        family: Family = plugins.load("families", name)
        found |= dict.fromkeys(family.class_names, family)
    return found


def with_single_file() -> list[Family]:
    """Families whose single file ppclc knows."""
    return [family for family in {f.name: f for f in _known().values()}.values() if family.single_file]


def timestep_scale(model: Any) -> float:
    """What a model's `timestep` is where the flow's is 1; 1 for what is of no family."""
    family = getattr(model, "family", None) or _known().get(type(model).__name__)
    return family.timestep_scale if isinstance(family, Family) else 1.0


def of_config(config: Mapping[str, Any], where: str) -> Family:
    """The family that knows this configuration's `_class_name`. Raises ModelError when none does."""
    class_name = config.get("_class_name")
    if (family := _known().get(str(class_name))) is not None:
        return family
    known = ", ".join(sorted({f.class_name for f in _known().values()}))
    raise ModelError(f"{where}: _class_name = {class_name!r}: no family knows this class; known are {known}")
