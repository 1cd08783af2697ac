"""Low-rank updates of one weight: what all kinds have in common, and the plain one, LoRA."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from .unmade import Unmade, magnitude


@dataclass(frozen=True, eq=False)
class Share:
    """A product in a sum: (above * up) @ (below * down), with rank the second dimension of up and the first of down; an
    unmade one may have more dimensions, of the kernel."""

    up: Tensor | Unmade
    down: Tensor | Unmade
    above: float = 1.0
    below: float = 1.0

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


class Layer(ABC):
    """An update of one weight that does not depend on that weight, so that updates add up.

    kind: what people call it. alpha: numerator of the scale; None means scale 1.
    prefix: what the names of its parts begin with, before the names of its fields.
    Tensors are shared with the caller and never changed.
    """

    kind: ClassVar[str]
    prefix: ClassVar[str] = ""
    alpha: float | None

    @property
    @abstractmethod
    def dim(self) -> int | None:
        """What alpha is divided by; None where alpha has no effect."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Rank of `factors`, the smallest that the kind guarantees."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the updated weight: (out, in, *kernel), the kernel flattened into `in` if the file has it so."""

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The tensors as they came, by the part names of files/keys.py, without alpha."""

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of its parts."""
        return {part.dtype for part in self.parts().values()}

    @property
    def device(self) -> torch.device:
        """Where its parts are."""
        return next(iter(self.parts().values())).device

    def in_dtype(self, dtype: torch.dtype) -> Layer:
        """The layer with its parts rounded to a dtype, whatever becomes of numbers beyond its range."""
        return self.with_parts({name: part.detach().to(dtype) for name, part in self.parts().items()})

    def with_parts(self, parts: Mapping[str, Tensor]) -> Layer:
        """The layer with other tensors for some of its `parts`."""
        return replace(self, **{name.removeprefix(self.prefix): part for name, part in parts.items()})  # type: ignore[type-var]

    def pieces(self) -> Mapping[str, Tensor | Unmade]:
        """`parts`, those that nobody has asked for unmade."""
        return self.parts()

    @abstractmethod
    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(out, rank) and (rank, in * kernel), float32 or float64, whose product is the update without the scale; exact."""

    def stored_factors(self) -> tuple[Tensor | Unmade, Tensor | Unmade]:
        """`factors` in the dtype they came in, unmade if they are, where they need no arithmetic; else in float32."""
        return self.factors()

    @property
    def scale(self) -> float:
        """Factor on the product: alpha / dim, 1 without alpha."""
        return 1.0 if self.alpha is None or self.dim is None else self.alpha / self.dim

    @property
    def written_alpha(self) -> float:
        """alpha, or the number that means the same."""
        return float(self.dim or self.rank) if self.alpha is None else self.alpha

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size of the weight, () for a linear one."""
        return self.shape[2:]

    @property
    def parameters(self) -> int:
        return sum(part.numel() for part in self.parts().values())

    def delta(self) -> Tensor:
        """What strength 1 adds to the weight: (out, in, *kernel), float32.

        Raises ValueError where float32 cannot hold it.
        """
        if is_safe(self):
            return self.delta_in(torch.float32)
        # Products of float32 numbers leave float32's range, sums of six of them do not leave float64's.
        delta = self.delta_in(torch.float64)
        if not float(delta.abs().max()) <= torch.finfo(torch.float32).max:
            raise ValueError(f"the update reaches {float(delta.abs().max()):.1e}, and float32 ends at 3.4e+38")
        return delta.float()

    def delta_in(self, dtype: torch.dtype) -> Tensor:
        """`delta` computed in that dtype, whatever becomes of numbers beyond its range."""
        up, down = self.factors(dtype)
        return (up @ down).mul_(self.scale).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class LoraLayer(Layer):
    """The update `delta = (alpha / rank) * up @ down` of one weight.

    up: (out, rank), trailing dimensions of size 1 allowed.
    down: (rank, in) for a linear weight, (rank, in, *kernel) for a convolution.
    alpha: numerator of the scale; None means scale 1, as every loader reads a file without alpha.
    mid: (rank, rank_of_down, *kernel), the core of a Tucker-decomposed convolution (LoCon's `lora_mid`,
        Yeh et al. 2023, arXiv 2309.14859); down is then (rank_of_down, in, 1, 1). None for everything else.
    Raises ValueError if the shapes do not belong together.
    """

    kind: ClassVar[str] = "LoRA"

    up: Tensor
    down: Tensor
    alpha: float | None = None
    mid: Tensor | None = None

    def __post_init__(self) -> None:
        check_factors(tuple(self.up.shape), tuple(self.down.shape), self.mid)
        check_alpha(self.alpha)

    @property
    def dim(self) -> int:
        """The rank of down, also with `mid`: what ComfyUI's LoRAAdapter divides by."""
        return int(self.down.shape[0])

    @property
    def rank(self) -> int:
        return int(self.up.shape[1])

    @property
    def shape(self) -> tuple[int, ...]:
        source = self.down if self.mid is None else self.mid
        return (int(self.up.shape[0]), int(self.down.shape[1]), *source.shape[2:])

    def parts(self) -> dict[str, Tensor]:
        return {"up": self.up, "down": self.down} | ({} if self.mid is None else {"mid": self.mid})

    @property
    def shares(self) -> tuple[Share, ...]:
        """What up and down are side by side of, `mid` aside."""
        return (Share(self.up.detach(), self.down.detach()),)

    def stored_factors(self) -> tuple[Tensor | Unmade, Tensor | Unmade]:
        if self.mid is not None:
            return self.factors()
        return self.up.detach().flatten(1), self.down.detach().flatten(1)

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(out, rank) and (rank, in * kernel), without the scale; exact, `mid` is folded into down."""
        up = self.up.detach().to(dtype).reshape(self.up.shape[0], -1)
        down = self.down.detach().to(dtype)
        if self.mid is not None:
            mid = self.mid.detach().to(dtype)
            # mid[i, j, kernel] * down[j, in] -> [i, in, kernel]
            down = torch.einsum("ij...,jn->in...", mid, down.reshape(down.shape[0], -1))
        return up, down.reshape(down.shape[0], -1)


# A layer and the strength that it enters a sum with.
Term = tuple[Layer, float]


def check_factors(up: tuple[int, ...], down: tuple[int, ...], mid: Tensor | None = None) -> None:
    """Raises ValueError if these shapes of a LoraLayer's parts do not belong together."""
    if len(up) < 2 or len(down) < 2 or prod(up) == 0 or prod(down) == 0:
        raise ValueError(f"up is {up} and down is {down}, but both need at least two dimensions, none of size 0")
    if prod(up[2:]) != 1:
        raise ValueError(f"up is {up}, but only down may have a kernel larger than 1")
    if mid is not None:
        shape = tuple(mid.shape)
        if len(shape) < 3 or prod(shape) == 0 or prod(down[2:]) != 1 or shape[:2] != (up[1], down[0]):
            raise ValueError(f"mid is {shape}, which does not fit between up {up} and down {down}")
    elif up[1] != down[0]:
        raise ValueError(f"up is {up} but down is {down}; ranks {up[1]} and {down[0]} differ")


def check_alpha(alpha: float | None) -> None:
    if alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}, but it has to be a finite number")


def is_safe(layer: Layer, strength: float = 1.0, *, part: int = 0, low: int = -110, high: int = 110) -> bool:
    """Whether strength * update and the products that lead to it are within float32's range, told from largest entries.

    part: powers of two, of either sign, that every part and the product of all keep within; 0 is what `factors` bears.
    low, high: powers of two that strength * update keeps within.
    """
    size = exponent(strength * layer.scale)
    plain = isinstance(layer, LoraLayer) and layer.mid is None
    if plain and layer.dtypes == {torch.float16} and low + 48 <= size <= high - 32:
        return True  # no need to look: float16 holds 2**-24 to 2**16
    parts = list(layer.pieces().values())
    # `factors` multiplies parts with one another where there are more than two.
    part = part or (100 if len(parts) == 2 else 36)
    sizes = [exponent(largest(tensor)) for tensor in parts]
    if max(sizes) > part or size > part:
        return False
    product = sum(sizes)
    if product == -math.inf:
        return True  # zeros, times what is no more than ordinary
    if size == -math.inf:
        return product <= part  # infinity times 0 is no number
    # The scale is shared evenly by the two factors.
    spread = -110 <= min(sizes) + size / 2 and max(sizes) + size / 2 <= 110
    return min(sizes) >= -part and abs(product) <= part and spread and low <= product + size <= high


def shaped(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> LoraLayer:
    """A layer of scale 1 from matrices (out, rank) and (rank, in * kernel), for a weight of the given shape."""
    rank, kernel = up.shape[1], shape[2:]
    return LoraLayer(
        up.reshape(shape[0], rank, *(1 for _ in kernel)), down.reshape(rank, *shape[1:]), alpha=float(rank)
    )


def exponent(number: float) -> float:
    """The power of two that the number is below, whole; -inf for 0, inf for what is no finite number."""
    if not math.isfinite(number):
        return math.inf
    return math.frexp(number)[1] if number else -math.inf


def largest(tensor: Tensor | Unmade) -> float:
    """Largest magnitude in a tensor, 0 in an empty one."""
    if isinstance(tensor, Unmade):
        return tensor.extremes.largest
    if tensor.numel() == 0:
        return 0.0
    return magnitude(tensor)


def unfolded(shape: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """(out, in * kernel) as (out, in, *kernel) where that divides without rest; any other shape as it is."""
    if len(shape) != 2 or not kernel or shape[1] % prod(kernel):
        return shape
    return (shape[0], shape[1] // prod(kernel), *kernel)


def whole_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as a product of the smallest rank it can need: with an identity on its shorter side."""
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.eye(rows, dtype=matrix.dtype, device=matrix.device), matrix
    return matrix, torch.eye(columns, dtype=matrix.dtype, device=matrix.device)


def shape_of_both(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape of the weight that two updates of the same module share, or None if there is no such weight.

    A 1x1 convolution and a linear layer are the same matrix, and some tools write a 3x3 convolution's down
    flattened to (rank, in * 9, 1, 1); row-major order is the same in all of them. The shape with the larger
    kernel wins, then the one with more dimensions, since it says more about the weight. A number without dimensions
    meets its like only.
    """
    if first[:1] != second[:1] or prod(first[1:]) != prod(second[1:]):
        return None
    return max(first, second, key=lambda shape: (prod(shape[2:]), len(shape)))
