"""The Frechet distance and its error against values worked out by hand."""

import math

import pytest
import torch
from scipy.stats import sem

from lcm_kit.demo.train.frechet import frechet, jackknife_error, without_each_seed


def with_moments(mean, covariance) -> torch.Tensor:
    """Rows whose sample mean and covariance are exactly these."""
    d = len(mean)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * d).reshape(-1, d)
    unit = corners * math.sqrt((len(corners) - 1) / len(corners))
    root = torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64))
    return torch.tensor(mean, dtype=torch.float64) + unit @ root.T


def test_gaussians_on_a_line():
    # (3 - 1)^2 + (5 - 2)^2: means 1 and 3, standard deviations 2 and 5
    assert frechet(with_moments([1.0], [[4.0]]), with_moments([3.0], [[25.0]])) == pytest.approx(13.0)


def test_a_shift_alone_is_its_square():
    heap = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([1.0, 0.0, -2.0, 0.0, 2.0, 0.0])
    assert frechet(heap, heap + shift) == pytest.approx(9.0, abs=1e-4)  # the shift is rounded to float32


def test_covariances_that_do_not_commute():
    # trace(A + B - 2 (A B)^1/2); for 2 x 2 matrices, trace(M^1/2) = sqrt(trace(M) + 2 sqrt(det(M))).
    a, b = [[2.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 4.0]]
    trace_ab, det_ab = 2.0 + 8.0, 3.0 * 4.0
    expected = 4.0 + 5.0 - 2 * math.sqrt(trace_ab + 2 * math.sqrt(det_ab))
    assert frechet(with_moments([0.0, 0.0], a), with_moments([0.0, 0.0], b)) == pytest.approx(expected)


def test_it_is_zero_for_the_same_heap_and_the_same_in_both_directions():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(50, 8, generator=generator), 2 * torch.randn(60, 8, generator=generator) + 1
    assert frechet(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet(a, b) == pytest.approx(frechet(b, a))


def test_fewer_rows_than_features_are_biased_upwards_but_finite():
    generator = torch.Generator().manual_seed(2)
    few, many = ([torch.randn(n, 32, generator=generator) for _ in range(2)] for n in (20, 2000))
    assert 0 < frechet(*many) < 1 < frechet(*few)


@pytest.mark.parametrize(("a", "b"), [((1, 4), (9, 4)), ((9, 4), (9, 5)), ((9,), (9,))])
def test_what_has_no_covariance_is_refused(a, b):
    with pytest.raises(ValueError, match="2 or more, d"):
        frechet(torch.zeros(a), torch.zeros(b))


def test_a_seed_left_out_is_really_left_out():
    generator = torch.Generator().manual_seed(3)
    features, reference = torch.randn(3, 20, 4, generator=generator), torch.randn(30, 4, generator=generator)
    features[2] += 100
    left_out = without_each_seed(features, reference)
    assert left_out[2] == frechet(features[:2].reshape(40, 4), reference)
    assert left_out[2] < 1 < min(left_out[:2])


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = [3.0, 5.0, 10.0, 2.0]
    left_out = [(sum(values) - v) / 3 for v in values]
    # variance (4 + 0 + 25 + 9) / 3, over 4 values
    assert jackknife_error(left_out) == pytest.approx(sem(values))


def test_one_seed_tells_nothing_about_the_error():
    assert math.isnan(jackknife_error([1.0]))
