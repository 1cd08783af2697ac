"""Runs of our sampler in sigma space and of diffusers' schedulers in variance-preserving space: same noise, same network.

x in sigma space is x_vp * sqrt(1 + sigma^2). The noise of a step is drawn from a generator with the same seed on both
sides.
"""

from functools import cache

import torch

from lcm_kit.samplers.multistep import sample_lcm
from lcm_kit.samplers.schedule import sigmas_at
from lcm_kit.tests.samplers.toy import (
    as_denoiser,
    diffusers,
    sigma_table,
    step_generator,
    tape,
    toy_network,
    zero_snr_alphas_cumprod,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (2, 4, 4, 4)
SEED = 22
TABLE = sigma_table()


@cache
def scheduler_of(kind, prediction_type, zero_snr=False):
    """A scheduler of diffusers on Stable Diffusion's noise levels; set_timesteps starts it anew."""
    scheduler = getattr(diffusers(), kind)(prediction_type=prediction_type, **BETAS)
    if zero_snr:
        scheduler.alphas_cumprod = zero_snr_alphas_cumprod()
    return scheduler


def drawn(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_diffusers(scheduler, x_vp, etas=None):
    """Latents before each step, and the last step's output, all in variance-preserving space."""
    trajectory = [x_vp]
    for step, timestep in enumerate(scheduler.timesteps):
        output = toy_network(trajectory[-1], int(timestep))
        eta = {} if etas is None else {"eta": etas[step]}
        state = scheduler.step(output, timestep, trajectory[-1], generator=step_generator(SEED, step), **eta)
        trajectory.append(state.prev_sample)
    return trajectory


def run_ours(prediction_type, x, sigmas, table=TABLE, **arguments):
    """The same from our sampler, in sigma space."""
    trajectory = []
    result = sample_lcm(
        as_denoiser(prediction_type, table),
        x,
        sigmas,
        callback=lambda state: trajectory.append(state["x"]),
        noise=tape(SEED, sigmas, table),
        table=table,
        disable=True,
        **arguments,
    )
    return [*trajectory, result]


def started(scheduler, sigma, image=None):
    """(x_vp, x) before the first step: pure noise, or the image with noise of the first level."""
    noise = drawn(11)
    if image is None:
        return noise, noise * (1 + sigma**2).sqrt()
    return scheduler.add_noise(image, noise, scheduler.timesteps[:1]), image + sigma * noise


def difference(ours, theirs):
    return float((ours - theirs).abs().max())


def lcm_difference(scheduler, timesteps, *, image=None, table=TABLE):
    """Of the finished latents, ours and those of an LCMScheduler whose set_timesteps has been called."""
    assert timesteps == scheduler.timesteps.tolist()
    sigmas = sigmas_at(timesteps, table)
    x_vp, x = started(scheduler, sigmas[0], image)
    ours = run_ours(scheduler.config.prediction_type, x, sigmas, table, timesteps=timesteps)
    return difference(ours[-1], run_diffusers(scheduler, x_vp)[-1])
