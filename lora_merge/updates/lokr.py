"""LoKr: the Kronecker product of two small matrices, each whole or low-rank (Yeh et al. 2023, arXiv 2309.14859)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from .layer import Layer, check_alpha, unfolded, whole_factors


@dataclass(frozen=True, eq=False)
class LokrLayer(Layer):
    """The update `delta = scale * kron(w1, w2)` of a weight (out1 * out2, in1 * in2, *kernel).

    w1: (out1, in1), or w1_a (out1, r1) @ w1_b (r1, in1).
    w2: (out2, in2), (out2, in2 * kernel) or (out2, in2, k, k); or w2_a (out2, r2) @ w2_b (r2, in2 * kernel); or with
        the Tucker core t2 (r2, r2, k, k): w2_a (r2, out2), w2_b (r2, in2), sum_ij t2[i, j, k, l] w2_a[i, o] w2_b[j, n].
    alpha: divided by r2, else by r1; without effect where both matrices are whole, as ComfyUI and LyCORIS read it.
    unfold: kernel of the weight, where the file has it flattened into `in`.
    As low-rank factors: kron(u1 d1, u2 d2) = kron(u1, u2) kron(d1, d2), so the rank is the product of the two ranks,
    where a whole matrix counts with its shorter side; exact.
    Raises ValueError if the shapes do not belong together.
    """

    kind: ClassVar[str] = "LoKr"
    prefix: ClassVar[str] = "lokr_"

    w1: Tensor | None = None
    w2: Tensor | None = None
    alpha: float | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    unfold: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for number, whole, a, b in ((1, self.w1, self.w1_a, self.w1_b), (2, self.w2, self.w2_a, self.w2_b)):
            if (whole is None) == (a is None) or (a is None) != (b is None):
                raise ValueError(f"needs either lokr_w{number} or both lokr_w{number}_a and lokr_w{number}_b")
        if self.t2 is not None and self.w2_a is None:
            raise ValueError("lokr_t2 belongs between lokr_w2_a and lokr_w2_b, which are not there")
        for name, part in self.parts().items():
            allowed = {"lokr_w2": (2, 4), "lokr_t2": (4,)}.get(name, (2,))
            if part.dim() not in allowed or part.numel() == 0:
                wanted = " or ".join(map(str, allowed))
                raise ValueError(f"{name} is {tuple(part.shape)}, but it needs {wanted} dimensions, none of size 0")
        for number, a, b, t in ((1, self.w1_a, self.w1_b, None), (2, self.w2_a, self.w2_b, self.t2)):
            if a is None:
                continue
            assert b is not None  # as was asked above
            if a.shape[1] != b.shape[0] if t is None else tuple(t.shape[:2]) != (a.shape[0], b.shape[0]):
                core = "" if t is None else f", lokr_t{number} {tuple(t.shape)}"
                raise ValueError(
                    f"lokr_w{number}_a is {tuple(a.shape)}, lokr_w{number}_b {tuple(b.shape)}{core}; their ranks differ"
                )
        check_alpha(self.alpha)

    @property
    def dim(self) -> int | None:
        for b in (self.w2_b, self.w1_b):  # in this order: the second one decides in ComfyUI
            if b is not None:
                return int(b.shape[0])
        return None

    @property
    def rank(self) -> int:
        (out1, in1), (out2, in2, *kernel) = self._shapes()
        rank1, rank2 = min(out1, in1), min(out2, in2 * prod(kernel))
        if self.w1_b is not None:
            rank1 = min(rank1, int(self.w1_b.shape[0]))
        if self.w2_b is not None:
            rank2 = min(rank2, int((self.w2_b if self.t2 is None else self.t2).shape[0]))
        return rank1 * rank2

    @property
    def shape(self) -> tuple[int, ...]:
        (out1, in1), (out2, in2, *kernel) = self._shapes()
        return unfolded((out1 * out2, in1 * in2, *kernel), self.unfold)

    def parts(self) -> dict[str, Tensor]:
        found = {
            "lokr_w1": self.w1,
            "lokr_w1_a": self.w1_a,
            "lokr_w1_b": self.w1_b,
            "lokr_w2": self.w2,
            "lokr_w2_a": self.w2_a,
            "lokr_w2_b": self.w2_b,
            "lokr_t2": self.t2,
        }
        return {name: part for name, part in found.items() if part is not None}

    def without_core(self) -> LokrLayer:
        """The layer with the second matrix whole and the scale in it, float32; itself if it has no Tucker core."""
        if self.t2 is None or self.w2_a is None or self.w2_b is None:
            return self
        core, a, b = (part.detach().to(torch.float32) for part in (self.t2, self.w2_a, self.w2_b))
        w2 = torch.einsum("ijkl,io,jn->onkl", core, a, b).mul_(self.scale).contiguous()
        # A core has the kernel: nothing is flattened.
        return LokrLayer(w1=self.w1, w2=w2, w1_a=self.w1_a, w1_b=self.w1_b)

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        (up1, down1), (up2, down2) = (_factors(pieces, dtype) for pieces in self._pieces())
        return _kron(up1, up2), _kron(down1, down2)

    def delta_in(self, dtype: torch.dtype) -> Tensor:
        (up1, down1), (up2, down2) = (_factors(pieces, dtype) for pieces in self._pieces())
        return _kron(up1 @ down1, up2 @ down2).mul_(self.scale).reshape(self.shape)

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of w1 and w2, without forming them."""
        first, second = map(_shape, self._pieces())
        return first, second

    def _pieces(self) -> tuple[list[Tensor], list[Tensor]]:
        """For each of the two matrices [whole], [a, b] or [a, b, core]."""
        first, second = (self.w1, self.w1_a, self.w1_b), (self.w2, self.w2_a, self.w2_b, self.t2)
        return [part for part in first if part is not None], [part for part in second if part is not None]


def _shape(pieces: list[Tensor]) -> tuple[int, ...]:
    if len(pieces) == 1:
        return tuple(pieces[0].shape)
    a, b, *core = pieces
    if core:
        return int(a.shape[1]), int(b.shape[1]), *core[0].shape[2:]
    return int(a.shape[0]), int(b.shape[1])


def _kron(a: Tensor, b: Tensor) -> Tensor:
    # torch 2.11 stops at a transposed tensor.
    return torch.kron(a.contiguous(), b.contiguous())


def _factors(pieces: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, r) and (r, in * kernel) of one of the two matrices, r the smallest that is sure."""
    a, *rest = (piece.detach().to(dtype) for piece in pieces)
    if not rest:
        return whole_factors(a.flatten(1))
    b = rest[0]
    if rest[1:]:
        a, b = a.T, torch.einsum("ijkl,jn->inkl", rest[1], b).flatten(1)
    if a.shape[1] <= min(a.shape[0], b.shape[1]):
        return a, b
    return whole_factors(a @ b)
