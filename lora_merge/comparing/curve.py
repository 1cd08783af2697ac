"""What a cut of a sum keeps, against its rank, module by module and added up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.order import Order, Product, order, squared_norm
from ..algebra.singular import Singular
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
    owns: Mapping[int, Own],
    strengths: Sequence[float],
    shape: tuple[int, int],
    rank: int,
    is_dense: bool,
    singular: Callable[[], Singular | None] = lambda: None,
) -> Curve:
    """rank: what an exact merge of this module takes.   singular: directions of the weighted sum of the owns, in their order, if
    somebody can tell them faster."""
    rows, columns = shape
    whole = [0.0] * (1 + len(strengths))
    for index, own in owns.items():
        whole[1 + index] = strengths[index] ** 2 * own.energy
    alone = len(owns) == 1
    if alone:
        whole[0] = sum(whole)
    if is_dense:  # a difference of whole weights stays whole at any rank
        if not alone:
            whole[0] = squared_norm(_sum(_products(owns, strengths)))
        numbers = torch.full((1,), float(rows * columns), dtype=torch.float64)
        return Curve(torch.tensor(whole, dtype=torch.float64)[:, None], numbers)
    if alone:
        ((index, own),) = owns.items()
        known = torch.nn.functional.pad(strengths[index] ** 2 * own.values.cumsum(0), (1, 0)).expand(2, -1)
    else:
        found: Order | Singular | None = singular()
        if found is None:
            products = _products(owns, strengths)
            found = order(_sum(products), products)
        whole[0], known = found.energy, found.kept
    # An exact merge takes no rank for strength 0, but one rank of zeros where nothing is left.
    rank = max(rank, 1)
    kept = torch.tensor(whole, dtype=torch.float64)[:, None].repeat(1, 1 + rank)
    # Where all that an exact merge takes fits, nothing is cut.
    shown = min(rank, known.shape[1])
    for row, part in zip((0, *(1 + index for index in owns)), known, strict=True):
        kept[row, :shown] = part[:shown]
    return Curve(kept, (rows + columns) * torch.arange(1 + rank, dtype=torch.float64))


def _products(owns: Mapping[int, Own], strengths: Sequence[float]) -> tuple[Product, ...]:
    return tuple(Product(strengths[index] * own.up, own.down) for index, own in owns.items())


def _sum(products: Sequence[Product]) -> Tensor:
    return torch.stack([one.core for one in products]).sum(0)
