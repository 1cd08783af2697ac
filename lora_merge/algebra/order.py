"""In which order the directions of a sum of updates are kept, in coordinates of the size of their ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

# Least ratio of eigenvalues from which singular vectors are computed.
CLEAR = 1e-10


@dataclass(frozen=True, eq=False)
class Cut:
    """left (p, r) @ right (r, q): what is left of a sum, in coordinates.   lost: its energy that is not.   kept: of each term."""

    left: Tensor
    right: Tensor
    lost: float
    kept: tuple[float, ...]


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
        return squared_norm(self.core)

    def along(self, u: Tensor, vh: Tensor) -> Tensor:
        """u^T core v: what it is in other directions."""
        inner: Tensor = (u.T @ self.left) @ (vh if self.right is None else vh @ self.right).T
        return inner


@dataclass(frozen=True, eq=False, kw_only=True)
class Order:
    """Directions in which a sum of products can be cut anywhere, most important first; all of it has the size of the ranks.

    u (p, k), vh (k, q): orthonormal, in the coordinates of two bases.   worth: (k,), how important each is.
    total: the sum; None where the directions are its singular vectors, worth its squared singular values.
    """

    u: Tensor
    vh: Tensor
    worth: Tensor
    products: tuple[Product, ...]
    total: Tensor | None = None

    @cached_property
    def energy(self) -> float:
        return float(self.worth.sum()) if self.total is None else squared_norm(self.total)

    @cached_property
    def source_energy(self) -> tuple[float, ...]:
        return tuple(product.energy for product in self.products)

    @cached_property
    def kept(self) -> Tensor:
        """(1 + terms, k + 1), as in Prospect."""
        of_sum = self.worth.cumsum(0) if self.total is None else _corners(self.u.T @ self.total @ self.vh.T)
        of_terms = [_corners(one.along(self.u, self.vh)) for one in self.products]
        kept = torch.nn.functional.pad(torch.stack([of_sum, *of_terms]), (1, 0))
        # Where nothing is cut nothing is lost, also of what one term has beyond the sum's directions and another takes back.
        kept[:, -1] = kept.new_tensor([self.energy, *self.source_energy])
        return kept

    @cached_property
    def _holding_all(self) -> Order | None:
        """As many directions that hold the whole sum, its own, where all of these together may lack some of it: where the weight is
        smaller than the ranks of the terms together, they are all that there are on its shorter side, and not on the longer one."""
        if self.total is None or self.total.shape[0] == self.total.shape[1]:
            return None
        u, s, vh = _singular(self.total)
        return replace(self, u=u, vh=vh, worth=s.double().square(), total=None)

    def cut(self, rank: int) -> Cut:
        """The nearest to the sum inside the first directions."""
        return Cut(*self._shared(rank), self._kept_at(rank))

    def _kept_at(self, rank: int) -> tuple[float, ...]:
        if rank >= len(self.worth):
            return self.source_energy
        if "kept" in vars(self):
            return tuple(self.kept[1:, rank].tolist())
        u, vh = self.u[:, :rank], self.vh[:rank]
        return tuple(squared_norm(one.along(u, vh)) for one in self.products)

    def _shared(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """left and right of `cut`, in even shares, and lost."""
        if rank >= len(self.worth) and (best := self._holding_all) is not None:
            return best._shared(rank)
        u, vh = self.u[:, :rank], self.vh[:rank]
        if self.total is None:
            root = self.worth[:rank].to(u.dtype).sqrt().sqrt()
            return u * root, root[:, None] * vh, float(self.worth[rank:].sum())
        # The projected sum has singular vectors of its own.
        core = u.T @ self.total @ vh.T
        inner, s, outer = torch.linalg.svd(core, full_matrices=False)
        root = s.sqrt()
        return (u @ inner) * root, root[:, None] * (outer @ vh), squared_norm(self.total - u @ core @ vh)


def order(total: Tensor, products: tuple[Product, ...], *, balanced: bool = False) -> Order:
    """`directions` in the coordinates of two bases. total: the products' sum, or what a method makes of them."""
    u, vh, worth = _by_importance(total, products, balanced)
    return Order(u=u, vh=vh, worth=worth, products=products, total=total if balanced else None)


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
        if bool(values[0] > CLEAR * values[-1]):
            s, v = values.flip(0).sqrt(), v.flip(1)
            return (total @ v) / s, s, v.T
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    return u, s, vh


def _corners(inner: Tensor) -> Tensor:
    """(k,) float64, the energy of a (k, k) matrix inside its first 1, 2, ... rows and columns."""
    return corners(inner.double().square())


def corners(squares: Tensor) -> Tensor:
    """(k,) the sums of a (k, k) matrix over its first 1, 2, ... rows and columns."""
    return squares.cumsum(0).cumsum(1).diagonal()


def squared_norm(matrix: Tensor) -> float:
    # float64: thousands of squares are added.
    return float(matrix.double().square().sum())
