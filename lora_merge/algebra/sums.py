"""Weighted sums of updates of one weight, exact, by putting their ranks side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ..updates.layer import Layer, LoraLayer, Share, Term, exponent, is_safe, largest, shape_of_both, shaped
from ..updates.side_by_side import Sum, side_by_side, split
from ..updates.unmade import Unmade
from .precision import holds, is_finite
from .scaling import level, raised

# Powers of two within which a scale may go into alpha.
_ORDINARY = 32


def weighted_sum(terms: Sequence[Term], dtype: torch.dtype = torch.float32) -> LoraLayer:
    """The layer with delta = sum of strength * delta over (layer, strength) terms: tau' of arXiv 2311.05556, eq. 3.

    Exact: up = [a_1 up_1, a_2 up_2, ...] and down = [b_1 down_1; b_2 down_2; ...], so the rank is the sum of ranks. The term
    of the largest rank keeps its numbers (a = b = 1) whatever its alpha and strength are, and alpha is rank * strength *
    scale of it; the others have a_i * b_i = strength_i * scale_i relative to that, b_i the power of two nearest to an even
    split, which keeps both factors within float16 and costs down no rounding. Of plain LoRAs, that is, one with a strength
    above 0; otherwise alpha is the rank (scale 1) and no term keeps its numbers. There is no `mid`.
    LoHa and LoKr enter by their exact factors.
    A term with strength 0 takes no rank; if all are 0 one rank of zeros is left, so that the module stays.
    dtype: of the result, rounded once from float32. Where float16 would take more than that (precision.holds), the
    result is float32 all the same, for `precision.cast` to balance.
    Numbers near the ends of float32's range are brought to its middle (algebra/scaling.py); the result is float32 then, and
    alpha may differ from the rank.
    Of plain LoRAs the result is a Sum: its factors are made when somebody asks for them.
    Raises ValueError without terms, if the updates are not of one weight, or if float32 cannot hold the sum.
    """
    if not all(is_safe(layer, strength) for layer, strength in terms):
        middling, power = level(terms)
        return raised(stacked(middling).layer(), power)
    plain = all(isinstance(layer, LoraLayer) and layer.mid is None for layer, _ in terms)

    def made_in(dtype: torch.dtype) -> LoraLayer:
        total = _beside_the_largest(terms, dtype) if plain else None
        return stacked(terms, dtype).layer() if total is None else total

    total = made_in(dtype)
    return total if dtype == torch.float32 or holds(total) else made_in(torch.float32)


def _beside_the_largest(terms: Sequence[Term], dtype: torch.dtype) -> Sum | None:
    """The sum with the numbers of the term of the largest rank as they are; None where nothing is in it."""
    shape, scales = common_shape([layer for layer, _ in terms]), _scales(terms)
    used = [(layer, scale) for (layer, _), scale in zip(terms, scales, strict=True) if scale]
    if not used:
        return None
    # Some readers may not expect an alpha below 0.
    _, by = max(used, key=lambda term: (term[1] > 0, term[0].rank))
    if not (
        by > 0 and abs(exponent(by)) <= _ORDINARY and all(is_safe(layer, strength / by) for layer, strength in terms)
    ):
        by = 1.0
    return side_by_side([_share(layer, scale / by) for layer, scale in used], shape, dtype, by)


def dense_sum(terms: Sequence[Term], diffs: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Sum of strength * delta over (layer, strength) terms and of strength * diff, as one dense difference; float32.

    Its shape is that of the differences, which is the weight's own.
    Raises ValueError if the shapes differ, or if float32 cannot hold the sum.
    """
    total = dense_sum_in(dense_dtype(terms, diffs), terms, diffs).float()
    if not is_finite(total):
        raise ValueError("the sum is beyond float32, which ends at 3.4e+38. Lower the strengths")
    return total


def dense_dtype(terms: Sequence[Term], diffs: Sequence[tuple[Tensor, float]]) -> torch.dtype:
    """float32 where it holds every number on the way to `dense_sum`, else float64."""
    layers = all(is_safe(layer, strength) for layer, strength in terms)
    whole = all(is_safe_whole(diff, strength) for diff, strength in diffs)
    return torch.float32 if layers and whole else torch.float64


def is_safe_whole(diff: Tensor, strength: float, limit: int = 110) -> bool:
    """Whether strength * diff is as far as powers of two of that limit within float32's range."""
    size, by = exponent(largest(diff)), exponent(strength)
    return size <= limit and by <= limit and (-math.inf in (size, by) or abs(size + by) <= limit)


def dense_sum_in(dtype: torch.dtype, terms: Sequence[Term], diffs: Sequence[tuple[Tensor, float]]) -> Tensor:
    """`dense_sum` in that dtype, whatever becomes of numbers beyond its range."""
    shape = _one_shape([tuple(diff.shape) for diff, _ in diffs])
    _one_shape([shape, *(layer.shape for layer, _ in terms)])
    total = torch.zeros(shape, device=diffs[0][0].device, dtype=dtype)
    for diff, strength in diffs:
        total = total + strength * diff.detach().to(dtype).reshape(shape)
    for layer, strength in terms:
        total = total + strength * layer.delta_in(dtype).reshape(shape)
    return total


@dataclass(frozen=True, eq=False)
class Stack:
    """Terms of one weight side by side: up (out, sum of ranks) and down (sum of ranks, in * kernel) have the sum of
    strength * delta as their product. ranks: of each term.   shape: of the weight.
    """

    up: Tensor
    down: Tensor
    ranks: tuple[int, ...]
    shape: tuple[int, ...]

    def layer(self) -> LoraLayer:
        """The sum, as a layer of scale 1."""
        return shaped(self.up, self.down, self.shape)

    @property
    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """up and down of each term."""
        ranks = list(self.ranks)
        return list(zip(torch.split(self.up, ranks, dim=1), torch.split(self.down, ranks, dim=0), strict=True))


def stacked(terms: Sequence[Term], dtype: torch.dtype = torch.float32) -> Stack:
    """The (layer, strength) terms, strengths and scales multiplied in: `weighted_sum` says how.

    Numbers are multiplied in float32 and rounded to the dtype once, each on its way to its place.
    """
    return _stack(terms, *_shares(terms), dtype)


def side_by_side_as_they_are(terms: Sequence[Term], until: ExitStack | None = None) -> tuple[Stack, Tensor]:
    """The terms without strengths and scales, float32, and these for each rank, (sum of ranks,) float64: the sum is
    up * numbers @ down. What has the size of the ranks only is multiplied in no time, and rounds nothing.

    until: they lie in memory that serves others once that is closed; in memory of their own without it.
    """
    shape, shares = _shares(terms)
    numbers = [share.above * share.below for share in shares if share is not None for _ in range(share.rank)] or [1.0]
    whole = _stack(terms, shape, [share and _bare(share) for share in shares], torch.float32, until)
    return whole, torch.tensor(numbers, dtype=torch.float64, device=whole.up.device)


def as_they_are(terms: Sequence[Term]) -> Sum | None:
    """`side_by_side_as_they_are`, unmade; None where no term is in the sum."""
    shape, shares = _shares(terms)
    used = [_bare(share) for share in shares if share is not None]
    return side_by_side(used, shape, torch.float32) if used else None


def _bare(share: Share) -> Share:
    return replace(share, above=1.0, below=1.0)


def _stack(
    terms: Sequence[Term],
    shape: tuple[int, ...],
    shares: Sequence[Share | None],
    dtype: torch.dtype,
    until: ExitStack | None = None,
) -> Stack:
    used = [share for share in shares if share is not None]
    ranks = tuple(0 if share is None else share.rank for share in shares)
    if not used:
        device = terms[0][0].device
        up, down = (torch.zeros(size, dtype=dtype, device=device) for size in ((shape[0], 1), (1, prod(shape[1:]))))
        return Stack(up, down, (1, *ranks[1:]), shape)
    total = side_by_side(used, shape, dtype)
    up, down = (lying(factor, until) for factor in total.stored_factors())
    return Stack(up.flatten(1), down.flatten(1), ranks, shape)


def lying(factor: Tensor | Unmade, until: ExitStack | None) -> Tensor:
    """The factor, on the CPU in memory that serves others once `until` is closed, if there is one and it is unmade."""
    if isinstance(factor, Tensor):
        return factor
    return factor.made() if until is None or factor.device.type != "cpu" else until.enter_context(factor.borrowed())


def _shares(terms: Sequence[Term]) -> tuple[tuple[int, ...], list[Share | None]]:
    """(shape of the weight, what each term is in the sum: None where strength or scale is 0)."""
    shape, scales = common_shape([layer for layer, _ in terms]), _scales(terms)
    return shape, [_share(layer, scale) if scale else None for (layer, _), scale in zip(terms, scales, strict=True)]


def _scales(terms: Sequence[Term]) -> list[float]:
    """strength * scale of each. Raises ValueError for a strength that is not finite."""
    for _, strength in terms:
        if not math.isfinite(strength):
            raise ValueError(f"strength is {strength}, but it has to be a finite number")
    return [strength * layer.scale for layer, strength in terms]


def _share(layer: Layer, scale: float) -> Share:
    above, below = split(scale)
    return Share(*layer.stored_factors(), above=above, below=below)


def common_shape(layers: Sequence[Layer]) -> tuple[int, ...]:
    """Shape of the one weight that all layers update. Raises ValueError if there is none."""
    if not layers:
        raise ValueError("there is nothing to add: give at least one layer")
    return _one_shape([layer.shape for layer in layers])


def _one_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    shape = shapes[0]
    for other in shapes[1:]:
        common = shape_of_both(shape, other)
        if common is None:
            raise ValueError(f"weights of shape {shape} and {other} differ")
        shape = common
    return shape
