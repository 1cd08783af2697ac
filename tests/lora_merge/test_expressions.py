"""PEFT's patterns: the same answer as Python's regular expressions, in bounded time."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lcm_kit.lora_merge import Lora
from lcm_kit.lora_merge.metadata import adapter_scales, expressions
from lcm_kit.lora_merge.metadata.adapter_scales import STEPS
from lcm_kit.lora_merge.metadata.expressions import Budget, Expression

ATOMS = st.sampled_from(["a", "b", "1", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c1]", r"[\d.]", "^", "$", "_"])


def parts(inner):
    repeated = st.builds(
        "{}{}".format, inner, st.sampled_from(["*", "+", "?", "{0}", "{2}", "{1,2}", "{,2}", "{2,}", "*?"])
    )
    groups = st.builds("({})".format, inner) | st.builds("(?:{}|{})".format, inner, inner)
    return (
        st.builds("".join, st.lists(inner, max_size=3))
        | groups
        | st.builds("({}){}".format, inner, st.just("*"))
        | (repeated.map("(?:{})".format))
    )


@given(st.recursive(ATOMS, parts, max_leaves=6), st.text("ab1._", max_size=9))
def test_an_expression_fits_what_python_lets_peft_fit(pattern, name):
    try:
        wanted = re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        return
    if re.search(r"[*+?}][*+?{]", pattern.replace("*?", "*")):
        return  # a repeat of a repeat, which is refused
    assert Expression(pattern).ends(name, Budget(10**6)) == wanted


@pytest.mark.parametrize(
    "times",
    ["{0}", "{0,0}", "{,0}", "{2}", "{2,}", "{0,}", "{,}", "{,2}", "{0,1}", "{1,3}", "{2,2}", "*", "+", "?", ""],
)
def test_a_repeat_fits_as_often_as_pythons(times):
    expression = Expression(f"a{times}b")
    for count in range(7):
        name = "." + "a" * count + "b"
        assert expression.ends(name, Budget(10**6)) == (re.match(rf"(.*\.)?(a{times}b)$", name) is not None), name


@pytest.mark.parametrize("times", ["{100}", "{100,}", "{99,100}", "{,100}"])
def test_what_is_repeated_most_often(times):
    expression = Expression(f"a{times}")
    for count in (0, 98, 99, 100, 101):
        assert expression.ends("a" * count, Budget(10**6)) == (re.fullmatch(f"a{times}", "a" * count) is not None)


NAMES = [
    "down_blocks.0.attn1.to_q",
    "up_blocks.0.attn1.to_q",
    "mid_block.attn2.to_k",
    "to_k",
    "blocks.10.ff.net.0.proj",
]
PATTERNS = [
    "to_q",
    "attn1.to_q",
    r".*down.*attn1\.to_q",
    r"^to_k",
    r"blocks\.\d+\.ff.*",
    r"(up|mid)_blocks?\..*",
    r".*\.to_[kv]",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", [1, -1])
def test_the_alpha_is_that_of_the_pattern_that_peft_chooses(name, order):
    # Neither the first pattern nor the last one has the smallest number.
    alphas = {pattern: 3 * number % 7 + 2 for number, pattern in enumerate(PATTERNS[::order], 2)}
    state = {
        f"base_model.model.{name}.lora_A.weight": torch.ones(1, 4),
        f"base_model.model.{name}.lora_B.weight": torch.ones(4, 1),
    }
    lora = Lora.from_state_dict(state, metadata={"lora_alpha": "1", "alpha_pattern": json.dumps(alphas)})
    (layer,) = lora.modules.values()
    assert layer.alpha == alphas.get(get_pattern_key(alphas.keys(), name), 1)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(?=a)", "looks ahead"),
        (r"(a)\1", r"has \\1"),
        (r"a\b", r"has \\b"),
        ("(a", "without its counterpart"),
        ("a)", "without its counterpart"),
        ("*a", "nothing to repeat"),
        ("a**", "repeats a repeat"),
        ("[a", "ends too early"),
        ("a{2", "has no '}'"),
        ("a{x}", "no numbers"),
        ("a{}", "no numbers"),
        ("a{ 2}", "no numbers"),
        ("a{1_0}", "no numbers"),
        ("a{+2,}", "no numbers"),
        ("a{1,2,3}", "no numbers"),
        ("a{2,1}", "numbers have to rise"),
        ("a{101}", "at most 100"),
        ("a{101,}", "at most 100"),
        ("a{2,101}", "at most 100"),
        ("[b-a]", "wrong way round"),
        ("((((a{99}){99}){99}){99})", "too involved"),
        ("(" * 30 + "a" + ")" * 30, "nests more than 20"),
        ("a" * 201, "longer than 200"),
        ("\\", "ends too early"),
    ],
)
def test_what_is_not_read_is_refused_in_words(pattern, why):
    with pytest.raises(ValueError, match=why):
        Expression(pattern)


@pytest.mark.parametrize(
    "pattern", [r"(\w+)+!", r"(a|a)*!", r"(a*)*!", ".*.*.*=", r"(\w*\w*)*=", "(.*a){9}x", "(a?){90}a{90}"]
)
def test_a_match_takes_no_more_steps_than_states_times_letters(pattern):
    expression, name = Expression(pattern), "a." * 100 + "a" * 200
    budget = Budget(10**9)
    assert not expression.ends(name, budget)
    assert 10**9 - budget.left <= (expression.states + 1) * (len(name) + 1)


@pytest.mark.parametrize("length", [0, 1, 400])
def test_every_place_of_a_name_costs_a_step_also_where_nothing_fits_any_more(length):
    assert _left_after("x", "") - _left_after("x", "a" * length) == length
    assert _left_after("x", "") < 10**6


def _left_after(pattern, name):
    budget = Budget(10**6)
    Expression(pattern).ends(name, budget)
    return budget.left


def test_a_match_may_take_the_steps_that_are_left_and_no_more():
    expression, name = Expression("(a|b)*c"), "ab.abc"
    needed = 10**6 - _left_after("(a|b)*c", name)
    assert expression.ends(name, Budget(needed))
    with pytest.raises(ValueError, match="too long on this many names"):
        expression.ends(name, Budget(needed - 1))


@pytest.mark.parametrize("pattern", ["", "a", "a|b", "(a{3}|b*)c", "to_[qk]$"])
def test_an_expression_may_have_as_many_states_as_there_may_be_and_no_more(pattern, monkeypatch):
    states = Expression(pattern).states
    monkeypatch.setattr(expressions, "MAX_STATES", states)
    assert Expression(pattern).states == states
    monkeypatch.setattr(expressions, "MAX_STATES", states - 1)
    with pytest.raises(ValueError, match="too involved"):
        Expression(pattern)


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        ("", 3),
        ("a", 5),
        ("ab", 7),
        ("a|b", 8),
        ("a*", 9),
        ("a+", 9),
        ("a{1,}", 9),
        ("a{3,}", 15),
        ("a{,3}", 15),
        ("a?", 9),
    ],
)
def test_an_expression_has_no_more_states_than_it_needs(pattern, states):
    """By hand: two for all alternatives and one for each, two for a letter; for a repeat one, its atom, which is read once more
    for each of its copies, and one behind each copy. Without an end there are as many copies as there have to be, at least one."""
    assert Expression(pattern).states == states


def test_groups_and_texts_may_be_as_deep_and_as_long_as_is_said():
    assert Expression("(" * 20 + "a" + ")" * 20 + "(b)" * 3).ends("abbb", Budget(10**6))
    with pytest.raises(ValueError, match="nests more than 20 groups"):
        Expression("(" * 21 + "a" + ")" * 21)
    assert Expression("a" * expressions.MAX_LENGTH).ends("a" * expressions.MAX_LENGTH, Budget(10**6))
    with pytest.raises(ValueError, match="longer than 200"):
        Expression("a" * (expressions.MAX_LENGTH + 1))


def test_all_matches_of_a_file_are_bounded_together():
    """A small file with many long names and patterns that fit none of them."""
    state = {}
    for number in range(2_000):
        name = "base_model.model." + "a." * 60 + f"{number}"
        state |= {f"{name}.lora_A.weight": torch.ones(1, 1), f"{name}.lora_B.weight": torch.ones(1, 1)}
    patterns = {f"(a.)*{number}=": 1 for number in range(500)}
    with pytest.raises(ValueError, match=r"alpha_pattern in the metadata is too involved.*too long on this many names"):
        Lora.from_state_dict(state, metadata={"lora_alpha": "2", "alpha_pattern": json.dumps(patterns)})
    assert STEPS < 2_000 * 500 * 100


def scaled(name, patterns):
    state = {f"{name}.lora_A.weight": torch.ones(1, 1), f"{name}.lora_B.weight": torch.ones(1, 1)}
    metadata = {"lora_alpha": "2", "alpha_pattern": json.dumps(patterns)}
    (layer,) = Lora.from_state_dict(state, metadata=metadata).modules.values()
    return layer.alpha


def test_there_may_be_as_many_expressions_as_is_said_and_any_number_of_names():
    most = adapter_scales.MAX_EXPRESSIONS
    names = {f"blocks.{number}.to_q": 1 for number in range(50)}
    patterns = {f"x{number}.*": 1 for number in range(most - 1)} | {"blocks.*": 7}
    assert scaled("blocks.77.to_q", names | patterns) == 7
    with pytest.raises(ValueError, match=f"has {most + 1} expressions, too involved to be tried: at most {most}"):
        scaled("blocks.77.to_q", names | patterns | {"y.*": 1})


@pytest.mark.parametrize("length", [0, 1, -1])
def test_the_end_of_a_name_that_is_looked_up_may_be_so_long(length):
    """From a dot on, with it; the whole name may be of any length."""
    end = "b" * (adapter_scales.MAX_END - 1 + length)
    assert scaled(f"a.{end}", {end: 7}) == (7 if length <= 0 else 2)
    assert scaled(f"a.{end}", {f"a.{end}": 7}) == 7


def test_plain_patterns_are_looked_up_and_not_tried():
    """2,000 modules by 50,000 patterns: tried one by one these are 100 million comparisons."""
    state = {}
    for number in range(2_000):
        name = f"base_model.model.blocks.{number}.to_q"
        state |= {f"{name}.lora_A.weight": torch.ones(1, 1), f"{name}.lora_B.weight": torch.ones(1, 1)}
    patterns = {f"blocks.{number}.to_q": number + 1 for number in range(50_000)}
    lora = Lora.from_state_dict(state, metadata={"lora_alpha": "2", "alpha_pattern": json.dumps(patterns)})
    assert [layer.alpha for layer in lora.modules.values()] == list(range(1, 2_001))
