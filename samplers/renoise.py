"""How a step returns from x0 to a noise level: the forward process, and gamma's mix of old and fresh noise."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .schedule import timesteps_at

NoiseScaling = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(sigma (), noise, latent) -> noised latent; linear in noise and in latent. ComfyUI's model_sampling.noise_scaling."""


def variance_exploding(sigma: Tensor, noise: Tensor, latent: Tensor) -> Tensor:
    """x = latent + sigma * noise, the forward process of ComfyUI's Stable Diffusion models (epsilon, v, x0)."""
    return latent + sigma * noise


def predicted_noise(x: Tensor, x0: Tensor, sigma: Tensor, noise_scaling: NoiseScaling) -> Tensor:
    """The noise that leads from x0 to x at level sigma; (x - x0) / sigma in the variance-exploding process."""
    signal, noise = _signal_and_noise(sigma, noise_scaling)
    return (x - signal * x0) / noise


def noise_kept(
    sigmas: Tensor, gamma: float, *, table: Tensor | None = None, noise_scaling: NoiseScaling = variance_exploding
) -> list[float]:
    """Share of the predicted noise in the noise that each step leaves behind: (steps,), each in [0, 1].

    sigmas: (steps + 1,) levels of a run; step i leaves the level sigmas[i + 1]. A step to 0 leaves no noise, and its
    share means nothing.
    gamma: [0, 1]. 1: all noise is fresh, every share exactly 0 (LCM's multistep sampling). 0: none is, every share
    exactly 1 (DDIM, Euler's method). Between: the strategic stochastic sampling of TCD (Zheng et al. 2024, arXiv
    2402.19159): follow the trajectory on to timestep s = floor((1 - gamma) * t), then add noise up to t.
    table: ascending sigmas of all training timesteps; only needed for 0 < gamma < 1, to tell s.

    A share r means noise = r * predicted + sqrt(1 - r^2) * fresh, of unit variance, with r the ratio of the
    noise-to-signal ratios at s and t: sigma_s / sigma_t in the variance-exploding process.
    At gamma = 1 the paper's rule stops at s = 0, whose sigma is small but not 0; LCM is the limit, taken here.
    Raises ValueError if gamma is outside [0, 1], or between the ends without a table.
    """
    if not 0.0 <= gamma <= 1.0:  # also catches NaN
        raise ValueError(f"gamma is {gamma}; it must be from 0 (deterministic) to 1 (LCM, all noise fresh).")
    steps = max(len(sigmas) - 1, 0)
    if gamma in (0.0, 1.0):
        return [1.0 - gamma] * steps
    if table is None:
        raise ValueError(
            f"gamma is {gamma}; between 0 and 1 the model's sigma table is needed. Pass table=, the ascending sigmas "
            "of all training timesteps, or use gamma 0 or 1."
        )
    return [_share(level, gamma, table, noise_scaling) if level > 0 else 1.0 for level in sigmas[1:]]


def _share(level: Tensor, gamma: float, table: Tensor, noise_scaling: NoiseScaling) -> float:
    timestep = int(timesteps_at(level[None], table))
    # The guard against float errors of lcm_timesteps: (1 - 0.9) * 500 is 49.99999999999999.
    sigma_s = table[math.floor((1.0 - gamma) * timestep + 1e-6)]
    signal_s, noise_s = _signal_and_noise(sigma_s, noise_scaling)
    signal_t, noise_t = _signal_and_noise(level, noise_scaling)
    share = float(noise_s) * float(signal_t) / (float(signal_s) * float(noise_t))
    # A level between table entries can lie below the nearest one; more than all of its noise cannot be old.
    return min(share, 1.0)


def _signal_and_noise(sigma: Tensor, noise_scaling: NoiseScaling) -> tuple[Tensor, Tensor]:
    """Coefficients of latent and noise at level sigma, read off a linear forward process by asking for each alone."""
    one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
    return noise_scaling(sigma, zero, one), noise_scaling(sigma, one, zero)
