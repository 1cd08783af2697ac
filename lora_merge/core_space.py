"""Several updates of one weight in the small space that their factors span together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arithmetic import Term, common_shape, shaped, stacked
from .layer import LoraLayer


@dataclass(frozen=True, eq=False)
class CoreSpace:
    """Coordinates of updates: strength * delta_i = left @ cores[i] @ right, exactly up to float32.

    left: (out, p) orthonormal columns. right: (q, in * kernel) orthonormal rows. cores: (p, q) each; p and q are at most
    the sum of ranks. shape: of the weight.
    """

    left: Tensor
    right: Tensor
    cores: tuple[Tensor, ...]
    shape: tuple[int, ...]

    def layer(self, core: Tensor, rank: int = 0) -> LoraLayer:
        """The layer with delta = left @ core @ right; with rank > 0 the best approximation of at most that rank."""
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        # What float32 made of exact zeros takes no rank.
        used = max(1, int((s > s[0] * 1e-6).sum())) if len(s) else 1
        kept = min(used, rank) if rank else used
        root = s[:kept].sqrt()
        return shaped(self.left @ (u[:, :kept] * root), (root[:, None] * vh[:kept]) @ self.right, self.shape)


def core_space(terms: Sequence[Term]) -> CoreSpace:
    """The common space of the (layer, strength) terms of one weight, strengths multiplied in. Float32.

    Core Space (Panariello et al. 2025, arXiv 2509.17786): the coordinates lose nothing, and a merge method works on
    (sum of ranks)^2 numbers instead of out * in. Norms, angles and singular values are those of the full updates, so
    that methods made of these (SLERP, TSV-M) come out the same. Methods that look at single entries (TIES, DARE, DELLA)
    see other entries than in the full matrix and give another, equally justified, result.
    The axes are the singular vectors of all updates side by side, largest first. Hence they depend neither on the order
    of the terms nor on how an update is split into its factors, as the QR factors that they are computed from would.
    """
    shape = common_shape([layer for layer, _ in terms])
    ups, downs = stacked(terms)
    ranks = [up.shape[1] for up in ups]
    q_up, r_up = torch.linalg.qr(torch.cat(ups, dim=1))
    q_down, r_down = torch.linalg.qr(torch.cat(downs, dim=0).T)
    cores = [a @ b.T for a, b in zip(r_up.split(ranks, dim=1), r_down.split(ranks, dim=1), strict=True)]
    u = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False)[0]
    v = torch.linalg.svd(torch.cat([core.T for core in cores], dim=1), full_matrices=False)[0]
    return CoreSpace(q_up @ u, (q_down @ v).T, tuple(u.T @ core @ v for core in cores), shape)
