"""The training loop: against torch driven by hand, with every knob, stopped and resumed to the same bits."""

from __future__ import annotations

import copy
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ppclc.data.batches import Feed
from ppclc.errors import RecipeError, UnavailableError
from ppclc.kernels import distillation_loss
from ppclc.kernels.distillation_loss import one
from ppclc.machine.devices import Ranks
from ppclc.machine.interrupts import noted_interrupts
from ppclc.training.curves import Curve
from ppclc.training.trainer import CHECKPOINT, Trainer, TrainingSettings, steps_done, train

STEPS = 30


def quiet(*_: Any) -> None:
    """Progress that nobody watches."""


@pytest.fixture
def data() -> torch.Tensor:
    return torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def feed(data: torch.Tensor, **changes: Any) -> Feed:
    return Feed(lambda g: data[torch.randint(40, (5,), generator=g)], list, **changes)


def loss(module: nn.Module, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"a": 0.25 * module(rows).square().mean(), "b": 0.75 * module(rows).square().mean()}


def test_a_parameter_of_one_element_leaves_the_one_that_backwards_begin_with_as_it_is() -> None:
    """Its gradient may be that tensor itself, and gradients are clipped where they lie."""
    lone = nn.Module()
    lone.weight = nn.Parameter(torch.tensor([2.0]))
    trainer = Trainer(lone, 3, 0.05, TrainingSettings(clip=0.1))
    trainer.step([lambda m: {"a": m.weight.reshape(())}])
    assert one(torch.device("cpu"), torch.float32).item() == 1.0
    assert lone.weight.grad is not None
    assert lone.weight.grad.item() == pytest.approx(0.1)


def test_the_one_that_backwards_begin_with_is_kept_unless_it_only_stands_for_one() -> None:
    place = torch.device("cpu"), torch.float64
    with FakeTensorMode():
        assert type(one(torch.device("meta"), torch.float64)) is not torch.Tensor
    assert one(*place) is one(*place)
    assert one(*place).item() == 1.0
    assert (torch.device("meta"), torch.float64) not in distillation_loss._ones


def run(data: torch.Tensor, work: Path, settings: TrainingSettings, progress: Any = quiet, curve: Any = None, **changes: Any) -> Trainer:
    work.mkdir(exist_ok=True)
    trainer = Trainer(module(), STEPS, 0.05, settings)
    train(trainer, feed(data, accumulate=settings.accumulate, **changes), loss, 3, 7, work, progress, curve)
    return trainer


def by_hand(data: torch.Tensor, settings: TrainingSettings) -> tuple[nn.Module, list[float], dict[str, torch.Tensor]]:
    """The same training with torch's own optimizer and schedule, written out."""
    twin, own = module(), torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1, betas=(0.9, 0.95), weight_decay=settings.weight_decay)
    average, losses = copy.deepcopy(twin.state_dict()), []
    for step in range(STEPS):
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / STEPS, dtype=torch.float64)).item())
        optimizer.param_groups[0]["lr"] = 0.05 * min((step + 1) / settings.warmup, 1.0 if settings.schedule == "constant" else cosine)
        rows = [data[torch.randint(40, (5,), generator=own)] for _ in range(settings.accumulate)]
        value = twin(torch.cat(rows)).square().mean()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), settings.clip)
        optimizer.step()
        losses.append(value.item())
        decay = min(settings.ema, (1 + step) / (10 + step))
        average = {k: decay * v + (1 - decay) * twin.state_dict()[k] for k, v in average.items()}
    return twin, losses, average


@pytest.mark.parametrize(
    "changes",
    [{}, {"schedule": "constant", "warmup": 5}, {"accumulate": 3}, {"ema": 0.9}, {"clip": 0.01, "weight_decay": 0.5}],
    ids=lambda c: "-".join(c) or "plain",
)
def test_training_is_what_torch_does_when_driven_by_hand(data: torch.Tensor, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = TrainingSettings(**changes)
    trainer = run(data, tmp_path / "work", settings)
    twin, losses, average = by_hand(data, settings)
    assert trainer.losses == pytest.approx(losses, rel=1e-5)
    kept = average if settings.ema else twin.state_dict()
    assert all(torch.allclose(v, kept[k], rtol=1e-4, atol=1e-6) for k, v in trainer.trained().items())
    assert trainer.window_losses() == [(n, pytest.approx(sum(losses[n - 10 : n]) / 10, rel=1e-5)) for n in (10, 20, 30)]


class StopError(Exception):
    """Power goes."""


def stop_at(step: int) -> Callable[[float, str], None]:
    def progress(done: float, _: str) -> None:
        if round(done * STEPS) == step:
            raise StopError

    return progress


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"accumulate": 2}, {"precision": "bfloat16"}], ids=lambda c: "-".join(c) or "plain")
@pytest.mark.parametrize("stops", [[7], [3, 13, 20], [29]])
def test_a_stopped_training_ends_on_the_same_bits(
    data: torch.Tensor, tmp_path: Path, stops: list[int], changes: dict[str, Any], together: int
) -> None:
    settings = TrainingSettings(**changes)
    whole = run(data, tmp_path / "whole", settings)
    for step in stops:
        with pytest.raises(StopError):
            run(data, tmp_path / "parts", settings, stop_at(step), together=together)
    again = run(data, tmp_path / "parts", settings, ahead=False)
    assert again.losses == whole.losses
    assert all(torch.equal(v, whole.trained()[k]) for k, v in again.trained().items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_after_its_step_with_a_checkpoint(data: torch.Tensor, tmp_path: Path, number: int) -> None:
    def progress(done: float, _: str) -> None:
        if round(done * STEPS) == 11:
            os.kill(os.getpid(), number)

    whole = run(data, tmp_path / "whole", TrainingSettings())
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "parts", TrainingSettings(), progress)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    seen: list[float] = []
    again = run(data, tmp_path / "parts", TrainingSettings(), lambda done, _: seen.append(done))
    assert len(seen) == STEPS - 12  # the step during which the signal came was still made and kept
    assert all(torch.equal(v, whole.trained()[k]) for k, v in again.trained().items())


def test_half_precision_weights_are_trained_in_single(data: torch.Tensor, tmp_path: Path) -> None:
    """A step far below bfloat16's resolution must not be lost; what is kept has the model's own dtype."""
    trainer = Trainer(module().bfloat16(), STEPS, 1e-5, TrainingSettings())
    train(trainer, feed(data), loss, 3, 7, tmp_path, quiet)
    assert all(p.dtype == torch.float32 for p in trainer.module.parameters())
    moved = [(p - q.float()).abs().max() for p, q in zip(trainer.module.parameters(), module().bfloat16().parameters(), strict=True)]
    assert all(0 < m < 1e-3 for m in moved)
    assert {v.dtype for v in trainer.trained().values()} == {torch.bfloat16}


def test_autocast_computes_in_the_precision_that_was_asked_for(data: torch.Tensor) -> None:
    seen: list[torch.dtype] = []
    for precision in ("float32", "bfloat16"):
        trainer = Trainer(module(), STEPS, 1e-3, TrainingSettings(precision=precision))
        trainer.module[0].register_forward_hook(lambda m, a, out: seen.append(out.dtype))
        trainer.step([lambda m: {"x": m(data).float().square().mean()}])
    assert seen == [torch.float32, torch.bfloat16]


def test_what_does_not_require_a_gradient_does_not_move(data: torch.Tensor) -> None:
    model = module()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, STEPS, 0.1, TrainingSettings(ema=0.5, weight_decay=0.9))
    trainer.step([lambda m: {"x": m(data).square().mean()}])
    kept = trainer.trained()
    assert torch.equal(kept["0.weight"], before["0.weight"])
    assert not torch.equal(kept["2.weight"], before["2.weight"])


def test_curves_go_on_where_the_checkpoint_is(data: torch.Tensor, tmp_path: Path) -> None:
    def curve(done: int) -> Curve:
        return Curve(tmp_path / "curves", "fit", done)

    with pytest.raises(StopError):
        run(data, tmp_path / "work", TrainingSettings(), stop_at(17), curve)
    path = tmp_path / "curves" / "fit.jsonl"
    with path.open("a") as file:
        file.write('{"step": 18, "lo')  # cut off
    trainer = run(data, tmp_path / "work", TrainingSettings(), curve=curve)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    assert [r["loss"] for r in rows] == trainer.losses
    assert all(r["a"] == pytest.approx(r["b"] / 3) for r in rows)
    assert list((tmp_path / "curves" / "tensorboard" / "fit").glob("events*"))


def test_eight_bit_adamw_learns_and_resumes_where_its_library_is(data: torch.Tensor, tmp_path: Path) -> None:
    """On a layer that is large enough for 8-bit moments; smaller ones keep theirs in float32."""
    pytest.importorskip("bitsandbytes")
    rows = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))

    def fit(work: Path, progress: Any = quiet) -> Trainer:
        work.mkdir(exist_ok=True)
        torch.manual_seed(0)
        trainer = Trainer(nn.Linear(64, 64), STEPS, 0.01, TrainingSettings(optimizer="adamw8bit"))
        train(trainer, feed(rows), loss, 3, 7, work, progress)
        return trainer

    whole = fit(tmp_path / "whole")
    assert whole.losses[-1] < 0.7 * whole.losses[0]
    states = [v for s in whole.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert torch.uint8 in {v.dtype for v in states}
    with pytest.raises(StopError):
        fit(tmp_path / "parts", stop_at(20))
    again = fit(tmp_path / "parts")
    assert again.losses == whole.losses
    assert all(torch.equal(v, whole.trained()[k]) for k, v in again.trained().items())


def test_eight_bit_adamw_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UnavailableError, match="ppclc\\[adamw8bit"):
        Trainer(module(), STEPS, 0.1, TrainingSettings(optimizer="adamw8bit"))


def test_a_checkpoint_is_written_whole_or_not_at_all(data: torch.Tensor, tmp_path: Path) -> None:
    run(data, tmp_path, TrainingSettings())
    assert (tmp_path / CHECKPOINT).is_file()
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_training_that_diverges_ends_in_a_message(data: torch.Tensor, tmp_path: Path) -> None:
    """Told at the first step whose gradient is not finite; nothing of it reaches the weights or a checkpoint."""

    def explodes(module: nn.Module, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        terms = loss(module, rows)
        return terms if len(trainer.losses) < 9 else {k: v * float("inf") for k, v in terms.items()}

    trainer = Trainer(module(), STEPS, 0.05, TrainingSettings(), name="interval-1-2")
    with pytest.raises(RecipeError, match=r"interval-1-2: loss inf .* at step 10 of 30, learning rate 0\.0\d+: .* smaller learning rate"):
        train(trainer, feed(data), explodes, 3, 7, tmp_path, quiet)
    assert len(trainer.losses) == 9
    assert all(p.isfinite().all() for p in trainer.parameters.values())
    assert steps_done(tmp_path / CHECKPOINT) == 7


def test_a_stop_in_the_last_step_loses_nothing(data: torch.Tensor, tmp_path: Path) -> None:
    def last(done: int) -> Callable[[nn.Module, torch.Tensor], dict[str, torch.Tensor]]:
        def stopping(module: nn.Module, rows: torch.Tensor) -> dict[str, torch.Tensor]:
            if len(trainer.losses) == done:
                os.kill(os.getpid(), signal.SIGINT)
            return loss(module, rows)

        return stopping

    trainer = Trainer(module(), STEPS, 0.05, TrainingSettings())
    with pytest.raises(KeyboardInterrupt):
        train(trainer, feed(data), last(STEPS - 1), 3, 7, tmp_path, quiet)
    assert steps_done(tmp_path / CHECKPOINT) == STEPS
    again = Trainer(module(), STEPS, 0.05, TrainingSettings())
    train(again, feed(data), loss, 3, 7, tmp_path, quiet)
    whole = run(data, tmp_path / "whole", TrainingSettings())
    assert again.losses == whole.losses
    assert all(torch.equal(v, whole.trained()[k]) for k, v in again.trained().items())


def test_a_signal_that_is_ignored_stays_so(data: torch.Tensor, tmp_path: Path) -> None:
    """As a shell has it for what runs in the background."""
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with noted_interrupts() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
        assert not interrupt.asked
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_whole_weights_are_no_start_for_shards(data: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        run(data, tmp_path, TrainingSettings(), stop_at(8))
    trainer = Trainer(module(), STEPS, 0.05, TrainingSettings())
    trainer.ranks = Ranks(world=2, sharded=True)
    with pytest.raises(UnavailableError, match="whole weights; go on without --use_fsdp"):
        trainer.load(tmp_path / CHECKPOINT)


def test_a_full_disk_under_a_curve_is_a_message(tmp_path: Path) -> None:
    curve = Curve(tmp_path, "a", 0)
    curve.close()
    with os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb", buffering=0) as full:
        curve.board, curve.file = None, io.TextIOWrapper(full, write_through=True)  # type: ignore[arg-type]
        with pytest.raises(UnavailableError, match="the disk is full"):
            curve.add(1, {"a": 1.0}, 0.1)
        curve.file.detach()
