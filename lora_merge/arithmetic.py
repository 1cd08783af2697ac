"""Weighted sums of updates of one weight, exact, by putting their ranks side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .layer import Layer, LoraLayer, meeting_shape

Term = tuple[Layer, float]


def weighted_sum(terms: Sequence[Term]) -> LoraLayer:
    """The layer with delta = sum of strength * delta over (layer, strength) terms: tau' of arXiv 2311.05556, eq. 3.

    Exact, in float32: up = [a_1 up_1, a_2 up_2, ...] and down = [b_1 down_1; b_2 down_2; ...] with
    a_i * b_i = strength_i * scale_i, so the rank is the sum of ranks. b_i is the power of two nearest to an even split,
    which keeps both factors within float16 and costs down no rounding, nor up where a_i is a power of two as well: an
    LCM-LoRA of alpha 8 and rank 64 goes through at strength 1 bit for bit. The result has alpha = rank (scale 1), no `mid`.
    LoHa and LoKr enter by their exact factors.
    A term with strength 0 takes no rank; if all are 0 one rank of zeros is left, so that the module stays.
    Raises ValueError without terms, or if the updates are not of one weight.
    """
    shape = common_shape([layer for layer, _ in terms])
    return joined(*stacked(terms), shape)


def dense_sum(terms: Sequence[Term], diffs: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Sum of strength * delta over (layer, strength) terms and of strength * diff, as one dense difference; float32.

    Its shape is that of the differences, which is the weight's own. Raises ValueError if the shapes differ.
    """
    shape = _one_shape([tuple(diff.shape) for diff, _ in diffs])
    _one_shape([shape, *(layer.shape for layer, _ in terms)])
    total = torch.zeros(shape, device=diffs[0][0].device)
    for diff, strength in diffs:
        total = total + strength * diff.detach().to(torch.float32).reshape(shape)
    for layer, strength in terms:
        total = total + strength * layer.delta().reshape(shape)
    return total


def stacked(terms: Sequence[Term]) -> tuple[list[Tensor], list[Tensor]]:
    """For each term, in order, (out, rank_i) and (rank_i, in * kernel) whose product is strength * delta; float32."""
    ups, downs = [], []
    for layer, strength in terms:
        if not math.isfinite(strength):
            raise ValueError(f"strength is {strength}, but it has to be a finite number")
        factor = strength * layer.scale
        up, down = layer.factors()
        if factor == 0:
            up, down = up[:, :0], down[:0]
        half = 2.0 ** round(math.log2(abs(factor)) / 2) if factor else 1.0
        ups.append(_times(up, factor / half, layer))
        downs.append(_times(down, half, layer))
    if sum(up.shape[1] for up in ups) == 0 and ups:
        ups[0], downs[0] = ups[0].new_zeros(ups[0].shape[0], 1), downs[0].new_zeros(1, downs[0].shape[1])
    return ups, downs


def _times(factor: Tensor, number: float, layer: Layer) -> Tensor:
    """The product, without a second copy where the way to float32 has made one."""
    own = isinstance(layer, LoraLayer) and torch.float32 not in (layer.up.dtype, layer.down.dtype)
    return factor.mul_(number) if own else factor * number


def joined(ups: Sequence[Tensor], downs: Sequence[Tensor], shape: tuple[int, ...]) -> LoraLayer:
    """A layer of scale 1 whose update is the sum of up @ down over the pairs that `stacked` gives."""
    if len(ups) == 1:
        return shaped(ups[0], downs[0], shape)
    return shaped(torch.cat(list(ups), dim=1), torch.cat(list(downs), dim=0), shape)


def shaped(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> LoraLayer:
    """A layer of scale 1 from matrices (out, rank) and (rank, in * kernel), for a weight of the given shape."""
    rank, kernel = up.shape[1], shape[2:]
    return LoraLayer(
        up.reshape(shape[0], rank, *(1 for _ in kernel)), down.reshape(rank, *shape[1:]), alpha=float(rank)
    )


def common_shape(layers: Sequence[Layer]) -> tuple[int, ...]:
    """Shape of the one weight that all layers update. Raises ValueError if there is none."""
    if not layers:
        raise ValueError("there is nothing to add: give at least one layer")
    return _one_shape([layer.shape for layer in layers])


def _one_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    shape = shapes[0]
    for other in shapes[1:]:
        common = meeting_shape(shape, other)
        if common is None:
            raise ValueError(f"weights of shape {shape} and {other} differ")
        shape = common
    return shape
