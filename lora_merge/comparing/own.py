"""One update in the small space that it shares with others, and what stands between two of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

# What float32 makes of exact zeros stays below this share of the largest singular value.
_ZERO = 1e-6


@dataclass(frozen=True, eq=False, kw_only=True)
class Own:
    """up: (p, r), down: (q, r), float64, the update's columns of R_u and R_d, scales in up.
    values: its squared singular values, descending.   thin, inner: up @ down^T = thin @ inner^T, inner orthonormal.
    vectors: of thin^T @ thin, in the order of the values; None where nobody is there to compare with.
    effective: number of values that are not 0.   leading: number of them that hold the wanted share of its energy.
    """

    up: Tensor
    down: Tensor
    values: Tensor
    thin: Tensor
    inner: Tensor
    vectors: Tensor | None
    effective: int
    leading: int
    energy: float

    @cached_property
    def right(self) -> Tensor:
        """(q, effective), orthonormal."""
        return self.inner @ self._vectors

    @cached_property
    def left(self) -> Tensor:
        """(p, effective), orthonormal."""
        return (self.thin @ self._vectors) / self.values[: self.effective].sqrt()

    @property
    def _vectors(self) -> Tensor:
        assert self.vectors is not None
        return self.vectors[:, : self.effective]

    def dot(self, other: Own) -> float:
        """Inner product of the two updates."""
        return float(((self.up.T @ other.up) * (self.down.T @ other.down)).sum())

    def inside(self, other: Own) -> float:
        """The part of its energy that lies in the other's leading right directions."""
        return float((self.up @ (self.down.T @ other.right[:, : other.leading])).square().sum())


def own_of(up: Tensor, down: Tensor, share: float, *, is_triangle: bool, alone: bool) -> Own:
    """share: of its energy that leading directions hold.   is_triangle: whether down is an upper triangle, with zeros below.

    Singular values are roots of eigenvalues: good to 1e-8 of the largest one, which is below float32's rounding of the
    factors, in half the time of a singular value decomposition.
    """
    if is_triangle:
        width = min(down.shape)
        inner, r = torch.eye(down.shape[0], width, dtype=down.dtype, device=down.device), down[:width]
    else:
        inner, r = torch.linalg.qr(down)
    thin = up @ r.T
    gram = thin.T @ thin
    # Values alone take half the time.
    rising, vectors = (torch.linalg.eigvalsh(gram), None) if alone else torch.linalg.eigh(gram)
    values = rising.flip(0).clamp_(min=0)
    listed = values.tolist()
    held = list(accumulate(listed))
    effective = sum(value > _ZERO**2 * listed[0] for value in listed)
    leading = sum(energy < share * (1 - 1e-9) * held[-1] for energy in held) + 1
    return Own(
        up=up,
        down=down,
        values=values,
        thin=thin,
        inner=inner,
        vectors=None if vectors is None else vectors.flip(1),
        effective=effective,
        leading=min(leading, effective),
        energy=held[-1],
    )
