"""A smaller rank for a sum of updates, without ever forming the update itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from ..updates.layer import Layer, LoraLayer, Term, shaped
from .core_space import CoreSpace
from .later import made_later, surely_holds, write_product
from .order import Cut, Order, Product, order, squared_norm
from .orthonormal import Basis, basis, gram
from .precision import holds
from .scaling import levelled
from .singular import Singular, energies, singular
from .sums import side_by_side_as_they_are, weighted_sum


@dataclass(frozen=True, eq=False)
class Truncated:
    """A layer and what the cut to its rank did. Energies are squared Frobenius norms.

    energy: of the exact sum; lost_energy: of exact sum minus layer.
    source_energy, kept_energy: for each term, of strength * delta and of the part of it inside the kept subspaces; all of it
        where the whole sum is kept.
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
class Known:
    """The part of Directions that has the size of the ranks: the bases' factors, as large as the updates', stand in the
    inputs already. r_up, r_down: as the bases have them."""

    order: Order | Singular
    r_up: Tensor | None = None
    r_down: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions of a sum of updates, and of its terms, most important first, in coordinates of the bases' columns.
    shape: of the weight."""

    up: Basis
    down: Basis
    order: Order | Singular
    shape: tuple[int, ...]

    def known(self) -> Known | None:
        """What need not be computed again for the same terms; None where the bases are no combinations of their factors."""
        if isinstance(self.order, Order) and (self.up.r is None or self.down.r is None):
            return None
        order = self.order if isinstance(self.order, Order) else self.order.for_later()
        return Known(order, self.up.r, self.down.r)

    def prospect(self) -> Prospect:
        cost = self.up.vectors.shape[0] + self.down.vectors.shape[0]
        return Prospect(self.order.kept, self.order.worth, cost)

    def cut(self, rank: int, dtype: torch.dtype = torch.float32) -> Truncated:
        """dtype: of the layer, rounded once from float32; float32 all the same where that would take more (precision.holds)."""
        found = self.order.cut(rank)
        left, right = self.up.coefficients(found.left), self.down.coefficients(found.right.T).T
        layer = self._layer(left, right, dtype)
        sure = isinstance(self.order, Singular) and surely_holds(self.order.norms(rank), self.shape, dtype)
        if not (sure or dtype == torch.float32 or holds(layer)):
            layer = self._layer(left, right, torch.float32)
        return _truncated(layer, self.order, found)

    def _layer(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> LoraLayer:
        up, down = _product(self.up.vectors, left, dtype), _product(right, self.down.vectors.T, dtype)
        return shaped(up, down, self.shape)


def _truncated(layer: LoraLayer, order: Order | Singular, found: Cut) -> Truncated:
    return Truncated(
        layer=layer,
        energy=order.energy,
        lost_energy=found.lost,
        source_energy=order.source_energy,
        kept_energy=found.kept,
    )


def _product(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Of float32 matrices, in a dtype."""
    result = first.new_empty((first.shape[0], second.shape[1]), dtype=dtype)
    write_product(first, second, result)
    return result


def directions(
    terms: Sequence[Term], *, balanced: bool = False, known: Known | None = None, until: ExitStack | None = None
) -> Directions:
    """Orthonormal directions of the weighted sum of (layer, strength) terms of one weight, by importance.

    up and down are the terms' factors side by side; with up = Q_u R_u and down^T = Q_d R_d the sum is
    Q_u (R_u R_d^T) Q_d^T, and all that follows happens in the small core in the middle, in float64. No clamping.
    balanced False: the singular vectors of the sum; the first r of them give the nearest update of rank r (Frobenius
        norm; Eckart & Young 1936). They follow the strong terms: a weak one may be lost whole at a small error.
    balanced True: the singular vectors of all terms side by side, each scaled to norm 1, so that a weak term has as
        much say as a strong one. The error of the sum is larger, what each term keeps is more even.
    known: of the same terms.   until: see side_by_side_as_they_are.
    """
    whole, numbers = side_by_side_as_they_are(terms, until)
    if known is not None:
        return Directions(Basis(whole.up, known.r_up), Basis(whole.down.T, known.r_down), known.order, whole.shape)
    if not balanced and (found := singular(whole.up, whole.down, numbers, whole.ranks)) is not None:
        return Directions(Basis(whole.up), Basis(whole.down.T), found, whole.shape)
    (up, r_up), (down, r_down) = basis(whole.up), basis(whole.down.T)
    ranks = list(whole.ranks)
    r_up = r_up * numbers
    products = tuple(map(Product, torch.split(r_up, ranks, 1), torch.split(r_down, ranks, 1)))
    in_order = order(r_up @ r_down.T, products, balanced=balanced)
    return Directions(up, down, in_order, whole.shape)


def prospect_and_known(terms: Sequence[Term], *, balanced: bool) -> tuple[Prospect, Known | None]:
    """Of `directions`, which take no new memory of the size of the updates here."""
    with ExitStack() as until:
        found = directions(terms, balanced=balanced, until=until)
        return found.prospect(), found.known()


def directions_in(space: CoreSpace, core: Tensor, *, balanced: bool = False) -> Directions:
    """`directions` of left @ core @ right, where core is a merge method's result in a CoreSpace."""
    found = order(core, tuple(map(Product, space.cores)), balanced=balanced)
    return Directions(Basis(space.left), Basis(space.right.T), found, space.shape)


def truncated_sum(
    terms: Sequence[Term],
    rank: int,
    *,
    balanced: bool = False,
    known: Known | None = None,
    dtype: torch.dtype = torch.float32,
) -> Truncated:
    """The weighted sum of (layer, strength) terms in at most the given rank, see `directions`.

    A sum whose ranks add up to no more than `rank` stays exact: `weighted_sum`.
    dtype: of the layer, where it can be: see there and Directions.cut.
    known: of `directions` of the same terms, if somebody has computed them.
    Since the kept part is U U^T (sum) V V^T it is the sum of each term projected so, which is what `kept_energy`
    measures: plain truncation keeps the strong terms and may drop most of a weak one.
    Raises ValueError for rank < 1.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}, but the smallest rank is 1")
    if sum(layer.rank for layer, strength in terms if strength * layer.scale) <= rank:
        energy, parts = _energies(terms) if known is None else (known.order.energy, known.order.source_energy)
        layer = weighted_sum(terms, dtype)
        return Truncated(layer=layer, energy=energy, lost_energy=0.0, source_energy=parts, kept_energy=parts)
    if known is not None and (later := _cut_later(terms, known.order, rank, dtype)) is not None:
        return later
    with ExitStack() as until:
        return directions(terms, balanced=balanced, known=known, until=until).cut(rank, dtype)


def _cut_later(terms: Sequence[Term], order: Order | Singular, rank: int, dtype: torch.dtype) -> Truncated | None:
    """What is known needs the updates for nothing but the result, which may be made when somebody writes it to a file."""
    if isinstance(order, Order):
        return None
    found = order.cut(rank)
    layer = made_later(terms, found.left.float(), found.right.float(), order.norms(rank), dtype)
    return None if layer is None else _truncated(layer, order, found)


def _energies(terms: Sequence[Term]) -> tuple[float, tuple[float, ...]]:
    """Energy of the sum of the terms, and of each, from the two (rank, rank) Gram matrices."""
    with ExitStack() as until:
        whole, numbers = side_by_side_as_they_are(terms, until)
        products = gram(whole.up).double().mul_(gram(whole.down.T).double())
    products.mul_(numbers).mul_(numbers[:, None])
    energy = max(0.0, float(products.sum()))
    return energy, (energy,) if len(whole.ranks) == 1 else energies(products, whole.ranks)


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
        energy=squared_norm(matrix),
        lost_energy=max(0.0, float(values[used:].sum())),
        source_energy=tuple(map(squared_norm, flat)),
        kept_energy=tuple(squared_norm(u.T @ delta @ vh.T) for delta in flat),
    )


def energy_of(term: Term) -> float:
    """Squared Frobenius norm of strength * delta, from the factors."""
    ((layer, strength),), power = levelled([term])
    return (strength * layer.scale) ** 2 * _product_energy(*layer.factors()) * 4.0**power


def _product_energy(up: Tensor, down: Tensor) -> float:
    """Energy of up @ down from the two (rank, rank) Gram matrices."""
    return max(0.0, float((gram(up).double() * gram(down.T).double()).sum()))
