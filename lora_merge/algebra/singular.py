"""Singular directions of a sum of low-rank updates, from nothing but the Gram matrices of their factors side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .order import CLEAR, Cut, corners
from .orthonormal import Triangle, independent


@dataclass(frozen=True, eq=False, kw_only=True)
class Singular:
    """The sum up @ diag(numbers) @ down, of R ranks. numbers: (R,).   ranks: of each term, R together.

    With down^T = q r (r upper, q orthonormal columns) and gram = diag(numbers) up^T up diag(numbers), the squared singular
    values `worth` are the eigenvalues of r gram r^T, v their vectors, and q v the right singular vectors; all (R, R) float64.
    The left ones are up diag(numbers) r^T v / s, so that of up neither a basis is needed nor anything to be solved.
    gram: None where `kept` is known, which is all that it is for.
    """

    numbers: Tensor
    ranks: tuple[int, ...]
    gram: Tensor | None
    r: Tensor
    v: Tensor
    worth: Tensor
    source_energy: tuple[float, ...]

    @cached_property
    def energy(self) -> float:
        return float(self.worth.sum())

    @cached_property
    def kept(self) -> Tensor:
        """(1 + terms, R + 1), as in Prospect."""
        of_sum = self.worth.cumsum(0)
        if len(self.ranks) == 1:
            return torch.nn.functional.pad(of_sum.expand(2, -1), (1, 0))
        squares = self._squares(self.r.T @ self.v)
        kept = torch.nn.functional.pad(torch.stack([of_sum, *map(corners, squares)]), (1, 0))
        kept[:, -1] = kept.new_tensor([self.energy, *self.source_energy])
        return kept

    def for_later(self) -> Singular:
        """The same in the least memory: for many modules at once."""
        result = replace(self, gram=None)
        vars(result)["kept"] = self.kept
        return result

    def norms(self, rank: int) -> Tensor:
        """Of the components of the best of that rank, the columns of up and the rows of down alike."""
        return self.worth[:rank].sqrt().sqrt()

    def cut(self, rank: int) -> Cut:
        """The best of that rank; left and right are of up and down themselves."""
        rank = min(rank, len(self.worth))
        v, root = self.v[:, :rank], self.norms(rank)
        along = self.r.T @ v
        right = torch.linalg.solve_triangular(self.r, v * root, upper=True).T
        lost = float(self.worth[rank:].sum())
        return Cut(self.numbers[:, None] * along / root, right, lost, tuple(self.kept[1:, rank].tolist()))

    def _squares(self, along: Tensor) -> list[Tensor]:
        """(R, R) for each term, the squared entries of u^T term v.   along: (R, R), r^T v."""
        assert self.gram is not None
        ranks = list(self.ranks)
        # u^T up_i = (r^T v / s)^T gram_i, and down_i v = (r^T v)_i.
        lefts, rights = torch.split(along.T @ self.gram, ranks, dim=1), torch.split(along, ranks)
        worth = self.worth[:, None]
        return [(left @ right).square_().div_(worth) for left, right in zip(lefts, rights, strict=True)]


def singular(up: Tensor, down: Tensor, numbers: Tensor, ranks: Sequence[int]) -> Singular | None:
    """Of up (out, R) and down (R, in); None where `singular_of` has none."""
    of_up = independent(up)
    of_down = None if of_up is None else independent(down.T)
    return None if of_up is None or of_down is None else singular_of(of_up, of_down, numbers, ranks)


def singular_of(up: Triangle, down: Triangle, numbers: Tensor, ranks: Sequence[int]) -> Singular | None:
    """up, down: triangles of up and down^T. None where they have no Gram matrices, or where singular values are too far apart for
    squares to tell them as exactly as float32 needs."""
    if up.gram is None or down.gram is None:
        return None
    gram = up.gram * numbers * numbers[:, None]
    values, v = torch.linalg.eigh(down.r @ gram @ down.r.T)
    if not float(values[0]) > CLEAR * float(values[-1]):
        return None
    return Singular(
        numbers=numbers,
        ranks=tuple(ranks),
        gram=gram,
        r=down.r,
        v=v.flip(1),
        worth=values.flip(0),
        source_energy=energies(gram * down.gram, ranks),
    )


def energies(products: Tensor, ranks: Sequence[int]) -> tuple[float, ...]:
    """Squared Frobenius norm of each term. products: (R, R), the Gram matrices of up and down multiplied entry by entry."""
    ends = list(accumulate(ranks, initial=0))
    return tuple(max(0.0, float(products[a:b, a:b].sum())) for a, b in pairwise(ends))
