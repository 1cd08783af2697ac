"""Figures of a comparison and the answer in words, from numbers written by hand."""

import math

import pytest

from lcm_kit.lora_merge.comparing.comparison import (
    Comparison,
    Group,
    Input,
    Measure,
    Pair,
    cosine_variance,
    inside,
    overlap,
)
from lcm_kit.lora_merge.comparing.report import _cuts
from lcm_kit.lora_merge.comparing.verdict import Relation, answer, dependent_blocks, headline, relation
from lcm_kit.lora_merge.files.twice import Named

NOTHING = Measure(0.0, 0.0, 0.0, 1.0)
SLICE = (
    Named(owner=0, canonical="qkv", spelling="qkv", is_bias=False, shape=(6, 2)),
    Named(owner=1, canonical="q", spelling="q", is_bias=False, shape=(2, 2)),
)


def pair(cosine=0.0, *, which=(0, 1), deviation=0.001, first=NOTHING, second=NOTHING, norms=2.0):
    return Pair(
        which=which,
        shared=1,
        dot=cosine * norms,
        norms=norms,
        dot_variance=(deviation * norms) ** 2,
        left=NOTHING,
        right=NOTHING,
        first_inside=first,
        second_inside=second,
    )


def crowd(share, expected=0.1, deviation=0.001, whole=4.0):
    return Measure(share * whole, expected * whole, (deviation * whole) ** 2, whole)


def group(*pairs, name="all", energies=(1.0, 1.0), energy=2.0):
    return Group(name=name, modules=1, energies=tuple(energies), energy=energy, pairs=tuple(pairs))


def comparison(*pairs, blocks=(), strengths=(1.0, 1.0), energies=None, sources=None, fused=(), **options):
    inputs = tuple(
        Input(
            source=(sources or [f"{'abcdefghi'[number]}.safetensors" for number in range(len(strengths))])[number],
            strength=strength,
            modules=1,
            compared=1,
            only_here=(),
            zero=(),
            deficient=(),
            settings=(),
            biases=0,
            carried=(),
            values=1,
        )
        for number, strength in enumerate(strengths)
    )
    facts = {
        "products": ((1.0, 0.0), (0.0, 1.0)),
        "kept": ((0.0, 1.0), (0.0, 1.0), (0.0, 1.0)),
        "numbers": (0, 10),
        "leading_energy": 0.5,
    } | options
    whole = group(*pairs, energies=energies or [1.0] * len(strengths))
    return Comparison(inputs=inputs, modules=(), blocks=tuple(blocks), whole=whole, fused=fused, **facts)


# ---- figures


def test_a_measure_is_a_share_of_its_whole():
    one = Measure(found=3.0, expected=1.0, variance=4.0, whole=8.0)
    assert (one.share, one.expected_share, one.excess, one.deviation) == (0.375, 0.125, 0.25, 0.25)
    nothing = Measure(3.0, 1.0, 4.0, 0.0)
    assert (nothing.share, nothing.expected_share, nothing.excess, nothing.deviation) == (0, 0, 0, 0)


def test_measures_of_modules_add_up():
    ones = [Measure(1.0, 2.0, 3.0, 4.0), Measure(10.0, 20.0, 30.0, 40.0)]
    assert Measure.total(ones) == Measure(11.0, 22.0, 33.0, 44.0)
    assert Measure.total(iter(ones), whole=100.0) == Measure(11.0, 22.0, 33.0, 100.0)


def test_chance_by_hand():
    """Means and variances of tr(P Q) for random projections; in one dimension nothing is left to chance."""
    assert cosine_variance(4, 8) == 1 / 32
    # Two lines in the plane at an even angle: cos^2 has the mean 1/2 and the variance 1/8.
    assert overlap(0.3, 1, 1, 2) == Measure(0.3, 0.5, pytest.approx(1 / 8), 1)
    # A line and a plane in space: cos^2 of a line and another has 1/3 and 4/45, and a plane is what a line leaves.
    assert overlap(0.3, 1, 2, 3) == Measure(0.3, pytest.approx(2 / 3), pytest.approx(4 / 45), 1)
    assert overlap(2.0, 2, 3, 3) == Measure(2.0, 2.0, 0.0, 2)
    assert overlap(1.0, 1, 1, 1) == Measure(1.0, 1.0, 0.0, 1)
    assert inside(3.0, 5.0, 2, 3) == Measure(3.0, pytest.approx(10 / 3), pytest.approx(25 * 4 / 45), 5.0)


def test_a_cosine_is_the_dot_product_by_the_norms():
    assert pair(0.25).cosine == 0.25
    assert pair(-1.0001).cosine == -1  # rounding
    assert pair(1.0001).cosine == 1
    assert pair(0.25, deviation=0.5).cosine_deviation == pytest.approx(0.5)
    none = pair(norms=0.0)
    assert (none.cosine, none.cosine_deviation) == (0, 0)


def test_labels_are_the_names_of_files_each_once():
    sources = ["a.safetensors", "b", "a", "a.safetensors"]
    assert comparison(strengths=[1.0] * 4, sources=sources).labels == ("a (1)", "b", "a (2)", "a (3)")


def test_norms_growth_and_what_another_strength_makes():
    both = comparison(
        strengths=(2.0, -3.0), energies=(4.0, 9.0), products=((4.0, 1.0), (1.0, 9.0)), kept=((0.0,), (0.0,), (0.0,))
    )
    assert [both.norm(0), both.norm(1)] == [4.0, 9.0]
    block = group(energies=(1.0, 0.25), energy=16.0)
    assert [both.norm(0, block), both.norm(1, block)] == [2.0, 1.5]
    assert both.growth() == pytest.approx(math.sqrt(2.0) / math.hypot(4, 9))
    assert both.growth(block) == pytest.approx(4 / math.hypot(2, 1.5))
    assert both.growth(group(energies=(0.0, 0.0))) == 1
    assert both.norm_at(0, 5.0) == pytest.approx(math.sqrt(25 * 4 - 2 * 15 * 1 + 9 * 9))
    assert both.norm_at(1, 0.0) == pytest.approx(4.0)
    cancelled = comparison(strengths=(1.0, -1.0), products=((1.0, 1.0 + 1e-9), (1.0 + 1e-9, 1.0)))
    assert cancelled.norm_at(0, 1.0) == 0  # below 0 by rounding


def test_what_a_cut_keeps_and_weighs():
    one = comparison(
        kept=((0.0, 6.0, 8.0), (0.0, 1.0, 4.0), (0.0, 0.0, 0.0)), numbers=(0, 3_000_000, 5_000_000)
    )  # fmt: skip
    assert one.full_rank == 2
    assert [one.error_at(rank) for rank in (0, 1, 2, 9)] == [1.0, 0.5, 0.0, 0.0]
    assert [one.retention(0, rank) for rank in (0, 1, 2, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert one.retention(1, 1) is None
    assert [one.megabytes(rank) for rank in (0, 1, 2, 9, None)] == [0.0, 6.0, 10.0, 10.0, 10.0]
    rounded = comparison(kept=((0.0, 1.0 + 1e-9, 1.0), (0.0, 1.0 + 1e-9, 1.0)), numbers=(0, 1, 2))
    assert (rounded.error_at(1), rounded.retention(0, 1)) == (0, 1)
    assert comparison(kept=((0.0, 0.0),), numbers=(0, 1)).error_at(0) == 0


def test_cuts_are_told_where_there_is_something_to_cut():
    def cuts(*energies, numbers=(0, 1_000_000, 3_000_000, 5_000_000)):
        kept = (energies,) * 3
        return _cuts(comparison(kept=kept, numbers=numbers[: len(energies)]), 2)

    assert cuts(0.0) == cuts(0.0, 0.0) == []
    assert cuts(0.0, 0.5)[0] == "Of the merge: rank 1 is exact, 2.0 MB in float16. Cut to a smaller rank:"
    assert cuts(0.0, 3.0, 4.0, 4.0)[0].startswith("Of the merge: rank 3 is exact, 10.0 MB in float16.")


# ---- the answer


@pytest.mark.parametrize(
    ("found", "kind", "degree"),
    [
        (pair(0.1), "alike", 0.1),
        (pair(-0.1), "oppose", -0.1),
        (pair(0.0999), "independent", 0.0999),
        (pair(0.5, deviation=0.05), "alike", 0.5),
        (pair(0.5, deviation=0.051), "independent", 0.5),
        (pair(first=crowd(0.2)), "crowd", 0.1),
        (pair(second=crowd(0.2)), "crowd", 0.1),
        (pair(first=crowd(0.3), second=crowd(0.4)), "crowd", 0.3),
        (pair(0.05, first=crowd(0.19)), "independent", 0.05),
        (pair(first=crowd(0.5, deviation=0.041)), "independent", 0.0),
        (pair(-0.2, first=crowd(0.9)), "oppose", -0.2),
    ],
)
def test_a_tenth_matters_and_ten_deviations_are_no_chance(found, kind, degree):
    assert relation(found) == Relation(kind, pytest.approx(degree))


def test_the_places_are_the_blocks_that_hold_something_the_worst_first():
    blocks = [
        group(pair(0.2), name="alike", energies=(0.5, 0.5)),
        group(pair(0.0, first=crowd(0.5)), name="crowded", energies=(0.5, 0.5)),
        group(pair(-0.2), name="opposed", energies=(0.5, 0.5)),
        group(pair(-0.4), name="more opposed", energies=(0.5, 0.5)),
        group(pair(0.0), name="calm", energies=(0.5, 0.5)),
        group(pair(-0.9), name="little of both", energies=(0.0099, 0.0099)),
        group(pair(-0.3), name="little of one", energies=(0.01, 0.0)),
        group(pair(-0.9, which=(0, 2)), name="others", energies=(0.5, 0.5)),
        group(name="nobody", energies=(0.5, 0.5)),
    ]
    found = dependent_blocks(comparison(pair(), blocks=blocks), (0, 1))
    assert [block.name for block, _ in found] == ["more opposed", "little of one", "opposed", "alike", "crowded"]
    assert [what.kind for _, what in found] == ["oppose"] * 3 + ["alike", "crowd"]
    assert dependent_blocks(comparison(pair(), blocks=blocks, energies=(0.0, 0.0)), (0, 1)) == []


def local(*pairs):
    return [group(one, name=f"block {number}", energies=(1.0, 1.0)) for number, one in enumerate(pairs)]


@pytest.mark.parametrize(
    ("one", "begins"),
    [
        (comparison(strengths=(1.0,)), "One LoRA alone"),
        (comparison(fused=(SLICE,)), "Not known"),
        (comparison(), "Nothing to fight"),
        (comparison(pair(-0.5), strengths=(1.0, 0.0)), "Nothing to fight"),
        (comparison(pair(-0.5), blocks=local(pair(0.5))), "They fight: "),
        (comparison(pair(0.5), blocks=local(pair(-0.5))), "They double up: "),
        (comparison(pair(first=crowd(0.5)), blocks=local(pair(-0.5))), "They fight in places"),
        (comparison(pair(first=crowd(0.5)), blocks=local(pair(0.5))), "They do not cancel, but they crowd"),
        (comparison(pair(), blocks=local(pair(0.5), pair(first=crowd(0.5)))), "They double up in places"),
        (comparison(pair(), blocks=local(pair(first=crowd(0.5)))), "No fight; but in places"),
        (comparison(pair(), blocks=local(pair())), "No fight: they are independent"),
    ],
)
def test_the_headline_says_the_worst(one, begins):
    assert headline(one).startswith(begins)
    assert answer(one)[0] == headline(one)


def test_there_is_a_sentence_for_every_two_those_that_matter_first():
    three = comparison(
        pair(0.0), pair(0.0, which=(0, 2)), pair(-0.5, which=(1, 2)), strengths=(1.0, 1.0, 1.0)
    )  # fmt: skip
    lines = answer(three)
    assert [line.split(":")[0] for line in lines[1:]] == ["b and c", "a and b", "a and c"]
    assert "opposed, cosine -0.500 (by chance up to 0.01)" in lines[1]
    assert "independent, cosine +0.000" in lines[2]


@pytest.mark.parametrize(
    ("dependent", "calm", "said"),
    [
        (5, 1, ["Where: block 0", "block 4 (cosine -0.50)."]),
        (6, 1, ["Where: nearly everywhere, most in block 0"]),
        (8, 2, ["Where: block 0", "block 4 (cosine -0.50), and 3 more blocks."]),
        (9, 2, ["Where: nearly everywhere, most in block 0"]),
    ],
)
def test_nearly_everywhere_is_more_than_four_of_five_blocks_and_more_than_are_named(dependent, calm, said):
    """Of the blocks that both change, whoever else changes them, and not of those that the others change alone."""
    blocks = local(*[pair(-0.9 + 0.1 * min(number, 7)) for number in range(dependent)], *[pair()] * calm)
    blocks = [group(*one.pairs, pair(which=(0, 2)), name=one.name, energies=(1.0, 1.0, 1.0)) for one in blocks]
    blocks += [group(pair(which=(0, 2)), name=f"other {number}", energies=(1.0, 1.0, 1.0)) for number in range(9)]
    lines = answer(comparison(pair(), blocks=blocks, strengths=(1.0,) * 3, energies=(1.0,) * 3))
    (line,) = [line for line in lines if line.startswith("a and b")]
    assert all(part in line for part in said)


@pytest.mark.parametrize(("inputs", "named"), [(3, 3), (4, 0)])
def test_many_pairs_that_are_independent_are_counted(inputs, named):
    which = [(i, j) for i in range(inputs) for j in range(i + 1, inputs)]
    lines = answer(comparison(*[pair(which=one) for one in which], strengths=[1.0] * inputs))
    assert len(lines) == 1 + (named or 1)
    assert named or lines[-1] == f"The other {len(which)} pairs: independent."


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (comparison(pair(0.5), strengths=(0.0, 1.0)), "a and b: a adds nothing, its strength is 0."),
        (
            comparison(pair(0.5), energies=(0.0, 0.0)),
            "a adds nothing, its updates are zeros, and b adds nothing, its updates are zeros.",
        ),
        (comparison(), "a and b: they change different modules"),
        (comparison(pair(0.5)), "alike, cosine +0.500 (by chance up to 0.01)"),
        (comparison(pair(0.05)), "nearly independent, cosine +0.050"),
        (comparison(pair(0.005)), "independent, cosine +0.005"),
        (
            comparison(pair(10 / 1024, deviation=1 / 1024)),
            "a and b: independent, cosine +0.010 (by chance up to 0.0098)",
        ),
        (comparison(pair(first=crowd(0.5))), "50 % of a lies where b is strongest (10 % by chance). Protecting"),
        (comparison(pair(second=crowd(0.5))), "50 % of b lies where a is strongest (10 % by chance). Protecting"),
        (comparison(pair(-0.5), blocks=local(pair(-0.5))), "Where: block 0 (cosine -0.50)."),
        (comparison(pair(), blocks=local(pair(first=crowd(0.5)))), "Where: block 0 (crowded, 40 % above chance)."),
        (
            comparison(pair(), blocks=local(*[pair(-0.9 + 0.1 * number) for number in range(6)], pair(), pair())),
            "Where: block 0 (cosine -0.90), block 1 (cosine -0.80), block 2 (cosine -0.70), block 3 (cosine -0.60), "
            "block 4 (cosine -0.50), and 1 more block.",
        ),
        (
            comparison(pair(), blocks=local(*[pair(-0.9 + 0.1 * number) for number in range(7)], pair())),
            "Where: nearly everywhere, most in block 0 (cosine -0.90)",
        ),
    ],
)
def test_a_sentence_has_the_figures_and_the_places(one, said):
    (line,) = answer(one)[1:]
    assert said in line
    assert ("Where:" in said) == ("Where:" in line)
