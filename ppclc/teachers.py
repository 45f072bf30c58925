"""Teachers that are run block by block: with all blocks in memory, or with one at a time read from its files.

Both kinds take one path through the model, so that what they give is the same to the bit:

1. The *skeleton*, the model with stand-ins for its blocks, makes the states that enter block 0 and all else that blocks get.
2. Blocks are run in order. All batches pass a block before the next is read.
3. The skeleton, its last stand-in now giving the last block's states, makes the velocity.

Shape suffixes: B batch, S image token, T text token, D width, C channel.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ppclc.data import flow
from ppclc.data.samples import Sample, picked
from ppclc.families import Family, Group, States
from ppclc.loading.classes import DTYPES, empty_model
from ppclc.loading.sources import Source
from ppclc.loading.weight_files import WeightFiles
from ppclc.machine.devices import free_bytes
from ppclc.models import ALIGNMENT, Shared, block_state, blocks_of, groups_of

TEXT_INPUT = "text_input"
HELD_BLOCKS, HELD_BYTES = 2, 2**28
"""States that are held while a streamed teacher's blocks are read: of as many bytes as so many blocks have, or of so many where blocks are small."""
HELD_SHARE = 0.3
"""Of the memory that is free on a GPU, what states may take there, if that is more."""
PASSING_BYTES = 2**28
"""Most bytes of a state of samples that pass a block together, where the caller does not care for the size of batches."""


@dataclass
class Sweep:
    """A chunk of batches on its way through the teacher.

    `shared`: by batch and block, what a block gets besides the streams. `states`: by state number, then by batch;
    number i is the input of block i, `num_blocks` the output of the last. Entries may be deleted when they
    are no longer needed. Under `text_input` stands the modulated text state (B, T, D) where it was asked for.
    `tembs`: by batch the time embedding (B, D), None where modulation comes from more than one. `inside`: by batch, where it
    was asked for, what lies within the block that was run last.
    """

    shared: list[Shared]
    states: dict[int, list[States]] = field(default_factory=dict)
    tembs: list[torch.Tensor | None] = field(default_factory=list)
    inside: dict[int, Inside] = field(default_factory=dict)


@dataclass(frozen=True)
class Embedded:
    """What enters block 0: states by stream; what every block gets besides, by its number; the time embedding, where there is one."""

    states: States
    shared: Shared
    temb: torch.Tensor | None = None


@dataclass(frozen=True)
class Inside:
    """What a batch passes through within a block, of what edits could put in its place.

    mids: by stream the state after the attention residual (B, tokens, D), where a network could be made linear. text_input: the modulated
    text state (B, T, D) that feeds the text keys and values, where the text stream could go.
    """

    mids: States
    text_input: torch.Tensor | None


class _EmbeddedError(Exception):
    """Raised inside a skeleton's forward that has embedded its inputs."""


class _Slot(nn.Module):
    """The stand-in for a block of a skeleton: hands its states to a function that it holds, and passes on what that gives."""

    function: Callable[[int, States, dict[str, Any]], Mapping[str, torch.Tensor]]
    text_tokens: int | None = None

    def __init__(self, number: int, group: Group) -> None:
        super().__init__()
        self.number, self.group = number, group

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states, shared = self.group.given(args, kwargs, self.text_tokens)
        return self.group.output(self.function(self.number, states, shared))


class Skeleton:
    """A model without its blocks, sharing all other tensors with it."""

    def __init__(self, model: Any, family: Family) -> None:
        self.family = family
        self.slots = [_Slot(number, group) for number, group in enumerate(groups_of(model, family))]
        # The model itself stays as it is: others may be running it.
        memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        for group in family.groups:
            memo[id(model.get_submodule(group.path))] = nn.ModuleList(s for s in self.slots if s.group is group)
        self.model = copy.deepcopy(model, memo)

    @torch.no_grad()
    def embed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Embedded:
        """What enters block 0 in a forward with these arguments, and what every block gets besides: that depends on no state."""
        first: States = {}
        shared: list[dict[str, Any]] = []
        tembs: list[torch.Tensor] = []

        def record(number: int, states: States, given: dict[str, Any]) -> States:
            first.update(states if number == 0 else {})
            shared.append(given)
            if number == 0:
                self._tell(states["text"].shape[1])
            if number == len(self.slots) - 1:
                raise _EmbeddedError
            return states

        self._put(record)
        with contextlib.suppress(_EmbeddedError), self._time_embedding(tembs):
            self.model(*args, **kwargs)
        return Embedded(first, shared, tembs[-1] if tembs else None)

    @contextlib.contextmanager
    def _time_embedding(self, kept: list[torch.Tensor]) -> Iterator[None]:
        """Keep what the module gives that all modulation comes from, where there is one."""
        if not self.family.time_embedding:
            yield
            return
        hook = self.model.get_submodule(self.family.time_embedding).register_forward_hook(lambda _, args, output: kept.append(output))
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def finish(self, states: States, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The model's own output, from the last block's states and the arguments of the forward."""
        self._tell(states["text"].shape[1])
        self._put(lambda number, passing, _: states if number == len(self.slots) - 1 else passing)
        return self.model(*args, **kwargs)

    def _put(self, function: Callable[[int, States, dict[str, Any]], Mapping[str, torch.Tensor]]) -> None:
        for slot in self.slots:
            slot.function = function

    def _tell(self, text_tokens: int) -> None:
        for slot in self.slots:
            slot.text_tokens = text_tokens


class Teacher:
    """A teacher that is run block by block, one thread at a time; what is common to both kinds.

    It can be called like the model itself, with the model's arguments and result, wherever a model is
    called and nothing else.
    """

    def __init__(
        self, family: Family, config: Mapping[str, Any], skeleton: Skeleton, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.family, self.config, self.dtype, self.device = family, config, dtype, torch.device(device)
        self.num_blocks = family.num_blocks(config)
        self.skeleton = skeleton

    def sweep(
        self,
        samples: Sequence[Sample],
        stops: Collection[int],
        text_inputs: Collection[int] = (),
        text_blocks: Callable[[int], nn.Module | None] = lambda _: None,
        inside: Collection[int] = (),
    ) -> Iterator[tuple[int, Sweep]]:
        """Each state number of `stops`, in rising order, with the sweep whose `states` hold it by then.

        No block after the last stop is run. For stops that are in `text_inputs`, `text_input` is among the
        states: modulated by the block that `text_blocks` has for that number, else by the teacher's own. `inside`: batches of which
        the sweep has what lies within the block that was run last. A streamed teacher holds no block while it waits for its caller.

        Raises:
            ValueError: a state number that is not there, or a text input that is no stop.
        """
        last = self.num_blocks
        if not set(stops) <= set(range(last + 1)) or not set(text_inputs) <= set(stops) - {last}:
            raise ValueError(f"stops {sorted(stops)}, text_inputs {sorted(text_inputs)}: wanted stops in 0..{last}, text inputs among them")
        embedded = [self.embed(sample) for sample in samples]
        sweep = Sweep(shared=[e.shared for e in embedded], tembs=[e.temb for e in embedded])
        current = [e.states for e in embedded]
        del embedded  # else the first states would stay to the end
        for number in range(max(stops, default=-1) + 1):
            if number in stops:
                kept = [dict(states) for states in current]
                if number in text_inputs:
                    self._add_text_inputs(text_blocks(number), number, kept, sweep.shared)
                sweep.states[number] = kept
                del kept
                self.release()
                yield number, sweep
            if number < max(stops):
                sweep.inside = self._run(number, current, sweep.shared, inside)

    def velocities(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """The velocity (B, S, C) of every batch, as `flow.predict` gives it."""
        return [velocity for velocity, _ in self.outputs(samples)]

    def outputs(self, samples: Sequence[Sample], stops: Collection[int] = ()) -> list[tuple[torch.Tensor, dict[int, States]]]:
        """Every batch's velocity (B, S, C), as `flow.predict` gives it, with the states of these numbers."""
        if not samples:
            return []
        *_, (_, sweep) = self.sweep(samples, {self.num_blocks, *stops})
        found = []
        for n, sample in enumerate(samples):
            found.append((self.finish(sample, sweep.states[self.num_blocks][n]), {stop: sweep.states[stop][n] for stop in stops}))
        return found

    def embed(self, sample: Sample, skeleton: Skeleton | None = None) -> Embedded:
        """What enters the blocks of this teacher for a sample, or those of a student whose skeleton is given."""
        return (skeleton or self.skeleton).embed((), self._inputs(sample))

    def finish(self, sample: Sample, states: States, skeleton: Skeleton | None = None) -> torch.Tensor:
        """The velocity (B, S, C) of a sample from the last block's states, as `flow.predict` gives it, of this teacher or of a student."""
        velocity: torch.Tensor = (skeleton or self.skeleton).finish(states, (), self._inputs(sample))[0]
        return velocity[:, : sample[0].shape[1]].to(sample[0])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own forward gives, without gradients; a streamed teacher reads all of its blocks for it."""
        embedded = self.skeleton.embed(args, kwargs)
        current = [embedded.states]
        for block in range(self.num_blocks):
            self._run(block, current, [embedded.shared])
        self.release()
        return self.skeleton.finish(current[0], args, kwargs)

    def state_bytes(self, sample: Sample) -> int:
        """Bytes of the states of one of the samples, both streams."""
        return sum(x.nbytes for x in self.embed(picked(sample, [0])).states.values())

    def parts(self, sample: Sample) -> list[Sample]:
        """The samples in their order, as few batches as states of at most PASSING_BYTES allow."""
        rows = max(1, PASSING_BYTES // self.state_bytes(sample))
        return [picked(sample, range(i, min(i + rows, len(sample[1])))) for i in range(0, len(sample[1]), rows)]

    def block_tensors(self, block: int) -> dict[str, torch.Tensor]:
        """A block's tensors by name, copies on the CPU that the caller may keep and change."""
        raise NotImplementedError

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Every tensor of the teacher by its full name, on the CPU, where students are built."""
        raise NotImplementedError

    def block(self, block: int) -> nn.Module:
        """A block, ready to run, until another is asked for or it is released."""
        raise NotImplementedError

    def release(self) -> None:
        """Give back the memory of the block that was run last, where it is held for that alone."""

    def _inputs(self, sample: Sample) -> dict[str, Any]:
        """Keyword arguments of forward for a sample."""
        return flow.inputs_for(self, *sample) | {"return_dict": False}

    @torch.no_grad()
    def _run(self, block: int, current: list[States], shared: Sequence[Shared], inside: Collection[int] = ()) -> dict[int, Inside]:
        """Put every batch's states through a block, each in the place of its input; of the batches `inside`, what lies within."""
        module, group, found = self.block(block), self.group(block), {}
        streams = self.family.ffn_streams(self.config, block) if inside else ()
        for n in range(len(current)):
            given = shared[n][block]
            if n in inside:
                mapped = group.text_input if group.text_modules else None
                text_input = mapped(module, current[n]["text"], given) if mapped else None
                with ffn_inputs_kept(module, group, streams) as mids:
                    current[n] = group.call(module, current[n], given)
                found[n] = Inside(mids, text_input)
            else:
                current[n] = group.call(module, current[n], given)
        return found

    @torch.no_grad()
    def _add_text_inputs(self, other: nn.Module | None, block: int, states: list[States], shared: Sequence[Shared]) -> None:
        module, text_input = self.block(block) if other is None else other.to(self.device), self.group(block).text_input
        assert text_input is not None
        for batch, given in zip(states, shared, strict=True):
            batch[TEXT_INPUT] = text_input(module, batch["text"], given[block])

    def group(self, block: int) -> Group:
        """The group that a block is of."""
        return self.skeleton.slots[block].group


class ResidentTeacher(Teacher):
    """A teacher with all of its blocks in memory: a model, whose tensors it shares."""

    def __init__(self, model: Any, family: Family) -> None:
        super().__init__(family, {"_class_name": type(model).__name__, **model.config}, Skeleton(model, family), model.dtype, model.device)
        self.model, self._blocks = model, blocks_of(model, family)

    def block_tensors(self, block: int) -> dict[str, torch.Tensor]:
        """As `Teacher.block_tensors`."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in block_state(self._blocks[block]).items()}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The model's own tensors by full name, no copies where it is on the CPU."""
        return _OnCpu(self.model.state_dict())

    def block(self, block: int) -> nn.Module:
        return self._blocks[block]


class _OnCpu(Mapping[str, torch.Tensor]):
    """Tensors by name, each brought to the CPU when it is asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name].cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class StreamedTeacher(Teacher):
    """A teacher that is never in memory as a whole: one block at a time is read from its files.

    It takes the memory of one block and of one tensor more, and of all that is not in blocks.
    `read_seconds` is the time that reading blocks has taken so far. `held_bytes`: what a caller should hold of states at most for whom
    a block is read once: more is faster.

    Raises:
        ModelError: as `load_source`, by headers alone. Values that are not finite are met when their block is read.
    """

    def __init__(self, source: Source, dtype: str, device: torch.device | str = "cpu") -> None:
        self.device, self.read_seconds = torch.device(device), 0.0
        self._files = WeightFiles(source, DTYPES[dtype], self.device)
        self._tensors = WeightFiles(source, DTYPES[dtype], torch.device("cpu"))
        model = empty_model(source.family, source.config, str(source.folder / "config.json")).eval().requires_grad_(False)
        self._files.check({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
        super().__init__(source.family, source.config, Skeleton(model, source.family), DTYPES[dtype], self.device)
        outside = self.skeleton.model
        outside.load_state_dict({name: self._files[name] for name in outside.state_dict()}, strict=True, assign=True)
        self._modules = blocks_of(model, source.family)  # without memory, but for the one that is held
        self._empty = [module.state_dict() for module in self._modules]
        block_bytes = max(sum(t.numel() for t in empty.values()) for empty in self._empty) * self.dtype.itemsize
        self.held_bytes = max(HELD_BYTES, HELD_BLOCKS * block_bytes)
        if self.device.type == "cuda":  # whose memory holds nothing else of the teacher
            self.held_bytes = max(self.held_bytes, int(HELD_SHARE * free_bytes(self.device)))
        for module in (outside, *self._modules):  # buffers that no file holds
            module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self.device))
        self._held: int | None = None
        self._memory: dict[str, torch.Tensor] = {}

    def block_tensors(self, block: int) -> dict[str, torch.Tensor]:
        """As `Teacher.block_tensors`, read anew."""
        prefix = self.family.prefix(self.config, block)
        return {name: self._tensors[prefix + name] for name in self._empty[block]}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Every tensor by its full name, read on each access: `items` and `values` read them all in turn."""
        return self._tensors

    def block(self, block: int) -> nn.Module:
        """The block, read into the memory of the one before, where that had the same shapes."""
        if self._held != block:
            start = time.perf_counter()
            if self._held is not None and _shapes(self._empty[self._held]) != _shapes(self._empty[block]):
                self.release()
            memory = self._memory or _one_allocation(self._empty[block], self.dtype, self.device)
            self.release()  # a refusal midway leaves no block that could be taken for whole
            prefix = self.family.prefix(self.config, block)
            for name, tensor in memory.items():
                self._files.read(prefix + name, tensor)
            self._modules[block].load_state_dict(memory, strict=True, assign=True)
            self._held, self._memory = block, memory
            self.read_seconds += time.perf_counter() - start
        return self._modules[block]

    def release(self) -> None:
        if self._held is not None:
            self._modules[self._held].load_state_dict(self._empty[self._held], strict=True, assign=True)
        self._held, self._memory = None, {}

    def _inputs(self, sample: Sample) -> dict[str, Any]:
        return {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in super()._inputs(sample).items()}


@contextlib.contextmanager
def ffn_inputs_kept(block: nn.Module, group: Group, streams: Collection[str]) -> Iterator[States]:
    """By stream, what enters the feed-forward networks of a block that is run within: the state after the attention residual."""
    kept: States = {}

    def keep(stream: str) -> Any:
        return block.get_submodule(group.ffn_inputs[stream]).register_forward_pre_hook(
            lambda _, args: kept.__setitem__(stream, args[0].detach())
        )

    hooks = [keep(stream) for stream in streams]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _shapes(block: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in block.items()}


def _one_allocation(like: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors of these names and shapes in one piece of memory, which goes back to the system whole when they go."""
    sizes = {name: math.ceil(tensor.numel() * dtype.itemsize / ALIGNMENT) * ALIGNMENT for name, tensor in like.items()}
    pieces = torch.empty(sum(sizes.values()), dtype=torch.uint8, device=device).split(list(sizes.values()))
    return {
        name: piece[: tensor.numel() * dtype.itemsize].view(dtype).view(tensor.shape)
        for (name, tensor), piece in zip(like.items(), pieces, strict=True)
    }
