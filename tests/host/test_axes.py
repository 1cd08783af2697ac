"""Axes of a grid: texts to values, and the order of the cells."""

import tracemalloc

import pytest

from lcm_kit.host.door.rules import LONGEST_TEXT as LONGEST
from lcm_kit.host.grid.axes import Axis, cells, check_axes, parse_axis, with_word


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0, 0.4 0.8,1.2", (0, 0.4, 0.8, 1.2)),
        ("0:1.2:0.4", (0, 0.4, 0.8, 1.2)),
        ("1.2:0:-0.4", (1.2, 0.8, 0.4, 0)),
        ("0:1:0.4", (0, 0.4, 0.8)),
        ("-1, 0.5:0.5:1", (-1, 0.5)),
        ("0:0.3:0.1", (0, 0.1, 0.2, 0.3)),
    ],
)
def test_numbers_and_ranges(text, values):
    assert parse_axis("strength of lora", text).values == values


def test_a_seed_keeps_all_its_digits():
    assert parse_axis("seed", f"{2**64 - 1}, 7:9:1").values == (2**64 - 1, 7, 8, 9)


def test_labels_are_words():
    assert parse_axis("steps", "1, 4").labels == ("1 step", "4 steps")
    assert parse_axis("cfg", "1.5").labels == ("cfg 1.5",)
    assert parse_axis("preset", "LCM\nTCD").labels == ("LCM", "TCD")


@pytest.mark.parametrize(
    ("setting", "text", "word"),
    [
        ("steps", "1, 2.5", "2.5"),
        ("steps", "0", "0 is not from 1"),
        ("gamma", "1.5", "1.5"),
        ("denoise", "nan", "nan"),
        ("strength of lora", "1e400", "1e400"),
        ("strength of lora", "0:1:0", "never gets"),
        ("strength of lora", "0:1:-1", "never gets"),
        ("strength of lora", "0:1000000:0.0001", "values"),
        ("seed", "-1", "-1"),
        ("preset", "LCN", "LCM"),
        ("cfg", " ".join(["1"] * 65), "more than 64"),
        ("cfg", "1_0", "1_0"),
        ("cfg", "\u0661", "number"),
    ],
)
def test_what_is_no_value_is_named(setting, text, word):
    with pytest.raises(ValueError, match=setting) as error:
        parse_axis(setting, text)
    assert word in str(error.value)


def test_an_empty_axis_has_one_cell_that_changes_nothing():
    assert parse_axis("steps", " ") == parse_axis("nothing", "1, 2") == Axis("nothing", (None,), ("",))
    nothing = parse_axis("nothing", "")
    assert cells(nothing, nothing) == [(0, 0, {})]
    check_axes(nothing, nothing)


def test_one_setting_cannot_be_on_both_axes_and_a_grid_is_bounded():
    steps, seeds = parse_axis("steps", "1:60:1"), parse_axis("seed", "1:60:1")
    with pytest.raises(ValueError, match="both vary steps"):
        check_axes(steps, steps)
    with pytest.raises(ValueError, match="3,600"):
        check_axes(steps, seeds)


@pytest.mark.parametrize("down", [True, False])
def test_a_strength_is_patched_once_and_few_steps_come_first(down):
    strength, steps = parse_axis("strength of lora", "0.8, 0, 0.4"), parse_axis("steps", "8, 1, 4")
    made = cells(strength, steps) if down else cells(steps, strength)
    assert len({(row, column) for row, column, _ in made}) == 9
    assert [own["strength of lora"] for *_, own in made] == [0.8] * 3 + [0] * 3 + [0.4] * 3
    assert [own["steps"] for *_, own in made] == [1, 4, 8] * 3


@pytest.mark.parametrize(
    ("prompt", "first", "word", "result"),
    [
        ("a cat, a cat", "cat", "red owl", "a red owl, a red owl"),
        ("a cat", "cat", "cat", "a cat"),
        ("a" * LONGEST, "b", "c" * LONGEST, "a" * LONGEST),
        ("ab", "a", "c" * (LONGEST - 1), "c" * (LONGEST - 1) + "b"),
    ],
)
def test_a_word_of_a_prompt_is_replaced_wherever_it_stands(prompt, first, word, result):
    assert with_word(prompt, first, word) == result


@pytest.mark.parametrize(
    ("prompt", "first", "word"),
    [
        ("a" * 1_000_000, "a", "b" * 1_000_000),  # 10**12 letters
        ("ab", "a", "c" * LONGEST),
        ("a" * (LONGEST + 1), "b", "c"),
    ],
)
def test_a_prompt_beyond_all_measure_is_refused_before_it_is_made(prompt, first, word):
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"prompt words: with .{3,60} the prompt has [\d,]+ characters, .* at most"):
        with_word(prompt, first, word)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
