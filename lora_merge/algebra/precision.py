"""Factors in a smaller dtype without losing what they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..updates.layer import Layer, LoraLayer, exponent, largest
from ..updates.side_by_side import Sum, put
from ..updates.unmade import Unmade, extremes, made, magnitude
from .threads import in_order, on_one_core

# Largest entry of a tensor, in the dtype's smallest normal numbers, below which rounding is coarser than the dtype's bits.
_SMALL = 4
# What is below it may be among the subnormal numbers of bfloat16 and float32.
_NOTHING = 2.0**-100
# Relative error above which an update is not the same any more; float16's rounding alone makes 0.0003.
COARSE = 0.005
# Powers of two that a written alpha keeps within.
ALPHA = 120
# Numbers that one thread looks at in one go.
_PIECE = 1 << 22
_WORTH_A_THREAD = 1 << 20


@dataclass(frozen=True, eq=False)
class Cast:
    """A layer in the wanted dtype, whether its factors had to be balanced to fit, and the relative error (Frobenius norm)
    of an update too small for the dtype all the same; 0 where nothing was lost but the dtype's rounding."""

    layer: Layer
    balanced: bool
    error: float = 0.0


def cast(layer: Layer, dtype: torch.dtype, *, into_alpha: bool = True) -> Cast:
    """The layer in another dtype, the same update up to that dtype's rounding.

    Where an entry would become infinite, or a whole component would fall among the dtype's subnormal numbers, the
    component's column of up and row of down are multiplied by a power of two and its inverse so that their largest
    entries are alike: exact in binary arithmetic, and the product stays the same. Where all components are too small for
    that, powers of two go from alpha into the factors (into_alpha). LoHa and LoKr are balanced as a whole.
    Raises ValueError if no balance helps.
    """
    if layer.dtypes == {dtype}:
        return Cast(layer, False)
    result = layer.in_dtype(dtype)
    plain = isinstance(result, LoraLayer) and result.mid is None
    if isinstance(result, LoraLayer) and plain and holds(result):
        return Cast(result, False)
    parts = {name: part.detach() for name, part in layer.parts().items()}
    balanced = False
    error = 0.0
    if not _all_fit(parts, dtype, by_component=plain):
        parts, balanced = _balanced(layer, parts, dtype)
        alpha = layer.alpha
        if into_alpha and layer.dim is not None and (shift := _shift(parts, dtype, layer)):
            parts = {name: part * 2.0**shift for name, part in parts.items()}
            alpha, balanced = math.ldexp(layer.written_alpha, -shift * len(parts)), True
        result = replace(layer.with_parts({name: part.to(dtype) for name, part in parts.items()}), alpha=alpha)  # type: ignore[type-var]
    if not all(map(is_finite, result.parts().values())):
        raise ValueError(_too_large(dtype))
    if not _all_fit(parts, dtype, by_component=False):
        error = _error(layer, result)
    return Cast(result, balanced, error)


def _all_fit(parts: Mapping[str, Tensor], dtype: torch.dtype, *, by_component: bool) -> bool:
    if by_component:
        return _fits(parts["up"], dtype, 1) and _fits(parts["down"], dtype, 0)
    return all(_fits(part, dtype) for part in parts.values())


def _balanced(layer: Layer, parts: dict[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], bool]:
    """The parts, or float32 or float64 ones with powers of two moved between them, and whether any were."""
    if isinstance(layer, LoraLayer):
        # With mid, rank indices of up and down do not pair up: one factor for all of them.
        up, down, balanced = _balance(parts["up"], parts["down"], per_component=layer.mid is None)
        parts = parts | {"up": up, "down": down}
        if layer.mid is None or _all_fit(parts, dtype, by_component=False):
            return parts, balanced
    return _balance_whole(parts)


def _error(layer: Layer, rounded: Layer) -> float:
    """Relative Frobenius norm of the difference of two updates of one scale, by Gram matrices in float64."""
    (a, b), (c, d) = layer.factors(torch.float64), rounded.factors(torch.float64)

    def energy(up: Tensor, down: Tensor) -> float:
        return max(0.0, float(((up.T @ up) * (down @ down.T)).sum()))

    # By what ends near 1: products of small scales would be 0. Whoever is that small has the scale it had.
    by = max(largest(b), torch.finfo(torch.float64).tiny)
    whole = energy(a, b / by)
    lost = energy(torch.cat([a, -c], dim=1), torch.cat([b / by, d / by]))
    return math.sqrt(lost / whole) if whole > 0 else 0.0


def _too_large(dtype: torch.dtype) -> str:
    others = "float32 or bfloat16" if dtype == torch.float16 else "float32"
    return f"values are too large for {str(dtype).removeprefix('torch.')}; save as {others}"


def cast_part(part: Tensor, dtype: torch.dtype | None, *, copy: bool = True) -> Tensor:
    """A tensor of another kind, or a difference, in another dtype; None, and what is no float, stays as it is.

    copy: False gives the tensor itself where nothing changes. Raises ValueError for values that the dtype cannot hold.
    """
    part = part.detach()
    if dtype is None or not part.dtype.is_floating_point:
        return part.clone(memory_format=torch.contiguous_format) if copy else part.contiguous()
    result = part.to(dtype, copy=copy).contiguous()
    if not is_finite(result):
        raise ValueError(_too_large(dtype))
    return result


def rounding(part: Tensor, rounded: Tensor) -> float:
    """Relative Frobenius norm of what rounding made of a tensor; 0 where it has kept its bits, or as many as the dtype has."""
    if part.dtype == rounded.dtype or not part.dtype.is_floating_point or _fits(part, rounded.dtype):
        return 0.0
    exact = part.detach().double()
    return float((rounded.double() - exact).norm() / exact.norm())


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values of all tensors are numbers. Neighbours in one memory, as those of a file are, count as one."""
    apart: list[Tensor] = []
    runs: list[tuple[Tensor, int, int]] = []  # first tensor, its storage, numbers
    for tensor in sorted(tensors, key=Tensor.data_ptr):
        if not tensor.is_contiguous():
            apart.append(tensor)
            continue
        storage = tensor.untyped_storage().data_ptr()
        if runs:
            first, where, numbers = runs[-1]
            follows = tensor.storage_offset() == first.storage_offset() + numbers
            if storage == where and tensor.dtype == first.dtype and follows:
                runs[-1] = (first, where, numbers + tensor.numel())
                continue
        runs.append((tensor, storage, tensor.numel()))
    pieces = [*apart, *(piece for first, _, n in runs for piece in torch.split(first.as_strided((n,), (1,)), _PIECE))]
    # To share out thousands of small tensors takes longer than to look at them.
    if sum(piece.numel() for piece in pieces) <= len(pieces) * _WORTH_A_THREAD:
        return on_one_core(lambda: all(map(is_finite, pieces)))
    with closing(in_order(is_finite, pieces, torch.get_num_threads())) as found:
        return all(found)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are numbers; true for a tensor without values (a meta tensor too), and for integers."""
    if tensor.numel() == 0 or tensor.is_meta or not tensor.dtype.is_floating_point:
        return True
    # Needs no memory of its own: 60 times the speed of isfinite().all().
    return math.isfinite(magnitude(tensor))


def holds(layer: LoraLayer) -> bool:
    """Whether factors that were rounded to this dtype lost nothing but the rounding: `cast` would have left them so.

    Told from the layer's shares, since what is largest before it is multiplied and rounded is so afterwards. What a Sum has
    as it came has lost nothing, and may not have been read yet.
    """
    (dtype,) = layer.dtypes
    sides = [
        [(share.up, share.above, 1) for share in layer.shares],
        [(share.down, share.below, 0) for share in layer.shares],
    ]
    if isinstance(layer, Sum):
        as_it_came = [one for side in sides for one, by, _ in side if by == 1 and one.dtype == dtype]
        if not all(is_finite(one) for one in as_it_came if isinstance(one, Tensor)):
            return False
        sides = [[(one, by, dim) for one, by, dim in side if by != 1 or one.dtype != dtype] for side in sides]
    if dtype == torch.float16:
        return all(_holds_components(*factor) for side in sides for factor in side)
    for side in sides:
        sizes = [float(_rounded(_largest(factor), by, dtype)) for factor, by, _ in side]
        if not all(size < math.inf for size in sizes) or max(sizes, default=1.0) <= _NOTHING:
            return False
    return True


def _holds_components(factor: Tensor | Unmade, number: float, rank_dim: int) -> bool:
    """`holds` for number * factor in float16, where a component of its own can be lost."""
    # Without the bounds themselves: what is there may have been rounded to them, and 0 may have been a small number.
    bounds, by = torch.finfo(torch.float16), abs(number)
    seen = factor.extremes if isinstance(factor, Unmade) else extremes(factor, rank_dim)
    top, small = seen.largest, _SMALL * bounds.tiny
    # As a rule a few entries of each component show that it is large enough, far from where rounding decides.
    if seen.component == rank_dim and seen.least * by > 2 * small and top * by < bounds.max / 2:
        return True
    factor = made(factor)
    if not float(_rounded(torch.tensor(top, dtype=factor.dtype), number, torch.float16)) < bounds.max:
        return False
    # float32: torch takes up to ten times as long over columns of float16, not over rows.
    return bool((_rounded(component_maxima(factor.float(), rank_dim), number, torch.float16) > small).all())


def _largest(factor: Tensor | Unmade) -> Tensor:
    return torch.tensor(largest(factor), dtype=factor.dtype)


def _rounded(sizes: Tensor, number: float, dtype: torch.dtype) -> Tensor:
    """What multiplying by a number and rounding to a dtype makes of magnitudes."""
    place = torch.empty(sizes.shape, dtype=dtype)
    put(sizes, abs(number), place)
    return place


def _fits(part: Tensor, dtype: torch.dtype, rank_dim: int | None = None) -> bool:
    """Whether the entries, those of every component if rank_dim is given, keep the bits that the dtype has."""
    bounds = torch.finfo(dtype)
    maxima = torch.tensor([largest(part)]) if rank_dim is None else component_maxima(part, rank_dim)
    return not bool(((maxima > bounds.max) | ((maxima > 0) & (maxima < _SMALL * bounds.tiny))).any())


def component_maxima(factor: Tensor, rank_dim: int) -> Tensor:
    # Without abs, which would take as much memory again.
    flat = factor.movedim(rank_dim, 0).flatten(1)
    return torch.maximum(flat.amax(dim=1), -flat.amin(dim=1))


def _balance(up: Tensor, down: Tensor, *, per_component: bool) -> tuple[Tensor, Tensor, bool]:
    # float64: the ratio of two float32 numbers can leave float32's range.
    above, below = component_maxima(up, 1).double(), component_maxima(down, 0).double()
    # Powers of two are exact in float32 as well, and whole factors in float64 would take twice the memory.
    large = any(bool(((maxima > 0) & ((maxima > 2.0**60) | (maxima < 2.0**-60))).any()) for maxima in (above, below))
    up, down = (factor.to(torch.float64 if large else torch.float32) for factor in (up, down))
    if not per_component:
        above, below = above.amax().reshape(1), below.amax().reshape(1)
    # A component with one factor 0 is 0, whatever stands in the other one.
    alive = (above > 0) & (below > 0)
    ratio = torch.where(alive, below, 1.0) / torch.where(alive, above, 1.0)
    factor = torch.exp2(torch.round(torch.log2(ratio) / 2)).to(up.dtype)
    in_up, in_down = (1, -1, *(1 for _ in up.shape[2:])), (-1, *(1 for _ in down.shape[1:]))
    up = torch.where(alive.reshape(in_up), up * factor.reshape(in_up), 0.0)
    down = torch.where(alive.reshape(in_down), down / factor.reshape(in_down), 0.0)
    return up, down, bool((factor != 1).any())


def _balance_whole(parts: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Parts of an update that is linear in each of them, their largest entries alike: one power of two for each. As they are
    where a value is no number."""
    sizes = {name: exponent(largest(part)) for name, part in parts.items()}
    if math.inf in sizes.values():
        return dict(parts), False
    if -math.inf in sizes.values():
        return {name: torch.zeros_like(part) for name, part in parts.items()}, False
    even = round(sum(sizes.values()) / len(sizes))
    by = {name: even - int(size) for name, size in sizes.items()}
    by[next(iter(by))] -= sum(by.values())  # they cancel
    return {name: part.double() * 2.0 ** by[name] for name, part in parts.items()}, any(by.values())


def _shift(parts: Mapping[str, Tensor], dtype: torch.dtype, layer: Layer) -> int:
    """The power of two that parts too small for the dtype are to be multiplied by, each, so that the largest are about 1;
    0 where they are not, or where alpha cannot take it."""
    sizes = [exponent(largest(part)) for part in parts.values()]
    if -math.inf in sizes or min(sizes) >= exponent(_SMALL * torch.finfo(dtype).tiny):
        return 0
    shift = -int(max(sizes))
    alpha = exponent(layer.written_alpha) - shift * len(parts)
    return shift if abs(alpha) <= ALPHA else 0
