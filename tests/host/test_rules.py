"""What each rule of the door lets through, and that its words say what it asks for."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcm_kit.host.door import rules

NO_NUMBERS = [None, "1", "x", b"1", [], [1.0], {}, (), True, False, np.bool_(True), 1j, torch.ones(()), object(), float]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
)


@pytest.mark.parametrize("value", [0, 1, 0.5, -0.0, np.float32(0.25), np.int64(1), Fraction(1, 3)])
def test_numbers_in_range_pass(value):
    assert rules.number(value, 0.0, 1.0) is None


@pytest.mark.parametrize(
    "value", [*NO_NUMBERS, math.nan, math.inf, -math.inf, 10**400, -0.001, 1.001, np.float32("nan")]
)
def test_what_is_no_finite_number_in_range_is_told(value):
    assert rules.number(value, 0.0, 1.0) == "a finite number from 0 to 1"


@pytest.mark.parametrize("value", [*NO_NUMBERS, math.nan, 1.0, 0, 1001, 10**400, Fraction(2)])
def test_what_is_no_whole_number_in_range_is_told(value):
    assert rules.whole_number(value, 1, 1000) == "a whole number from 1 to 1,000"


def test_bounds_are_part_of_the_range():
    assert [rules.whole_number(n, 1, 2) for n in (1, np.int32(2))] == [None, None]
    assert [rules.number(n, -0.5, 0.5) for n in (-0.5, 0.5)] == [None, None]
    assert rules.whole_number(2**64 - 1, 0, 2**64 - 1) is None
    assert rules.number(1e300) is None
    assert rules.number(-1, 0) == "a finite number, at least 0"
    assert rules.number(1, None, 0) == "a finite number, at most 0"


def test_steps_count_from_the_low_end():
    assert [rules.whole_number(n, 16, 100, 8) for n in (16, 24, 96)] == [None] * 3
    assert rules.whole_number(60, 16, 100, 8) == "a whole number from 16 to 100 in steps of 8"
    assert rules.whole_number(3, None, None, 1) is None


def test_truth_is_true_or_false():
    assert [rules.truth(value) for value in (True, False, np.bool_(True), 0, 1)] == [None] * 5
    assert {rules.truth(value) for value in (None, "true", 2, 0.0, math.nan, [])} == {"true or false"}


@pytest.mark.parametrize("value", ["", "cat face", "Ä€𝄞", "a\nb\tc", "\x1b[31m", "x" * rules.LONGEST_TEXT])
def test_texts_pass(value):
    assert rules.text(value) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("x" * (rules.LONGEST_TEXT + 1), "at most 100,000 characters"),
        ("a\0b", "without the character NUL"),
        ("ab\ud800", "valid Unicode, and character 3 is half of one"),
        ("\udc80", "valid Unicode"),
        *((value, "text") for value in (None, 5, math.nan, [], {}, b"x", True)),
    ],
)
def test_what_is_no_sound_text_is_told(value, words):
    assert words in rules.text(value)


def test_choices_are_members_of_their_list():
    options = ["linear", "ties"]
    assert rules.choice("ties", options) is None
    for value in ["nonsense", "", "TIES", "ties ", None, 0, [], ["ties"], {}, np.zeros(2), torch.zeros(2), "\ud800"]:
        assert rules.choice(value, options) == "one of linear, ties"
    assert rules.choice(True, [1, 2]) is not None or isinstance(True, int)
    assert "empty" in rules.choice("a", [])


def test_long_lists_are_not_written_out():
    options = [f"style {n}.safetensors" for n in range(1000)]
    rule = rules.choice("stile 77.safetensors", options)
    assert "one of 1000 names" in rule
    assert "style 77.safetensors" in rule
    assert len(rule) < 200
    assert rules.nearest("gone.safetensors", options) == ""
    assert rules.nearest("x" * 10_000_000, options) == ""


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "empty"),
        ("cat", "'cat'"),
        ("a\n\0\ud800<b>", r"'a\n\x00\ud800<b>'"),
        ("x" * 10_000_000, f"'{'x' * 60}'... (10,000,000 characters)"),
        (math.nan, "nan"),
        (np.float32(0.5), "0.5"),
        (3, "3"),
        (2**200, "a number of 201 bits"),
        (torch.zeros(2, 3), "a tensor of shape (2, 3)"),
        (["secret"], "a list of 1 entry"),
        ({"a": 1, "b": 2}, "a dict of 2 entries"),
        (rules, "a module"),
    ],
)
def test_values_are_shown_short(value, words):
    assert rules.shown(value) == words


@given(ANYTHING)
def test_no_value_whatever_makes_a_rule_fail(value):
    for rule in (rules.number, rules.whole_number, rules.truth, rules.text):
        assert rule(value) is None or isinstance(rule(value), str)
    assert rules.choice(value, ["a", "b", 1]) is None or isinstance(rules.choice(value, ["a", "b", 1]), str)
    told = rules.shown(value)
    assert len(told) < 400
    told.encode()
