"""Several updates of one weight in the small space that their factors span together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..updates.layer import LoraLayer, Term, shaped
from .sums import stacked


@dataclass(frozen=True, eq=False)
class CoreSpace:
    """Coordinates of updates: strength * delta_i = left @ cores[i] @ right, exactly up to float32.

    left: (out, p) orthonormal columns. right: (q, in * kernel) orthonormal rows. cores: (p, q) each; p and q are the
    ranks of all updates side by side, at most the sum of ranks. shape: of the weight.
    """

    left: Tensor
    right: Tensor
    cores: tuple[Tensor, ...]
    shape: tuple[int, ...]

    def layer(self, core: Tensor, rank: int = 0) -> LoraLayer:
        """The layer with delta = left @ core @ right; with rank > 0 the best approximation of at most that rank."""
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        # What float32 made of exact zeros takes no rank.
        used = max(1, int((s > s[0] * 1e-6).sum()))
        kept = min(used, rank) if rank else used
        root = s[:kept].sqrt()
        return shaped(self.left @ (u[:, :kept] * root), (root[:, None] * vh[:kept]) @ self.right, self.shape)


def core_space(terms: Sequence[Term]) -> CoreSpace:
    """The common space of the (layer, strength) terms of one weight, strengths multiplied in. Float32.

    Core Space (Panariello et al. 2025, arXiv 2509.17786): the coordinates lose nothing, and a merge method works on
    (sum of ranks)^2 numbers instead of out * in. Norms, angles and singular values are those of the full updates, so
    that methods made of these (SLERP, TSV-M) come out the same in any axes.
    Methods that look at single entries (TIES, DARE, DELLA, ...) do not, and the axes are part of the method. The authors
    take the singular vectors of the stacked factors. Along such axes an update is a few large entries, which single
    draws delete or double, which are outliers all, and which no density takes. Our axes prefer no direction: an entry
    is a mean over many, as one of the whole weight is, so that the papers' densities keep their meaning. What is
    pruned, kept and elected then is, in share of energy, what it is on whole weights.
    The axes depend on the two spans alone: not on the order of the terms, on how an update is split into its factors,
    or on the seed.
    """
    total = stacked(terms)
    q_up, r_up = torch.linalg.qr(total.up)
    q_down, r_down = torch.linalg.qr(total.down.T)
    ranks = total.ranks
    cores = [a @ b.T for a, b in zip(r_up.split(ranks, dim=1), r_down.split(ranks, dim=1), strict=True)]
    generator = torch.Generator().manual_seed(0)
    left = _impartial(q_up, cores, generator)
    right = _impartial(q_down, [core.T for core in cores], generator)
    return CoreSpace(q_up @ left, (q_down @ right).T, tuple(left.T @ core @ right for core in cores), total.shape)


def _impartial(q: Tensor, cores: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """(p, k) orthonormal columns; q @ them is a basis of the span of all q @ core that prefers none of its directions.

    q: (n, p) orthonormal columns. Fixed Gaussian vectors are projected on the span and made orthonormal by the polar
    factor, which does not depend on the basis that the span came in. Over such vectors it is uniformly distributed.
    """
    u, s, _ = torch.linalg.svd(torch.cat(list(cores), dim=1), full_matrices=False)
    # Directions that no update has are left over from the QR and arbitrary.
    span = u[:, : max(1, int((s > 1e-6 * s[0]).sum()))]
    # Drawn on the CPU: the same axes on every device.
    draws = torch.randn(q.shape[0], span.shape[1], generator=generator).to(q.device)
    a, _, b = torch.linalg.svd(span.T @ (q.T @ draws))
    axes: Tensor = span @ (a @ b)
    return axes
