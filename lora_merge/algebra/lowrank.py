"""A smaller rank for a sum of updates, without ever forming the update itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..updates.layer import Layer, Term, shaped
from .core_space import CoreSpace
from .orthonormal import Basis, basis
from .scaling import levelled
from .sums import side_by_side_as_they_are, weighted_sum

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


@dataclass(frozen=True, eq=False)
class Product:
    """left @ right^T in the coordinates of two bases: left (p, r), right (q, r), None for q columns of the identity."""

    left: Tensor
    right: Tensor | None = None

    @property
    def core(self) -> Tensor:
        """(p, q)"""
        return self.left if self.right is None else self.left @ self.right.T

    @property
    def energy(self) -> float:
        return _energy(self.core)

    def along(self, u: Tensor, vh: Tensor) -> Tensor:
        """u^T core v: what it is in other directions."""
        inner: Tensor = (u.T @ self.left) @ (vh if self.right is None else vh @ self.right).T
        return inner


@dataclass(frozen=True, eq=False, kw_only=True)
class Order:
    """Directions in which a sum of products can be cut anywhere, most important first; all of it has the size of the ranks.

    u (p, k), vh (k, q): orthonormal, in the coordinates of two bases.   worth: (k,), how important each is.
    total: the sum; None where the directions are its singular vectors, worth its squared singular values.
    alone: whether the sum is its one term, in its own directions: what is kept of either is what they are worth.
    """

    u: Tensor
    vh: Tensor
    worth: Tensor
    products: tuple[Product, ...]
    total: Tensor | None = None
    alone: bool = False

    @cached_property
    def energy(self) -> float:
        return float(self.worth.sum()) if self.total is None else _energy(self.total)

    @cached_property
    def source_energy(self) -> tuple[float, ...]:
        return (self.energy,) if self.alone else tuple(product.energy for product in self.products)

    @cached_property
    def kept(self) -> Tensor:
        """(1 + terms, k + 1), as in Prospect."""
        of_sum = self.worth.cumsum(0) if self.total is None else _corners(self.u.T @ self.total @ self.vh.T)
        of_terms = [of_sum] if self.alone else [_corners(one.along(self.u, self.vh)) for one in self.products]
        kept = torch.nn.functional.pad(torch.stack([of_sum, *of_terms]), (1, 0))
        if self._holding_all is not None:
            kept[:, -1] = self._holding_all.kept[:, -1]
        return kept

    @cached_property
    def _holding_all(self) -> Order | None:
        """As many directions that hold the whole sum, its own, where all of these together may lack some of it: where the weight is
        smaller than the ranks of the terms together, they are all that there are on its shorter side, and not on the longer one."""
        if self.total is None or self.total.shape[0] == self.total.shape[1]:
            return None
        u, s, vh = _singular(self.total)
        return replace(self, u=u, vh=vh, worth=s.double().square(), total=None)

    def _at(self, rank: int) -> Order:
        """Directions whose first ones make the best of that rank."""
        return self._holding_all or self if rank >= len(self.worth) else self

    def kept_at(self, rank: int) -> tuple[float, ...]:
        """The energy of each term inside the first directions."""
        if (best := self._at(rank)) is not self:
            return best.kept_at(rank)
        if self.alone:
            return (float(self.worth[:rank].sum()),)
        if "kept" in vars(self):
            return tuple(self.kept[1:, min(rank, len(self.worth))].tolist())
        u, vh = self.u[:, :rank], self.vh[:rank]
        return tuple(_energy(one.along(u, vh)) for one in self.products)

    def shared(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """((p, r), (r, q), energy of what is lost): the nearest to the sum inside the first directions, in even shares."""
        if (best := self._at(rank)) is not self:
            return best.shared(rank)
        u, vh = self.u[:, :rank], self.vh[:rank]
        if self.total is None:
            root = self.worth[:rank].to(u.dtype).sqrt().sqrt()
            return u * root, root[:, None] * vh, float(self.worth[rank:].sum())
        # The projected sum has singular vectors of its own.
        core = u.T @ self.total @ vh.T
        inner, s, outer = torch.linalg.svd(core, full_matrices=False)
        root = s.sqrt()
        return (u @ inner) * root, root[:, None] * (outer @ vh), _energy(self.total - u @ core @ vh)


def _corners(inner: Tensor) -> Tensor:
    """(k,) float64, the energy of a (k, k) matrix inside its first 1, 2, ... rows and columns."""
    return inner.double().square().cumsum(0).cumsum(1).diagonal()


@dataclass(frozen=True, eq=False, kw_only=True)
class Known:
    """The part of Directions that has the size of the ranks: the bases' factors, as large as the updates', stand in the
    inputs already. r_up, r_down: as the bases have them."""

    r_up: Tensor
    r_down: Tensor
    order: Order


@dataclass(frozen=True, eq=False)
class Directions:
    """Orthonormal directions of a sum of updates, and of its terms: with q the columns of the bases, q_up @ u and
    vh @ q_down^T, most important first. shape: of the weight."""

    up: Basis
    down: Basis
    order: Order
    shape: tuple[int, ...]

    def known(self) -> Known | None:
        """What need not be computed again for the same terms; None where the bases are no combinations of their factors."""
        if self.up.r is None or self.down.r is None:
            return None
        return Known(r_up=self.up.r, r_down=self.down.r, order=self.order)

    def prospect(self) -> Prospect:
        cost = self.up.vectors.shape[0] + self.down.vectors.shape[0]
        return Prospect(self.order.kept, self.order.worth, cost)

    def cut(self, rank: int) -> Truncated:
        left, right, lost = self.order.shared(rank)
        up = self.up.vectors @ self.up.coefficients(left)
        down = self.down.coefficients(right.T).T @ self.down.vectors.T
        return Truncated(
            layer=shaped(up, down, self.shape),
            energy=self.order.energy,
            lost_energy=lost,
            source_energy=self.order.source_energy,
            kept_energy=self.order.kept_at(rank),
        )


def directions(terms: Sequence[Term], *, balanced: bool = False) -> Directions:
    """Orthonormal directions of the weighted sum of (layer, strength) terms of one weight, by importance.

    up and down are the terms' factors side by side; with up = Q_u R_u and down^T = Q_d R_d the sum is
    Q_u (R_u R_d^T) Q_d^T, and all that follows happens in the small core in the middle, in float64. No clamping.
    balanced False: the singular vectors of the sum; the first r of them give the nearest update of rank r (Frobenius
        norm; Eckart & Young 1936). They follow the strong terms: a weak one may be lost whole at a small error.
    balanced True: the singular vectors of all terms side by side, each scaled to norm 1, so that a weak term has as
        much say as a strong one. The error of the sum is larger, what each term keeps is more even.
    """
    return _directions(terms, balanced)


def _directions(terms: Sequence[Term], balanced: bool, known: Known | None = None) -> Directions:
    whole, numbers = side_by_side_as_they_are(terms)
    if known is not None:
        up, down = Basis(whole.up, known.r_up), Basis(whole.down.T, known.r_down)
        return Directions(up, down, known.order, whole.shape)
    (up, r_up), (down, r_down) = basis(whole.up), basis(whole.down.T)
    ranks = list(whole.ranks)
    r_up = r_up * numbers
    products = tuple(map(Product, torch.split(r_up, ranks, 1), torch.split(r_down, ranks, 1)))
    found = order(r_up @ r_down.T, products, balanced=balanced, alone=len(ranks) == 1)
    return Directions(up, down, found, whole.shape)


def directions_in(space: CoreSpace, core: Tensor, *, balanced: bool = False) -> Directions:
    """`directions` of left @ core @ right, where core is a merge method's result in a CoreSpace."""
    alone = len(space.cores) == 1 and space.cores[0] is core
    found = order(core, tuple(map(Product, space.cores)), balanced=balanced, alone=alone)
    return Directions(Basis(space.left), Basis(space.right.T), found, space.shape)


def order(total: Tensor, products: tuple[Product, ...], *, balanced: bool = False, alone: bool = False) -> Order:
    """`directions` in the coordinates of two bases. total: the products' sum, or what a method makes of them.   alone: whether
    the total is the one product."""
    u, vh, worth = _by_importance(total, products, balanced)
    return Order(
        u=u,
        vh=vh,
        worth=worth,
        products=products,
        total=total if balanced else None,
        alone=alone and not balanced,
    )


def _by_importance(total: Tensor, products: Sequence[Product], balanced: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(u, vh, worth) of `Order`."""
    if not balanced:
        u, s, vh = _singular(total)
        return u, vh, s.double().square()
    cores = [product.core for product in products]
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
        energy, energies = _energies(terms) if known is None else (known.order.energy, known.order.source_energy)
        layer = weighted_sum(terms, dtype)
        return Truncated(layer=layer, energy=energy, lost_energy=0.0, source_energy=energies, kept_energy=energies)
    return _directions(terms, balanced, known).cut(rank)


def _energies(terms: Sequence[Term]) -> tuple[float, tuple[float, ...]]:
    """Energy of the sum of the terms, and of each, from the two (rank, rank) Gram matrices."""
    whole, numbers = side_by_side_as_they_are(terms)
    products = (whole.up.T @ whole.up).double().mul_((whole.down @ whole.down.T).double())
    products.mul_(numbers).mul_(numbers[:, None])
    energy = max(0.0, float(products.sum()))
    if len(whole.ranks) == 1:
        return energy, (energy,)
    ends = list(accumulate(whole.ranks, initial=0))
    return energy, tuple(max(0.0, float(products[a:b, a:b].sum())) for a, b in pairwise(ends))


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
