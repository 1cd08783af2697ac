"""The sheet of a grid: its labels come out of a shared workflow, so they may be anything."""

import random
import time

import pytest

from lcm_kit.host.grid.sheet import Sheet


def slowly_cut(sheet, text, width):
    """One letter less, until it fits."""
    while len(text) > 1 and sheet._font.getlength(text) > width:
        text = text[:-2].rstrip() + "…"
    return text


@pytest.mark.parametrize("seed", range(20))
def test_of_a_label_as_much_is_kept_as_there_is_room_for(seed):
    draw = random.Random(seed)
    sheet = Sheet(["x"], ["y"], (128, 128))
    for _ in range(20):
        text = "".join(draw.choice("il WM.,é x") for _ in range(draw.randint(0, 60))).strip()
        width = draw.randint(0, 300)
        assert sheet._cut(text, width) == slowly_cut(sheet, text, width), (text, width)


@pytest.mark.parametrize(
    "letter", ["i", "W", " x", "\u0301", "語", "\U0001f600", "\0", "\x1b", "\u202e", "\ud800", "<b>"]
)
def test_a_label_of_any_length_costs_nothing(letter):
    started = time.process_time()
    sheet = Sheet([letter * 5_000_000, "x"], ["y", letter * 5_000_000], (128, 96))
    sheet.note(0, 0, letter * 5_000_000)
    assert sheet.image.size == (188 + 2 * 132, 30 + 2 * 100)
    assert time.process_time() - started < 3.0  # 0.1 s
