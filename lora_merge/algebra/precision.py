"""Factors in a smaller dtype without losing what they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..updates.layer import LoraLayer
from .threads import in_order

# Largest entry of a factor below which float16 starts to round it coarser than its 11 bits (subnormals begin at 2**-14).
_SMALL = 2.0**-12
# Numbers that one thread looks at in one go.
_PIECE = 1 << 22
_WORTH_A_THREAD = 1 << 20


@dataclass(frozen=True, eq=False)
class Cast:
    """A layer in the wanted dtype, and whether its factors had to be balanced to fit."""

    layer: LoraLayer
    balanced: bool


def cast(layer: LoraLayer, dtype: torch.dtype) -> Cast:
    """The layer in another dtype, the same update up to that dtype's rounding.

    Where an entry would become infinite, or a whole component would fall among float16's subnormal numbers, the
    component's column of up and row of down are multiplied by a power of two and its inverse so that their largest
    entries are alike: exact in binary arithmetic, and the product stays the same. Raises ValueError if no balance helps.
    """
    up, down, mid = layer.up.detach(), layer.down.detach(), layer.mid
    if {factor.dtype for factor in (up, down, mid) if factor is not None} == {dtype}:
        return Cast(layer, False)
    result = _rounded(layer, up, down, dtype)
    if mid is None and holds(result.up, result.down):
        return Cast(result, False)
    balanced = False
    if dtype == torch.float16 and not _fits(up, down):
        # With mid, rank indices of up and down do not pair up: one factor for all of them.
        up, down, balanced = _balance(up, down, per_component=mid is None)
        result = _rounded(layer, up, down, dtype)
    factors = [result.up, result.down] + ([] if result.mid is None else [result.mid])
    if not all(map(is_finite, factors)):
        raise ValueError(f"values are too large for {str(dtype).removeprefix('torch.')}; save as float32 or bfloat16")
    return Cast(result, balanced)


def _rounded(layer: LoraLayer, up: Tensor, down: Tensor, dtype: torch.dtype) -> LoraLayer:
    mid = None if layer.mid is None else layer.mid.detach().to(dtype)
    return replace(layer, up=up.to(dtype), down=down.to(dtype), mid=mid)


def cast_part(part: Tensor, dtype: torch.dtype | None, *, copy: bool = True) -> Tensor:
    """A tensor of another kind, or a difference, in another dtype; None, and what is no float, stays as it is.

    copy: False gives the tensor itself where nothing changes. Raises ValueError for values that the dtype cannot hold.
    """
    part = part.detach()
    if dtype is None or not part.dtype.is_floating_point:
        return part.clone(memory_format=torch.contiguous_format) if copy else part.contiguous()
    result = part.to(dtype, copy=copy).contiguous()
    if not is_finite(result):
        raise ValueError(f"values are too large for {str(dtype).removeprefix('torch.')}; save as float32 or bfloat16")
    return result


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values of all tensors are numbers. Neighbours in one memory, as those of a file are, count as one."""
    runs: list[tuple[Tensor, int, int]] = []  # first tensor, its storage, numbers
    apart = []
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
    large = sum(piece.numel() for piece in pieces) > len(pieces) * _WORTH_A_THREAD
    with closing(in_order(is_finite, pieces, torch.get_num_threads() if large else 1)) as found:
        return all(found)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are numbers; true for a tensor without values, and for integers."""
    if tensor.numel() == 0 or not tensor.dtype.is_floating_point:
        return True
    tensor = tensor.detach()
    # aminmax hands NaN on and needs no memory: 20 times the speed of isfinite().all(). 8-bit floats have none.
    low, high = torch.aminmax(tensor.half() if tensor.dtype.itemsize == 1 else tensor)
    return math.isfinite(float(low)) and math.isfinite(float(high))


def holds(up: Tensor, down: Tensor) -> bool:
    """Whether factors that were rounded to this dtype lost nothing but the rounding: `cast` would have left them so."""
    if up.dtype != torch.float16:
        return is_finite(up) and is_finite(down)
    largest = torch.finfo(torch.float16).max
    # float32: torch takes up to ten times as long over columns of float16, not over rows.
    maxima = torch.cat([_component_maxima(up.float(), 1), _component_maxima(down, 0).float()])
    # Without the bounds themselves: what is there may have been rounded to them, and 0 may have been a small number.
    return bool(((maxima > _SMALL) & (maxima < largest)).all())


def _fits(up: Tensor, down: Tensor) -> bool:
    largest = torch.finfo(torch.float16).max
    for factor in (_component_maxima(up, 1), _component_maxima(down, 0)):
        if bool((factor > largest).any()) or bool(((factor > 0) & (factor < _SMALL)).any()):
            return False
    return True


def _component_maxima(factor: Tensor, rank_dim: int) -> Tensor:
    # Without abs, which would take as much memory again.
    flat = factor.movedim(rank_dim, 0).flatten(1)
    return torch.maximum(flat.amax(dim=1), -flat.amin(dim=1))


def _balance(up: Tensor, down: Tensor, *, per_component: bool) -> tuple[Tensor, Tensor, bool]:
    # float64: the ratio of two float32 numbers can leave float32's range.
    above, below = _component_maxima(up, 1).double(), _component_maxima(down, 0).double()
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
