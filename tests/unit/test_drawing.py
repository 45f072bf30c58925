"""The drawing of a plan: every edit is in it, at its own block."""

from __future__ import annotations

import pytest

from ppclc.plan import CompressionPlan, FfnEdit
from ppclc.screens.drawing import duration_text, strip, words


def drawn(plan: CompressionPlan, width: int = 80) -> list[str]:
    return [line.plain for line in strip(plan, width)]


def test_each_edit_stands_at_its_block() -> None:
    plan = CompressionPlan.of("qwen_image", 8, [(1, 2)], [6, 7], 3, True)
    plan = plan.model_copy(update={"ffn": (FfnEdit(block=0, stream="image"), FfnEdit(block=4, stream="text"))})
    assert drawn(plan) == [
        "block          0   1   2   3   4   5   6   7",
        "image          ■   ■───┤   ■   ■   ■   ■   ■",
        "text           ■   ■───┤   ■   ■   ■   ▒   ▒",
        "image ffn      ╱   ■───┤   ■   ■   ■   ■   ■",
        "text ffn       ■   ■───┤   ■   ╱   ■        ",
    ]
    assert words(plan)[1:] == [
        "─ merged into one block: 1-2",
        "▒ text stream mapped: 6-7",
        "╱ image feed-forward made linear: 0",
        "╱ text feed-forward made linear: 4",
        "  modulation of rank 3",
        "  dead code removed",
    ]


def test_adapters_stand_at_the_first_block_of_their_interval() -> None:
    plan = CompressionPlan.of("qwen_image", 6, [(1, 2), (3, 5)], adapters=[(3, 5)])
    assert drawn(plan)[1:] == [
        "image          ■   ■───┤   ■───┤───┤",
        "adapters       ■   ■───┤   ▶───┤───┤",
    ]
    assert words(plan)[1:] == ["─ merged into one block: 1-2, 3-5", "▶ adapters before: 3-5"]


def test_a_plan_without_edits_says_so() -> None:
    plan = CompressionPlan.of("qwen_image", 3)
    assert drawn(plan) == ["block          0   1   2", "image          ■   ■   ■"]
    assert words(plan)[-1].strip() == "nothing is cut"


@pytest.mark.parametrize("width", [20, 40, 80, 300])
def test_a_long_strip_is_folded_to_the_screen(width: int) -> None:
    lines = drawn(CompressionPlan.of("qwen_image", 60, [(3, 5)], [59]), width)
    assert max(map(len, lines)) <= width
    numbers = [int(n) for line in lines if line.startswith("block") for n in line.split()[1:]]
    assert numbers == list(range(60))
    assert "".join(lines).count("┤") == 4  # two merged blocks, in both streams


@pytest.mark.parametrize(("seconds", "text"), [(3.2, "3 s"), (200, "3.3 min"), (2000, "33 min"), (10_000, "2.8 h"), (864_000, "10 days")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
