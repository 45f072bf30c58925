"""Metrics and the sampler against references that share no code with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from ppclc.data import flow
from ppclc.quality import SampledDistance, paired_drop, paired_quality, velocity_error
from ppclc.scenes.judge import frechet_distance


class Field:
    """A transformer whose velocity is a function of (x, t, conditioning)."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, hidden_states: torch.Tensor, timestep: torch.Tensor, return_dict: bool, **conditioning: Any) -> tuple[torch.Tensor]:
        assert return_dict is False
        self.calls += 1
        return (self.function(hidden_states, timestep[:, None, None], **conditioning),)


def outcomes(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """0 or 1 for each scene, student and teacher alike on most of them."""
    g = np.random.default_rng(seed)
    teacher = g.random(count) < 0.85
    student = np.where(g.random(count) < 0.9, teacher, g.random(count) < 0.7)
    return torch.tensor(teacher, dtype=torch.float32), torch.tensor(student, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("better", ["higher", "lower"])
def test_paired_drop_is_that_of_a_bootstrap_over_pairs(better: str) -> None:
    teacher, student = outcomes(2000)
    drop, (low, high) = paired_drop(teacher, student, better)
    t, s = teacher.double().numpy(), student.double().numpy()
    sign = 1 if better == "higher" else -1
    assert drop == pytest.approx(sign * 100 * (t.mean() - s.mean()) / t.mean(), rel=1e-9)
    rows = np.random.default_rng(1).integers(len(t), size=(4000, len(t)))
    drops = sign * 100 * (1 - s[rows].mean(1) / t[rows].mean(1))
    wanted = np.quantile(drops, [0.025, 0.975])
    assert [low, high] == pytest.approx(wanted, abs=0.06 * (wanted[1] - wanted[0]))
    # Pairs are what makes it narrow: of unpaired samples the interval would be far wider.
    unpaired = 100 * (1 - s[rows[:2000]].mean(1) / t[rows[2000:]].mean(1))
    assert high - low < 0.7 * np.ptp(np.quantile(unpaired, [0.025, 0.975]))


def test_worse_is_positive_either_way() -> None:
    teacher = torch.tensor([1.0, 2.0, 3.0, 2.0])
    assert paired_drop(teacher, 0.9 * teacher, "higher")[0] == pytest.approx(10, rel=1e-6)
    assert paired_drop(teacher, 1.1 * teacher, "lower")[0] == pytest.approx(10, rel=1e-6)
    assert paired_drop(teacher, 0.9 * teacher, "lower")[0] == pytest.approx(-10, rel=1e-6)
    drop, (low, high) = paired_drop(teacher, 0.9 * teacher)
    assert high - low < 1e-4  # a constant ratio has no spread
    assert paired_drop(teacher, teacher) == (0.0, (0.0, 0.0))
    right = torch.ones(64)  # nothing differs in 64 pairs, of which 5.6 % may
    right[::8] = 0
    drop, (low, high) = paired_drop(right, right)
    assert drop == 0
    assert high == -low == pytest.approx(100 * (1 - 0.025 ** (1 / 64)) / 0.875)
    assert (1 - high / 100 * 0.875) ** 64 == pytest.approx(0.025)
    assert low <= drop <= high


def test_paired_quality_scales_and_gives_the_standard_error() -> None:
    teacher, student = outcomes(500)
    row = paired_quality(teacher, student, (0, 1), "%", "higher", 100)
    assert row.teacher == pytest.approx(100 * teacher.mean().item(), rel=1e-6)
    assert row.student == pytest.approx(100 * student.mean().item(), rel=1e-6)
    assert row.noise == pytest.approx(100 * np.std(student.numpy(), ddof=1) / 500**0.5, rel=1e-5)
    assert row.drop_percent == pytest.approx(100 * (row.teacher - row.student) / row.teacher, rel=1e-9)
    assert (row.n, row.seeds) == (500, [0, 1])


def test_velocity_error_is_one_ratio_of_sums_over_all_samples() -> None:
    g = torch.Generator().manual_seed(0)
    samples: list[Any] = [(scale * torch.randn(n, 5, 3, generator=g), torch.rand(n, generator=g), {}) for n, scale in ((2, 1.0), (7, 10.0))]
    teacher, student = Field(lambda x, t: x + t), Field(lambda x, t: 0.9 * x)
    flat = [((0.9 * x - (x + t[:, None, None])).double(), (x + t[:, None, None]).double()) for x, t, _ in samples]
    wanted = sum(d.square().sum() for d, _ in flat) / sum(e.square().sum() for _, e in flat)
    assert velocity_error(teacher, student, samples) == pytest.approx(wanted.item(), rel=1e-5)
    assert velocity_error(teacher, teacher, samples) == 0
    assert velocity_error(teacher, Field(lambda x, t: 3 * (x + t)), samples) == pytest.approx(4, rel=1e-5)


def test_sampled_distance_is_the_median_of_what_euler_steps_come_to() -> None:
    """Velocities that depend on time alone: a sample is the noise minus their sum, so that distances are known by hand."""
    g = torch.Generator().manual_seed(0)
    starts: list[Any] = [(torch.randn(n, 4, 2, generator=g), {"push": 0.1 * torch.rand(n, generator=g)[:, None, None]}) for n in (3, 4)]
    teacher = Field(lambda x, t, push: t + 0 * x)
    student = Field(lambda x, t, push: t + push + 0 * x)
    distance = SampledDistance.of_teacher(teacher, starts, 4)
    drift = (1 + 0.75 + 0.5 + 0.25) / 4
    energy = torch.cat([(n - drift).double().square().sum((1, 2)) for n, _ in starts]).mean()
    gaps = torch.cat([8 * c["push"].flatten().double().square() for _, c in starts])
    assert distance(teacher) == 0
    assert distance(student) == pytest.approx((gaps.median() / energy).item(), rel=1e-4)
    assert distance(Field(lambda x, t, push: x * float("nan"))) == float("inf")


@pytest.mark.parametrize("count", [300, 10])
def test_frechet_distance_is_that_of_the_matrix_square_root(count: int) -> None:
    g = np.random.default_rng(0)
    mix = g.normal(size=(12, 12))
    a, b = g.normal(size=(count, 12)) @ mix, g.normal(size=(count, 12)) @ mix.T * 1.3 + 0.4
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(wanted, rel=1e-4 if count < 12 else 1e-8)
    assert frechet_distance(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(torch.tensor(a), torch.tensor(a + 2)) == pytest.approx(48, rel=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_sampler_is_exact_where_the_velocity_is_constant(steps: int) -> None:
    noise, data = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    model = Field(lambda x, t, **_: noise - data)
    assert (flow.sample(model, noise, {}, {}, 1, steps) - data).abs().max() < 1e-12
    assert model.calls == steps
    model.calls = 0
    assert (flow.sample(model, noise, {"c": 1}, {"c": 0}, 2.5, steps) - data).abs().max() < 1e-12
    assert model.calls == 2 * steps


def test_sampler_walks_from_one_to_zero_in_equal_steps() -> None:
    seen: list[float] = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t[0].item())
        return x

    out = flow.sample(Field(velocity), torch.ones(1, 1, 1, dtype=torch.float64), {}, {}, 1, 4)
    assert seen == [1.0, 0.75, 0.5, 0.25]
    assert out.item() == pytest.approx(0.75**4, rel=1e-12)  # Euler's x (1 - h) at every step


def test_guidance_is_its_formula() -> None:
    x, t = torch.randn(2, 3, 4), torch.rand(2)
    model = Field(lambda x, t, c: c * x + t)
    conditional, without = 2.0 * x + t[:, None, None], 0.5 * x + t[:, None, None]
    for g in (0.0, 1.0, 2.0, 4.5):
        wanted = (1 - g) * without + g * conditional
        assert torch.allclose(flow.guided(model, x, t, {"c": 2.0}, {"c": 0.5}, g), wanted, atol=1e-5)
    calls = model.calls
    flow.guided(model, x, t, {"c": 2.0}, {"c": 0.5}, 1)
    assert model.calls == calls + 1


def test_path_and_velocity_agree() -> None:
    """`x_t` moves with `noise - x_0`, from the data at 0 to the noise at 1."""
    data, noise = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    t = torch.rand(3, dtype=torch.float64)
    assert torch.equal(flow.interpolate(data, noise, torch.zeros(3)), data)
    assert torch.equal(flow.interpolate(data, noise, torch.ones(3)), noise)
    moved = flow.interpolate(data, noise, t + 1e-3) - flow.interpolate(data, noise, t)
    assert torch.allclose(moved / 1e-3, noise - data, atol=1e-9)


def test_predict_gives_as_many_tokens_as_it_got() -> None:
    x, t = torch.randn(1, 3, 2), torch.rand(1)
    longer = Field(lambda x, t: torch.cat([x, 9 + x], 1))
    assert torch.equal(flow.predict(longer, x, t, {}), x)


def test_timesteps_are_logit_normal() -> None:
    t = flow.logit_normal_timesteps(20000, torch.Generator().manual_seed(0))
    logits = torch.logit(t.double())
    assert logits.mean().item() == pytest.approx(0, abs=0.03)
    assert logits.std().item() == pytest.approx(1, abs=0.03)
