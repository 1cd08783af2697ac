"""Multistep consistency sampling: denoise to x0, return to a lower noise level, repeat."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange as tqdm_trange  # type: ignore[import-untyped, unused-ignore]

from .linear_step import HALF_RESOLUTION, Plan, plan_run
from .renoise import NoiseScaling, variance_exploding


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
    gamma: float | Sequence[float] = 1.0,
    timesteps: Tensor | Sequence[int] | None = None,
    table: Tensor | None = None,
    noise_scaling: NoiseScaling = variance_exploding,
    plan: Plan | None = None,
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
    (what the model returned). The tensors it gets are never changed afterwards.
    disable: progress bar off (True), on (False), or on in a terminal only (None), as in tqdm.
    noise: noise(level, like) gives standard normal noise like `like` for the level that a step returns to, called by its
    number (noise.level_numbers, noise.StepNoise). A source whose attribute `hands_over` is true returns a new tensor each
    time, which is then overwritten.
    gamma: [0, 1], share of randomness. 1: LCM. 0: deterministic, Euler's method (DDIM) exactly; `noise` is not called.
    Between: strategic stochastic sampling, see renoise.noise_kept. A sequence gives each step its own, the last one
    holds to the end: (0, 1) begins with one deterministic step and goes on as LCM.
    timesteps: (steps,) of sigmas[:-1], for LCM's boundary scalings. None: their limit c_skip = 0, c_out = 1, for
    models with no such scalings (flow models) and for the exact Euler and TCD samplers.
    table: ascending sigmas of all training timesteps. Needed for 0 < gamma < 1; levels are numbered by it if it is given.
    noise_scaling: forward process of the model, for flow models; see renoise.NoiseScaling.
    plan: what linear_step.plan_run makes of sigmas, gamma, timesteps, table and noise_scaling, where it is known already;
    the last four are not looked at then.
    trange: makes the progress bar, trange(steps, disable=disable).

    Works in float32 or the wider dtype of x; the model and the callback get tensors in the dtype of x, but sigma
    always in float32. Raises ValueError before the first model call if an argument breaks these rules.
    """
    extra_args = {} if extra_args is None else extra_args
    sigmas = sigmas.to(device=x.device, dtype=torch.float32)
    if plan is None:
        plan = plan_run(sigmas, gamma=gamma, timesteps=timesteps, table=table, noise_scaling=noise_scaling)
    weights, numbers = plan.weights, plan.numbers

    wide = torch.promote_types(x.dtype, torch.float32)
    # A factor so near 1 that it is 1 in float32. In float64 only 1 itself is.
    is_one = HALF_RESOLUTION if wide == torch.float32 else 1e-300
    # Split once: an index into a tensor in every step costs more than the step's own arithmetic on small latents.
    levels, for_all = sigmas.unbind(), sigmas[:, None]
    if x.shape[0] != 1:
        for_all = for_all.expand(-1, x.shape[0]).contiguous()
    per_image = for_all.unbind()
    hands_over = getattr(noise, "hands_over", False)
    for i in trange(len(weights), disable=disable):
        denoised = model(x, per_image[i], **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": levels[i], "sigma_hat": levels[i], "denoised": denoised})
        x0 = _in_dtype(denoised, wide)
        weight = weights[i]
        # Only what has a weight is drawn or read: exact ends, and gamma 0 needs no noise source.
        after = x0 if abs(1.0 - weight.denoised) < is_one else x0 * weight.denoised
        if weight.fresh:
            fresh = noise(numbers[i], x0)
            after = torch.add(after, fresh, alpha=weight.fresh, out=fresh if hands_over else None)
        if weight.x:
            # In place where the tensor is this loop's own.
            after = torch.add(after, _in_dtype(x, wide), alpha=weight.x, out=None if after is x0 else after)
        elif after is denoised:
            after = after.clone()
        x = _in_dtype(after, x.dtype)
    return x


def _in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which is slow where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)
