"""Updates that disagree: which sign wins at each place, and what the winners come to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def elected_sign(deltas: Sequence[Tensor]) -> Tensor:
    """Sign of the sum at each place: the side with the larger total magnitude (TIES, arXiv 2306.01708). 0 if even."""
    return torch.sign(torch.stack(list(deltas)).sum(dim=0))


def disjoint(deltas: Sequence[Tensor], *, mean: bool) -> Tensor:
    """At each place the mean, or the sum, of the entries with the elected sign; zero where there are none.

    TIES-Merging's disjoint merge (Yadav et al. 2023, arXiv 2306.01708) is the mean. The sum is for entries that have been
    rescaled before (DARE-TIES). DELLA's authors take the mean there too; ours is the sum: strengths are not averaged.
    """
    stack = torch.stack(list(deltas))
    agreeing = (torch.sign(stack) == elected_sign(deltas)) & (stack != 0)
    total = (stack * agreeing).sum(dim=0)
    return total / agreeing.sum(dim=0).clamp(min=1) if mean else total


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """The point at the share t of the way from first to second on the arc between them (Shoemake 1985).

    sin((1 - t) w) / sin(w) * first + sin(t w) / sin(w) * second, w the angle between the two as vectors. Where the arc is
    not defined (parallel, opposite, or a zero) it is the straight line. t: 0 gives first, 1 second, both exactly.
    """
    a, b = first.double(), second.double()
    norms = a.norm() * b.norm()
    cosine = float((a * b).sum() / norms) if norms > 0 else 1.0
    angle = torch.arccos(torch.tensor(min(1.0, max(-1.0, cosine)), dtype=torch.float64))
    sine = float(torch.sin(angle))
    if sine < 1e-6:
        return ((1 - t) * a + t * b).float()
    weights = [float(torch.sin((1 - t) * angle)) / sine, float(torch.sin(t * angle)) / sine]
    return (weights[0] * a + weights[1] * b).float()


def orthogonalised(deltas: Sequence[Tensor]) -> Tensor:
    """Sum of the deltas (m, n) after their singular vectors have been made orthogonal to one another: TSV-Merge.

    Gargiulo et al. 2024 (arXiv 2412.00081): the singular vectors of all deltas side by side, the left ones and the right
    ones each replaced by the nearest orthonormal set (Procrustes: the polar factor); the singular values stay. Updates
    that are orthogonal already come back as their sum.
    The paper first cuts each of T full-rank deltas to min(m, n) / T triples, so that there is room for all. LoRAs of
    small rank have that room; they are cut so only where their ranks add up to more than min(m, n).
    """
    parts = [torch.linalg.svd(delta.float(), full_matrices=False) for delta in deltas]
    # Triples of singular value 0 have vectors of no meaning, which would push the others about.
    ranks = [int((s > 1e-6 * s[0]).sum()) for _, s, _ in parts]
    room = min(deltas[0].shape)
    if sum(ranks) > room:
        ranks = [min(rank, max(1, room // len(deltas))) for rank in ranks]
    kept = list(zip(parts, ranks, strict=True))
    left = _nearest_orthonormal(torch.cat([u[:, :rank] for (u, _, _), rank in kept], dim=1))
    right = _nearest_orthonormal(torch.cat([vh[:rank] for (_, _, vh), rank in kept], dim=0).T)
    values = torch.cat([s[:rank] for (_, s, _), rank in kept])
    merged: Tensor = (left * values) @ right.T
    return merged


def _nearest_orthonormal(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = u @ vh
    return nearest
