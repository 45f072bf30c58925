"""The supernet: what it trains on, how sets of blocks are searched, and that its best set is the plan's."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from ppclc.analysis.budget import PlanSettings, TargetSettings
from ppclc.analysis.detection import spans_of_dropped
from ppclc.analysis.search import AnalyzeSettings
from ppclc.analysis.supernet import Dropped, Score, Supernet, dropped_by, fits, picker, search, surrogate
from ppclc.analysis.trials import Teaching, Trial, ended_with
from ppclc.data.samples import open_samples
from ppclc.families import Family
from ppclc.loading.sources import open_source
from ppclc.models import apply_plan, blocks_of
from ppclc.passes.analyze import analyze
from ppclc.passes.calibrate import CalibrateSettings, calibrate
from ppclc.plan import CompressionPlan
from ppclc.teachers import ResidentTeacher

LENGTH = 10
GROUPS = [LENGTH]
SPANS = {(u, v) for u, v in itertools.combinations(range(LENGTH), 2) if v - u < 5}


def quiet(*_: Any) -> None:
    """Progress that nobody watches."""


def landscape(seed: int, bumps: float = 0.0) -> Callable[[Dropped], float]:
    """Scores whose logarithm adds up over blocks that go and over pairs of neighbours that go, but for bumps."""
    g = torch.Generator().manual_seed(seed)
    single, pair = torch.rand(LENGTH, generator=g), torch.rand(LENGTH, generator=g)

    def score(dropped: Dropped) -> float:
        terms = sum(single[b].item() for b in dropped) + sum(pair[b].item() for b in dropped if b + 1 in dropped)
        return math.exp(terms + bumps * math.sin(sum(7.3**i * b for i, b in enumerate(dropped))))

    return score


def counting(score: Callable[[Dropped], float], calls: list[Dropped]) -> Score:
    def every(sets: Iterable[Dropped]) -> list[torch.Tensor]:
        found = list(sets)
        calls.extend(found)
        return [score(d) * torch.tensor([0.5, 1, 9], dtype=torch.float64) for d in found]

    return every


def test_the_surrogate_orders_sets_as_an_additive_score_does() -> None:
    score = landscape(0)
    sets = [d for d in itertools.combinations(range(1, LENGTH), 4) if fits(d, SPANS, GROUPS)]
    costs = surrogate({d: score(d) for d in sets}, SPANS, LENGTH)
    assert costs.keys() == SPANS

    def told(dropped: Dropped) -> float:
        return sum(costs[s] for s in spans_of_dropped(dropped, GROUPS) or {})

    best = min(sets, key=score)
    assert min(sets, key=told) == best
    assert spearmanr([told(d) for d in sets], [score(d) for d in sets]).statistic > 0.99


@pytest.mark.parametrize("bumps", [0.0, 0.15])
def test_the_search_finds_the_best_set_with_few_scores(bumps: float) -> None:
    for seed in range(8):
        score, calls = landscape(seed, bumps), []  # type: ignore[var-annotated]
        sets = [d for d in itertools.combinations(range(1, LENGTH), 4) if fits(d, SPANS, GROUPS)]
        draw = picker([1.0] * LENGTH, range(1, LENGTH), GROUPS, [(4,)], seed=seed)
        first = [(1, 2, 3, 4), (2, 4, 6, 8)]
        ranked = search(counting(score, calls), (4,), first, draw, SPANS, GROUPS, 48, quiet)
        assert calls[:2] == first
        assert len(calls) == len(set(calls)) == len(ranked) == 48 < len(sets) / 2
        assert [e.median().item() for _, e in ranked] == pytest.approx(sorted(score(d) for d in calls))
        place = sorted(sets, key=score).index(ranked[0][0])
        assert place == 0 if bumps == 0 else place < 3


def test_a_small_space_is_searched_whole_and_no_set_is_scored_twice() -> None:
    calls: list[Dropped] = []
    ranked = search(
        counting(landscape(3), calls), (1,), [], picker([1.0] * LENGTH, range(1, LENGTH), GROUPS, [(1,)]), SPANS, GROUPS, 40, quiet
    )
    assert sorted(calls) == [(b,) for b in range(1, LENGTH)]
    assert len(ranked) == len(calls)


def test_sets_are_made_of_allowed_intervals_that_keep_their_first_block() -> None:
    assert fits((2, 3, 7), SPANS, GROUPS)
    assert not fits((0, 1), SPANS, GROUPS)
    assert not fits((1, 2, 3, 4, 5), SPANS, GROUPS)
    assert not fits((2,), SPANS - {(1, 2)}, GROUPS)
    assert dropped_by({(1, 3): 1, (6, 7): 6}) == (2, 3, 7)
    assert dropped_by({(1, 3): 2}) == (1, 3)


def test_costly_blocks_are_left_out_less_often_and_forbidden_ones_never() -> None:
    pick = picker([0.0, 0.01, 0.01, 1.0, 0.01, 0.01], {1, 2, 3, 4}, [6], [(1,), (2,)])
    drawn = [pick() for _ in range(4000)]
    assert {len(d) for d in drawn} == {1, 2}
    seen = Counter(b for d in drawn if len(d) == 1 for b in d)
    assert seen.keys() == {1, 2, 3, 4}
    # Weights 10, 10, 1, 10 of 31.
    assert seen[3] / seen.total() == pytest.approx(1 / 31, abs=0.015)
    assert seen[1] / seen.total() == pytest.approx(10 / 31, abs=0.03)
    again = picker([0.0, 0.01, 0.01, 1.0, 0.01, 0.01], {1, 2, 3, 4}, [6], [(1,), (2,)])
    assert [again() for _ in range(50)] == drawn[:50]


@pytest.fixture(scope="module")
def tiny(make_teacher: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A teacher of six blocks with its source, samples and teaching."""
    model = make_teacher(6, seed=3)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    source = open_source(str(folder))
    samples = open_samples("auto", source, model, "train")
    return model, source, samples, Teaching.of(model, samples, 12, 8, 2e-3, 16)


@pytest.mark.slow
def test_an_untrained_supernet_is_the_teacher_without_those_blocks(tiny: Any, family: Family) -> None:
    model, _, _, teaching = tiny
    before = {k: v.clone() for k, v in model.state_dict().items()}
    net = Supernet(model, family, 2e-3)
    student = apply_plan(model, CompressionPlan.of(family.name, 6, [(1, 2), (4, 5)]), {})
    with net.judges(teaching.distance) as score:
        found = [e.median().item() for e in score([(2, 5), (), (2, 5)])]
    assert found[0] == pytest.approx(teaching.distance(student), rel=1e-5)
    assert found[1] == 0
    assert found[2] == found[0]
    net.train(teaching.taught, lambda: (2, 5), quiet)
    with net.judges(teaching.distance) as score:
        (each,) = score([(2, 5)])
        assert each.median() < 0.9 * found[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(blocks_of(net.model, family)) == 6


@pytest.mark.slow
def test_the_plan_takes_the_supernets_best_set(tiny: Any, family: Family) -> None:
    model, source, samples, _ = tiny
    stats = calibrate(ResidentTeacher(model, family), samples, CalibrateSettings(samples=64, longest=4), quiet)
    settings = AnalyzeSettings(probes=16, trials=4, trial_steps=6, supernet_steps=10, supernet_sets=10)
    wanted = PlanSettings(text_stream="none", ffn="none", modulation_rank="none", protect=[4])
    found = [
        analyze(ResidentTeacher(model, family), source, stats, samples, settings, TargetSettings(parameters=0.7), wanted, "float32", quiet)
        for _ in range(2)
    ]
    assert found[0].model_dump(exclude={"tensors"}) == found[1].model_dump(exclude={"tensors"})
    scores, plan = found[0].supernet, found[0].plan
    assert 1 < len(scores) <= 10
    assert not any({0, 4, 5} & set(s.dropped) for s in scores)  # 5 would go into 4
    removed = 6 - len(plan.kept)
    of_depth = [s for s in scores if len(s.dropped) == removed]
    assert [s.distance for s in of_depth] == sorted(s.distance for s in of_depth)
    assert set(range(6)) - set(plan.kept) == set(of_depth[0].dropped)
    assert {i.key: found[0].starts[i.key] for i in plan.intervals} == {i.key: i.first for i in plan.intervals}
    assert found[0].starts.keys() == {f"interval-{c.first}-{c.last}" for c in found[0].candidates}
    assert found[0].stability["supernet.resamples"].runs == 40
    assert 0 < found[0].stability["supernet.resamples"].jaccard <= 1
    assert len(found[0].trials) in (0, len({len(s.dropped) for s in scores}))  # of a depth one is left to try


@pytest.mark.slow
def test_lessons_and_starts_are_the_same_every_time(tiny: Any) -> None:
    model, _, samples, teaching = tiny
    again = Teaching.of(model, samples, 12, 8, 2e-3, 16)
    assert torch.equal(again.distance.wanted[0], teaching.distance.wanted[0])
    assert torch.equal(again.taught[5][1], teaching.taught[5][1])
    noise, given = samples.starts(5, torch.Generator().manual_seed(0))
    assert noise.shape[0] == 5
    assert abs(noise.mean().item()) < 0.2
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    assert "encoder_hidden_states" in given


def test_threads_that_train_end_with_what_waits_for_them() -> None:
    """After what is under way, which looks whether it is to stop at every step; what has not begun does not."""
    stopped, ended = threading.Event(), []

    def train() -> None:
        ended.append(stopped.wait(30))

    def interrupted() -> None:
        with ThreadPoolExecutor(1) as pool, ended_with(pool, stopped):
            jobs.extend(pool.submit(train) for _ in range(3))
            raise KeyboardInterrupt

    start, jobs = time.perf_counter(), list[Any]()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.perf_counter() - start < 10
    assert ended in ([True], [])
    assert jobs[2].cancelled()


def test_a_trial_that_is_stopped_is_not_judged(tiny: Any) -> None:
    model, source, _, teaching = tiny
    trial, stopped = Trial(CompressionPlan.of(source.family.name, 6), {}, 1e-3), threading.Event()
    trial.prepare(model)
    stopped.set()
    trial.advance(teaching.taught, len(teaching.taught), lambda _: 1.0, stopped)
    assert (trial.done, [step for step, _ in trial.errors]) == (0, [0])
