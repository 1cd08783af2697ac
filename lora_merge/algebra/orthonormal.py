"""Orthonormal bases of tall factors, by way of their Gram matrices.

With factor^T factor = R^T R (Cholesky), factor R^-1 has orthonormal columns. In float64 this squares no condition number
that float32 factors could tell, and takes half the time of a QR decomposition; in float32, a quarter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Least distance of a column from the span of those before it, its own norm being 1. Below, the next finer way takes over:
# errors of the Gram matrix grow by the inverse's square, those of QR by the inverse.
_FAR, _INDEPENDENT = 0.1, 1e-3
# Multiplications from which leaving out a quarter of a symmetric product takes less time than asking for its parts.
_HALVED = 1 << 22
# Squared norms between which float32's products neither overflow nor lose digits.
_LEAST, _MOST = 1e-20, 1e30


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal columns q, (n, k), which are vectors @ r^-1, or the vectors themselves where r is None."""

    vectors: Tensor
    r: Tensor | None = None

    def coefficients(self, inner: Tensor) -> Tensor:
        """c with q @ inner = vectors @ c, float32; q is never formed."""
        if self.r is not None:
            inner = torch.linalg.solve_triangular(self.r, inner.double(), upper=True)
        return inner.float()


@dataclass(frozen=True, eq=False)
class Triangle:
    """Upper triangular r with factor = q @ r for some orthonormal columns q.   gram: r^T r, of columns far enough apart for
    it to tell all of them; None for others. Both (., k) in float64."""

    r: Tensor
    gram: Tensor | None = None


def basis(factor: Tensor) -> tuple[Basis, Tensor]:
    """(orthonormal basis, r in float64) with factor = q @ r. factor: (n, k) float32, which the basis shares."""
    found = independent(factor)
    if found is not None:
        return Basis(factor, found.r), found.r
    q, r = torch.linalg.qr(factor.double())
    return Basis(q.float()), r


def triangle(factor: Tensor) -> Triangle:
    """factor: (n, k)."""
    found = independent(factor)
    return Triangle(torch.linalg.qr(factor.double(), mode="r").R) if found is None else found


def gram(factor: Tensor) -> Tensor:
    """factor^T factor, (k, k), in the factor's dtype."""
    k = factor.shape[1]
    if factor.numel() * k < _HALVED:
        return factor.T @ factor
    # torch has no product that knows that the result is symmetric: one corner is the other one's mirror.
    first, last = factor[:, : k // 2], factor[:, k // 2 :]
    result = factor.new_empty(k, k)
    torch.mm(first.T, factor, out=result[: k // 2])
    torch.mm(last.T, last, out=result[k // 2 :, k // 2 :])
    result[k // 2 :, : k // 2] = result[: k // 2, k // 2 :].T
    return result


def independent(factor: Tensor) -> Triangle | None:
    """With the Gram matrix; None if the factor's columns are too near to dependent ones.

    The products are summed in float32 where that leaves six digits of each inner product, relative to the norms, and
    columns are far enough apart for it; it halves the time. On other devices float32 may mean less.
    """
    if factor.dtype != torch.float64 and factor.device.type == "cpu":
        single = factor.float()
        found = _factored(gram(single).double(), _FAR, _LEAST, _MOST)
        if found is not None:
            return found
    return _factored(gram(factor.double()), _INDEPENDENT)


def _factored(squares: Tensor, far: float, least: float = 0.0, most: float = math.inf) -> Triangle | None:
    """By Cholesky, where squared norms are within the bounds and columns as far apart as that."""
    norms = squares.diagonal()
    r: Tensor
    r, failed = torch.linalg.cholesky_ex(squares, upper=True)
    if int(failed):
        return None
    low, high = norms.aminmax()
    if not (float(low) >= least and float(high) <= most):
        return None
    return Triangle(r, squares) if float((r.diagonal().square() / norms).min()) >= far**2 else None
