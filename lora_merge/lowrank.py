"""A smaller rank for a sum of updates, the best there is, without ever forming the update itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .arithmetic import Term, common_shape, shaped, stacked, weighted_sum
from .layer import LoraLayer


@dataclass(frozen=True, eq=False)
class Truncated:
    """A layer and what the cut to its rank did. Energies are squared Frobenius norms.

    energy: of the exact sum; lost_energy: of exact sum minus layer.
    source_energy, kept_energy: for each term, of strength * delta and of the part of it inside the kept subspaces.
    """

    layer: LoraLayer
    energy: float
    lost_energy: float
    source_energy: tuple[float, ...]
    kept_energy: tuple[float, ...]

    @property
    def error(self) -> float:
        """Relative error in Frobenius norm, 0..1."""
        return math.sqrt(self.lost_energy / self.energy) if self.energy > 0 else 0.0


def truncated_sum(terms: Sequence[Term], rank: int) -> Truncated:
    """The layer of at most the given rank nearest to the weighted sum (Frobenius norm; Eckart & Young 1936).

    up and down are the terms' factors side by side; with up = Q_u R_u and down^T = Q_d R_d the sum is
    Q_u (R_u R_d^T) Q_d^T, and the SVD of the small core in the middle is the SVD of the sum. Float32, no clamping.
    A sum whose ranks add up to no more than `rank` stays exact.
    Since the kept part is U U^T (sum) V V^T it is the sum of each term projected so, which is what `kept_energy`
    measures: plain truncation keeps the strong terms and may drop most of a weak one.
    Raises ValueError for rank < 1.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}, but the smallest rank is 1")
    shape = common_shape([layer for layer, _ in terms])
    ups, downs = stacked(terms)
    ranks = [up.shape[1] for up in ups]
    if sum(ranks) <= rank:
        energies = tuple(map(_product_energy, ups, downs))
        energy = _product_energy(torch.cat(ups, dim=1), torch.cat(downs, dim=0))
        return Truncated(weighted_sum(terms), energy, 0.0, energies, energies)
    q_up, r_up = torch.linalg.qr(torch.cat(ups, dim=1))
    q_down, r_down = torch.linalg.qr(torch.cat(downs, dim=0).T)
    cores = [a @ b.T for a, b in zip(r_up.split(ranks, dim=1), r_down.split(ranks, dim=1), strict=True)]
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    kept = min(rank, s.shape[0])
    u, vh, root = u[:, :kept], vh[:kept], s[:kept].sqrt()
    layer = shaped(q_up @ (u * root), (root[:, None] * vh) @ q_down.T, shape)
    return Truncated(
        layer,
        energy=_energy(s),
        lost_energy=_energy(s[kept:]),
        source_energy=tuple(_energy(core) for core in cores),
        kept_energy=tuple(_energy(u.T @ core @ vh.T) for core in cores),
    )


def _product_energy(up: torch.Tensor, down: torch.Tensor) -> float:
    """Energy of up @ down from the two (rank, rank) Gram matrices."""
    return max(0.0, float(((up.T @ up).double() * (down @ down.T).double()).sum()))


def _energy(matrix: torch.Tensor) -> float:
    # float64: thousands of squares are added.
    return float(matrix.double().square().sum())
