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


def basis(factor: Tensor) -> tuple[Basis, Tensor]:
    """(orthonormal basis, r in float64) with factor = q @ r. factor: (n, k) float32, which the basis shares."""
    r = _cholesky(factor)
    if r is not None:
        return Basis(factor, r), r
    q, r = torch.linalg.qr(factor.double())
    return Basis(q.float()), r


def triangle(factor: Tensor) -> Tensor:
    """r in float64 with factor = q @ r for some orthonormal columns q. factor: (n, k)."""
    r = _cholesky(factor)
    return torch.linalg.qr(factor.double(), mode="r").R if r is None else r


def _cholesky(factor: Tensor) -> Tensor | None:
    """Upper triangular r in float64 with r^T r = factor^T factor; None if the columns are too near to dependent ones.

    The products are summed in float32 where that leaves six digits of each inner product, relative to the norms, and
    columns are far enough apart for it; it halves the time. On other devices float32 may mean less.
    """
    if factor.dtype != torch.float64 and factor.device.type == "cpu":
        single = factor.float()
        r = _factored((single.T @ single).double(), _FAR, _LEAST, _MOST)
        if r is not None:
            return r
    tall = factor.double()
    return _factored(tall.T @ tall, _INDEPENDENT)


def _factored(gram: Tensor, far: float, least: float = 0.0, most: float = math.inf) -> Tensor | None:
    """The Cholesky factor, where squared norms are within the bounds and columns as far apart as that."""
    squares = gram.diagonal()
    r: Tensor
    r, failed = torch.linalg.cholesky_ex(gram, upper=True)
    good = (r.diagonal() >= far * squares.sqrt()) & (squares >= least) & (squares <= most)
    return None if int(failed) or not bool(good.all()) else r
