"""What holds for every plan."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppclc.errors import PlanError
from ppclc.plan import CompressionPlan, Interval, TextStreamEdit


@st.composite
def plans(draw: st.DrawFn) -> CompressionPlan:
    length = draw(st.integers(1, 14))
    edges = sorted(draw(st.sets(st.integers(0, length))) | {0, length})
    chosen = [(a, b - 1) for a, b in itertools.pairwise(edges) if b - a >= 2 and draw(st.booleans())]
    gone = {k for a, b in chosen for k in range(a + 1, b + 1)}
    text = [k for k in range(1, length) if k not in gone and draw(st.booleans())]
    rank = draw(st.none() | st.integers(1, 64))
    places = [(k, s) for k in range(length) if k not in gone for s in ("image", "text") if s == "image" or k not in text]
    ffn = draw(st.lists(st.sampled_from(places), max_size=4, unique=True))
    adapters = draw(st.permutations([span for span in chosen if draw(st.booleans())]))
    dead = bool(text or rank or ffn or adapters) and draw(st.booleans())
    return CompressionPlan.of("qwen_image", length, draw(st.permutations(chosen)), draw(st.permutations(text)), rank, dead, ffn, adapters)


@pytest.mark.slow
@given(plans())
def test_json_round_trip(plan: CompressionPlan) -> None:
    again = CompressionPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()


@pytest.mark.slow
@given(plans())
def test_every_block_is_kept_or_inside_one_interval(plan: CompressionPlan) -> None:
    for block in range(plan.num_blocks):
        inside = [i for i in plan.intervals if block in i]
        assert (block in plan.kept) == (not inside or inside[0].first == block)
    assert len(plan.kept) == plan.num_blocks - sum(len(i) - 1 for i in plan.intervals)
    assert [plan.student_block(b) for b in plan.kept] == list(range(len(plan.kept)))


@given(plans())
def test_reference_is_the_nearest_earlier_block_that_has_its_text_stream(plan: CompressionPlan) -> None:
    mapped = {e.block for e in plan.text_stream}
    for edit in plan.text_stream:
        assert edit.reference in plan.kept
        assert edit.reference not in mapped
        between = [b for b in plan.kept if edit.reference < b < edit.block]
        assert set(between) <= mapped


def edit_names(plan: CompressionPlan) -> list[Any]:
    names: list[Any] = [("interval", i.first, i.last) for i in plan.intervals]
    names += [("text", e.block) for e in plan.text_stream]
    names += [("ffn", e.block, e.stream) for e in plan.ffn]
    return names + ([("rank", plan.modulation_rank)] if plan.modulation_rank else [])


@given(plans())
def test_without_puts_exactly_one_edit_back(plan: CompressionPlan) -> None:
    assert len(plan.edits()) == len(edit_names(plan))
    for edit, name in zip(plan.edits(), edit_names(plan), strict=True):
        smaller = plan.without(edit)
        smaller.check()
        assert edit_names(smaller) == [n for n in edit_names(plan) if n != name]
        assert smaller.dead_code == (plan.dead_code and smaller.has_width_edits)
        assert smaller.adapters == tuple(i for i in plan.adapters if i != edit)  # they go with their interval
        assert len(smaller.kept) == len(plan.kept) + (len(edit) - 1 if isinstance(edit, Interval) else 0)


@given(plans(), st.data())
def test_any_other_reference_is_refused(plan: CompressionPlan, data: st.DataObject) -> None:
    if not plan.text_stream:
        return
    edit = data.draw(st.sampled_from(plan.text_stream))
    wrong = data.draw(st.integers(0, plan.num_blocks).filter(lambda r: r != edit.reference))
    edits = tuple(TextStreamEdit(block=e.block, reference=wrong if e == edit else e.reference) for e in plan.text_stream)
    with pytest.raises(PlanError, match=f"block {edit.block} with reference {wrong}, wanted reference {edit.reference}"):
        plan.model_copy(update={"text_stream": edits}).check()
