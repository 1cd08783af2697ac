"""LoRA updates side by side: their sum, whose factors are made when somebody asks for them, and one that lies in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from .layer import LoraLayer, Share, check_alpha, check_factors
from .unmade import Unmade, borrowed_bytes, made


class Sum(LoraLayer):
    """up = [a_1 up_1, a_2 up_2, ...] and down = [b_1 down_1; b_2 down_2; ...] of its shares.

    Numbers are multiplied in float32 and rounded to the dtype once, each on its way to its place. Made by `side_by_side`, or
    by `stored` of one share with an alpha of its own; as a layer it is a LoraLayer, whose `up` and `down` are made when they
    are read: once where the shares are in memory, each time where they are in a file. The shares' tensors have to stay as
    they are until then.
    """

    dtype: torch.dtype
    _shares: tuple[Share, ...]
    _shape: tuple[int, ...]
    _up_shape: torch.Size
    _down_shape: torch.Size
    _alpha: float | None

    def __new__(cls, *parts: Any, **named: Any) -> LoraLayer:  # type: ignore[misc]
        # dataclasses.replace: with another part it is the sum of these shares no more.
        return LoraLayer(*parts, **named)

    def __reduce__(self) -> tuple[Any, ...]:
        return LoraLayer, (self.up, self.down, self.alpha)

    @property
    def shares(self) -> tuple[Share, ...]:
        return self._shares

    @property
    def alpha(self) -> float | None:  # type: ignore[override]
        return self._alpha

    @property
    def up(self) -> Tensor:
        return self._kept("up", self._up)

    @property
    def down(self) -> Tensor:
        return self._kept("down", self._down)

    @property
    def dim(self) -> int:
        return self.rank

    @cached_property
    def rank(self) -> int:
        return sum(share.rank for share in self.shares)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def parameters(self) -> int:
        return self.rank * (self.shape[0] + prod(self.shape[1:]))

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {self.dtype}

    @property
    def device(self) -> torch.device:
        return self.shares[0].up.device

    def stored_factors(self) -> tuple[Tensor | Unmade, Tensor | Unmade]:
        return self._piece("up", self._up), self._piece("down", self._down)

    def pieces(self) -> dict[str, Tensor | Unmade]:
        kept = vars(self)
        return {"up": kept.get("up", self._up), "down": kept.get("down", self._down)}

    def without_scale(self) -> Sum:
        """The update with its scale in the factors and scale 1, in float32: to be rounded once."""
        above, below = split(self.scale)
        shares = [replace(one, above=one.above * above, below=one.below * below) for one in self.shares]
        return side_by_side(shares, self.shape, torch.float32)

    def in_dtype(self, dtype: torch.dtype) -> LoraLayer:
        if dtype == self.dtype:
            return self
        # Rounding twice is not rounding once; float32 is what numbers are before they are rounded, and what is multiplied by
        # nothing was not rounded yet.
        if self.dtype == torch.float32 or self._is_whole:
            return _sum(self.shares, self.shape, dtype, (self._up_shape, self._down_shape), self.alpha)
        result = super().in_dtype(dtype)
        assert isinstance(result, LoraLayer)
        return result

    @cached_property
    def _is_whole(self) -> bool:
        """Whether it has the very numbers of its shares."""
        return all(
            share.above == share.below == 1 and {share.up.dtype, share.down.dtype} == {self.dtype}
            for share in self.shares
        )

    @property
    def _up(self) -> Unmade:
        if (only := self._only(self._shares[0].up, self._up_shape)) is not None:
            return only
        return self._unmade(self._up_shape, self._write_up, [(share.up, share.above) for share in self._shares])

    @property
    def _down(self) -> Unmade:
        if (only := self._only(self._shares[0].down, self._down_shape)) is not None:
            return only
        return self._unmade(self._down_shape, self._write_down, [(share.down, share.below) for share in self._shares])

    def _only(self, factor: Tensor | Unmade, shape: torch.Size) -> Unmade | None:
        """The factor of the first share, where that is the sum's own."""
        is_own = len(self._shares) == 1 and self._is_whole and factor.shape == shape
        return factor if is_own and isinstance(factor, Unmade) else None

    def _unmade(
        self, shape: torch.Size, write: Callable[[Tensor], None], of: Sequence[tuple[Tensor | Unmade, float]]
    ) -> Unmade:
        factors = [factor for share in self.shares for factor in (share.up, share.down)]
        of_file = all(isinstance(factor, Unmade) and factor.of_file for factor in factors)
        shares = tuple(of) if self.dtype == torch.float32 or self._is_whole else ()
        return Unmade(dtype=self.dtype, shape=shape, write=write, device=self.device, of_file=of_file, shares=shares)

    def _piece(self, name: str, unmade: Unmade) -> Tensor | Unmade:
        kept = vars(self).get(name)
        return unmade if kept is None else kept.flatten(1)

    def _kept(self, name: str, unmade: Unmade) -> Tensor:
        """The factor, kept where only time and no memory of its own was to be saved by not making it."""
        known: dict[str, Tensor] = vars(self)
        if name in known:
            return known[name]
        result = unmade.made()
        if not any(isinstance(factor, Unmade) for share in self.shares for factor in (share.up, share.down)):
            known[name] = result
        return result

    def _write_up(self, place: Tensor) -> None:
        places = torch.split(place.view(self.shape[0], -1), [share.rank for share in self.shares], dim=1)
        for share, part in zip(self.shares, places, strict=True):
            put(share.up, share.above, part)

    def _write_down(self, place: Tensor) -> None:
        places = torch.split(place.view(self.rank, -1), [share.rank for share in self.shares])
        for share, part in zip(self.shares, places, strict=True):
            put(share.down, share.below, part)


def side_by_side(shares: Sequence[Share], shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Sum:
    """scale * the sum of shares of one weight; the scale becomes alpha / rank.

    shares: one or more, of matrices.   shape: of the weight.   dtype: of the result.
    """
    rank = sum(share.rank for share in shares)
    up, down = torch.Size((shape[0], rank, *(1 for _ in shape[2:]))), torch.Size((rank, *shape[1:]))
    return _sum(shares, shape, dtype, (up, down), scale * rank)


def split(scale: float) -> tuple[float, float]:
    """(a, b) with a * b = scale, b the power of two nearest to an even split, by which nothing is rounded."""
    half = 2.0 ** round(math.log2(abs(scale)) / 2) if scale else 1.0
    return scale / half, half


def stored(up: Tensor | Unmade, down: Tensor | Unmade, alpha: float | None) -> LoraLayer:
    """LoraLayer(up, down, alpha), read when somebody asks where both are unmade.

    Raises ValueError if the shapes do not belong together.
    """
    if not (isinstance(up, Unmade) and isinstance(down, Unmade) and up.dtype == down.dtype):
        return LoraLayer(made(up), made(down), alpha)
    check_factors(tuple(up.shape), tuple(down.shape))
    check_alpha(alpha)
    shape = (up.shape[0], *down.shape[1:])
    return _sum([Share(up, down)], shape, up.dtype, (up.shape, down.shape), alpha)


def shares_of(up: Tensor | Unmade, down: Tensor | Unmade) -> list[Share]:
    """What the two factors of a LoRA are side by side of, through sums of sums; the two themselves where that is nothing."""
    ups, downs = ((factor.shares if isinstance(factor, Unmade) else ()) for factor in (up, down))
    if not ups or [one.shape[1] for one, _ in ups] != [one.shape[0] for one, _ in downs]:
        return [Share(up, down)]
    return [
        replace(inner, above=inner.above * above, below=inner.below * below)
        for (one, above), (other, below) in zip(ups, downs, strict=True)
        for inner in shares_of(one, other)
    ]


def _sum(
    shares: Sequence[Share],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    factors: tuple[torch.Size, torch.Size],
    alpha: float | None,
) -> Sum:
    result: Sum = object.__new__(Sum)
    vars(result).update(
        _shares=tuple(shares), _shape=shape, dtype=dtype, _up_shape=factors[0], _down_shape=factors[1], _alpha=alpha
    )
    return result


def put(factor: Tensor | Unmade, number: float, place: Tensor) -> None:
    """number * factor, multiplied in float32 and rounded to the place's dtype once."""
    if isinstance(factor, Unmade):
        if factor.dtype == place.dtype and place.is_contiguous():
            factor.fill(place)
            if number != 1:
                place.mul_(number)
            return
        with borrowed_bytes(factor.nbytes) as memory:
            between = memory.view(factor.dtype).view(place.shape)
            factor.fill(between)
            put(between, number, place)
    elif number == 1:
        place.copy_(factor)
    elif factor.dtype == place.dtype:
        # torch multiplies 16-bit floats by a number in float32.
        torch.mul(factor, number, out=place)
    elif place.dtype == torch.float32:
        place.copy_(factor).mul_(number)
    else:
        with borrowed_bytes(4 * factor.numel(), place.device) as memory:
            place.copy_(memory.view(torch.float32).view(factor.shape).copy_(factor).mul_(number))
