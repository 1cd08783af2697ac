"""Updates near the ends of float32's range, brought to its middle by powers of two, which round nothing.

Norms and products of updates are squares and worse: from 1e20 on they overflow, below 1e-20 they are lost. Multiplied by a
power of two before and by its inverse afterwards, every step of a merge makes the same digits that it would make in the
middle. Ordinary updates pass through untouched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..updates.layer import Layer, LoraLayer, Term, exponent, is_safe, shaped
from .precision import ALPHA, component_maxima, is_finite

# Powers of two that parts, and updates with their strength, keep within for squares and sums of squares to be good.
_PART, _LOW, _HIGH = 50, -56, 40
# The largest power of two that a factor is divided by; more than that goes into alpha.
_FACTOR = 100
_LARGEST = 128


def levelled(terms: Sequence[Term]) -> tuple[list[Term], int]:
    """(the (layer, strength) terms divided by 2 ** e, e), where the largest is about 1 then; as they are, and 0, where
    all are of ordinary size. e is even.

    Raises ValueError for a strength that is not finite.
    """
    if all(is_safe(layer, strength, part=_PART, low=_LOW, high=_HIGH) for layer, strength in terms):
        return list(terms), 0
    return level(terms)


def level(terms: Sequence[Term]) -> tuple[list[Term], int]:
    """`levelled` of terms of any size."""
    for _, strength in terms:
        if not math.isfinite(strength):
            raise ValueError(f"strength is {strength}, but it has to be a finite number")
    middling = [_middling(layer) for layer, _ in terms]
    # Mantissa and exponent of strength * scale, whose product may be beyond float64.
    numbers = []
    for (layer, strength), (_, top) in zip(terms, middling, strict=True):
        (s, by_strength), (c, by_scale) = math.frexp(strength), math.frexp(layer.scale)
        numbers.append((s * c, by_strength + by_scale + top))
    sizes = [e for (number, e), (layer, _) in zip(numbers, middling, strict=True) if number and layer.up.any()]
    common = 2 * (max(sizes, default=0) // 2)
    # Above are updates of zeros only; what is 2**-1000 of the largest is nothing.
    scaled = [math.ldexp(number, min(max(e - common, -1000), 1)) for number, e in numbers]
    return [(layer, number) for (layer, _), number in zip(middling, scaled, strict=True)], common


def _middling(layer: Layer) -> tuple[LoraLayer, int]:
    """(layer of scale 1, e) with update = 2 ** e * that layer's, without the scale; each component is shared evenly by up
    and down, and the largest is about 1."""
    up, down = layer.factors(torch.float64)
    above, below = component_maxima(up, 1), component_maxima(down, 0)
    # A component with one factor 0 is 0, whatever stands in the other one.
    alive = (above > 0) & (below > 0)
    first, second = (torch.frexp(torch.where(alive, m, 1.0)).exponent.double() for m in (above, below))
    top = float((first + second)[alive].max()) if bool(alive.any()) else 0.0
    in_up = torch.floor((first + second - top) / 2)
    in_down = first + second - top - in_up
    up = torch.where(alive, up * torch.exp2(in_up - first), 0.0)
    down = torch.where(alive[:, None], down * torch.exp2(in_down - second)[:, None], 0.0)
    return shaped(up.float(), down.float(), layer.shape), int(top)


def raised(layer: LoraLayer, power: int) -> LoraLayer:
    """The layer times 2 ** power, in even shares in up and down; what is left over goes into alpha.

    power: even. Raises ValueError for an update that float32 cannot hold.
    """
    if not power:
        return layer
    size = power + _size_of(layer)
    if size > _LARGEST:
        raise ValueError(
            f"the update reaches about 1e{round(size * math.log10(2)):+d}, and float32 ends at 3.4e+38. Lower its strength, or "
            "leave the LoRA out: no trained one is of that size"
        )
    half = max(-_FACTOR, power // 2)
    alpha = math.ldexp(layer.written_alpha, power - 2 * half)
    if abs(exponent(alpha)) > ALPHA:
        # 1e-100 and less, which changes no weight.
        half, alpha = power // 2, layer.written_alpha
    return LoraLayer(layer.up * 2.0**half, layer.down * 2.0**half, alpha)


def _size_of(layer: LoraLayer) -> float:
    """Power of two of the largest component."""
    above, below = component_maxima(layer.up.double(), 1), component_maxima(layer.down.double(), 0)
    return exponent(float((above * below).max()) * layer.scale)


def raised_whole(diff: Tensor, power: int) -> Tensor:
    """A whole difference times 2 ** power. Raises ValueError where float32 cannot hold it."""
    if not power:
        return diff
    result = (diff.double() * 2.0**power).float()
    if not is_finite(result):
        raise ValueError(
            "the update is beyond float32, which ends at 3.4e+38. Lower its strength, or leave the LoRA out"
        )
    return result
