"""How a module is trained, whatever it learns: optimizer, schedule, average, precision, and checkpoints that hold all of it.

Weights, optimizer state, the average, the step number and the state of the generator that batches are drawn
from are the whole of a training: one that was stopped goes on from its checkpoint to the same bits.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from torch import nn

from ppclc.data.batches import Feed
from ppclc.errors import RecipeError, UnavailableError
from ppclc.kernels.distillation_loss import one
from ppclc.loading.checkpoints import STATES, places_in, read_at
from ppclc.machine.devices import Ranks, gradients_settle
from ppclc.machine.interrupts import noted_interrupts
from ppclc.records import write_tensors
from ppclc.training.curves import Curve
from ppclc.training.shards import forget_older, like, local, newest_step, shard_file, whole

Progress = Callable[[float, str], None]
Terms = Mapping[str, torch.Tensor]
"""A loss by its weighted terms, which add up to it."""
CHECKPOINT = "checkpoint.safetensors"
LOG_EVERY = 10
SAVING_SHARE = 0.05
"""Most of the time that checkpoints may take: those of large models are left out until the time for one has come again."""
ALONE = Ranks()
BETAS = (0.9, 0.95)
"""Source: arXiv 2511.16156, training set-up; weight decay as well."""


class TrainingSettings(BaseModel):
    """The keys of a recipe that say how gradient steps are made.

    accumulate: batches a step. schedule: `cosine` to zero or `constant`, after `warmup` steps. optimizer:
    `adamw8bit` needs bitsandbytes. ema: decay of an average of the weights, which is then what is kept;
    0 for none. precision: of products in the forward; weights and sums stay in float32. `auto` is the
    model's own dtype. clip: largest norm of the gradient.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    accumulate: Annotated[int, Field(ge=1)] = 1
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Annotated[int, Field(ge=1)] = 20
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.02
    clip: Annotated[float, Field(gt=0)] = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def rate(self, step: int, steps: int) -> float:
        """Learning rate at a step, as a share of its peak."""
        warm = (step + 1) / self.warmup
        return min(warm, 1.0 if self.schedule == "constant" else 0.5 + 0.5 * math.cos(math.pi * step / steps))


class Trainer:
    """A module with all that its next step depends on. Its trainable parameters are those that require a gradient.

    name: what a message calls it. losses: of every step so far. Parameters in half precision are raised to float32, which small steps need.
    ranks: those that train it together, each on batches of its own; `blocks` are the units in which it is sharded.
    """

    def __init__(
        self,
        module: nn.Module,
        steps: int,
        learning_rate: float,
        settings: TrainingSettings,
        ranks: Ranks = ALONE,
        blocks: Sequence[nn.Module] = (),
        name: str = "training",
    ) -> None:
        self.name = name
        self.dtype, self.ranks = next(module.parameters()).dtype, ranks
        self.module = module.float() if ranks.sharded else module.float().to(ranks.device)  # a shard moves alone
        self.called: nn.Module = ranks.prepared(self.module, blocks)
        self.steps, self.learning_rate, self.settings = steps, learning_rate, settings
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.optimizer = _optimizer(self.parameters.values(), settings)
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if settings.ema else {}
        self.losses: list[float] = []
        # The gradient of a parameter of one element may be what a backward began with itself, and gradients are scaled where they lie.
        self.known = all(p.numel() > 1 for p in self.parameters.values())
        # Nothing here holds this object: it, and what it has on a GPU, is gone as soon as nobody needs it.
        self.clip: Callable[[], Any] = partial(nn.utils.clip_grad_norm_, list(self.parameters.values()), settings.clip)

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return self.learning_rate * self.settings.rate(len(self.losses), self.steps)

    def step(self, losses: Iterable[Callable[[nn.Module], Terms]]) -> dict[str, float]:
        """One step on the mean of some losses, each on a batch of its own; the mean of each term, over all ranks.

        Raises:
            RecipeError: a loss or a gradient that is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.zero_grad()
        found: list[tuple[str, torch.Tensor]] = []
        parts = list(losses)
        for n, part in enumerate(parts, start=1):
            with gradients_settle(self.called, last=n == len(parts)):
                with self.autocast():
                    terms = part(self.called)
                _backward(list(terms.values()), len(parts), self.known)
            found += [(name, term.detach()) for name, term in terms.items()]
        norm = whole(self.clip())  # of all ranks' gradients: all find the same
        # Read at once: each look at a number waits for the device.
        *values, length = torch.stack([*(t.to(norm) for _, t in found), norm]).tolist()
        told: dict[str, float] = {}
        for (name, _), value in zip(found, values, strict=True):
            told[name] = told.get(name, 0.0) + value / len(parts)
        if not math.isfinite(length):
            raise RecipeError(
                f"{self.name}: loss {sum(told.values()):.4g} with a gradient of norm {length:.4g} at step {len(self.losses) + 1} of "
                f"{self.steps}, learning rate {self.rate:.3g}: the training diverged; wanted a smaller learning rate, or more warmup"
            )
        self.optimizer.step()
        self._follow()
        told = dict(zip(told, self.ranks.mean(list(told.values())), strict=True))
        self.losses.append(sum(told.values()))
        return told

    @property
    def precision(self) -> torch.dtype:
        """What products of the forward are made in."""
        return {"auto": self.dtype, "float32": torch.float32, "bfloat16": torch.bfloat16}[self.settings.precision]

    def autocast(self) -> torch.autocast:
        """The forward's context: float32 weights, products in `precision`."""
        return autocast(self.module, self.precision)

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights. Its decay rises with the steps, so that the start is soon forgotten."""
        decay = min(self.settings.ema, (1 + len(self.losses)) / (10 + len(self.losses)))
        for name, value in self.average.items():
            local(value).lerp_(local(self.parameters[name]), 1 - decay)

    def trained(self) -> dict[str, torch.Tensor]:
        """All tensors of the module as they are kept, in its own dtype: the average where there is one.

        Of a sharded module the main rank has them, and the others nothing; all have to ask.
        """
        kept: dict[str, torch.Tensor] = {}
        for name, value in (self.module.state_dict() | self.average).items():
            full = whole(value)
            if self.ranks.is_main or not self.ranks.sharded:
                kept[name] = full.to("cpu", self.dtype if full.is_floating_point() else full.dtype, copy=True)
        return kept

    def window_losses(self) -> list[tuple[int, float]]:
        """The mean loss of every ten steps, with the last one's number."""
        windows = [self.losses[i : i + LOG_EVERY] for i in range(0, len(self.losses), LOG_EVERY)]
        return [(i * LOG_EVERY + len(w), sum(w) / len(w)) for i, w in enumerate(windows)]

    def save(self, path: Path, generator_state: torch.Tensor) -> None:
        """Write everything, whole or not at all; `generator_state` is that after the last batch that was used.

        Ranks with a copy each leave this to the main one; with shards, each writes its own.
        """
        if not (self.ranks.is_main or self.ranks.sharded):
            return
        tensors, numbers = {"generator": generator_state}, {}
        for name, parameter in self.parameters.items():
            tensors[f"weight.{name}"] = local(parameter)
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"state.{key}.{name}"] = local(value)
                else:
                    numbers[f"{key}.{name}"] = value
        tensors |= {f"average.{n}": local(v) for n, v in self.average.items()}
        step = len(self.losses)
        own = shard_file(path.parent, step, self.ranks) if self.ranks.sharded else path
        write_tensors(own, tensors, {"losses": json.dumps(self.losses), "numbers": json.dumps(numbers)})
        if self.ranks.sharded:
            forget_older(path.parent, step, self.ranks)

    def load(self, path: Path) -> torch.Tensor | None:
        """Go on from a checkpoint; the generator's state, None where there is no checkpoint.

        Raises:
            UnavailableError: the checkpoint is sharded over another number of processes, or not sharded where this is.
        """
        step = newest_step(path.parent, self.ranks)
        if step is not None:
            path = shard_file(path.parent, step, self.ranks)
        if not path.exists():
            return None
        if step is None and self.ranks.sharded:
            raise UnavailableError(
                f"{path.parent}: holds a checkpoint of whole weights; go on without --use_fsdp, or remove that folder to begin anew"
            )
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        self.losses = json.loads(metadata["losses"])
        numbers: dict[str, Any] = json.loads(metadata["numbers"])
        # Read and not mapped: pages of a mapped file count as memory of the process beside what is read from them.
        held = places_in(path, STATES)
        for name, parameter in self.parameters.items():
            local(parameter).copy_(read_at(held[f"weight.{name}"]))
            state = {_key(k, "state.", name): like(read_at(p), parameter) for k, p in held.items() if _is_of(k, "state.", name)}
            state |= {_key(k, "", name): v for k, v in numbers.items() if _is_of(k, "", name)}
            if state:  # parameters that nothing reads get no gradient, and have no state
                self.optimizer.state[parameter] = state
        for name, value in self.average.items():
            local(value).copy_(read_at(held[f"average.{name}"]))
        return read_at(held["generator"])


def autocast(module: nn.Module, wanted: torch.dtype) -> torch.autocast:
    """A context in which products of a module, whose weights are float32, are made in a dtype."""
    device = next(iter(module.parameters())).device.type
    return torch.autocast(device, torch.bfloat16 if wanted == torch.float32 else wanted, enabled=wanted != torch.float32)


def _backward(terms: Sequence[torch.Tensor], parts: int, known: bool) -> None:
    """Add the gradients of a sum of scalars, one of so many parts of a mean, to the parameters. known: begin with `one` itself where that is right.

    Each term is begun with on its own: adding them up, and making the ones that a sum begins with, are as many kernels more on a GPU.
    """
    learnt = [t for t in terms if t.requires_grad]
    ones = [one(t.device, t.dtype) for t in learnt]
    torch.autograd.backward(learnt, ones if known and parts == 1 else [o / parts for o in ones])


class Saving:
    """When checkpoints are due: every so many steps, and no sooner than writing the last one is a small share of the time since."""

    def __init__(self, every: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.every, self.clock, self.ended, self.took = every, clock, clock(), 0.0

    def due(self, done: int) -> bool:
        """Whether one is due after so many steps."""
        return done % self.every == 0 and self.took <= SAVING_SHARE * (self.clock() - self.ended)

    def timed(self, save: Callable[[], None]) -> None:
        """Write one."""
        start = self.clock()
        save()
        self.ended = self.clock()
        self.took = self.ended - start


def train(
    trainer: Trainer,
    feed: Feed,
    loss: Callable[[nn.Module, Any], Terms],
    seed: int,
    every: int,
    work: Path,
    progress: Progress,
    curve: Callable[[int], Curve] | None = None,
) -> None:
    """Train to the end, from the checkpoint in `work` if there is one; one more is left there every so many steps.

    The first SIGINT or SIGTERM, on any rank, ends it after the step that is under way, with a checkpoint.

    Raises:
        KeyboardInterrupt: a stop was asked for.
    """
    path, generator = work / CHECKPOINT, torch.Generator().manual_seed(seed)
    state = trainer.load(path)
    if state is not None:
        generator.set_state(state)
    drawn_curve = curve(len(trainer.losses)) if curve else None
    saving = Saving(every)
    with closing(drawn_curve) if drawn_curve else nullcontext(), noted_interrupts() as interrupt:
        for chunk in feed.chunks(generator, trainer.steps - len(trainer.losses)):
            for step in chunk:
                rate = trainer.rate
                terms = trainer.step([partial(_loss_on, loss, batch) for batch in step.batches])
                done, stop = len(trainer.losses), trainer.ranks.any(interrupt.asked)
                if drawn_curve:
                    drawn_curve.add(done, terms, rate)
                if stop or (done < trainer.steps and done % every == 0 and trainer.ranks.any(saving.due(done))):
                    saving.timed(partial(trainer.save, path, step.state))
                if stop:
                    trainer.ranks.wait()  # a launcher ends all once one has left: not before every file is whole
                    raise KeyboardInterrupt
                progress(done / trainer.steps, f"loss {trainer.losses[-1]:.4g}")


def _loss_on(loss: Callable[[nn.Module, Any], Terms], batch: Any, module: nn.Module) -> Terms:
    return loss(module, batch)


def steps_done(path: Path) -> int:
    """Steps that a checkpoint has behind it, 0 where there is none."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return len(json.loads(file.metadata()["losses"]))


def generator_state(path: Path) -> torch.Tensor:
    """The generator's state that a checkpoint holds."""
    return read_at(places_in(path, STATES)["generator"])


def _is_of(key: str, prefix: str, name: str) -> bool:
    return key.startswith(prefix) and key.endswith(f".{name}") and "." not in _key(key, prefix, name)


def _key(key: str, prefix: str, name: str) -> str:
    return key[len(prefix) : -len(name) - 1]


def state_bytes(settings: TrainingSettings) -> int:
    """Bytes a parameter that learns takes beside its weight in float32: gradient, both moments, a copy in 16 bits, the average."""
    moments = 2 if settings.optimizer == "adamw8bit" else 8
    return 4 + moments + 2 + (4 if settings.ema else 0)


def checkpoint_bytes(settings: TrainingSettings) -> int:
    """Bytes that a parameter which learns takes of a checkpoint: its weight in float32, both moments, the average."""
    moments = 2 if settings.optimizer == "adamw8bit" else 8
    return 4 + moments + (4 if settings.ema else 0)


def check_optimizer(settings: TrainingSettings) -> None:
    """Raise UnavailableError when the optimizer's library is not there."""
    if settings.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise UnavailableError("distill.optimizer = 'adamw8bit': pip install 'ppclc[adamw8bit]', or take adamw")


def _optimizer(parameters: Iterable[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW in float32 or with 8-bit moments. Raises UnavailableError as `check_optimizer`."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=0.0, betas=BETAS, weight_decay=settings.weight_decay, fused=True)
    check_optimizer(settings)
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(list(parameters), lr=0.0, betas=BETAS, weight_decay=settings.weight_decay)
    return optimizer
