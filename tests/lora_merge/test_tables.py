"""How slices share the rows of a fused weight, worked out by hand."""

from itertools import product

import pytest

from lcm_kit.lora_merge.naming import tables
from lcm_kit.lora_merge.naming.family import Rows
from lcm_kit.lora_merge.naming.tables import Fused, Stack


@pytest.mark.parametrize(
    ("sizes", "shape", "starts"),
    [
        ("www", (15, 5), [0, 5, 10, 15]),
        ("wwwr", (35, 5), [0, 5, 10, 15, 35]),
        ("wwwr", (15, 5), [0, 5, 10, 15, 15]),  # nothing is left for the last one
        ("wrr", (9, 5), [0, 5, 7, 9]),
        ("rr", (8, 5), [0, 4, 8]),
        ("www", (16, 5), None),
        ("www", (14, 5), None),
        ("wwwr", (14, 5), None),
        ("wrr", (10, 5), None),
        ("www", (15,), None),
        ("www", (15, 5, 1, 1), None),
    ],
)
def test_slices_are_as_wide_as_the_weight_or_have_even_shares_of_the_rest(sizes, shape, starts):
    one = Fused((), sizes)
    for first in range(len(sizes)):
        for count in range(1, len(sizes) - first + 1):
            wanted = None if starts is None else Rows(starts[first], starts[first + count] - starts[first])
            assert one.rows(first, count, shape) == wanted


@pytest.mark.parametrize(
    ("sizes", "share", "known", "shape"),
    [
        ("www", 0, {1: (5, 5)}, (15, 5)),
        ("wwwr", 4, {0: (5, 5)}, (35, 5)),
        ("wwwr", 4, {0: (5, 5), 3: (7, 5)}, (22, 5)),  # what is there tells more than what is usual
        ("wwwr", 0, {0: (5, 5)}, None),
        ("wwwr", 0, {3: (7, 5)}, (22, 5)),
        ("wrr", 0, {1: (2, 5), 2: (2, 5)}, (9, 5)),
        ("wrr", 0, {1: (2, 5), 2: (3, 5)}, None),
        ("wrr", 0, {0: (5, 5), 1: (2, 6)}, None),
        ("rr", 0, {0: (3, 5)}, (6, 5)),
        ("rr", 2, {0: (3, 2, 2)}, (6, 4)),
    ],
)
def test_some_slices_tell_the_shape_of_the_whole(sizes, share, known, shape):
    assert Fused((), sizes, share).shape(known) == shape


def test_a_stack_lists_its_modules_with_the_names_that_others_have_for_them():
    one = Stack(own="b", whole={"x": "y ~z", "none": ""}, same="s t", fused={"f": Fused(("p q", "~r ~u"), "rr")},
                parameters={"g": "h"}, also={"x": "old", "only": "~older"})  # fmt: skip
    assert dict(one.modules()) == {
        "b.{}.f": [], "b.{}.x": ["b.{}.y", "~b.{}.z", "b.{}.old"], "b.{}.only": ["~b.{}.older"], "b.{}.s": ["b.{}.s"],
        "b.{}.t": ["b.{}.t"], "b.{}.none": [], "b.{}.g": ["b.{}.h"],
    }  # fmt: skip
    assert [(own, names) for own, names, _ in one.slices()] == [
        ("b.{}.f", ["b.{}.p", "b.{}.q"]),
        ("b.{}.f", ["~b.{}.r", "~b.{}.u"]),
    ]
    assert dict(Stack(own="b", theirs="d", same="s", also={"s": "old"}).modules()) == {"b.{}.s": ["d.{}.s", "b.{}.old"]}


def test_endings_are_made_alike_by_all_patterns_whatever_is_looked_at_first():
    pieces = ["x_", "text_", "all_", "mlp_fc1", "mod_linear", "modulation_linear", "to_out_0", "attention_to_out_0", "query_norm_scale",
              "attention_norm_k", "final_layer_2-1", "attention_to_out", "mlp", "\n"]  # fmt: skip
    changed = 0
    for name in map("".join, product(["", *pieces], pieces, ["", *pieces])):
        wanted = name
        for pattern, ending in tables._ENDINGS:
            wanted = pattern.sub(ending, wanted)
        assert tables.alike(name) == wanted
        changed += wanted != name
    assert changed > 100
