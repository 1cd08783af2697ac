"""Orthonormal bases by way of Gram matrices, against the QR decomposition in float64."""

import math

import pytest
import torch

from lcm_kit.lora_merge.algebra.orthonormal import basis, gram, triangle


def random(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def dependent(rows, columns):
    return random(rows, 3) @ random(3, columns, seed=1)


def nearly_dependent(rows, columns):
    """One column off the span of the others by 1e-5 of its length."""
    factor = random(rows, columns)
    factor[:, -1] = factor[:, 0] + factor[:, 1] + 1e-5 * factor[:, -1]
    return factor


FACTORS = {
    "tall": random(40, 7),
    "one column": random(40, 1),
    "wide": random(5, 9),
    "dependent": dependent(40, 7),
    "nearly dependent": nearly_dependent(40, 7),
    "a column of zeros": torch.cat([random(40, 3), torch.zeros(40, 1), random(40, 2, seed=1)], dim=1),
    "zero": torch.zeros(40, 3),
    "a column next to nothing": torch.cat([random(40, 3), 1e-21 * random(40, 1, seed=1)], dim=1),
    "columns of very different size": random(40, 6) * 10.0 ** torch.arange(-12, 12, 4),
}


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
def test_q_is_orthonormal_and_q_r_is_the_factor(factor):
    found, r = basis(factor)
    q = (found.vectors @ found.coefficients(torch.eye(r.shape[0], dtype=torch.float64))).double()
    # float32 throughout, times the inverse of the least distance that a Cholesky factor is trusted with
    assert (q.T @ q - torch.eye(r.shape[0])).abs().max() < 1e-4
    scale = factor.double().norm(dim=0).clamp(min=1e-30)
    assert ((q @ r - factor) / scale).abs().max() < 1e-4


@pytest.mark.parametrize("power", [-40, -25, -6, 0, 6, 25, 37])
@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
def test_both_triangles_have_the_factors_gram_matrix(factor, power):
    factor = (factor.double() * 10.0**power).float()
    if power == 37:
        factor = factor.clamp(-3e38, 3e38)
    elif power == -40:
        factor = torch.where(factor.abs() < 1e-37, 0.0, factor)  # bits that float32 has lost already are none of ours
    exact = factor.double()
    expected = exact.T @ exact
    size = exact.norm(dim=0).clamp(min=1e-290)
    for r in (basis(factor)[1], triangle(factor).r):
        assert ((r.T @ r - expected) / size / size[:, None]).abs().max() < 1e-6
    r = triangle(exact).r
    assert ((r.T @ r - expected) / size / size[:, None]).abs().max() < 1e-12


@pytest.mark.parametrize("far", [1.0, 0.3, 0.11, 0.09, 0.01, 2e-3])
def test_singular_values_lose_no_digit_that_matters_as_columns_come_nearer(far):
    q = torch.linalg.qr(random(5000, 6).double()).Q
    factor = q.clone()
    factor[:, -1] = math.sqrt(1 - far**2) * q[:, 0] + far * q[:, -1]
    actual, expected = (
        torch.linalg.svdvals(matrix) for matrix in (triangle(factor.float()).r, factor.float().double())
    )
    assert (actual - expected).abs().max() < 2e-6 * expected[0]
    assert ((actual - expected).abs() / expected).max() < 3e-5


@pytest.mark.parametrize("rows", [3, 700, 3000])
@pytest.mark.parametrize("columns", [1, 7, 64, 97])
def test_a_gram_matrix_has_all_inner_products_of_columns_however_they_lie(rows, columns):
    factor = random(rows, columns).double()
    for tall in (factor, factor.T.contiguous().T, factor.float()):
        found = gram(tall)
        assert found.dtype == tall.dtype
        expected = torch.einsum("ni,nj->ij", tall.double(), tall.double())
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=100 * rows * torch.finfo(tall.dtype).eps)


@pytest.mark.parametrize(("far", "single"), [(0.3, True), (0.11, True), (0.09, False), (0.01, False)])
def test_inner_products_are_summed_in_float32_where_columns_are_far_apart(far, single):
    """Of float32's own length, which squares must tell from the bound."""
    q = torch.linalg.qr(random(500, 6).double()).Q
    q[:, -1] = math.sqrt(1 - far**2) * q[:, 0] + far * q[:, -1]
    factor = (7 * q).float()
    found, wide = triangle(factor).gram, gram(factor.double())
    assert torch.equal(found, gram(factor).double()) is single
    assert torch.equal(found, wide) is not single


def test_only_what_is_near_to_dependent_takes_the_slow_way():
    assert basis(FACTORS["tall"])[0].r is not None
    assert basis(FACTORS["columns of very different size"])[0].r is not None
    for name in ("wide", "dependent", "nearly dependent", "a column of zeros", "zero"):
        assert basis(FACTORS[name])[0].r is None


def test_half_precision_and_turned_factors_are_the_same():
    half = FACTORS["tall"].half()
    close = {"rtol": 0, "atol": 1e-6 * float(half.float().norm())}
    torch.testing.assert_close(triangle(half).r, triangle(half.float()).r, **close)
    torch.testing.assert_close(triangle(half.T.contiguous().T).r, triangle(half).r, **close)
