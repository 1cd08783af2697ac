"""Time on the way from the picture to noise, and the noise level that a model's own table has at it.

A table of n ascending levels holds those of the times 1/n, 2/n, ..., 1. Flow models are trained on every time and are
told the level itself, so that times between the entries are as good as entries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def even(steps: int, lowest: float | None = None) -> list[float]:
    """The times 1 - i / steps, i = 0 .. steps - 1: down to a last step that ends at 0.

    What rectified flow models are published with (Esser et al. 2024, arXiv 2403.03206); ComfyUI's "simple", less the
    rounding to its table.
    """
    return [(steps - i) / steps for i in range(steps)]


def normal(steps: int, lowest: float) -> list[float]:
    """From 1 to the lowest level, taken as a time: ComfyUI's "normal"."""
    return [1.0 - (1.0 - lowest) * i / max(steps - 1, 1) for i in range(steps)]


def sgm_uniform(steps: int, lowest: float) -> list[float]:
    """`normal` with one more step, which is left out: ComfyUI's "sgm_uniform"."""
    return normal(steps + 1, lowest)[:-1]


SPACINGS = {"even": even, "normal": normal, "sgm_uniform": sgm_uniform}
"""Name -> function of (steps, the lowest level of the table) -> times, descending, the first 1."""


def levels_at(times: Sequence[float], table: Tensor) -> Tensor:
    """(n,) noise levels at these times, float32, on the CPU: linear between a table's entries, and from 0 to the first.

    times: each in (0, 1].   table: (levels,) ascending. Exact at entries; between those of a shifted flow of 1,000
    levels off by 2e-5 at most for a shift up to 12.
    """
    padded = _from_zero(table)
    place = torch.tensor(times, dtype=torch.float64) * len(table)
    # A float error must not cost exactness at an entry: 0.07 * 100 is 7.000000000000001.
    place = torch.where((place - place.round()).abs() < 1e-6, place.round(), place)
    below = place.floor().long().clamp(0, len(table) - 1)
    share = place - below
    return ((1.0 - share) * padded[below] + share * padded[below + 1]).float()


def times_at(levels: Sequence[float], table: Tensor) -> list[float]:
    """Times whose levels these are: undoes levels_at. Levels above the table's last are at time 1."""
    padded = _from_zero(table)
    wanted = torch.tensor(levels, dtype=torch.float64).clamp(max=float(padded[-1]))
    above = torch.searchsorted(padded, wanted).clamp(1, len(table))
    low, high = padded[above - 1], padded[above]
    return ((above - 1 + (wanted - low) / (high - low)) / len(table)).tolist()


def _from_zero(table: Tensor) -> Tensor:
    """The table in float64 on the CPU (some devices lack it), with the level 0 of time 0 before its first entry."""
    return torch.nn.functional.pad(table.detach().cpu().double(), (1, 0))


def shift_of(table: Tensor) -> float:
    """The shift s of a flow model's table, whose level at time t is s t / (1 + (s - 1) t): its odds at half time.

    table: (levels,) ascending, below 1 but at the end. Flux' mu is log s (Esser et al. 2024, arXiv 2403.03206, eq. 23).
    """
    half = float(levels_at([0.5], table))
    return half / (1.0 - half)


def karras_table(sigma_min: float, sigma_max: float, *, rho: float = 7.0, length: int = 1000) -> Tensor:
    """(length,) ascending levels, evenly spaced in sigma^(1 / rho): float32, from sigma_min to sigma_max.

    For models of continuous levels. Karras et al. 2022 (arXiv 2206.00364, eq. 5); consistency models were trained on
    these levels and take their steps evenly from them (Song et al. 2023, arXiv 2303.01469, appendix C).
    """
    ramp = torch.linspace(sigma_min ** (1 / rho), sigma_max ** (1 / rho), length, dtype=torch.float64)
    return (ramp**rho).float()
