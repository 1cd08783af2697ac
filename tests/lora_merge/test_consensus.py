"""Election of signs, disjoint merging, SLERP and TSV-Merge against values worked out by hand."""

import math

import pytest
import torch

from lcm_kit.lora_merge.methods.consensus import disjoint, elected_sign, orthogonalised, slerp

A = torch.tensor([3.0, -1.0, 2.0, 0.0, 1.0])
B = torch.tensor([-1.0, -2.0, 4.0, 5.0, -1.0])


def test_the_larger_total_wins_the_sign():
    assert elected_sign([A, B]).tolist() == [1.0, -1.0, 1.0, 1.0, 0.0]


def test_the_disjoint_mean_counts_the_winners_only():
    assert disjoint([A, B], mean=True).tolist() == [3.0, -1.5, 3.0, 5.0, 0.0]


def test_the_disjoint_sum():
    assert disjoint([A, B], mean=False).tolist() == [3.0, -3.0, 6.0, 5.0, 0.0]


@pytest.mark.parametrize("mean", [True, False])
def test_one_update_comes_back(mean):
    assert torch.equal(disjoint([A], mean=mean), A)


def test_flipping_all_signs_flips_the_result():
    assert torch.equal(disjoint([-A, -B], mean=True), -disjoint([A, B], mean=True))


def test_slerp_of_orthogonal_unit_vectors_runs_on_the_circle():
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for t in (0.0, 0.25, 0.5, 1.0):
        expected = torch.tensor([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)])
        torch.testing.assert_close(slerp(x, y, t), expected, rtol=0, atol=1e-7)


def test_slerp_ends_and_degenerate_arcs():
    torch.testing.assert_close(slerp(A, B, 0.0), A)
    torch.testing.assert_close(slerp(A, B, 1.0), B)
    torch.testing.assert_close(slerp(A, 2 * A, 0.5), 1.5 * A)
    torch.testing.assert_close(slerp(A, -A, 0.5), torch.zeros_like(A))
    torch.testing.assert_close(slerp(A, torch.zeros_like(A), 0.5), 0.5 * A)


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0, -0.7])
def test_slerp_along_one_line_is_that_line_however_its_cosine_is_rounded(factor):
    """To a little above 1 or below -1 for some of these, where no angle has that cosine."""
    cosines = []
    for seed in range(40):
        one = torch.randn(9, generator=torch.Generator().manual_seed(seed))
        other = factor * one
        a, b = one.double(), other.double()
        cosines.append(float((a * b).sum() / (a.norm() * b.norm())))
        expected = 0.75 * one + 0.25 * other
        torch.testing.assert_close(slerp(one, other, 0.25), expected, rtol=1e-5, atol=1e-6)
    assert max(map(abs, cosines)) > 1


@pytest.mark.parametrize("off", [1e-1, 1e-2, 1e-3, 1e-4])
def test_slerp_of_nearly_opposite_updates_keeps_the_digits_of_its_large_weights(off):
    """The weights are 1 / sin of the angle and cancel: what a cosine loses by rounding they multiply."""
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([-math.cos(off), math.sin(off)])
    x, y = second.double().tolist()
    angle = math.atan2(y, x)
    for t in (0.25, 0.5, 0.9):
        near, far = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
        wanted = torch.tensor([near + far * x, far * y])
        torch.testing.assert_close(slerp(first, second, t), wanted, rtol=0, atol=1e-6)


def test_tsv_merge_of_orthogonal_updates_is_their_sum():
    first, second = torch.zeros(8, 8), torch.zeros(8, 8)
    first[0, 0], first[1, 1], second[4, 4], second[5, 6] = 3.0, 1.0, 2.0, 0.5
    torch.testing.assert_close(orthogonalised([first, second]), first + second, rtol=0, atol=1e-6)


def test_tsv_merge_makes_singular_vectors_orthogonal():
    """Two copies of one update interfere fully; orthogonalised, the merge has both sets of singular values."""
    update = torch.diag(torch.tensor([4.0, 2.0, 0.0, 0.0]))
    other = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0] @ update
    values = torch.linalg.svdvals(orthogonalised([update, other]))
    torch.testing.assert_close(values, torch.tensor([4.0, 4.0, 2.0, 2.0]), rtol=1e-5, atol=1e-5)


def test_an_update_of_zeros_leaves_the_others_of_a_tsv_merge_alone():
    update = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    for deltas in ([update, torch.zeros(6, 9)], [torch.zeros(6, 9), update]):
        torch.testing.assert_close(orthogonalised(deltas), update, rtol=0, atol=1e-5)
    assert not orthogonalised([torch.zeros(6, 9)] * 2).any()


@pytest.mark.parametrize("power", [-40, -12, 12, 40])
def test_the_size_of_updates_of_small_rank_changes_no_direction_of_a_tsv_merge(power):
    """What float32 leaves of their other directions has vectors of no meaning, at any size."""
    g = torch.Generator().manual_seed(3)
    deltas = [torch.randn(9, 2, generator=g) @ torch.randn(2, 8, generator=g) for _ in range(2)]
    expected = orthogonalised(deltas)
    assert int(torch.linalg.matrix_rank(expected)) == 4
    found = orthogonalised([delta * 2.0**power for delta in deltas])
    torch.testing.assert_close(found / 2.0**power, expected, rtol=0, atol=1e-5)


def test_tsv_merge_of_one_update_is_that_update():
    update = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalised([update]), update, rtol=0, atol=1e-5)


def test_tsv_merge_of_updates_of_full_rank_keeps_an_equal_share_of_each():
    """As the paper does it: the leading min(m, n) / T triples of each of T updates, then the nearest orthonormal sets."""
    g = torch.Generator().manual_seed(2)
    updates = [torch.randn(9, 6, generator=g, dtype=torch.float64) for _ in range(3)]
    triples = [torch.linalg.svd(update) for update in updates]
    left, right = torch.cat([u[:, :2] for u, _, _ in triples], dim=1), torch.cat([v[:2] for _, _, v in triples]).T

    def orthonormal(vectors):
        """X (X^T X)^(-1/2)."""
        values, axes = torch.linalg.eigh(vectors.T @ vectors)
        return vectors @ (axes / values.sqrt()) @ axes.T

    wanted = orthonormal(left) @ torch.diag(torch.cat([s[:2] for _, s, _ in triples])) @ orthonormal(right).T
    torch.testing.assert_close(orthogonalised(updates).double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [2, 3])
def test_as_many_full_updates_as_there_is_room_for_directions_give_their_largest_one_each(count):
    """Orthonormal vectors on both sides: the singular values of the merge are those that were kept."""
    deltas = [
        torch.randn(count, count + 2, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
        for seed in range(count)
    ]
    largest = sorted((float(torch.linalg.matrix_norm(delta, 2)) for delta in deltas), reverse=True)
    assert torch.linalg.svdvals(orthogonalised(deltas)).tolist() == pytest.approx(largest, rel=1e-5)
