"""A limit for the denoised picture of a guided step, taken from the same step without guidance."""

import math

import torch
from torch import Tensor


def limit_denoised(guided: Tensor, unguided: Tensor, quantile: float) -> Tensor:
    """`guided`, with values outside the range of `unguided` moved to its edge; in the shape and dtype of `guided`.

    guided: (batch, channels, ...) x0 after guidance.   unguided: the same shape, the x0 of the prompt alone.
    quantile: above 0.5 and at most 1. For each image and channel on its own, the range is that between the 1 - quantile
    and the quantile of the unguided values, to the nearest value outwards; 1 is from the smallest to the largest. With
    u = unguided, low and high the two quantiles:

        x = min(max(guided, min(low, u)), max(high, u))

    Values may go as far as the unguided picture goes at that very place. So guidance 1 is left alone, bit by bit, and
    so is all that guidance moved towards the middle. Scaling or shifting a channel of both scales or shifts the result.

    Thresholding x0 at a quantile against burnt pictures is dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487,
    section 2.3): clamp to the quantile of |x0| of the guided picture, divide by it, which suits pixels in [-1, 1]. Few-step
    models clip x0 in latent space (Wang et al. 2024, TDD, arXiv 2409.01347; Adaptive Sampling Scheduler, 2025, arXiv
    2509.12569), where no fixed bound holds; the bound from the unguided prediction is our own choice.
    Raises ValueError for a quantile out of range, or shapes that differ or have no channels.
    """
    check_quantile(quantile)
    if guided.shape != unguided.shape or guided.ndim < 3:
        raise ValueError(
            f"guided has shape {tuple(guided.shape)} and unguided {tuple(unguided.shape)}; both must be the same "
            "(batch, channels, ...)."
        )
    low, high = _outer_values(unguided, quantile)
    return torch.clamp(guided, torch.minimum(low, unguided), torch.maximum(high, unguided)).to(guided.dtype)


def check_quantile(quantile: float) -> None:
    """Raises ValueError for a quantile that limit_denoised does not take."""
    if not 0.5 < quantile <= 1.0:  # also catches NaN
        raise ValueError(f"quantile is {quantile}; it must be above 0.5 and at most 1. 0.99 is mild, 0.9 is strict.")


def _outer_values(x: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """The 1 - quantile and the quantile of each channel, (batch, channels, 1, ...), both values that occur in it.

    Not torch.quantile: it refuses more than 2^24 values, which a video has, and on a CPU takes five times as long.
    """
    values = x.flatten(2)
    last = values.shape[-1] - 1
    # 1e-6: a float error must not cost a value, 0.9 * 10 has to be the 9th.
    upper = math.ceil(quantile * last - 1e-6)
    if values.device.type == "cpu":
        low, high = (values.kthvalue(i + 1, dim=-1).values for i in (last - upper, upper))
    else:  # fast there, and not every backend has kthvalue
        ordered = values.sort(dim=-1).values
        low, high = ordered[..., last - upper], ordered[..., upper]
    shape = x.shape[:2] + (1,) * (x.ndim - 2)
    return low.reshape(shape), high.reshape(shape)
