"""Multistep consistency sampling: denoise to x0, return to a lower noise level, repeat."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange as tqdm_trange  # type: ignore[import-untyped, unused-ignore]

from .consistency import boundary_scalings, consistency_output
from .renoise import NoiseScaling, noise_kept, predicted_noise, variance_exploding


@torch.no_grad()
def sample_lcm(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    *,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    noise: Callable[[int, Tensor], Tensor],
    gamma: float = 1.0,
    timesteps: Tensor | Sequence[int] | None = None,
    table: Tensor | None = None,
    noise_scaling: NoiseScaling = variance_exploding,
    trange: Callable[..., Iterable[int]] = tqdm_trange,
) -> Tensor:
    """Latent of an LCM run at level sigmas[-1], in the shape, dtype and device of x.

    Implements Algorithm 3 of Luo et al. 2023 (arXiv 2310.04378) in sigma space. Each step asks the model for x0 and
    adds noise of the next, lower level; the step to sigma 0 adds none and draws none. With the same noise it equals
    LCMScheduler of diffusers, x there being x / sqrt(1 + sigma^2) here.

    model: called as model(x, sigma, **extra_args), sigma (batch,); returns the denoised x0 in the shape of x.
    x: (batch, ...), x0 + sigmas[0] * eps; any number of dimensions.
    sigmas: (steps + 1,), all but the last above 0. A last one above 0 leaves that much noise, for a next sampler.
    callback: called after each model call with a dict: x (what the model saw), i (step), sigma, sigma_hat, denoised
    (x0). The tensors it gets are never changed afterwards.
    disable: progress bar off (True), on (False), or on in a terminal only (None), as in tqdm.
    noise: noise(step, like) gives standard normal noise like `like`, after step 0, 1, ... (noise.StepNoise).
    gamma: [0, 1], share of randomness. 1: LCM. 0: deterministic, Euler's method (DDIM) exactly; `noise` is not called.
    Between: strategic stochastic sampling, see renoise.noise_kept.
    timesteps: (steps,) of sigmas[:-1], for LCM's boundary scalings. None: their limit c_skip = 0, c_out = 1, for
    models with no such scalings (flow models) and for the exact Euler and TCD samplers.
    table: ascending sigmas of all training timesteps, needed for 0 < gamma < 1 only.
    noise_scaling: forward process of the model, for flow models; see renoise.NoiseScaling.
    trange: makes the progress bar, trange(steps, disable=disable).

    Works in float32 or the wider dtype of x; the model and the callback get tensors in the dtype of x, but sigma
    always in float32. Raises ValueError before the first model call if an argument breaks these rules.
    """
    extra_args = {} if extra_args is None else extra_args
    sigmas = sigmas.to(device=x.device, dtype=torch.float32)
    levels = sigmas.tolist()  # read once: a comparison on the device would stall it in every step
    _check_levels(sigmas, levels)
    steps = max(len(levels) - 1, 0)
    scalings = None if timesteps is None else _scalings(timesteps, steps)
    shares = noise_kept(sigmas, gamma, table=table, noise_scaling=noise_scaling)

    wide = torch.promote_types(x.dtype, torch.float32)
    per_image = sigmas.new_ones(x.shape[0])
    for i in trange(steps, disable=disable):
        denoised = model(x, sigmas[i] * per_image, **extra_args)
        x_wide, x0 = x.to(wide), denoised.to(wide)
        if scalings is not None:
            c_skip, c_out = scalings[i]
            x0 = consistency_output(x_wide, x0, sigmas[i], c_skip, c_out)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": x0.to(x.dtype)})
        if levels[i + 1] > 0:
            # The two ends draw or predict only what they use: exact, and gamma 0 needs no noise source.
            share = shares[i]
            if share == 0.0:
                unit_noise = noise(i, x0)
            elif share == 1.0:
                unit_noise = predicted_noise(x_wide, x0, sigmas[i], noise_scaling)
            else:
                predicted = predicted_noise(x_wide, x0, sigmas[i], noise_scaling)
                unit_noise = share * predicted + math.sqrt((1.0 - share) * (1.0 + share)) * noise(i, x0)
            x0 = noise_scaling(sigmas[i + 1], unit_noise, x0)
        x = x0.to(x.dtype)
    return x


def _check_levels(sigmas: Tensor, levels: list[float]) -> None:
    if sigmas.ndim != 1:
        raise ValueError(f"sigmas has shape {tuple(sigmas.shape)}; it must be (steps + 1,).")
    if not all(math.isfinite(level) and level >= 0 for level in levels) or 0.0 in levels[:-1]:
        raise ValueError(f"sigmas are {levels}; all must be finite and above 0, the last may be 0.")


def _scalings(timesteps: Tensor | Sequence[int], steps: int) -> list[tuple[float, float]]:
    """(c_skip, c_out) of each step as plain numbers, so that the loop reads nothing back from the device."""
    if len(timesteps) != steps:
        raise ValueError(
            f"there are {len(timesteps)} timesteps for {steps} steps; give one for each of sigmas[:-1], or None."
        )
    c_skip, c_out = boundary_scalings(timesteps)
    return list(zip(c_skip.tolist(), c_out.tolist(), strict=True))
