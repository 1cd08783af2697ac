"""How far two heaps of pictures are apart: the Frechet distance of their features, and how sure the number is."""

import math
from collections.abc import Sequence

import torch


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of Gaussians fitted to features (n, d) and (m, d): |mu|^2 + tr(A + B - 2 (A B)^1/2).

    In the unit of the features, squared. Dowson and Landau 1982; on features of a classifier, Heusel et al. 2017 (arXiv
    1706.08500). Biased upwards for few rows, the more the fewer: compare numbers of equal n and m only, and read them
    against the distance of two heaps of the same kind. Raises ValueError for less than 2 rows or unequal d.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features are {tuple(a.shape)} and {tuple(b.shape)}; both must be (2 or more, d) with the same d."
        )
    mean = (a.double().mean(0) - b.double().mean(0)).square().sum()
    d = a.shape[1]
    cov_a, cov_b = (torch.cov(heap.double().T).reshape(d, d) for heap in (a, b))  # (), not (1, 1), for one feature
    eigenvalues, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def without_each_seed(features: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Frechet distances of features (seeds, n, d) to reference (m, d), each time with one seed left out."""
    seeds = len(features)
    return [frechet(features[[s for s in range(seeds) if s != k]].flatten(0, 1), reference) for k in range(seeds)]


def jackknife_error(left_out: Sequence[float]) -> float:
    """Standard error of a statistic from its values with one of n seeds left out; nan for less than two.

    sqrt((n - 1) / n * sum (value - mean)^2) (Tukey 1958). For a plain mean it is the usual standard error. What the
    fewer pictures add to each value cancels.
    """
    n = len(left_out)
    if n < 2:
        return math.nan
    mean = sum(left_out) / n
    return math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in left_out))
