"""Step noise that another pack has put in the place of core's for a run, as AnimateDiff-Evolved's Ancestral Options do."""

from collections.abc import Callable
from itertools import pairwise

import torch
from comfy.k_diffusion import sampling as core


def foreign_noise(x: torch.Tensor, sigmas: torch.Tensor, seed: int | None) -> Callable | None:
    """A source of step noise for this run, or None where core's own is in its place.

    ComfyUI has no option for a run's step noise, so packs exchange the function that core's samplers take it from while a
    run lasts. Whoever chose a kind of noise there (constant over frames, another seed) means it for this sampler as well.
    """
    make = core.default_noise_sampler
    if getattr(make, "__module__", None) == core.__name__:
        return None
    draw, steps = make(x, seed=seed), pairwise(sigmas)

    def noise(_, like):
        return draw(*next(steps)).to(like)

    return noise
