"""What a cut of a sum keeps, against its rank, module by module and added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.order import Product, order
from .own import Own


@dataclass(frozen=True, eq=False)
class Curve:
    """Kept energy and file size as functions of the rank r = 0..R of a cut.

    kept: (1 + inputs, R + 1) energies, of the sum and of each input.   numbers: (R + 1,) values in the file.
    """

    kept: Tensor
    numbers: Tensor

    @classmethod
    def total(cls, curves: Sequence[Curve], inputs: int) -> Curve:
        """Of all modules together. Beyond its own ranks nothing changes any more."""
        length = max((len(curve.numbers) for curve in curves), default=1)
        kept, numbers = torch.zeros(1 + inputs, length, dtype=torch.float64), torch.zeros(length, dtype=torch.float64)
        for curve in curves:
            own = len(curve.numbers)
            for whole, part in ((kept, curve.kept), (numbers, curve.numbers)):
                whole[..., :own] += part
                whole[..., own:] += part[..., -1:]
        return cls(kept, numbers)


def curve_of(
    owns: Mapping[int, Own], strengths: Sequence[float], shape: tuple[int, int], rank: int, is_dense: bool
) -> Curve:
    """rank: what an exact merge of this module takes."""
    rows, columns = shape
    products = tuple(Product(strengths[index] * own.up, own.down) for index, own in owns.items())
    energies = torch.zeros(1 + len(strengths), 1, dtype=torch.float64)
    for index, own in owns.items():
        energies[1 + index] = strengths[index] ** 2 * own.energy
    alone = len(owns) == 1
    total = torch.zeros((), dtype=torch.float64) if alone else torch.stack([one.core for one in products]).sum(0)
    energies[0] = energies.sum() if alone else total.square().sum()
    if is_dense:  # a difference of whole weights stays whole at any rank
        return Curve(energies, torch.full((1,), float(rows * columns), dtype=torch.float64))
    if alone:
        ((index, own),) = owns.items()
        kept_of_one = strengths[index] ** 2 * torch.cat([own.values.new_zeros(1), own.values.cumsum(0)])
        known = kept_of_one.expand(2, -1)
    else:
        known = order(total, products).kept
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
