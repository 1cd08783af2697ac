"""A smaller rank for a sum of updates, without ever forming the update itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..updates.layer import Layer, Term, shaped
from .core_space import CoreSpace
from .orthonormal import Basis, basis
from .scaling import levelled
from .sums import Stack, stacked, weighted_sum

# Least ratio of eigenvalues from which singular vectors are computed.
_CLEAR = 1e-10


@dataclass(frozen=True, eq=False)
class Truncated:
    """A layer and what the cut to its rank did. Energies are squared Frobenius norms.

    energy: of the exact sum; lost_energy: of exact sum minus layer.
    source_energy, kept_energy: for each term, of strength * delta and of the part of it inside the kept subspaces.
    """

    layer: Layer
    energy: float
    lost_energy: float
    source_energy: tuple[float, ...]
    kept_energy: tuple[float, ...]

    @property
    def error(self) -> float:
        """Relative error in Frobenius norm, 0..1."""
        return math.sqrt(self.lost_energy / self.energy) if self.energy > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Prospect:
    """What each rank of a sum would keep, before any is chosen.

    kept: (1 + terms, ranks + 1) float64, kept[0, r] the energy of the sum inside the first r directions, kept[1 + i, r]
    that of term i; the last column is the whole energy.
    priority: (ranks,) float64, what each further direction is worth, never rising.
    cost: numbers that one rank takes in a file, out + in * kernel.
    """

    kept: Tensor
    priority: Tensor
    cost: int

    @property
    def ranks(self) -> int:
        return len(self.priority)


@dataclass(frozen=True, eq=False, kw_only=True)
class Known:
    """The part of Directions that has the size of the ranks: the bases' factors, as large as the updates', stand in the
    inputs already. r_up, r_down: as `basis` gives them; the others as in Directions."""

    r_up: Tensor
    r_down: Tensor
    u: Tensor
    vh: Tensor
    worth: Tensor
    energy: float
    source_energy: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Directions:
    """The sum's core and terms' cores in an order of directions in which they can be cut anywhere.

    With q the columns of the bases, q_up @ u and vh @ q_down^T are orthonormal directions, most important first; `worth`
    says how important. singular: they are the singular vectors of the sum, worth its squared singular values.
    """

    up: Basis
    down: Basis
    u: Tensor
    vh: Tensor
    total: Tensor
    cores: tuple[Tensor, ...]
    worth: Tensor
    singular: bool
    shape: tuple[int, ...]

    def known(self) -> Known | None:
        """What need not be computed again for the same terms; None where the bases are no combinations of their factors."""
        if self.up.r is None or self.down.r is None:
            return None
        return Known(
            r_up=self.up.r,
            r_down=self.down.r,
            u=self.u,
            vh=self.vh,
            worth=self.worth,
            energy=self.energy,
            source_energy=self.source_energy,
        )

    @property
    def alone(self) -> bool:
        """Whether the sum is its one term, in its own directions: what is kept of either is what they are worth."""
        return self.singular and len(self.cores) == 1 and self.cores[0] is self.total

    @cached_property
    def energy(self) -> float:
        return float(self.worth.sum()) if self.singular else _energy(self.total)

    @cached_property
    def source_energy(self) -> tuple[float, ...]:
        return (self.energy,) if self.alone else tuple(map(_energy, self.cores))

    def prospect(self) -> Prospect:
        cores = [] if self.alone else list(self.cores) if self.singular else [self.total, *self.cores]
        corners = [self._corners(core) for core in cores]
        if self.singular:
            corners = [self.worth.cumsum(0)] * (2 if self.alone else 1) + corners
        kept = torch.nn.functional.pad(torch.stack(corners), (1, 0))
        if self._lacks_some:
            kept[:, -1] = self._holding_all().prospect().kept[:, -1]
        cost = self.up.vectors.shape[0] + self.down.vectors.shape[0]
        return Prospect(kept, self.worth, cost)

    def _corners(self, core: Tensor) -> Tensor:
        """(ranks,) float64, the energy of a core inside the first 1, 2, ... directions."""
        blocks = (self.u.T @ core @ self.vh.T).double().square()
        return blocks.cumsum(0).cumsum(1).diagonal()

    @property
    def _lacks_some(self) -> bool:
        """Whether all of these directions together may lack some of the sum: where the weight is smaller than the ranks of the
        terms together, they are all that there are on its shorter side, and not on the longer one."""
        return not self.singular and self.total.shape[0] != self.total.shape[1]

    def _holding_all(self) -> Directions:
        """As many directions that hold the whole sum: its own."""
        u, s, vh = _singular(self.total)
        return replace(self, u=u, vh=vh, worth=s.double().square(), singular=True)

    def cut(self, rank: int) -> Truncated:
        if self._lacks_some and rank >= len(self.worth):
            return self._holding_all().cut(rank)
        u, vh = self.u[:, :rank], self.vh[:rank]
        left, s, right = u, self.worth[:rank].to(u.dtype).sqrt(), vh
        lost = float(self.worth[rank:].sum())
        if not self.singular:
            # The projected sum has singular vectors of its own; they share its size evenly between the factors.
            core = u.T @ self.total @ vh.T
            lost = _energy(self.total - u @ core @ vh)
            inner, s, outer = torch.linalg.svd(core, full_matrices=False)
            left, right = u @ inner, outer @ vh
        root = s.sqrt()
        up = self.up.vectors @ self.up.coefficients(left * root)
        down = self.down.coefficients(right.T * root).T @ self.down.vectors.T
        layer = shaped(up, down, self.shape)
        return Truncated(
            layer,
            energy=self.energy,
            lost_energy=lost,
            source_energy=self.source_energy,
            kept_energy=self._kept(u, vh, rank),
        )

    def _kept(self, u: Tensor, vh: Tensor, rank: int) -> tuple[float, ...]:
        if self.alone:
            return (float(self.worth[:rank].sum()),)
        return tuple(_energy(u.T @ core @ vh.T) for core in self.cores)


def directions(terms: Sequence[Term], *, balanced: bool = False) -> Directions:
    """Orthonormal directions of the weighted sum of (layer, strength) terms of one weight, by importance.

    up and down are the terms' factors side by side; with up = Q_u R_u and down^T = Q_d R_d the sum is
    Q_u (R_u R_d^T) Q_d^T, and all that follows happens in the small core in the middle, in float64. No clamping.
    balanced False: the singular vectors of the sum; the first r of them give the nearest update of rank r (Frobenius
        norm; Eckart & Young 1936). They follow the strong terms: a weak one may be lost whole at a small error.
    balanced True: the singular vectors of all terms side by side, each scaled to norm 1, so that a weak term has as
        much say as a strong one. The error of the sum is larger, what each term keeps is more even.
    """
    return _directions(stacked(terms), balanced)


def _directions(whole: Stack, balanced: bool, known: Known | None = None) -> Directions:
    up, r_up = basis(whole.up) if known is None else (Basis(whole.up, known.r_up), known.r_up)
    down, r_down = basis(whole.down.T) if known is None else (Basis(whole.down.T, known.r_down), known.r_down)
    ranks = list(whole.ranks)
    total = r_up @ r_down.T
    parts = zip(torch.split(r_up, ranks, 1), torch.split(r_down, ranks, 1), strict=True)
    cores = [a @ b.T for a, b in parts] if len(ranks) > 1 else [total]
    u, vh, worth = _by_importance(total, cores, balanced) if known is None else (known.u, known.vh, known.worth)
    return Directions(
        up=up,
        down=down,
        u=u,
        vh=vh,
        total=total,
        cores=tuple(cores),
        worth=worth,
        singular=not balanced,
        shape=whole.shape,
    )


def directions_in(space: CoreSpace, core: Tensor, *, balanced: bool = False) -> Directions:
    """`directions` of left @ core @ right, where core is a merge method's result in a CoreSpace."""
    u, vh, worth = _by_importance(core, space.cores, balanced)
    return Directions(
        up=Basis(space.left),
        down=Basis(space.right.T),
        u=u,
        vh=vh,
        total=core,
        cores=space.cores,
        worth=worth,
        singular=not balanced,
        shape=space.shape,
    )


def _by_importance(total: Tensor, cores: Sequence[Tensor], balanced: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(u, vh, worth) of `Directions`."""
    if not balanced:
        u, s, vh = _singular(total)
        return u, vh, s.double().square()
    side_by_side = [core / norm for core in cores if (norm := core.norm()) > 0] or [total]
    u, left, _ = torch.linalg.svd(torch.cat(side_by_side, dim=1), full_matrices=False)
    v, right, _ = torch.linalg.svd(torch.cat([core.T for core in side_by_side], dim=1), full_matrices=False)
    count = min(len(left), len(right))
    return u[:, :count], v[:, :count].T, (left[:count] * right[:count]).double()


def _singular(total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(u, s, vh) of a singular value decomposition.

    From eigenvectors, in half the time, where float64 leaves them as exact as float32 needs: u is orthonormal to about
    1e-16 / (smallest / largest eigenvalue).
    """
    if total.dtype == torch.float64 and total.shape[0] >= total.shape[1]:
        values, v = torch.linalg.eigh(total.T @ total)
        if bool(values[0] > _CLEAR * values[-1]):
            s, v = values.flip(0).sqrt(), v.flip(1)
            return (total @ v) / s, s, v.T
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    return u, s, vh


def truncated_sum(
    terms: Sequence[Term],
    rank: int,
    *,
    balanced: bool = False,
    known: Known | None = None,
    dtype: torch.dtype = torch.float32,
) -> Truncated:
    """The weighted sum of (layer, strength) terms in at most the given rank, see `directions`.

    A sum whose ranks add up to no more than `rank` stays exact: `weighted_sum`, in that dtype where it can be.
    known: of `directions` of the same terms, if somebody has computed them.
    Since the kept part is U U^T (sum) V V^T it is the sum of each term projected so, which is what `kept_energy`
    measures: plain truncation keeps the strong terms and may drop most of a weak one.
    Raises ValueError for rank < 1.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}, but the smallest rank is 1")
    if sum(layer.rank for layer, strength in terms if strength * layer.scale) <= rank:
        energy, energies = _energies(terms) if known is None else (known.energy, known.source_energy)
        layer = weighted_sum(terms, dtype)
        return Truncated(layer=layer, energy=energy, lost_energy=0.0, source_energy=energies, kept_energy=energies)
    return _directions(stacked(terms), balanced, known).cut(rank)


def _energies(terms: Sequence[Term]) -> tuple[float, tuple[float, ...]]:
    """Energy of the sum of the terms, and of each."""
    whole = stacked(terms)
    energies = tuple(_product_energy(up, down) for up, down in whole.parts)
    return (energies[0] if len(energies) == 1 else _product_energy(whole.up, whole.down)), energies


def truncated_matrix(total: Tensor, deltas: Sequence[Tensor], rank: int) -> Truncated:
    """A whole update (out, in, *kernel) in at most the given rank, and what that keeps of it and of each of the deltas.

    The nearest of that rank (Eckart & Young 1936), from the eigenvectors of the smaller of A A^T and A^T A. In float64
    these are good to 1e-8 of the largest singular value, and take a tenth of the time of a singular value decomposition.
    """
    shape = tuple(total.shape)
    matrix = total.reshape(shape[0], -1).double()
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    values, u = values.flip(0).clamp(min=0), vectors.flip(1)
    used = max(1, min(rank, int((values > 1e-14 * values[0]).sum())))
    u, s = u[:, :used], values[:used].sqrt()
    vh = (u.T @ wide) / s.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    if tall:
        u, vh = vh.T, u.T
    root = s.sqrt()
    layer = shaped((u * root).float(), (root[:, None] * vh).float(), shape)
    flat = [delta.reshape(shape[0], -1).double() for delta in deltas]
    return Truncated(
        layer=layer,
        energy=_energy(matrix),
        lost_energy=max(0.0, float(values[used:].sum())),
        source_energy=tuple(map(_energy, flat)),
        kept_energy=tuple(_energy(u.T @ delta @ vh.T) for delta in flat),
    )


def energy_of(term: Term) -> float:
    """Squared Frobenius norm of strength * delta, from the factors."""
    ((layer, strength),), power = levelled([term])
    return (strength * layer.scale) ** 2 * _product_energy(*layer.factors()) * 4.0**power


def _product_energy(up: Tensor, down: Tensor) -> float:
    """Energy of up @ down from the two (rank, rank) Gram matrices."""
    return max(0.0, float(((up.T @ up).double() * (down @ down.T).double()).sum()))


def _energy(matrix: Tensor) -> float:
    # float64: thousands of squares are added.
    return float(matrix.double().square().sum())
