"""All randomness of a training run, from (seed, step, item) alone.

Nothing is carried from step to step, so a resumed run draws what the uninterrupted one drew, and n processes with b
images each draw what one process with n * b images draws.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..samplers.noise import stream_seed
from .objective import Draws

# Keeps the streams of one seed apart.
NOISE, ORDER, START, SAMPLES, VALIDATION, DROPPED, CUTS = range(7)
WHOLE_RUN = -1


def generator(seed: int, step: int, item: int, purpose: int) -> torch.Generator:
    """A fresh CPU generator for one purpose of one item of one step; integers, taken modulo 2^64."""
    return torch.Generator().manual_seed(stream_seed(stream_seed(seed, purpose, WHOLE_RUN), item, step))


def draw(
    seed: int, step: int, items: Iterable[int], like: Tensor, grid: Sequence[int], cfg_range: tuple[float, float]
) -> Draws:
    """Timesteps, guidance and noise of the items of a step; noise and cfg in like's dtype and on its device.

    items: their numbers within the whole step, over all processes.   like: (b, ...), the latents of those items.
    grid: timesteps to choose from, evenly.   cfg_range: lowest and highest cfg, between them evenly.
    """
    low, high = cfg_range
    timesteps, scales, noise = [], [], []
    for item in items:
        source = generator(seed, step, item, NOISE)
        timesteps.append(grid[int(torch.randint(len(grid), (), generator=source))])
        scales.append(low + (high - low) * float(torch.rand((), generator=source)))
        noise.append(torch.randn(like.shape[1:], generator=source))
    return Draws(torch.tensor(timesteps), torch.tensor(scales).to(like), torch.stack(noise).to(like))


def shuffled(seed: int, count: int, position: int) -> int:
    """Which of `count` things comes at `position` 0, 1, ... when all are gone through in a new random order each time."""
    epoch, place = divmod(position, count)
    return int(_order(seed, count, epoch)[place])


@lru_cache(maxsize=2)  # a batch may lie in two epochs
def _order(seed: int, count: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, epoch, 0, ORDER))
