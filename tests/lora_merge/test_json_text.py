"""JSON that comes with a file is read whole or refused in words, in bounded time and depth."""

import contextlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm_kit.lora_merge.disk import json_text
from lcm_kit.lora_merge.disk.json_text import MAX_CHARACTERS, MAX_DEPTH, is_text, parse, parse_object

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=5)
NUMBERS = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)
)


@settings(max_examples=30)
@given(VALUES)
def test_what_json_writes_is_read(value):
    assert parse(json.dumps(value)) == value
    assert parse(json.dumps(value, ensure_ascii=False)) == value


@settings(max_examples=100)
@given(st.text(max_size=30))
def test_any_text_is_a_value_or_a_value_error(text):
    with contextlib.suppress(ValueError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested deeper than 100"),
        ("[" * 100_000, "nested deeper than 100"),
        ('{"a":' * 100_000, "nested deeper than 100"),
        ('[{"a":' * 60 + "1" + "}]" * 60, "nested deeper than 100"),
        ("NaN", "NaN is not in JSON"),
        ('{"a": [-Infinity]}', "-Infinity is not in JSON"),
        ("1e999", "1e999 is too large a number"),
        ("9" * 100_000, "a number of 100000 digits"),
        ('{"a": {"b": 1, "b": 2}}', "'b' stands twice in one object"),
        ('{"a": 1, "c": 1, "b": 2, "d": 1, "b": 2}', "'b' stands twice in one object"),
        (r'"\ud800"', "half of a surrogate pair"),
        (r'{"\udfff": 1}', "half of a surrogate pair"),
        ('["\ud800"]', "half of a surrogate pair"),
        (" " * (MAX_CHARACTERS + 1), "16000001 characters, more than 16000000"),
        ("[],".join([""] * 2_000_002), "more than 2000000 lists and objects"),
    ],
    ids=range(16),
)
def test_what_is_not_read(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_the_deepest_that_is_read():
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse(deepest)) == deepest
    assert parse(json.dumps("[" * 1000)) == "[" * 1000


@pytest.mark.parametrize(
    ("limit", "text", "much"),
    [
        ("MAX_CONTAINERS", '[{"a": []}, {}]', 4),
        ("MAX_DIGITS", "-12345", 6),
        ("MAX_DIGITS", "12345", 5),
        ("MAX_DEPTH", '[1, {"a": [2]}]', 3),
    ],
)
def test_there_may_be_as_much_as_is_said_and_no_more(monkeypatch, limit, text, much):
    monkeypatch.setattr(json_text, limit, much)
    assert parse(text) == json.loads(text)
    monkeypatch.setattr(json_text, limit, much - 1)
    with pytest.raises(ValueError, match=r"more than|digits|deeper"):
        parse(text)


def test_there_may_be_as_many_letters_as_the_caller_says():
    assert parse(" [1]", characters=4) == [1]
    with pytest.raises(ValueError, match="4 characters, more than 3"):
        parse(" [1]", characters=3)
    json_text.check_size("é" * 4, 4)
    json_text.check_size("x" * MAX_CHARACTERS)


def test_minus_zero_is_a_float_as_safetensors_reads_it():
    assert parse("-0") == 0
    assert math.copysign(1, parse("-0")) == -1
    assert isinstance(parse("-0"), float)


@pytest.mark.parametrize("text", ["[1]", "5", '"a"', "null", "true", "1.5"])
def test_an_object_is_asked_for(text):
    with pytest.raises(ValueError, match="and no object"):
        parse_object(text)


def test_text_is_what_utf8_can_hold():
    assert is_text("é \U0001f600 \x00")
    assert not any(map(is_text, ["\ud800", b"a", 1, None, ["a"]]))
