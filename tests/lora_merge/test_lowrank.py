import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm_kit.lora_merge import LoraLayer
from lcm_kit.lora_merge.algebra.core_space import core_space
from lcm_kit.lora_merge.algebra.lowrank import (
    directions,
    directions_in,
    energy_of,
    truncated_matrix,
    truncated_sum,
)
from lcm_kit.lora_merge.algebra.order import Product, _singular, order
from lcm_kit.lora_merge.algebra.orthonormal import Triangle, basis, triangle
from lcm_kit.lora_merge.algebra.singular import Singular, singular, singular_of
from lcm_kit.lora_merge.algebra.sums import side_by_side_as_they_are
from lcm_kit.tests.lora_merge.make import dense, factors, layer, relative


def exact(terms):
    return sum(strength * dense(one.up, one.down, one.scale) for one, strength in terms)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.sampled_from([(), (3, 3)]))
def test_the_error_is_the_smallest_possible(rank, first, second, kernel):
    terms = [(layer(10, first, 8, kernel, alpha=1.0, seed=1), 1.0), (layer(10, second, 8, kernel, seed=2), -0.6)]
    result = truncated_sum(terms, rank)
    wanted = exact(terms)
    spectrum = torch.linalg.svdvals(wanted.flatten(1))  # Eckart-Young, from the dense matrix in float64
    best = math.sqrt(float(spectrum[rank:].square().sum() / spectrum.square().sum()))
    assert result.layer.rank <= max(rank, 1)
    assert relative(result.layer.delta(), wanted) == pytest.approx(best, abs=1e-5)  # float32 rounding
    assert result.error == pytest.approx(best, abs=1e-5)


def test_a_sum_that_fits_stays_exact():
    terms = [(layer(10, 3, 8, seed=1), 1.0), (layer(10, 2, 8, seed=2), 0.5)]
    result = truncated_sum(terms, 5)
    assert result.layer.rank == 5
    assert result.lost_energy == 0
    assert result.kept_energy == result.source_energy
    assert relative(result.layer.delta(), exact(terms)) < 1e-6
    energies = [float(exact(some).square().sum()) for some in (terms, terms[:1], terms[1:])]
    assert [result.energy, *result.source_energy] == pytest.approx(energies, rel=1e-5)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_what_a_method_made_of_the_updates_is_cut_and_measured_as_it_is(count, balanced):
    """The result is another update than its terms are, also where there is one alone."""
    terms = [(layer(14, 6, 11, alpha=2.0, seed=n), 0.7 + n) for n in range(count)]
    space = core_space(terms)
    mask = torch.rand(space.cores[0].shape, generator=torch.Generator().manual_seed(9)) < 0.5
    made = sum(space.cores) * mask
    whole = (space.left @ made @ space.right).double()
    found = directions_in(space, made, balanced=balanced)
    prospect = found.prospect()
    for rank in (1, 2, 4):
        result = found.cut(rank)
        got = result.layer.delta().double()
        assert result.energy == pytest.approx(float(whole.square().sum()), rel=1e-5)
        assert result.lost_energy == pytest.approx(float((got - whole).square().sum()), rel=1e-3, abs=1e-6)
        u, _, vh = torch.linalg.svd(got, full_matrices=False)
        for row, term in enumerate(terms):
            inside = u[:, :rank].T @ exact([term]) @ vh[:rank].T
            assert result.source_energy[row] == pytest.approx(float(exact([term]).square().sum()), rel=1e-5)
            assert result.kept_energy[row] == pytest.approx(float(inside.square().sum()), rel=1e-3)
            assert float(prospect.kept[1 + row, rank]) == pytest.approx(result.kept_energy[row], rel=1e-4)


def test_a_low_rank_sum_is_found_whatever_its_factors():
    # the same LoRA three times has rank 3, though the factors side by side have 9
    one = layer(10, 3, 8)
    result = truncated_sum([(one, 1.0), (one, 0.5), (one, -0.2)], 3)
    assert result.layer.rank == 3
    assert relative(result.layer.delta(), 1.3 * dense(one.up, one.down)) < 1e-5  # float32 QR and SVD


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("shape", [(4, 5), (5, 4), (3, 40), (40, 3)])
def test_ranks_beyond_the_weight_are_no_trouble(shape, balanced):
    terms = [(layer(shape[0], 6, shape[1], seed=seed), 1.0) for seed in (1, 2)]
    found = directions(terms, balanced=balanced)
    for result in (truncated_sum(terms, 8, balanced=balanced), found.cut(min(shape))):
        assert result.layer.rank == min(shape)
        assert relative(result.layer.delta(), exact(terms)) < 1e-5
        assert result.error < 1e-6
        assert found.prospect().kept[:, -1].tolist() == pytest.approx([result.energy, *result.kept_energy], rel=1e-5)
    space = core_space(terms)
    result = directions_in(space, sum(space.cores), balanced=balanced).cut(8)
    assert relative(result.layer.delta(), exact(terms)) < 1e-5


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("shape", [(4, 5), (5, 4), (3, 40), (40, 3), (6, 6), (3, 5, 3, 3), (30, 2, 3, 3)])
@pytest.mark.parametrize("strengths", [(1.0, 1.0), (1.0, -0.01), (0.8, 1.0, -0.5)])
def test_a_cut_that_cuts_nothing_keeps_all_of_each_term(shape, strengths, balanced):
    """Also where terms take more ranks than the weight has, and what one has beyond the sum is taken back by another."""
    out, inside, *kernel = shape
    terms = [(layer(out, 5, inside, tuple(kernel), seed=n), strength) for n, strength in enumerate(strengths)]
    energies = [float(exact([term]).square().sum()) for term in terms]
    whole = min(out, math.prod(shape[1:]), 5 * len(terms))
    for rank in (whole, whole + 1, 100):
        result = truncated_sum(terms, rank, balanced=balanced)
        assert result.source_energy == pytest.approx(energies, rel=1e-5)
        assert result.kept_energy == pytest.approx(result.source_energy, rel=1e-6)
    found = directions(terms, balanced=balanced)
    assert found.prospect().kept[1:, -1].tolist() == pytest.approx(energies, rel=1e-5)
    less = found.cut(whole - 1)
    assert less.lost_energy > 0
    assert less.kept_energy[0] < less.source_energy[0]


@pytest.mark.parametrize("balanced", [False, True])
def test_an_update_of_zeros_beside_others_changes_nothing_and_one_of_scale_0_takes_no_rank(balanced):
    one, zeros = layer(14, 5, 11, seed=1), LoraLayer(torch.zeros(14, 2), torch.ones(2, 11))
    scaled_away = layer(14, 4, 11, alpha=0.0, seed=2)
    for rank in (3, 5):
        alone = truncated_sum([(one, 1.0)], rank, balanced=balanced)
        result = truncated_sum([(one, 1.0), (zeros, 1.0), (scaled_away, 1.0)], rank, balanced=balanced)
        assert result.layer.rank == rank
        torch.testing.assert_close(result.layer.delta(), alone.layer.delta(), rtol=0, atol=1e-6)
        assert result.source_energy == (pytest.approx(alone.energy), 0.0, 0.0)
    assert truncated_sum([(one, 1.0), (scaled_away, 1.0)], 5, balanced=balanced).lost_energy == 0.0


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (8, 8), (6, 3, 3, 3), (30, 2, 3, 3)])
@pytest.mark.parametrize("own_rank", [2, 100])
@pytest.mark.parametrize("rank", [1, 3, 100])
@pytest.mark.parametrize("power", [-40, 0, 40])
def test_a_whole_update_is_cut_as_eckart_and_young_have_it_at_any_size(shape, own_rank, rank, power):
    """And what that keeps of the updates that it was made of is measured inside its own directions."""
    g = torch.Generator().manual_seed(0)
    flat = (shape[0], math.prod(shape[1:]))
    inner = min(own_rank, *flat)
    first, second = ((torch.randn(flat[0], inner, generator=g) @ torch.randn(inner, flat[1], generator=g)) * 2.0**power
                     for _ in range(2))  # fmt: skip
    total = first
    result = truncated_matrix(total.reshape(shape), [first.reshape(shape), second.reshape(shape)], rank)
    u, s, vh = torch.linalg.svd(total.double(), full_matrices=False)
    kept = min(rank, inner)
    assert result.layer.rank == kept
    assert result.layer.shape == shape
    wanted = u[:, :kept] * s[:kept] @ vh[:kept]
    assert relative(result.layer.delta().flatten(1), wanted) < 1e-5
    size = float(s.square().sum())
    assert result.energy == pytest.approx(size)
    assert result.lost_energy == pytest.approx(float(s[kept:].square().sum()), abs=1e-12 * size)
    assert result.source_energy == (pytest.approx(size), pytest.approx(float(second.double().square().sum())))
    inside = [float((u[:, :kept].T @ one.double() @ vh[:kept].T).square().sum()) for one in (first, second)]
    assert result.kept_energy == (pytest.approx(inside[0]), pytest.approx(inside[1], rel=1e-4))


def test_a_whole_update_of_zeros_is_a_rank_of_zeros():
    result = truncated_matrix(torch.zeros(5, 4), [torch.zeros(5, 4)], 3)
    assert result.layer.rank == 1
    assert not result.layer.delta().any()
    assert (result.energy, result.lost_energy, result.error) == (0.0, 0.0, 0.0)
    assert (result.source_energy, result.kept_energy) == ((0.0,), (0.0,))


def test_energies_are_those_of_the_dense_computation():
    terms = [(layer(10, 6, 8, seed=1), 1.0), (layer(10, 5, 8, seed=2), 0.3)]
    result = truncated_sum(terms, 4)
    u, _, vh = torch.linalg.svd(exact(terms), full_matrices=False)
    for index, (one, strength) in enumerate(terms):
        delta = strength * dense(one.up, one.down, one.scale)
        inside = u[:, :4].T @ delta @ vh[:4].T
        assert result.source_energy[index] == pytest.approx(float(delta.square().sum()), rel=1e-4)
        assert result.kept_energy[index] == pytest.approx(float(inside.square().sum()), rel=1e-3)
    assert result.energy == pytest.approx(float(exact(terms).square().sum()), rel=1e-4)


def test_a_weak_source_is_lost_first_and_the_figures_say_so():
    # orthogonal by construction: strong in the first four directions, weak in the next two
    eye = torch.eye(8)
    strong, weak = LoraLayer(eye[:, :4], eye[:4]), LoraLayer(eye[:, 4:6], eye[4:6])
    result = truncated_sum([(strong, 1.0), (weak, 0.1)], 4)
    assert result.kept_energy[0] == pytest.approx(result.source_energy[0], rel=1e-5)
    assert result.kept_energy[1] == pytest.approx(0, abs=1e-9)
    assert result.error == pytest.approx(0.1 * math.sqrt(2) / math.sqrt(4.02), rel=1e-4)


def test_zero_is_truncated_to_zero():
    result = truncated_sum([(layer(6, 4, 5), 0.0)], 2)
    assert result.error == 0
    assert torch.equal(result.layer.delta(), torch.zeros(6, 5))
    cancelled = truncated_sum([(layer(6, 4, 5), 1.0), (layer(6, 4, 5), -1.0)], 2)
    assert cancelled.layer.delta().abs().max() < 1e-6


def test_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="rank is 0, but the smallest rank is 1"):
        truncated_sum([(layer(6, 4, 5), 1.0)], 0)


# ---- balanced directions


def weak_and_strong():
    """A strong and a weak update of independent directions: the plain cut keeps the strong one only."""
    return [(layer(40, 8, 30, seed=1), 1.0), (layer(40, 8, 30, seed=2), 0.1)]


def test_the_plain_cut_loses_the_weak_term_and_the_balanced_one_shares_the_loss():
    plain, balanced = (truncated_sum(weak_and_strong(), 8, balanced=choice) for choice in (False, True))
    kept = [[k / e for k, e in zip(r.kept_energy, r.source_energy, strict=True)] for r in (plain, balanced)]
    assert kept[0][0] > 0.95 > 0.2 > kept[0][1]
    assert min(kept[1]) > 0.3
    assert balanced.error > plain.error


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_figures_are_those_of_the_dense_matrices(balanced, kernel):
    """Error and retention from the finished layer and full-size float64 projections."""
    terms = [(layer(14, 5, 8, kernel, seed=1), 1.0), (layer(14, 4, 8, kernel, alpha=3.0, seed=2), -0.4)]
    result = truncated_sum(terms, 6, balanced=balanced)
    wanted = exact(terms).flatten(1)
    got = result.layer.delta().double().flatten(1)
    assert result.error == pytest.approx(float((got - wanted).norm() / wanted.norm()), abs=1e-5)
    u, _, vh = torch.linalg.svd(got)
    u, vh = u[:, :6], vh[:6]
    for (one, strength), whole, kept in zip(terms, result.source_energy, result.kept_energy, strict=True):
        delta = (strength * dense(one.up, one.down, one.scale)).flatten(1)
        assert whole == pytest.approx(float(delta.square().sum()), rel=1e-5)
        assert kept == pytest.approx(float((u.T @ delta @ vh.T).square().sum()), rel=1e-3)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_prospect_tells_what_each_cut_will_keep(balanced):
    found = directions(weak_and_strong(), balanced=balanced)
    prospect = found.prospect()
    assert prospect.cost == 70
    assert (prospect.priority.diff() <= 1e-9).all()
    for rank in (1, 5, 16):
        result = found.cut(rank)
        kept = prospect.kept[:, rank].tolist()
        assert kept[0] == pytest.approx(result.energy - result.lost_energy, rel=1e-4)
        assert kept[1:] == pytest.approx(list(result.kept_energy), rel=1e-4)
    assert prospect.kept[0, -1].item() == pytest.approx(found.cut(16).energy, rel=1e-5)


def test_terms_that_cancel_have_balanced_directions_too():
    one = layer(10, 3, 8)
    result = truncated_sum([(one, 1.0), (one, -1.0)], 2, balanced=True)
    assert result.layer.delta().abs().max() < 1e-6


@pytest.mark.parametrize("strength", [0.5, -2.0])
@pytest.mark.parametrize("alpha", [None, 1.0, 7.0])
def test_the_energy_is_the_squared_norm_of_strength_times_delta(strength, alpha):
    layer = LoraLayer(*factors(9, 3, 7), alpha=alpha)
    wanted = (strength * dense(layer.up, layer.down, layer.scale)).square().sum()
    assert energy_of((layer, strength)) == pytest.approx(float(wanted), rel=1e-6)
    far = LoraLayer(layer.up * 2.0**60, layer.down * 2.0**40, alpha=alpha)
    assert energy_of((far, strength)) == pytest.approx(float(wanted) * 2.0**200, rel=1e-6)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_known_of_the_directions_makes_the_same_cut_bit_for_bit(count, balanced, kernel):
    terms = [(layer(40, 5 + n, 30, kernel, alpha=2.0, seed=n), 0.5 + n) for n in range(count)]
    known = directions(terms, balanced=balanced).known()
    assert known is not None
    kept = [part for of in (known, known.order) for part in vars(of).values() if isinstance(part, torch.Tensor)]
    assert isinstance(known.order, Singular) is not balanced
    assert getattr(known.order, "gram", None) is None
    # A table of what is kept begins with rank 0.
    assert {max(part.shape) for part in kept} <= {(rank := sum(one.rank for one, _ in terms)), rank + 1}
    for rank in (1, 3, 4):
        anew, again = (
            truncated_sum(terms, rank, balanced=balanced),
            truncated_sum(terms, rank, balanced=balanced, known=known),
        )
        assert torch.equal(again.layer.up, anew.layer.up)
        assert torch.equal(again.layer.down, anew.layer.down)
        figures = [(one.energy, one.lost_energy, one.source_energy, one.kept_energy) for one in (anew, again)]
        assert figures[0] == figures[1]


def test_of_dependent_factors_nothing_is_kept_for_later():
    """Their bases come from a QR, of the size of the factors."""
    one = layer(40, 5, 30, seed=1)
    assert directions([(one, 1.0), (one, 0.5)]).known() is None


@pytest.mark.parametrize("singular", [(1.0, 1.0, 1e-7), (1.0, 1e-7, 0.9e-7), (1.0, 0.5, 0.25)])
def test_singular_vectors_are_orthonormal_however_far_the_singular_values_are_apart(singular):
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 3, generator=generator).double())[0] for n in (5, 3))
    u, s, vh = _singular(u * torch.tensor(singular).double() @ v.T)
    for vectors in (u.T @ u, vh @ vh.T):
        torch.testing.assert_close(vectors, torch.eye(3).double(), rtol=0, atol=1e-6)  # float32 needs no more
    torch.testing.assert_close(s, torch.tensor(singular).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("power", [-30, 0, 30])
def test_singular_values_are_as_exact_whatever_the_size_of_the_update_and_in_float32(power):
    """From squares float32 would lose all below 3e-4 of the largest one, and float64 below 1e-8."""
    for dtype, least, tolerance in ((torch.float64, 1e-6, 1e-9), (torch.float32, 1e-4, 1e-2)):
        generator = torch.Generator().manual_seed(0)
        u, v = (torch.linalg.qr(torch.randn(n, 3, generator=generator).double())[0] for n in (5, 3))
        singular = torch.tensor([1.0, 0.5, least]).double() * 2.0**power
        u, s, vh = _singular((u * singular @ v.T).to(dtype))
        torch.testing.assert_close(s.double(), singular, rtol=tolerance, atol=0)
        for vectors in (u.T @ u, vh @ vh.T):
            torch.testing.assert_close(vectors.double(), torch.eye(3).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("strengths", [(1.0,), (-0.7,), (0.9, -0.4), (1.0, 1e-2, -3.0)])
def test_gram_matrices_tell_the_singular_directions_that_a_decomposition_tells(strengths):
    """To what float32 leaves of inner products."""
    terms = [(layer(40, 5 + n, 30, alpha=2.0, seed=n), strength) for n, strength in enumerate(strengths)]
    whole, numbers = side_by_side_as_they_are(terms)
    one = singular(whole.up, whole.down, numbers, whole.ranks)
    (up, r_up), (down, r_down) = basis(whole.up), basis(whole.down.T)
    ranks = list(whole.ranks)
    products = tuple(map(Product, torch.split(r_up * numbers, ranks, 1), torch.split(r_down, ranks, 1)))
    other = order(r_up * numbers @ r_down.T, products)
    torch.testing.assert_close(one.kept, other.kept, rtol=1e-6, atol=0)
    torch.testing.assert_close(one.worth, other.worth, rtol=1e-6, atol=0)
    assert one.energy == pytest.approx(other.energy, rel=1e-6)
    assert one.source_energy == pytest.approx(other.source_energy, rel=1e-6)
    for rank in (1, 4, sum(ranks), 100):
        first, second = one.cut(rank), other.cut(rank)
        assert first.lost == pytest.approx(second.lost, rel=1e-6)
        assert first.kept == pytest.approx(second.kept, rel=1e-6)
        in_factors = up.coefficients(second.left).double() @ down.coefficients(second.right.T).double().T
        scale = float(in_factors.abs().max())
        torch.testing.assert_close(first.left @ first.right, in_factors, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_cut_is_rounded_once_where_the_dtype_holds_it(dtype, balanced):
    terms = [(layer(40, 5 + n, 30, seed=n), 1.0) for n in range(2)]
    exact_one, rounded = (directions(terms, balanced=balanced).cut(4, to).layer for to in (torch.float32, dtype))
    assert rounded.dtypes == {dtype}
    assert torch.equal(rounded.up, exact_one.up.to(dtype))
    assert torch.equal(rounded.down, exact_one.down.to(dtype))
    # What float16 would lose comes as it is, for precision.cast to balance.
    small = directions([(one, 1e-9) for one, _ in terms], balanced=balanced).cut(4, dtype).layer
    assert small.dtypes == {torch.float32 if dtype == torch.float16 else dtype}


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_squares_are_left_alone_where_they_could_not_tell(size):
    """Singular values of which float64 loses the square beside the largest, and factors that depend on one another."""
    one, tiny, zeros = (
        layer(40, 5, 30, seed=1),
        layer(40, 5, 30, seed=2),
        LoraLayer(torch.zeros(40, 2), torch.ones(2, 30)),
    )
    for terms in ([(one, size), (tiny, 1e-6 * size)], [(one, size), (one, 0.5)], [(one, size), (zeros, 1.0)]):
        whole, numbers = side_by_side_as_they_are(terms)
        assert singular(whole.up, whole.down, numbers, whole.ranks) is None
        result = truncated_sum(terms, 3)
        best = torch.linalg.svdvals(exact(terms).double())[3:].norm() / exact(terms).double().norm()
        assert result.error == pytest.approx(float(best), rel=1e-5)
    whole, numbers = side_by_side_as_they_are([(one, 1.0), (tiny, 1.0)])
    sides = triangle(whole.up), triangle(whole.down.T)
    assert singular_of(*sides, numbers, whole.ranks) is not None
    for which in range(2):
        without = [Triangle(one.r) if index == which else one for index, one in enumerate(sides)]
        assert singular_of(*without, numbers, whole.ranks) is None


@pytest.mark.parametrize("strengths", [(1.0,), (-0.7,), (0.0, 1.3), (0.9, -0.4)])
def test_what_is_kept_is_what_a_singular_value_decomposition_of_the_whole_update_keeps(strengths):
    """Also of a LoRA alone, where nothing but its singular values is looked at."""
    terms = [(layer(40, 5 + n, 30, alpha=2.0, seed=n), strength) for n, strength in enumerate(strengths)]
    u, s, vh = torch.linalg.svd(exact(terms).double(), full_matrices=False)
    rank = int((s > 1e-6 * s[0]).sum())
    kept = directions(terms).prospect().kept
    assert kept.shape == (1 + len(terms), 1 + sum(one.rank for one, strength in terms if strength))
    for r in range(1, rank):
        assert kept[0, r].item() == pytest.approx(float(s[:r].square().sum()), rel=1e-5)
        for row, term in enumerate(terms, start=1):
            inside = u[:, :r].T @ exact([term]).double() @ vh[:r].T
            assert kept[row, r].item() == pytest.approx(float(inside.square().sum()), rel=1e-4, abs=1e-9)
