"""Updates brought to the middle of float32's range by powers of two: nothing but the place of the point moves."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lcm_kit.lora_merge import LoraLayer
from lcm_kit.lora_merge.algebra.scaling import level, levelled, raised, raised_whole
from lcm_kit.tests.lora_merge.make import generator

POWERS = st.integers(-140, 120)


def few_bits(*shape, seed):
    """Odd sixteenths: products of two are exact in float64 whatever power of two they are multiplied by."""
    return (2 * torch.randint(-8, 8, shape, generator=generator(seed)) + 1).float() / 16


def layer(up, down, alpha, *, kernel=(), seed=0, dead=False):
    ups = few_bits(6, 3, *(1 for _ in kernel), seed=seed) * 2.0**up
    downs = few_bits(3, 5, *kernel, seed=seed + 1) * 2.0**down
    if dead:
        ups[:, 1], downs[2] = 0.0, 0.0
    return LoraLayer(ups, downs, 3.0 * 2.0**alpha)


def update(one, strength, power=0):
    """strength * update * 2**power, (out, in * kernel), in float64; strength and scale as powers first, which cannot overflow."""
    (s, e), (c, f) = math.frexp(strength), math.frexp(one.scale)
    first = min(max(power + e + f, -900), 900)
    product = one.up.double().flatten(1) @ one.down.double().flatten(1)
    return torch.ldexp(product * (s * c), torch.tensor(first))


@given(
    powers=st.lists(st.tuples(POWERS, POWERS, st.integers(-100, 100)), min_size=1, max_size=3),
    strengths=st.lists(st.sampled_from([1.0, -1.0, 0.5, -0.75, 3.0, 2.0**-40, 2.0**60]), min_size=3, max_size=3),
    kernel=st.sampled_from([(), (1, 1), (3, 3)]),
    dead=st.booleans(),
)
@example(powers=[(0, 0, 0)], strengths=[1.0] * 3, kernel=(), dead=False)
@example(powers=[(120, 120, 100)], strengths=[3.0] * 3, kernel=(3, 3), dead=True)
@example(powers=[(-140, -140, -100), (120, -140, 0)], strengths=[-0.75] * 3, kernel=(), dead=True)
def test_levelling_moves_the_point_and_nothing_else(powers, strengths, kernel, dead):
    terms = [
        (layer(*power, kernel=kernel, seed=7 * number, dead=dead), strength)
        for number, (power, strength) in enumerate(zip(powers, strengths, strict=False))
    ]
    result, power = level(terms)
    assert power % 2 == 0
    assert [one.shape for one, _ in result] == [one.shape for one, _ in terms]
    sizes = []
    for (old, strength), (new, number) in zip(terms, result, strict=True):
        assert new.up.dtype == new.down.dtype == torch.float32
        assert new.scale == 1
        wanted, found = update(old, strength, -power), update(new, number)
        # What is 2**-100 and less of the largest may be rounded or be lost; the rest is exact.
        assert float((found - wanted).abs().max()) <= 2.0**-100
        sizes.append(float(wanted.abs().max()))
        # Evenly shared: up and down of each component are within one power of two of one another, or both zero.
        above, below = new.up.flatten(1).abs().amax(dim=0), new.down.flatten(1).abs().amax(dim=1)
        assert torch.equal(above == 0, below == 0)
        alive = (above > 2.0**-60) & (below > 2.0**-60)
        assert bool(((above[alive] / below[alive]).log2().abs() < 2).all())
    # A component's largest entries are in [1/2, 1) each, their product in [1/4, 1), and strength and scale have mantissas
    # in [1/2, 1): the largest of the terms is 2**0 or 2**1 times that, and the sum of three components three times.
    components = [
        float((new.up.flatten(1).abs().amax(dim=0) * new.down.flatten(1).abs().amax(dim=1)).max()) * abs(number)
        for new, number in result
    ]
    assert 2.0**-4 <= max(components) < 2.0
    assert max(sizes) < 8


def test_ordinary_terms_are_handed_back_as_they_are():
    terms = [(layer(0, 0, 0), 0.7), (layer(-8, 8, 3, seed=5), -1.0)]
    result, power = levelled(terms)
    assert power == 0
    assert all(new is old for new, old in zip(result, terms, strict=True))


@pytest.mark.parametrize(
    "far", [{"up": 60}, {"down": -60}, {"alpha": 60}, {"alpha": -70}, {"up": 52, "down": -52}, {"up": 45, "down": 0}]
)
def test_one_term_out_of_the_middle_has_all_levelled(far):
    """2**50 for a part, 2**-56 to 2**40 for an update, are the bounds that squares and their sums bear."""
    terms = [(layer(0, 0, 0), 1.0), (layer(**({"up": 0, "down": 0, "alpha": 0} | far), seed=3), 1.0)]
    result, power = levelled(terms)
    assert all(new is not old for (new, _), (old, _) in zip(result, terms, strict=True))
    for (old, strength), (new, number) in zip(terms, result, strict=True):
        torch.testing.assert_close(update(new, number), update(old, strength, -power), rtol=0, atol=2.0**-90)


def test_zeros_say_nothing_about_the_size_of_the_others():
    """Neither an update of zeros nor a strength of 0, whatever stands beside them."""
    zeros = LoraLayer(torch.zeros(6, 3), torch.full((3, 5), 1e30), 1e30)
    small = layer(-60, -60, 0)
    _, alone = level([(small, 1.0)])
    result, power = level([(zeros, 1e30), (small, 1.0), (layer(100, 20, 0), 0.0)])
    assert power == alone < -100
    assert not update(*result[0]).any()
    assert not update(*result[2]).any()
    assert torch.equal(update(*result[1]), update(small, 1.0, -power))
    assert level([(zeros, 1.0)])[1] == 0


def test_what_is_nothing_beside_the_largest_becomes_nothing_and_what_is_small_does_not():
    large = layer(100, 100, 100)
    (_, (tiny, number)), power = level([(large, 1.0), (layer(-140, -140, -100), 2.0**-900)])
    assert abs(number) <= 2.0**-900
    assert float(update(tiny, number).abs().max()) < 2.0**-800
    assert power > 290


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [level, levelled])
def test_a_strength_that_is_no_number_is_refused(function, strength):
    with pytest.raises(ValueError, match=f"strength is {strength}, but it has to be a finite number"):
        function([(layer(0, 0, 0), 1.0), (layer(100, 100, 0), strength)])


@pytest.mark.parametrize("power", [-800, -420, -340, -300, -200, -120, -2, 0, 2, 60, 100, 120])
def test_raising_a_layer_is_multiplying_by_the_power(power):
    one = layer(0, 0, 0)
    found = raised(one, power)
    assert (found is one) == (power == 0)
    # Factors are divided by 2**100 at most, the rest goes into alpha as far as 2**-120: less changes no weight.
    wanted = update(one, 1.0, power)
    assert float((update(found, 1.0) - wanted).abs().max()) <= 2.0**-310
    assert torch.isfinite(found.up).all()
    assert torch.isfinite(found.down).all()
    # In even shares, and alpha is what it was as long as that is enough.
    assert (found.alpha == one.alpha) == (power >= -200 or power < -320)
    assert not power or torch.equal(found.up / one.up, torch.full_like(one.up, float((found.down / one.down).max())))
    if power > -310:
        assert bool(found.up.all())
        assert torch.equal(update(found, 1.0), wanted)


@pytest.mark.parametrize("scale", [-6, 0, 10])
def test_raising_ends_where_float32_does(scale):
    """The scale counts as the factors do."""
    one = LoraLayer(torch.full((1, 1), 0.75), torch.ones(1, 1), 2.0**scale)
    found = raised(one, 128 - scale)
    assert found.scale * float(found.up.double() * found.down.double()) == 0.75 * 2.0**128
    for power in (130 - scale, 300 - scale):
        size = round((power + scale - 0.4) * math.log10(2))
        with pytest.raises(ValueError, match=rf"reaches about 1e\+({size}|{size + 1}), and float32 ends"):
            raised(one, power)


def test_raising_a_whole_difference_is_multiplying_by_the_power():
    diff = few_bits(3, 4, seed=1)
    assert raised_whole(diff, 0) is diff
    for power in (-140, -2, 2, 120):
        assert torch.equal(raised_whole(diff, power), (diff.double() * 2.0**power).float())
    with pytest.raises(ValueError, match="beyond float32"):
        raised_whole(diff, 200)
