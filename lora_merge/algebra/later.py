"""Cuts that are made on their way into a file: nothing but what has the size of the ranks is there before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt

import torch
from torch import Tensor

from ..updates.layer import LoraLayer, Term
from ..updates.side_by_side import stored
from ..updates.unmade import CPU, Unmade, borrowed_bytes
from .sums import as_they_are
from .threads import on_one_core

# Largest number of a component from which rounding is sure to leave it the dtype's bits, in the dtype's smallest normal
# numbers; and for dtypes of which these are next to nothing.
_FINE, _SOME = 8, 2.0**-90


@dataclass(frozen=True, eq=False)
class Combined:
    """Combinations of a factor's components, float32: factor @ by, or by @ factor where the components are rows.

    factor: unmade, in float32.   by: (ranks, r) or (r, ranks).
    """

    factor: Unmade
    by: Tensor
    rows: bool

    def write(self, place: Tensor) -> None:
        """Into contiguous memory of any dtype, rounded once; the same bits in whatever thread."""
        on_one_core(partial(self._write, place))

    def _write(self, place: Tensor) -> None:
        with self.factor.borrowed() as factor:
            first, second = (self.by, factor.flatten(1)) if self.rows else (factor.flatten(1), self.by)
            write_product(first, second, place)


def write_product(first: Tensor, second: Tensor, place: Tensor) -> None:
    """first @ second, float32 matrices, into contiguous memory of any dtype; what is rounded takes no new memory before."""
    shape = (first.shape[0], second.shape[1])
    if place.dtype == first.dtype:
        torch.mm(first, second, out=place.view(shape))
        return
    with borrowed_bytes(prod(shape) * first.itemsize, first.device) as memory:
        place.view(shape).copy_(torch.mm(first, second, out=memory.view(first.dtype).view(shape)))


def made_later(
    terms: Sequence[Term], left: Tensor, right: Tensor, norms: Tensor, dtype: torch.dtype
) -> LoraLayer | None:
    """The layer U left @ right D of the terms' factors side by side, without their strengths and scales, as `stored` ones.

    norms: of the columns of U left, which are those of the rows of right D.
    None where it has to be made now: where an input is in memory, which may be written to, and where the dtype might not hold
    it (precision.holds), which only the numbers themselves would tell.
    """
    total = as_they_are(terms)
    if total is None or not surely_holds(norms, total.shape, dtype):
        return None
    up, down = total.stored_factors()
    if not (isinstance(up, Unmade) and isinstance(down, Unmade) and up.of_file and down.of_file):
        return None
    rank, kernel = left.shape[1], total.shape[2:]
    shapes = torch.Size((total.shape[0], rank, *(1 for _ in kernel))), torch.Size((rank, *total.shape[1:]))
    writes = Combined(up, left, rows=False).write, Combined(down, right, rows=True).write
    new_up, new_down = (
        Unmade(dtype=dtype, shape=shape, write=write, device=CPU) for shape, write in zip(shapes, writes, strict=True)
    )
    return stored(new_up, new_down, float(rank))


def surely_holds(norms: Tensor, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether the dtype holds components of these norms for a weight of that shape, whatever their numbers are: the largest of
    them is between the norm over the root of their count and the norm itself."""
    bounds, length = torch.finfo(dtype), max(shape[0], prod(shape[1:]))
    least, most = float(norms.min()) / sqrt(length), float(norms.max())
    return max(_FINE * bounds.tiny, _SOME) < least and most < bounds.max / 2
