"""Fewer entries in an update: which are kept, and how the kept ones are scaled up for those that went.

Every function takes a tensor of any shape and returns a new one of that shape, float32. density is the share that is
kept, [0, 1]: 1 keeps all and changes nothing, 0 keeps none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def by_magnitude(delta: Tensor, density: float) -> Tensor:
    """The largest entries as they are, zeros elsewhere: TIES-Merging's trim (Yadav et al. 2023, arXiv 2306.01708).

    round(density * n) entries stay; of equal magnitudes the first in row order.
    """
    flat = delta.float().flatten()
    kept = round(flat.numel() * density)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    # A stable sort: topk breaks ties differently from machine to machine.
    mask[flat.abs().argsort(descending=True, stable=True)[:kept]] = True
    return (flat * mask).reshape(delta.shape)


def without_outliers(delta: Tensor, density: float, outliers: float) -> Tensor:
    """The middle: the largest share `outliers` goes, then the smallest until the share `density` is left.

    Model Breadcrumbs (Davari & Belilovsky 2023, arXiv 2312.06795). In the authors' code gamma is the share cut off as
    too large and beta the share kept of the rest, row by row; here both are shares of the whole update, as in mergekit,
    whose gamma is `outliers`. Raises ValueError if the two add up to more than 1.
    """
    if density + outliers > 1 + 1e-9:
        raise ValueError(
            f"density {density:g} and outliers {outliers:g} add up to more than 1: what is kept and what is cut off as "
            "too large are shares of the same entries. Lower one of them."
        )
    flat = delta.float().flatten()
    cut, kept = round(flat.numel() * outliers), round(flat.numel() * density)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.abs().argsort(descending=True, stable=True)[cut : cut + kept]] = True
    return (flat * mask).reshape(delta.shape)


def at_random(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry with probability `density`, times 1 / density; zeros elsewhere. Its expectation is the input.

    DARE (Yu et al. 2023, arXiv 2311.03099), whose p is 1 - density. At density 0 all is zero.
    """
    delta = delta.float()
    if density >= 1:
        return delta.clone()
    if density <= 0:
        return torch.zeros_like(delta)
    return delta * (_uniform(delta, generator) < density) / density


def by_magnitude_at_random(delta: Tensor, density: float, spread: float, generator: torch.Generator) -> Tensor:
    """Each entry kept with a probability that grows with its magnitude's place in its row, and divided by it.

    DELLA's MAGPRUNE (Deep et al. 2024, arXiv 2406.11617): within a row of n entries ranked from the
    smallest (0) to the largest (n - 1), the probability runs evenly from density - spread / 2 to density + spread / 2.
    spread: their epsilon (twice mergekit's), [0, 1]; 0 is DARE. Probabilities are held within [0, 1], those at 0 keep nothing.
    Tensors of more than two dimensions count as (first, rest). Its expectation is the input where no probability is 0.
    """
    rows = delta.float().reshape(delta.shape[0], -1)
    if density >= 1:
        return rows.reshape(delta.shape).clone()
    if density <= 0:
        return torch.zeros_like(rows).reshape(delta.shape)
    places = rows.abs().argsort(stable=True).argsort(stable=True).float()
    share = places / max(rows.shape[1] - 1, 1) - 0.5
    chance = (density + spread * share).clamp(0.0, 1.0)
    kept = _uniform(rows, generator) < chance
    return torch.where(kept, rows / chance.clamp(min=torch.finfo(torch.float32).tiny), 0.0).reshape(delta.shape)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU: the same entries stay on every device.
    return torch.rand(like.shape, generator=generator, device="cpu").to(like.device)
