"""Step noise that is limited or scaled before it is added, as a source around another: also for partly masked pixels."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


class ShapedNoise:
    """Call it as noise(level, like), as the source that it is made of.

    source: standard normal noise, noise(level, like).
    clip_std: values further out than so many standard deviations of an image's own noise are moved there; 0 leaves them.
    factors: level number -> what that level's noise is multiplied by, after the limit: a number, or a tensor that
    broadcasts to it. Levels that are not in it keep theirs.

    Each image is limited by its own noise, so it is the same alone and in any batch.
    """

    hands_over = True

    def __init__(
        self,
        source: Callable[[int, Tensor], Tensor],
        *,
        clip_std: float = 0.0,
        factors: Mapping[int, float | Tensor] | None = None,
    ) -> None:
        self.source, self.clip_std, self.factors = source, clip_std, factors or {}

    def __call__(self, level: int, like: Tensor) -> Tensor:
        noise = self.source(level, like)
        if not getattr(self.source, "hands_over", False):
            noise = noise.clone()
        if self.clip_std > 0 and noise.numel() > len(noise):
            for image in noise.unbind():
                bound = self.clip_std * image.std()
                image.clamp_(min=-bound, max=bound)
        if (factor := self.factors.get(level)) is not None:
            noise.mul_(factor)
        return noise


def ramp(start: float, end: float, places: Sequence[int], steps: int) -> list[float]:
    """A value that goes evenly from start in the first of so many steps to end in the last; its values at these places."""
    return [start + (end - start) * (place / (steps - 1) if steps > 1 else 0.0) for place in places]


def feathered_factors(mask: Tensor, shares: Sequence[float], kept: float = 1.0) -> list[Tensor]:
    """What to multiply each step's fresh noise by where a mask is between 0 and 1: (steps,) tensors in its shape.

    mask: values in [0, 1], 1 where a picture may change.   shares: (steps,) of old noise, renoise.noise_kept.
    kept: share of the initial noise in the noise that the first of these steps starts from; 1 in the first of a run.

    Where it is m, ComfyUI shows the model m * x + (1 - m) * (the picture with the initial noise z0). With fresh noise in
    x the two are independent, and their sum is weaker than the level says: sqrt(m^2 + (1 - m)^2) of it, 0.71 at m = 1/2.
    Let x have the noise k * z0 + b * z, z of unit variance and independent of z0. The sum has unit variance for

        b^2 = B(k)^2 = (1 - (m * k + 1 - m)^2) / m^2

    A step keeps the share r of its noise and adds sqrt(1 - r^2) * s * fresh, so k becomes r * k, and b stays right with

        s^2 = (B(r k)^2 - r^2 B(k)^2) / (1 - r^2) = ((2 / m) (1 + r - r k) - (1 + r) + 2 r k) / (1 + r)

    which is (2 - m) / m for r = 0, LCM's own steps. s is exactly 1 where m is 0 or 1. Exact if x0 is; else as near.
    """
    partly = (mask > 0) & (mask < 1)
    safe = torch.where(partly, mask, 1.0)
    factors = []
    for share in shares:
        squared = ((2.0 / safe) * (1 + share - share * kept) - (1 + share) + 2 * share * kept) / (1 + share)
        factors.append(torch.where(partly, squared.clamp_min(0.0).sqrt(), 1.0))
        kept *= share
    return factors
