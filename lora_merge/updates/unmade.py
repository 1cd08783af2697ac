"""Tensors that are not there yet: a factor in a file, read when it is needed, and a sum that nobody has asked for.

Memory that is used again costs nothing; new memory costs more than reading into it, in page faults, and as much of it as
the files have. So such a tensor is filled into memory that somebody has already, piece by piece.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

# Rows or columns of a component that are looked at first.
_FEW = 64
# Bytes that a thread keeps for its next piece.
_KEPT = 1 << 24
_of_this_thread = threading.local()
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class _Bits:
    """How to compare floats as whole numbers: without the sign the bits are in the order of the magnitudes, with NaN behind infinity.

    whole: torch's numbers of as many bits.   unsigned: numpy's.
    wide, shift, of: what the bits become before they are read as one of numpy's floats, which lack bfloat16.
    """

    whole: torch.dtype
    unsigned: Any
    wide: Any
    shift: int
    of: Any

    @cached_property
    def rest(self) -> int:
        """All bits but the sign."""
        return int(np.iinfo(self.unsigned).max) >> 1

    def magnitude(self, bits: int) -> float:
        return float(self.wide(bits << self.shift).view(self.of))

    def largest(self, whole: np.ndarray) -> float:
        """The largest magnitude: of those without a sign or of those with one. Two looks, at twice the speed of aminmax."""
        return self.magnitude(max(int(whole.max()), int(whole.view(self.unsigned).max()) & self.rest))


_BITS = {
    torch.bfloat16: _Bits(whole=torch.int16, unsigned=np.uint16, wide=np.uint32, shift=16, of=np.float32),
    torch.float16: _Bits(whole=torch.int16, unsigned=np.uint16, wide=np.uint16, shift=0, of=np.float16),
    torch.float32: _Bits(whole=torch.int32, unsigned=np.uint32, wide=np.uint32, shift=0, of=np.float32),
}


@dataclass(frozen=True)
class Extremes:
    """What one look at all values tells.

    largest: the largest magnitude, NaN or infinity where a value is.
    component: the shorter dimension of the matrix, that of the rank as a rule.   least: of the largest magnitudes that some
        entries of each of its components have, the smallest; a lower bound of what all entries have.
    """

    largest: float
    component: int
    least: float


@dataclass(frozen=True, eq=False)
class Unmade:
    """A tensor that is not there yet, all values of which are finite: what is not is refused when it is read.

    write: puts it into contiguous memory of that dtype and as many values; call `fill`.
    of_file: whether all that it is made of lies in files, so that it is the same whenever it is made, or refused.
    shares: factors, each times its number, that it is side by side of along the rank; () where it is nothing of the kind, or
        rounded.
    called: (file, key) of what is read from a file, where nobody has looked yet: that is done in the first reading.
    """

    dtype: torch.dtype
    shape: torch.Size
    write: Callable[[Tensor], None]
    device: torch.device
    of_file: bool = False
    shares: tuple[tuple[Tensor | Unmade, float], ...] = ()
    called: tuple[str, str] | None = None
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
        with borrowed_bytes(self.nbytes, self.device) as memory:
            place = memory.view(self.dtype).view(self.shape)
            self.fill(place)
            yield place

    def fill(self, place: Tensor) -> None:
        """Writes it into contiguous memory of that dtype and as many values. Raises ValueError for a value that is not finite."""
        self.write(place)
        if self.called and not vars(self).get("_looked_at"):
            self._refuse(magnitude(place))

    @property
    def extremes(self) -> Extremes:
        known: Extremes | None = vars(self).get("_extremes")
        if known is None:
            with borrowed_bytes(self.nbytes, self.device) as memory:
                place = memory.view(self.dtype).view(self.shape)
                self.write(place)
                known = extremes(place)
            self._refuse(known.largest)
            vars(self)["_extremes"] = known
        return known

    def _refuse(self, largest: float) -> None:
        if self.called and not math.isfinite(largest):
            raise ValueError(not_finite(*self.called))
        vars(self)["_looked_at"] = True


def not_finite(source: str, keys: str) -> str:
    """What to say of a file with such values under these keys."""
    return (
        f"{source}: NaN or infinite values in {keys}; the training diverged or the file was saved in too small a dtype, so use "
        "another copy."
    )


def extremes(tensor: Tensor, component: int | None = None) -> Extremes:
    """tensor: of two dimensions or more, of floats.   component: 0 or 1, the shorter one if None."""
    tensor = _comparable(tensor.detach())
    component = int(tensor.shape[0] > prod(tensor.shape[1:])) if component is None else component
    along = 1 - component
    if (bits := _bits(tensor)) is None:
        matrix = tensor.flatten(1)
        some = matrix.narrow(along, 0, min(_FEW, matrix.shape[along])).float().abs().amax(dim=along)
        return Extremes(magnitude(tensor), component, float(some.min()))
    whole = tensor.view(bits.whole).numpy()
    rows = whole.reshape(len(whole), -1)
    few = (rows[:_FEW] if component else rows[:, :_FEW]) & bits.rest
    return Extremes(bits.largest(whole), component, bits.magnitude(int(few.max(axis=along).min())))


def magnitude(tensor: Tensor) -> float:
    """The largest magnitude of values, one or more; NaN or infinity where one is."""
    tensor = _comparable(tensor.detach())
    if (bits := _bits(tensor)) is not None:
        return bits.largest(tensor.view(bits.whole).numpy())
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high))


def _comparable(tensor: Tensor) -> Tensor:
    """8-bit floats have no order; float16 holds all their values."""
    return tensor.half() if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor


def _bits(tensor: Tensor) -> _Bits | None:
    return _BITS.get(tensor.dtype) if tensor.is_cpu else None


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
