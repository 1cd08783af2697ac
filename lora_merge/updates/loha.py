"""LoHa: the elementwise product of two low-rank matrices (Yeh et al. 2023, arXiv 2309.14859, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from .layer import Layer, check_alpha, unfolded, whole_factors


@dataclass(frozen=True, eq=False)
class LohaLayer(Layer):
    """The update `delta = (alpha / r1) * (w1_a @ w1_b) * (w2_a @ w2_b)`, the second product elementwise.

    w1_a, w2_a: (out, r1), (out, r2).   w1_b, w2_b: (r1, in * kernel), (r2, in * kernel).
    t1, t2: both or none; (r1, r1, k, k) and (r2, r2, k, k), Tucker cores. The others are then w1_a (r1, out),
        w1_b (r1, in), and each product is sum_ij t[i, j, k, l] * a[i, out] * b[j, in].
    unfold: kernel of the weight, where the file has it flattened into `in`.
    As low-rank factors: row o of up is the outer product of row o of w1_a and of w2_a, column n of down that of
    column n of w1_b and of w2_b, so that the rank is r1 * r2; exact. Where that is more than the weight has rows
    or columns, the matrix itself is one factor and the identity the other.
    Raises ValueError if the shapes do not belong together.
    """

    kind: ClassVar[str] = "LoHa"
    prefix: ClassVar[str] = "hada_"

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float | None = None
    t1: Tensor | None = None
    t2: Tensor | None = None
    unfold: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, part in self.parts().items():
            wanted = 4 if name in ("hada_t1", "hada_t2") else 2
            if part.dim() != wanted or part.numel() == 0:
                raise ValueError(f"{name} is {tuple(part.shape)}, but it needs {wanted} dimensions, none of size 0")
        if (self.t1 is None) != (self.t2 is None):
            raise ValueError("hada_t1 and hada_t2 belong together, but only one of them is there")
        for a, b, t, number in ((self.w1_a, self.w1_b, self.t1, 1), (self.w2_a, self.w2_b, self.t2, 2)):
            inner = (a.shape[1], b.shape[0]) if t is None else (a.shape[0], b.shape[0])
            if inner[0] != inner[1] if t is None else tuple(t.shape[:2]) != inner:
                core = "" if t is None else f", hada_t{number} {tuple(t.shape)}"
                raise ValueError(
                    f"hada_w{number}_a is {tuple(a.shape)}, hada_w{number}_b {tuple(b.shape)}{core}; their ranks differ"
                )
        first, second = _shape(self.w1_a, self.w1_b, self.t1), _shape(self.w2_a, self.w2_b, self.t2)
        if first != second:
            raise ValueError(f"the two products are {first} and {second}, but they have to be of one shape")
        check_alpha(self.alpha)

    @property
    def dim(self) -> int:
        return int(self.w1_b.shape[0])

    @property
    def rank(self) -> int:
        rows, *columns = _shape(self.w1_a, self.w1_b, self.t1)
        first, second = (self.w1_b, self.w2_b) if self.t1 is None else (self.w1_a, self.w2_a)
        return min(int(first.shape[0] * second.shape[0]), rows, prod(columns))

    @property
    def shape(self) -> tuple[int, ...]:
        return unfolded(_shape(self.w1_a, self.w1_b, self.t1), self.unfold)

    def parts(self) -> dict[str, Tensor]:
        found = {
            "hada_w1_a": self.w1_a,
            "hada_w1_b": self.w1_b,
            "hada_w2_a": self.w2_a,
            "hada_w2_b": self.w2_b,
            "hada_t1": self.t1,
            "hada_t2": self.t2,
        }
        return {name: part for name, part in found.items() if part is not None}

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        (a1, b1), (a2, b2) = self._products(dtype)
        if a1.shape[1] * a2.shape[1] > self.rank:
            return whole_factors((a1 @ b1) * (a2 @ b2))
        # The row-wise Khatri-Rao product of the a's and the column-wise one of the b's.
        up = torch.einsum("op,oq->opq", a1, a2).reshape(a1.shape[0], -1)
        down = torch.einsum("pn,qn->pqn", b1, b2).reshape(-1, b1.shape[1])
        return up, down

    def delta_in(self, dtype: torch.dtype) -> Tensor:
        (a1, b1), (a2, b2) = self._products(dtype)
        return ((a1 @ b1) * (a2 @ b2)).mul_(self.scale).reshape(self.shape)

    def _products(self, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return _matrices(self.w1_a, self.w1_b, self.t1, dtype), _matrices(self.w2_a, self.w2_b, self.t2, dtype)


def _shape(a: Tensor, b: Tensor, t: Tensor | None) -> tuple[int, ...]:
    """(out, in * kernel) of one product, (out, in, *kernel) with a Tucker core."""
    if t is None:
        return int(a.shape[0]), int(b.shape[1])
    return int(a.shape[1]), int(b.shape[1]), *t.shape[2:]


def _matrices(a: Tensor, b: Tensor, t: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, r) and (r, in * kernel); a Tucker core is folded into the second."""
    a, b = a.detach().to(dtype), b.detach().to(dtype)
    if t is None:
        return a, b
    return a.T, torch.einsum("ijkl,jn->inkl", t.detach().to(dtype), b).reshape(a.shape[0], -1)
