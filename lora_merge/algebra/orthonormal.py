"""Orthonormal bases of tall factors, by way of their Gram matrices.

With factor^T factor = R^T R (Cholesky), factor R^-1 has orthonormal columns. In float64 this squares no condition number
that float32 factors could tell, and takes half the time of a QR decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Least distance of a column from the span of those before it, its own norm being 1. Below, QR takes over: errors of float32
# grow by the inverse.
_INDEPENDENT = 1e-3


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
    tall = factor.double()
    r = _cholesky(tall)
    if r is not None:
        return Basis(factor, r), r
    q, r = torch.linalg.qr(tall)
    return Basis(q.float()), r


def triangle(factor: Tensor) -> Tensor:
    """r in float64 with factor = q @ r for some orthonormal columns q. factor: (n, k)."""
    tall = factor.double()
    r = _cholesky(tall)
    return torch.linalg.qr(tall, mode="r").R if r is None else r


def _cholesky(tall: Tensor) -> Tensor | None:
    """Upper triangular r with r^T r = tall^T tall; None if the columns are too near to dependent ones."""
    gram = tall.T @ tall
    r: Tensor
    r, failed = torch.linalg.cholesky_ex(gram, upper=True)
    if int(failed) or bool((r.diagonal() < _INDEPENDENT * gram.diagonal().sqrt()).any()):
        return None
    return r
