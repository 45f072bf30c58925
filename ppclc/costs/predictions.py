"""What a student will be, from configuration and plan alone: parameters, bytes on disk, latency, memory while it runs.

Nothing is allocated and nothing is run: parameters and bytes are counted exactly, activations are
followed through one forward of fake tensors.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ppclc.costs.blocks import BlockCosts, blocks_by_group, default_size, width_of
from ppclc.errors import PlanError
from ppclc.families import Family
from ppclc.loading import checkpoints
from ppclc.loading.checkpoints import METADATA
from ppclc.loading.classes import DTYPES, count_parameters, model_class, model_outline, student_config
from ppclc.plan import CompressionPlan
from ppclc.records import safetensors_header

TRACED_BLOCKS = 2
"""Blocks of a group that activations are followed through: the peak of a forward does not grow with depth."""


class Prediction(BaseModel):
    """One model before it is made. `bytes`: its weight files. `vram_bytes`: weights and activations at bench's size.

    `latency_ms` is None where no block costs were measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    parameters: int
    bytes: int
    blocks: int
    latency_ms: float | None
    vram_bytes: int


def predict(
    family: Family,
    config: Mapping[str, Any],
    plan: CompressionPlan,
    dtype: str,
    costs: BlockCosts | None = None,
    size: Mapping[str, int] | None = None,
) -> Prediction:
    """The student of a teacher's configuration; with an empty plan, the teacher itself.

    Raises:
        PlanError: a plan that the model cannot take.
        ModelError: a configuration that cannot be built.
    """
    if plan.modulation_rank is not None and plan.modulation_rank > width_of(config):
        raise PlanError(f"plan.modulation_rank = {plan.modulation_rank}: wanted at most the width, {width_of(config)}")
    empty = model_outline(family, student_config(family, config, plan))
    return Prediction(
        parameters=count_parameters(empty),
        bytes=weight_bytes(empty, dtype),
        blocks=len(plan.kept),
        latency_ms=costs.latency_ms(plan, config) if costs else None,
        vram_bytes=_tensor_bytes(empty, dtype) + student_activation_bytes(family, config, plan, dtype, size),
    )


def vram_bytes(family: Family, config: Mapping[str, Any], plan: CompressionPlan, dtype: str, size: Mapping[str, int] | None = None) -> int:
    """Most bytes that tensors take while the plan's student runs: weights, and activations at a size.

    What a device's context, its libraries' work space and the allocator's rounding take is not counted.
    """
    return predict(family, config, plan, dtype, None, size).vram_bytes


def _tensor_bytes(model: Any, dtype: str) -> int:
    """Bytes of parameters and persistent buffers; floating-point ones in `dtype`."""
    return sum(t.numel() * dtype_for(t, dtype).itemsize for t in model.state_dict().values())


def dtype_for(tensor: torch.Tensor, dtype: str) -> torch.dtype:
    """What a tensor of a model in a dtype is in: numbers that count or tell apart stay as they are."""
    return DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype


def weight_bytes(empty: Any, dtype: str) -> int:
    """Bytes of the safetensors files that `save_model` writes for a model, headers included, its index not.

    `empty` may be on the meta device.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    # With the target's dtype, since the limit of a shard is in bytes.
    state = {n: t.to(dtype_for(t, dtype)) for n, t in empty.state_dict().items()}
    split = split_torch_state_dict_into_shards(state, max_shard_size=checkpoints.SHARD_SIZE)
    headers = [safetensors_header({n: state[n] for n in names}, METADATA) for names in split.filename_to_tensors.values()]
    return sum(len(h) for h in headers) + _tensor_bytes(empty, dtype)


def student_activation_bytes(
    family: Family, config: Mapping[str, Any], plan: CompressionPlan, dtype: str, size: Mapping[str, int] | None = None
) -> int:
    """Most bytes of activations in one forward of the plan's student.

    A student that has a whole block left peaks there as its teacher does; only one that has none is followed itself.
    """
    edited = {e.block for e in plan.text_stream} | {e.block for e in plan.ffn}
    if any(block not in edited for block in plan.kept):
        kept = blocks_by_group(family, config, plan)
        shallow = dict(config) | {g.count_key: min(TRACED_BLOCKS, kept[g.name]) for g in family.groups}
        # The class of a student runs its whole blocks in other steps than the stock one.
        rank = (plan.modulation_rank or width_of(config)) if plan.has_width_edits else None
        # One more block, to be merged, where a whole block has adapters: its states are there twice.
        pair = [(0, 1)] if any(i.first not in edited for i in plan.adapters) else []
        shallow |= {g.count_key: shallow[g.count_key] + len(pair) for g in family.groups[:1]}
        like = CompressionPlan.of(family.name, family.num_blocks(shallow), pair, modulation_rank=rank, adapters=pair)
        config = student_config(family, shallow, like)
    else:
        config = student_config(family, config, plan)
    return activation_bytes(family, config, dtype, size)


def activation_bytes(
    family: Family, config: Mapping[str, Any], dtype: str, size: Mapping[str, int] | None = None, training: bool = False
) -> int:
    """Most bytes that the tensors of one forward take beside the weights, inputs included; `training` adds a backward.

    Of a training step the gradients are counted, the optimizer's state is not.
    """
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    return _activation_bytes(
        family.name, json.dumps(plain, sort_keys=True), dtype, tuple(sorted((size or default_size(family)).items())), training
    )


@cache
def _activation_bytes(family_name: str, config: str, dtype: str, size: tuple[tuple[str, int], ...], training: bool) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ppclc import plugins

    family: Family = plugins.load("families", family_name)
    given = json.loads(config)
    model_outline(family, given)  # its errors are ours
    with FakeTensorMode():
        model = model_class(family, given).from_config({k: v for k, v in given.items() if k != "auto_map"})
        state = {n: t.to(dtype_for(t, dtype)) for n, t in model.state_dict().items()}
        model.load_state_dict(state, strict=True, assign=True)
        model.eval().requires_grad_(training)
        inputs = family.example_inputs(given, **dict(size))
        inputs = {k: v.to(dtype_for(v, dtype)) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        with Allocations() as seen, torch.set_grad_enabled(training):
            output = model(**inputs, return_dict=False)[0]
            if training:
                output.square().mean().backward()
        return int(seen.peak) + sum(int(t.nbytes) for t in inputs.values() if isinstance(t, torch.Tensor))


class Allocations(TorchDispatchMode):
    """Bytes of the storages that come and go while it is active: `live` now, `peak` at most.

    Storages of arguments that were there before are not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        for tensor in tree_iter((args, kwargs or {})):
            if isinstance(tensor, torch.Tensor):
                self._know(tensor.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._know(storage := tensor.untyped_storage(), storage.nbytes())
        return result

    def _know(self, storage: torch.UntypedStorage, count: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += count
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, count)

    def _forget(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.live -= count


def by_depth(family: Family, config: Mapping[str, Any], plan: CompressionPlan, measured: Callable[[dict[str, Any]], int]) -> int:
    """What is measured of a student's configuration, where it is linear in depth: shallow students of like blocks tell it."""
    rank = (plan.modulation_rank or width_of(config)) if plan.has_width_edits else None
    low = [2] * len(family.groups)

    def at(
        first: int, text_stream: tuple[int, ...] = (), ffn: tuple[tuple[int, str], ...] = (), pairs: tuple[tuple[int, int], ...] = ()
    ) -> int:
        """With so many blocks in the first group, which is the one that width edits are tried in."""
        return of([first, *low[1:]], text_stream, ffn, pairs)

    def of(
        sizes: Sequence[int],
        text_stream: tuple[int, ...] = (),
        ffn: tuple[tuple[int, str], ...] = (),
        pairs: tuple[tuple[int, int], ...] = (),
    ) -> int:
        shallow = dict(config) | {g.count_key: size for g, size in zip(family.groups, sizes, strict=True)}
        like = CompressionPlan.of(family.name, family.num_blocks(shallow), pairs, text_stream, rank, ffn=ffn, adapters=pairs)
        return measured(student_config(family, shallow, like))

    two, three, mapped = of(low), at(3), len(plan.text_stream)
    saved = mapped * (three - at(3, (2,))) if mapped else 0
    for stream in {e.stream for e in plan.ffn}:
        saved += sum(e.stream == stream for e in plan.ffn) * (three - at(3, (), ((2, stream),)))
    if plan.adapters:
        saved += len(plan.adapters) * (three - at(4, pairs=((2, 3),)))
    total = two - saved
    for n, count in enumerate(blocks_by_group(family, config, plan).values()):
        deeper = three if n == 0 else of([*low[:n], 3, *low[n + 1 :]])
        total += (deeper - two) * (count - 2)
    return max(0, total)
