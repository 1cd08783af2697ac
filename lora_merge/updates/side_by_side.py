"""LoRA updates side by side: their sum, whose factors are made when somebody asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from .layer import LoraLayer, Share, Unmade


class Sum(LoraLayer):
    """up = [a_1 up_1, a_2 up_2, ...] and down = [b_1 down_1; b_2 down_2; ...] of its shares, alpha = rank.

    Numbers are multiplied in float32 and rounded to the dtype once, each on its way to its place. Made by `side_by_side`;
    as a layer it is a LoraLayer, whose `up` and `down` are made once, when they are first read. The shares' tensors have to
    stay as they are until then.
    """

    dtype: torch.dtype
    _shares: tuple[Share, ...]
    _shape: tuple[int, ...]

    def __new__(cls, *parts: Any, **named: Any) -> LoraLayer:  # type: ignore[misc]
        # dataclasses.replace: with another part it is the sum of these shares no more.
        return LoraLayer(*parts, **named)

    def __reduce__(self) -> tuple[Any, ...]:
        return LoraLayer, (self.up, self.down, self.alpha)

    @property
    def shares(self) -> tuple[Share, ...]:
        return self._shares

    @property
    def alpha(self) -> float:  # type: ignore[override]
        return float(self.rank)

    @cached_property
    def up(self) -> Tensor:
        return self._up.made()

    @cached_property
    def down(self) -> Tensor:
        return self._down.made()

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

    def pieces(self) -> dict[str, Tensor | Unmade]:
        return {"up": vars(self).get("up", self._up), "down": vars(self).get("down", self._down)}

    def in_dtype(self, dtype: torch.dtype) -> LoraLayer:
        if dtype == self.dtype:
            return self
        # Rounding twice is not rounding once, but float32 is what the numbers are before they are rounded.
        if self.dtype == torch.float32:
            return side_by_side(self.shares, self.shape, dtype)
        result = super().in_dtype(dtype)
        assert isinstance(result, LoraLayer)
        return result

    @property
    def _up(self) -> Unmade:
        shape = torch.Size((self.shape[0], self.rank, *(1 for _ in self.kernel)))
        return Unmade(self.dtype, shape, self._fill_up, self.device)

    @property
    def _down(self) -> Unmade:
        return Unmade(self.dtype, torch.Size((self.rank, *self.shape[1:])), self._fill_down, self.device)

    def _fill_up(self, place: Tensor) -> None:
        places = torch.split(place.view(self.shape[0], -1), [share.rank for share in self.shares], dim=1)
        for share, part in zip(self.shares, places, strict=True):
            put(share.up, share.above, part)

    def _fill_down(self, place: Tensor) -> None:
        places = torch.split(place.view(self.rank, -1), [share.rank for share in self.shares])
        for share, part in zip(self.shares, places, strict=True):
            put(share.down, share.below, part)


def side_by_side(shares: Sequence[Share], shape: tuple[int, ...], dtype: torch.dtype) -> Sum:
    """The sum of shares of one weight. shares: one or more, of matrices.   shape: of the weight.   dtype: of the result."""
    result: Sum = object.__new__(Sum)
    vars(result).update(_shares=tuple(shares), _shape=shape, dtype=dtype)
    return result


def put(factor: Tensor, number: float, place: Tensor) -> None:
    """number * factor, multiplied in float32 and rounded to the place's dtype once."""
    if factor.dtype == place.dtype:
        # torch multiplies 16-bit floats by a number in float32.
        torch.mul(factor, number, out=place)
    elif place.dtype == torch.float32:
        place.copy_(factor).mul_(number)
    else:
        place.copy_(factor.to(torch.float32) * number)
