import math
from contextlib import ExitStack

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lcm_kit.lora_merge import Lora, LoraLayer
from lcm_kit.lora_merge.algebra.precision import cast
from lcm_kit.lora_merge.algebra.sums import (
    dense_dtype,
    dense_sum_in,
    is_safe_whole,
    side_by_side_as_they_are,
    stacked,
    weighted_sum,
)
from lcm_kit.lora_merge.updates.side_by_side import Sum, split
from lcm_kit.tests.lora_merge import kinds
from lcm_kit.tests.lora_merge.make import dense, factors, layer, relative


def test_hand_worked_sum():
    # 2 * [[1, 2]] (alpha 1, rank 1) - 0.5 * [[4, 8]] = [[0, 0]]; and with +0.5: [[4, 8]]
    a = LoraLayer(torch.tensor([[1.0]]), torch.tensor([[1.0, 2.0]]), 1.0)
    b = LoraLayer(torch.tensor([[2.0]]), torch.tensor([[2.0, 4.0]]), 1.0)
    torch.testing.assert_close(weighted_sum([(a, 2.0), (b, -0.5)]).delta(), torch.zeros(1, 2))
    torch.testing.assert_close(weighted_sum([(a, 2.0), (b, 0.5)]).delta(), torch.tensor([[4.0, 8.0]]))


ranks = st.integers(1, 8)
alphas = st.one_of(st.none(), st.sampled_from([0.5, 1.0, 4.0, 8.0, -2.0, 0.0]))
strengths = st.one_of(st.floats(-4, 4, allow_subnormal=False), st.sampled_from([0.0, 1.0, -1.0]))
terms = st.lists(st.tuples(ranks, alphas, strengths), min_size=1, max_size=4)


def scale_of_the_largest(layers, strengths):
    """strength * scale of the largest rank that enters with more than 0; 1 where there is none, and where it is no ordinary
    number."""
    scales = [(one.rank, strength * one.scale) for one, strength in zip(layers, strengths, strict=True)]
    rank = max((rank for rank, scale in scales if scale > 0), default=0)
    found = next((scale for of_rank, scale in scales if of_rank == rank and scale > 0), 1.0)
    return found if 2.0**-33 <= found < 2.0**32 else 1.0


@pytest.mark.parametrize(
    ("strength", "scale"),
    [(2.0**31, 2.0**31), (2.0**32, 1.0), (2.0**-33, 2.0**-33), (2.0**-34, 1.0), (-2.0, 1.0), (0.7, 0.7)],
)
def test_alpha_takes_a_strength_of_ordinary_size_above_nothing(strength, scale):
    one = LoraLayer(*factors(6, 3, 5))
    assert weighted_sum([(one, strength)]).scale == pytest.approx(scale, rel=1e-15)


def test_alpha_takes_no_strength_beside_which_another_lora_leaves_the_middle_of_float32s_range():
    one, other = LoraLayer(*factors(6, 3, 5)), LoraLayer(*factors(6, 2, 5, seed=1))
    far = LoraLayer(other.up * 2.0**90, other.down)
    for strength, scale in ((2.0**-30, 1.0), (0.5, 0.5)):
        total = weighted_sum([(one, strength), (far, 1.0)])
        assert total.scale == scale
        assert relative(total.delta(), strength * dense(one.up, one.down) + dense(far.up, far.down)) < 1e-6


def test_beside_what_is_no_plain_lora_alpha_takes_nothing():
    plain = LoraLayer(*factors(6, 9, 5), 3.0)
    tucker = LoraLayer(torch.randn(6, 2, 1, 1), torch.randn(2, 5, 1, 1), mid=torch.randn(2, 2, 3, 3))
    assert weighted_sum([(LoraLayer(*factors(6, 9, 45), 3.0), 0.7), (tucker, 1.0)]).scale == 1.0
    assert weighted_sum([(plain, 0.7)]).scale == pytest.approx(0.7 / 3)


@pytest.mark.parametrize("scale", [0.0, 1.0, -1.0, 0.4, -3.75, 7e-9, 2.0**20, 3.0**30])
def test_a_scale_is_split_as_evenly_as_a_power_of_two_allows(scale):
    above, below = split(scale)
    assert above * below == scale
    assert math.frexp(below)[0] == 0.5
    assert below == 1.0 if not scale else 2**-1.5 <= abs(above) / below <= 2**1.5


@settings(max_examples=60, deadline=None)
@given(terms, st.sampled_from([(), (1, 1), (3, 3)]))
def test_delta_of_the_sum_is_the_sum_of_deltas(terms, kernel):
    layers = [layer(6, rank, 5, kernel, alpha=alpha, seed=seed) for seed, (rank, alpha, _) in enumerate(terms)]
    total = weighted_sum([(one, strength) for one, (_, _, strength) in zip(layers, terms, strict=True)])
    parts = [strength * dense(one.up, one.down, one.scale) for one, (_, _, strength) in zip(layers, terms, strict=True)]
    size = sum(float(part.norm()) for part in parts)
    assert (
        float((total.delta().double() - sum(parts)).norm()) <= 1e-6 * size + 1e-36
    )  # float32 has nothing finer near zero
    assert total.mid is None
    if all(
        strength == 0 or abs(strength) > 1e-9 for *_, strength in terms
    ):  # else alpha takes what is beyond the factors
        assert total.scale == pytest.approx(
            scale_of_the_largest(layers, [strength for *_, strength in terms]), rel=1e-12
        )


@settings(max_examples=20, deadline=None)
@given(strengths, strengths)
def test_the_order_does_not_matter(first, second):
    a, b = layer(6, 2, 5, alpha=3.0, seed=1), layer(6, 4, 5, seed=2)
    one, other = weighted_sum([(a, first), (b, second)]), weighted_sum([(b, second), (a, first)])
    torch.testing.assert_close(one.delta(), other.delta(), rtol=1e-5, atol=1e-7)  # sums of 6 float32 products


def test_sums_can_be_nested():
    a, b, c = layer(6, 2, 5, alpha=3.0, seed=1), layer(6, 4, 5, seed=2), layer(6, 1, 5, alpha=8.0, seed=3)
    at_once = weighted_sum([(a, 0.6), (b, -0.3), (c, 1.5)])
    in_steps = weighted_sum([(weighted_sum([(a, 2.0), (b, -1.0)]), 0.3), (c, 1.5)])
    torch.testing.assert_close(in_steps.delta(), at_once.delta(), rtol=1e-5, atol=1e-7)


def test_one_layer_at_strength_one_is_that_layer():
    one = layer(6, 4, 5, alpha=2.0)
    torch.testing.assert_close(weighted_sum([(one, 1.0)]).delta(), one.delta(), rtol=1e-6, atol=1e-9)


def test_the_same_layer_twice_doubles():
    one = layer(6, 4, 5, alpha=2.0)
    torch.testing.assert_close(weighted_sum([(one, 1.0), (one, 1.0)]).delta(), 2 * one.delta(), rtol=1e-5, atol=1e-8)


def test_a_term_of_strength_zero_takes_no_rank():
    total = weighted_sum([(layer(6, 4, 5), 0.0), (layer(6, 2, 5, seed=1), 1.0)])
    assert total.rank == 2


def test_all_zero_keeps_the_module():
    total = weighted_sum([(layer(6, 4, 5, (3, 3)), 0.0)])
    assert total.rank == 1
    assert torch.equal(total.delta(), torch.zeros(6, 5, 3, 3))


def test_one_by_one_convolution_and_linear_layer_add_up():
    conv, linear = layer(6, 2, 5, (1, 1), seed=1), layer(6, 3, 5, seed=2)
    for order in ([(conv, 1.0), (linear, 2.0)], [(linear, 2.0), (conv, 1.0)]):
        total = weighted_sum(order)
        assert total.up.shape == (6, 5, 1, 1)
        assert total.down.shape == (5, 5, 1, 1)
        assert relative(total.delta()[..., 0, 0], dense(conv.up, conv.down)[..., 0, 0] + 2 * dense(linear.up, linear.down)) < 1e-6  # fmt: skip


def test_tucker_layers_join_plain_ones():
    up, _ = factors(6, 4, 5, (1, 1), seed=1)
    _, down = factors(6, 3, 5, (1, 1), seed=2)
    _, mid = factors(6, 4, 3, (3, 3), seed=3)
    tucker, plain = LoraLayer(up, down, 1.5, mid), layer(6, 2, 5, (3, 3), alpha=1.0, seed=4)
    total = weighted_sum([(tucker, -0.7), (plain, 0.9)])
    torch.testing.assert_close(total.delta(), -0.7 * tucker.delta() + 0.9 * plain.delta(), rtol=1e-5, atol=1e-7)


def test_strength_is_shared_evenly_between_the_factors():
    one = layer(6, 1, 5)
    total = weighted_sum([(one, -4.0)])
    torch.testing.assert_close(total.up, -2 * one.up)
    torch.testing.assert_close(total.down, 2 * one.down)


def test_layers_of_different_weights_do_not_add():
    with pytest.raises(ValueError, match=r"\(6, 5\) and \(6, 7\) differ"):
        weighted_sum([(layer(6, 2, 5), 1.0), (layer(6, 2, 7), 1.0)])
    with pytest.raises(ValueError, match="nothing to add"):
        weighted_sum([])
    with pytest.raises(ValueError, match="strength is nan"):
        weighted_sum([(layer(6, 2, 5), float("nan"))])


dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
# Where float16 holds all, where components overflow, and where they are lost among its subnormal numbers.
sizes = st.sampled_from([1.0, 1.0, 1e-2, 3e-3, 1e-4, 1e-8, 0.0, 1e6])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(ranks, alphas, strengths, dtypes, sizes, sizes), min_size=1, max_size=3), dtypes)
def test_straight_to_a_dtype_is_what_comes_by_way_of_float32_bit_for_bit(terms, dtype):
    layers = []
    for number, (rank, alpha, strength, given_dtype, up_size, down_size) in enumerate(terms):
        up, down = factors(6, rank, 5, seed=number)
        up, down = ((factor * size).to(given_dtype) for factor, size in ((up, up_size), (down, down_size)))
        layers.append((LoraLayer(up, down, alpha), strength))
    assume(all(factor.isfinite().all() for layer, _ in layers for factor in (layer.up, layer.down)))
    exact = weighted_sum(layers)
    try:
        expected = cast(exact, dtype)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)):
            cast(weighted_sum(layers, dtype), dtype)
        return
    found = cast(weighted_sum(layers, dtype), dtype)
    assert found.balanced == expected.balanced
    assert torch.equal(found.layer.up, expected.layer.up)
    assert torch.equal(found.layer.down, expected.layer.down)
    alive = found.layer.up.abs().amax(0) * found.layer.down.abs().amax(1) > 0
    if not found.balanced and alive.all():  # a component with one factor 0 is 0 in both
        assert torch.equal(found.layer.up, exact.up.to(dtype))
        assert torch.equal(found.layer.down, exact.down.to(dtype))


def test_a_sum_in_another_dtype_leaves_its_terms_alone():
    one = LoraLayer(*factors(6, 2, 5, dtype=torch.float16), 1.0)
    before = one.up.clone(), one.down.clone()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weighted_sum([(one, 0.3)], dtype)
    assert torch.equal(one.up, before[0])
    assert torch.equal(one.down, before[1])


def test_a_whole_difference_is_safe_by_the_size_of_its_product_with_the_strength():
    large, small = torch.full((2, 2), 2.0**100), torch.full((2, 2), 2.0**-100)
    assert is_safe_whole(large, 2.0**-100)
    assert is_safe_whole(small, 2.0**100)
    assert not is_safe_whole(small, 2.0**-100)
    assert not is_safe_whole(large, 2.0**100)
    assert is_safe_whole(torch.zeros(2, 2), 2.0**-100)
    assert is_safe_whole(small, 0.0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(ranks, alphas, st.sampled_from([0.0, 1.0, -0.75, 2.5])), min_size=1, max_size=4),
    st.sampled_from([(), (3, 3)]),
)
def test_each_term_of_a_stack_is_its_strength_times_its_update(terms, kernel):
    """Those of strength 0 or alpha 0 too, alone, first or last: a rank of zeros at most."""
    layers = [layer(6, rank, 5, kernel, alpha=alpha, seed=seed) for seed, (rank, alpha, _) in enumerate(terms)]
    made = stacked([(one, strength) for one, (_, _, strength) in zip(layers, terms, strict=True)])
    assert made.up.shape == (6, sum(made.ranks))
    assert made.down.shape == (sum(made.ranks), 5 * (9 if kernel else 1))
    assert made.shape == (6, 5, *kernel)
    alive = [rank if alpha != 0 and strength else 0 for rank, alpha, strength in terms]
    assert sum(made.ranks) == max(1, sum(alive))
    for one, (_, _, strength), (up, down) in zip(layers, terms, made.parts, strict=True):
        wanted = strength * dense(one.up, one.down, one.scale).flatten(1)
        torch.testing.assert_close(up.double() @ down.double(), wanted, rtol=1e-5, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(ranks, alphas, st.sampled_from([0.0, 1.0, -0.75, 2.5])), min_size=1, max_size=4),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_side_by_side_as_they_are_factors_keep_their_numbers_and_the_sum_takes_its_own(terms, dtype):
    made = [
        LoraLayer(*factors(6, rank, 5, seed=seed, dtype=dtype), alpha) for seed, (rank, alpha, _) in enumerate(terms)
    ]
    used = [(one, strength) for one, (_, alpha, strength) in zip(made, terms, strict=True) if alpha != 0 and strength]
    whole, numbers = side_by_side_as_they_are([(one, s) for one, (_, _, s) in zip(made, terms, strict=True)])
    if used:
        assert torch.equal(whole.up, torch.cat([one.up.float() for one, _ in used], dim=1))
        assert torch.equal(whole.down, torch.cat([one.down.float() for one, _ in used]))
    wanted = sum((strength * dense(one.up, one.down, one.scale) for one, strength in used), torch.zeros(6, 5))
    torch.testing.assert_close((whole.up.double() * numbers) @ whole.down.double(), wanted.double())


def test_factors_in_borrowed_memory_are_the_same_and_serve_the_next_ones_afterwards():
    terms = [(layer(6, 4, 5), 1.0), (layer(6, 2, 5, seed=1), -0.5)]
    places = []
    for _ in range(2):
        with ExitStack() as until:
            whole, numbers = side_by_side_as_they_are(terms, until)
            own, same_numbers = side_by_side_as_they_are(terms)
            assert torch.equal(whole.up, own.up)
            assert torch.equal(whole.down, own.down)
            assert torch.equal(numbers, same_numbers)
            places.append({whole.up.data_ptr(), whole.down.data_ptr()})
    assert len(places[0]) == 2
    assert places[0] == places[1]


def test_a_sum_of_plain_loras_is_made_when_it_is_asked_for_whatever_their_strengths():
    first, second = layer(6, 4, 5), layer(6, 2, 5, seed=1)
    for strengths in ((1.0, 0.5), (0.0, 0.5), (1.0, 0.0)):
        total = weighted_sum([*zip((first, second), strengths, strict=True)])
        assert isinstance(total, Sum)
        assert total.rank == sum(one.rank for one, strength in zip((first, second), strengths, strict=True) if strength)


@pytest.mark.parametrize("kind", kinds.ADDITIVE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_is_rounded_once_to_the_dtype_that_was_asked_for_whatever_it_is_made_of(kind, dtype):
    kernel = (3, 3) if kinds.ADDITIVE[kind][1] else ()
    state = {f"lora_unet_conv_in{end}": part for end, part in kinds.parts(kind, kernel=kernel).items()}
    (one,) = Lora.from_state_dict(state).modules.values()
    total, exact = weighted_sum([(one, 0.7)], dtype), weighted_sum([(one, 0.7)])
    assert total.dtypes == {dtype}
    assert torch.equal(total.up, exact.up.to(dtype))
    assert torch.equal(total.down, exact.down.to(dtype))
    if dtype == torch.float16:  # what it would lose stays in float32, to be balanced; a plain LoRA has alpha for it
        small = weighted_sum([(one, 1e-9)], dtype)
        assert small.dtypes == {dtype if isinstance(small, Sum) else torch.float32}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(ranks, alphas, strengths, sizes), min_size=1, max_size=4),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    dtypes,
)
def test_the_largest_of_a_sum_keeps_its_numbers_bit_for_bit_at_any_alpha_and_strength(terms, given_dtype, dtype):
    """The first of those of the largest rank that enter with more than 0. The others are what they are relative to it."""
    layers = [
        LoraLayer(*((factor * size).to(given_dtype) for factor in factors(6, rank, 5, seed=number)), alpha)
        for number, (rank, alpha, _, size) in enumerate(terms)
    ]
    strengths = [strength for _, _, strength, _ in terms]
    assume(all(factor.isfinite().all() for layer in layers for factor in (layer.up, layer.down)))
    wanted = scale_of_the_largest(layers, strengths)
    total = weighted_sum(list(zip(layers, strengths, strict=True)), dtype)
    used = [one for one, strength in zip(layers, strengths, strict=True) if strength * one.scale]
    kept = max(
        (one for one in used if strengths[layers.index(one)] * one.scale > 0), key=lambda one: one.rank, default=None
    )
    assume(
        kept is not None and isinstance(total, Sum) and total.scale == pytest.approx(wanted, rel=1e-12) and wanted != 1
    )
    before = sum(one.rank for one in used[: used.index(kept)])
    up, down = total.up[:, before : before + kept.rank], total.down[before : before + kept.rank]
    assert torch.equal(up, kept.up.to(total.dtype))
    assert torch.equal(down, kept.down.to(total.dtype))


@pytest.mark.parametrize("first", [True, False])
def test_one_term_whose_factors_leave_float32s_range_on_the_way_is_enough_to_take_care(first):
    one = layer(6, 2, 5)
    far = LoraLayer(one.up * 2.0**100, one.down * 2.0**-100)
    terms = [(far, 2.0**100), (layer(6, 3, 5, seed=1), 1.0)]
    total = weighted_sum(terms if first else terms[::-1])
    wanted = torch.ldexp(dense(one.up, one.down), torch.tensor(100))
    assert relative(total.delta_in(torch.float64), wanted) < 1e-6


def test_ordinary_sums_are_made_in_float32_and_only_those_that_leave_it_in_float64():
    one, diff = layer(6, 2, 5), torch.ones(6, 5)
    assert dense_dtype([(one, 1.0)], [(diff, -2.0)]) == torch.float32
    assert dense_dtype([(one, 1.0)], [(diff, 2.0**120)]) == torch.float64
    assert dense_dtype([(one, 2.0**120)], [(diff, 1.0)]) == torch.float64
    assert dense_dtype([(one, 1.0), (one, 2.0**120)], []) == torch.float64
    assert dense_dtype([], [(diff, 1.0), (diff, 2.0**120)]) == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_sum_of_nothing_has_the_dtype_and_the_device_of_any_other(dtype):
    layer = LoraLayer(*factors(6, 2, 5))
    elsewhere = LoraLayer(layer.up.to("meta"), layer.down.to("meta"))
    for terms in ([(layer, 0.0)], [(elsewhere, 0.0)]):
        total = stacked(terms, dtype)
        assert {total.up.dtype, total.down.dtype} == {dtype}
        assert {total.up.device, total.down.device} == {terms[0][0].up.device}


def test_a_sum_of_differences_is_made_where_they_are():
    """A device without numbers, which takes part in no sum with another one."""
    away = torch.zeros(3, 2, device="meta")
    assert dense_sum_in(torch.float32, [], [(away, 1.0), (away, 2.0)]).device == away.device
