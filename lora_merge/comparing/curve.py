"""What a cut of a sum keeps, against its rank, module by module and added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..algebra.core_space import CoreSpace
from ..algebra.lowrank import directions_in


@dataclass(frozen=True, eq=False, kw_only=True)
class Own:
    """One update in the common small space. up: (p, r), down: (q, r), float64, the update's columns of R_u and R_d, scales
    in up.   values: its squared singular values, descending.   inner @ vectors: the right ones, (q, r) @ (r, r).
    effective: number of those that are not 0.   leading: number of them that hold the wanted share of its energy.
    """

    up: Tensor
    down: Tensor
    values: Tensor
    inner: Tensor
    vectors: Tensor
    effective: int
    leading: int
    energy: float

    @cached_property
    def core(self) -> Tensor:
        """(p, q)"""
        return self.up @ self.down.T

    @cached_property
    def right(self) -> Tensor:
        """(q, effective), orthonormal."""
        return self.inner @ self.vectors[:, : self.effective]

    @cached_property
    def left(self) -> Tensor:
        """(p, effective), orthonormal."""
        return (self.core @ self.right) / self.values[: self.effective].sqrt()


@dataclass(frozen=True, eq=False)
class Curve:
    """Kept energy and file size as functions of the rank r = 0..R of a cut.

    kept: (1 + inputs, R + 1) energies, of the sum and of each input.   numbers: (R + 1,) values in the file.
    """

    kept: Tensor
    numbers: Tensor

    @classmethod
    def empty(cls, inputs: int) -> Curve:
        return cls(torch.zeros(1 + inputs, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))

    def __add__(self, other: Curve) -> Curve:
        length = max(len(self.numbers), len(other.numbers))
        (a, m), (b, n) = self._to(length), other._to(length)
        return Curve(a + b, m + n)

    def _to(self, length: int) -> tuple[Tensor, Tensor]:
        """Beyond its own ranks nothing changes any more."""
        more = length - len(self.numbers)
        return (
            torch.cat([self.kept, self.kept[:, -1:].expand(-1, more)], dim=1),
            torch.cat([self.numbers, self.numbers[-1:].expand(more)]),
        )


def curve_of(
    owns: Mapping[int, Own], strengths: Sequence[float], shape: tuple[int, int], rank: int, is_dense: bool
) -> Curve:
    """rank: what an exact merge of this module takes."""
    rows, columns = shape
    weighted = {index: strengths[index] * own.core for index, own in owns.items()}
    total = sum(weighted.values(), torch.zeros((), dtype=torch.float64))
    energies = torch.zeros(1 + len(strengths), 1, dtype=torch.float64)
    energies[0] = total.square().sum()
    for index, own in owns.items():
        energies[1 + index] = strengths[index] ** 2 * own.energy
    if is_dense:  # a difference of whole weights stays whole at any rank
        return Curve(energies, torch.full((1,), float(rows * columns), dtype=torch.float64))
    if len(owns) == 1:
        ((index, own),) = owns.items()
        kept_of_one = strengths[index] ** 2 * torch.cat([own.values.new_zeros(1), own.values.cumsum(0)])
        known = kept_of_one.expand(2, -1)
    else:
        space = CoreSpace(total.new_zeros(rows, 0), total.new_zeros(0, columns), tuple(weighted.values()), shape)
        known = directions_in(space, total).prospect().kept
    # An exact merge takes no rank for strength 0, but one rank of zeros where nothing is left.
    rank = max(rank, 1)
    kept = energies.expand(-1, 1 + rank).clone()
    # Where all that an exact merge takes fits, nothing is cut.
    shown = min(rank, known.shape[1])
    kept[0, :shown] = known[0, :shown]
    for row, index in enumerate(owns, start=1):
        kept[1 + index, :shown] = known[row, :shown]
    numbers = (rows + columns) * torch.arange(1 + rank, dtype=torch.float64)
    return Curve(kept, numbers)
