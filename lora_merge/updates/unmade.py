"""Tensors that are not there yet: a factor in a file, read when it is needed, and a sum that nobody has asked for.

Memory that is used again costs nothing; new memory costs more than reading into it, in page faults, and as much of it as
the files have. So such a tensor is filled into memory that somebody has already, piece by piece.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

# Rows or columns of a component that are looked at first.
_FEW = 64
# Bytes that a thread keeps for its next piece.
_KEPT = 1 << 24
_of_this_thread = threading.local()
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Extremes:
    """What one look at all values tells.

    low, high: the smallest and the largest value, NaN where one is.
    component: the shorter dimension of the matrix, that of the rank as a rule.   least: of the largest magnitudes that some
        entries of each of its components have, the smallest; a lower bound of what all entries have.
    """

    low: float
    high: float
    component: int
    least: float

    @property
    def largest(self) -> float:
        """Magnitude."""
        return max(-self.low, self.high)


@dataclass(frozen=True, eq=False)
class Unmade:
    """A tensor that is not there yet. fill: writes it into contiguous memory of that dtype and as many values.

    of_file: whether all that it is made of lies in files, so that it is the same whenever it is made, or refused.
    shares: factors, each times its number, that it is side by side of along the rank; () where it is nothing of the kind, or
        rounded.
    """

    dtype: torch.dtype
    shape: torch.Size
    fill: Callable[[Tensor], None]
    device: torch.device
    of_file: bool = False
    shares: tuple[tuple[Tensor | Unmade, float], ...] = ()
    is_meta = False

    @property
    def nbytes(self) -> int:
        return self.numel() * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def detach(self) -> Unmade:
        return self

    def made(self) -> Tensor:
        memory = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self.fill(memory)
        return memory

    def shared(self) -> Tensor:
        """`made`, and the same tensor for all who ask while somebody has it."""
        there = self._given
        if there is None:
            there = self.made()
            vars(self)["_ref"] = TensorWeakRef(there)
        return there

    def gave(self, tensor: object) -> bool:
        """Whether this is the tensor that `shared` gives."""
        return tensor is not None and tensor is self._given

    @property
    def _given(self) -> Tensor | None:
        ref = vars(self).get("_ref")
        return None if ref is None else ref()

    @contextmanager
    def borrowed(self) -> Iterator[Tensor]:
        """The tensor in memory that serves the next one afterwards."""
        with borrowed_bytes(self.nbytes) as memory:
            place = memory.view(self.dtype).view(self.shape)
            self.fill(place)
            yield place

    @cached_property
    def extremes(self) -> Extremes:
        with self.borrowed() as made:
            return extremes(made)


def extremes(tensor: Tensor, component: int | None = None) -> Extremes:
    """tensor: of two dimensions or more, of floats.   component: 0 or 1, the shorter one if None."""
    # 8-bit floats have no aminmax.
    tensor = tensor.half() if tensor.dtype.itemsize == 1 else tensor
    low, high = torch.aminmax(tensor)
    component = int(tensor.shape[0] > prod(tensor.shape[1:])) if component is None else component
    matrix = tensor.flatten(1)
    along = 1 - component
    few = matrix.narrow(along, 0, min(_FEW, matrix.shape[along])).float().abs().amax(dim=along)
    return Extremes(float(low), float(high), component, float(few.min()))


def made(tensor: Tensor | Unmade) -> Tensor:
    return tensor.made() if isinstance(tensor, Unmade) else tensor


@contextmanager
def borrowed_bytes(size: int, device: torch.device = CPU) -> Iterator[Tensor]:
    """That many bytes, nobody else's until the end, with anything in them."""
    if device.type != "cpu":
        # There torch itself keeps memory for the next one.
        yield torch.empty(size, dtype=torch.uint8, device=device)
        return
    spare: list[Tensor] = vars(_of_this_thread).setdefault("spare", [])
    memory = spare.pop() if spare else None
    if memory is None or memory.numel() < size:
        memory = torch.empty(size, dtype=torch.uint8)
    try:
        yield memory[:size]
    finally:
        if memory.numel() <= _KEPT:
            spare.append(memory)
