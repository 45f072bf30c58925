"""The compression plan: what follows from its edits, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ppclc.errors import PlanError
from ppclc.plan import CompressionPlan, FfnEdit, Interval, TextStreamEdit, kept_blocks

FULL = CompressionPlan.of("qwen_image", 12, [(10, 11), (3, 5)], [6, 9, 7], 8, True)


FFN = CompressionPlan.of("qwen_image", 12, [(3, 5)], [9], ffn=[(7, "text"), (3, "image"), (9, "image"), (7, "image"), (7, "text")])


def changed(**changes: Any) -> str:
    return json.dumps(json.loads(FULL.to_json()) | changes)


def test_kept_blocks_and_references_follow_from_the_edits() -> None:
    assert FULL.intervals == (Interval(first=3, last=5), Interval(first=10, last=11))
    assert FULL.kept == (0, 1, 2, 3, 6, 7, 8, 9, 10)
    # 6 and 7 lean on the interval that starts at 3, since 4 and 5 are gone; 9 on 8, for 7 has no text stream left.
    assert [(e.block, e.reference) for e in FULL.text_stream] == [(6, 3), (7, 3), (9, 8)]
    assert [FULL.student_block(b) for b in (0, 3, 6, 10)] == [0, 3, 4, 8]
    assert FULL.interval_at(3) == Interval(first=3, last=5)
    assert FULL.interval_at(4) is None


def test_published_plan_leaves_35_of_60_blocks() -> None:
    """Source: arXiv 2511.16156, the intervals printed for Qwen-Image."""
    spans = [(3, 4), (5, 7), (8, 10), (11, 12), (15, 24), (25, 27), (29, 30), (42, 43), (45, 47), (48, 49), (52, 53), (54, 55), (56, 57)]
    plan = CompressionPlan.of("qwen_image", 60, spans)
    assert len(plan.kept) == 35
    assert not plan.has_width_edits


def test_json_is_written_for_people_one_edit_a_line() -> None:
    text = FULL.to_json()
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    assert '{"first": 3, "last": 5}' in lines
    assert '{"block": 9, "reference": 8}' in lines
    assert '"kept": [0, 1, 2, 3, 6, 7, 8, 9, 10]' in lines
    assert CompressionPlan.from_json(text) == FULL
    assert json.loads(text)["format"] == 1


def test_empty_plan_is_the_teacher() -> None:
    plan = CompressionPlan.of("qwen_image", 4)
    assert plan.is_empty
    assert plan.kept == (0, 1, 2, 3)
    assert plan.edits() == []
    assert not CompressionPlan.of("qwen_image", 4, modulation_rank=1).is_empty
    assert not CompressionPlan.of("qwen_image", 4, [(0, 1)]).is_empty


@pytest.mark.parametrize(
    ("intervals", "text", "words"),
    [
        ([(1, 3), (3, 4)], [], ["[3, 4]", "without overlap"]),
        ([(1, 4), (2, 3)], [], ["[2, 3]", "without overlap"]),
        ([(10, 12)], [], ["[10, 12]", "within 0..11"]),
        ([(0, 10**15)], [], ["within 0..11"]),
        ([(4, 4)], [], ["[4, 4]", "at least two blocks"]),
        ([(5, 4)], [], ["[5, 4]", "at least two blocks"]),
        ([(-1, 1)], [], ["-1", "greater than or equal to 0"]),
        ([(3, 5)], [4], ["text_stream", "block 4", "wanted a kept block after the first"]),
        ([], [0], ["text_stream", "block 0", "wanted a kept block after the first"]),
        ([], [12], ["text_stream", "block 12"]),
    ],
)
def test_edits_that_contradict_themselves_are_refused(intervals: list[tuple[int, int]], text: list[int], words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        CompressionPlan.of("qwen_image", 12, intervals, text)
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["line 1", "wanted JSON"]),
        ("", ["line 1", "wanted JSON"]),
        ("[]", ["document", "[]"]),
        ("{}", ["family is missing"]),
        (changed(format=2), ["format = 2", "1"]),
        (changed(ffm=[]), ["ffm", "not permitted"]),
        (changed(num_blocks=0), ["num_blocks = 0", "greater than or equal to 1"]),
        (changed(num_blocks="12"), ["num_blocks = '12'", "integer"]),
        (changed(modulation_rank=0), ["modulation_rank = 0", "greater than or equal to 1"]),
        (changed(dead_code="yes"), ["dead_code = 'yes'", "boolean"]),
        (changed(ffn=[{"block": 1, "stream": "sound"}]), ["ffn.0.stream = 'sound'", "'image' or 'text'"]),
        (changed(ffn=[{"block": 4, "stream": "image"}]), ["ffn: got block 4, image", "a kept block, one of [0, 1, 2, 3, 6"]),
        (changed(ffn=[{"block": 12, "stream": "text"}]), ["ffn: got block 12, text", "a kept block"]),
        (changed(ffn=[{"block": 2, "stream": "image"}] * 2), ["ffn: got [[2, 'image'], [2, 'image']]", "once, in order"]),
        (changed(ffn=[{"block": 2, "stream": "text"}, {"block": 2, "stream": "image"}]), ["ffn: got [[2, 'text']", "in order"]),
        (changed(ffn=[{"block": 9, "stream": "text"}]), ["ffn: got block 9, text", "its text stream is mapped", "left out of ffn"]),
        (changed(intervals=[{"first": 3, "last": 5, "weight": 1}]), ["intervals.0.weight", "not permitted"]),
        (changed(intervals=[{"first": 10, "last": 11}, {"first": 3, "last": 5}]), ["[3, 5]", "in order"]),
        (changed(intervals=[{"first": 3, "last": 3}]), ["[3, 3]", "at least two blocks"]),
        (changed(intervals=[{"first": 10, "last": 12}]), ["[10, 12]", "within 0..11"]),
        (changed(kept=[0, 1, 2, 3]), ["kept: got [0, 1, 2, 3]", "wanted [0, 1, 2, 3, 6, 7, 8, 9, 10]"]),
        (changed(text_stream=[{"block": 6, "reference": 2}]), ["block 6 with reference 2", "wanted reference 3"]),
        (changed(text_stream=[{"block": 9, "reference": 7}, {"block": 7, "reference": 6}]), ["[9, 7]", "in order"]),
        (changed(text_stream=[{"block": 4, "reference": 3}]), ["block 4", "wanted a block of [1, 2, 3, 6"]),
        (changed(text_stream=[{"block": 0, "reference": 0}]), ["block 0", "wanted a block of [1, 2"]),
        (changed(adapters=[{"first": 3, "last": 4}]), ["adapters: got [3, 4]", "one of the intervals [[3, 5], [10, 11]]"]),
        (changed(adapters=[{"first": 0, "last": 1}]), ["adapters: got [0, 1]", "one of the intervals"]),
        (changed(adapters=[{"first": 3, "last": 5}] * 2), ["adapters: got [[3, 5], [3, 5]]", "once, in order"]),
        (changed(adapters=[{"first": 10, "last": 11}, {"first": 3, "last": 5}]), ["adapters: got [[10, 11], [3, 5]]", "in order"]),
        (changed(adapters=[{"first": 3}]), ["adapters.0.last is missing"]),
        (changed(text_stream=[], modulation_rank=None), ["dead_code: got true", "without width edits", "wanted false"]),
    ],
)
def test_plans_that_no_student_has_are_refused_with_the_place(text: str, words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        CompressionPlan.from_json(text, "mine/plan.json")
    message = str(caught.value)
    assert message.startswith("mine/plan.json: ")
    for word in words:
        assert word in message, message


def test_a_plan_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"gone\.json.*wanted a plan\.json"):
        CompressionPlan.read(tmp_path / "gone.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"bytes\.json"):
        CompressionPlan.read(tmp_path / "bytes.json")
    (tmp_path / "plan.json").write_text(FULL.to_json(), "utf-8")
    assert CompressionPlan.read(tmp_path / "plan.json") == FULL


def test_without_puts_one_edit_back_and_references_follow() -> None:
    back = FULL.without(Interval(first=3, last=5))
    assert [(i.first, i.last) for i in back.intervals] == [(10, 11)]
    assert [(e.block, e.reference) for e in back.text_stream] == [(6, 5), (7, 5), (9, 8)]
    assert (back.modulation_rank, back.dead_code) == (8, True)
    back = FULL.without(TextStreamEdit(block=6, reference=3))
    assert [(e.block, e.reference) for e in back.text_stream] == [(7, 6), (9, 8)]
    assert back.intervals == FULL.intervals
    # The last width edit takes dead-code removal with it: the student becomes the stock class.
    narrow = CompressionPlan.of("qwen_image", 12, [(3, 5)], (), 8, True)
    assert narrow.without("modulation_rank") == CompressionPlan.of("qwen_image", 12, [(3, 5)])


def test_ffn_edits_stand_in_order_each_once() -> None:
    assert [(e.block, e.stream) for e in FFN.ffn] == [(3, "image"), (7, "image"), (7, "text"), (9, "image")]
    assert FFN.has_width_edits
    assert '{"block": 7, "stream": "text"}' in [line.strip().rstrip(",") for line in FFN.to_json().splitlines()]
    assert CompressionPlan.from_json(FFN.to_json()) == FFN
    # What is trained for an interval is the interval's, so the bank tells it from the block's own.
    assert FFN.ffn_key(7, "text") == "ffn-7-text"
    assert FFN.ffn_key(3, "image") == "ffn-3-5-image"


@pytest.mark.parametrize(
    ("ffn", "words"),
    [
        ([(4, "image")], ["block 4, image", "wanted a kept block, one of [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]"]),
        ([(12, "image")], ["block 12, image", "wanted a kept block"]),
        ([(-1, "image")], ["-1", "greater than or equal to 0"]),
        ([(9, "text")], ["block 9, text", "its text stream is mapped", "the block left out of text_stream"]),
        ([(2, "sound")], ["'sound'", "'image' or 'text'"]),
    ],
)
def test_ffn_edits_with_nothing_to_replace_are_refused(ffn: list[tuple[int, str]], words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        CompressionPlan.of("qwen_image", 12, [(3, 5)], [9], ffn=ffn)
    for word in words:
        assert word in str(caught.value)


def test_without_puts_one_ffn_back_and_leaves_the_others() -> None:
    assert set(FFN.ffn) < set(FFN.edits())
    back = FFN.without(FfnEdit(block=7, stream="image"))
    assert [(e.block, e.stream) for e in back.ffn] == [(3, "image"), (7, "text"), (9, "image")]
    assert (back.intervals, back.text_stream) == (FFN.intervals, FFN.text_stream)
    # Blocks keep their numbers: what was the interval's is the first block's now.
    back = FFN.without(Interval(first=3, last=5))
    assert back.ffn == FFN.ffn
    assert back.ffn_key(3, "image") == "ffn-3-image"
    alone = CompressionPlan.of("qwen_image", 12, dead_code=True, ffn=[(2, "text")])
    assert alone.without(alone.ffn[0]) == CompressionPlan.of("qwen_image", 12)


def test_kept_blocks_are_all_but_those_after_the_first_of_an_interval() -> None:
    assert kept_blocks(6, [(0, 2), (4, 5)]) == (0, 3, 4)


def test_adapters_stand_before_intervals_and_go_with_them() -> None:
    plan = CompressionPlan.of("qwen_image", 12, [(10, 11), (3, 5), (7, 8)], dead_code=True, adapters=[(10, 11), (3, 5), (3, 5)])
    assert plan.adapters == (Interval(first=3, last=5), Interval(first=10, last=11))
    assert plan.has_width_edits
    assert '"adapters": [' in plan.to_json()
    assert CompressionPlan.from_json(plan.to_json()) == plan
    # What is distilled with adapters in front is another block, so the bank tells the two apart.
    assert [plan.interval_key(i) for i in plan.intervals] == ["interval-3-5-adapted", "interval-7-8", "interval-10-11-adapted"]
    assert plan.edits() == list(plan.intervals)
    assert plan.without(plan.intervals[1]) == CompressionPlan.of(
        "qwen_image", 12, [(3, 5), (10, 11)], dead_code=True, adapters=[(3, 5), (10, 11)]
    )
    back = plan.without(plan.intervals[0])
    assert (back.adapters, back.dead_code) == ((Interval(first=10, last=11),), True)
    # The last adapters take dead-code removal with them: the student becomes the stock class.
    assert back.without(back.intervals[1]) == CompressionPlan.of("qwen_image", 12, [(7, 8)])
    with pytest.raises(PlanError, match=r"plan: adapters: got \[3, 4\], wanted one of the intervals \[\[3, 5\]\]"):
        CompressionPlan.of("qwen_image", 12, [(3, 5)], adapters=[(3, 4)])
    with pytest.raises(PlanError, match=r"-1.*greater than or equal to 0"):
        CompressionPlan.of("qwen_image", 12, [(3, 5)], adapters=[(-1, 4)])


def test_a_key_that_stands_there_twice_is_refused() -> None:
    text = CompressionPlan.of("qwen_image", 6, [(1, 2)]).to_json()
    assert CompressionPlan.from_json(text) == CompressionPlan.of("qwen_image", 6, [(1, 2)])
    with pytest.raises(PlanError, match=r"plan\.json: num_blocks stands there twice"):
        CompressionPlan.from_json(text.replace('"num_blocks"', '"num_blocks": 6, "num_blocks"', 1))


def test_a_plan_by_hand_need_not_tell_what_its_intervals_leave() -> None:
    text = '{"family": "sd3", "num_blocks": 8, "intervals": [{"first": 2, "last": 4}]}'
    assert CompressionPlan.from_json(text) == CompressionPlan.of("sd3", 8, [(2, 4)])
    with pytest.raises(PlanError, match=r"^p\.json: num_blocks is missing$"):
        CompressionPlan.from_json('{"family": "sd3"}', "p.json")
    with pytest.raises(PlanError, match=r"intervals: got \[2, 9\]"):
        CompressionPlan.from_json(text.replace("4", "9"), "p.json")
