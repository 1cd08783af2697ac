"""Our sampler in sigma space against diffusers' schedulers in variance-preserving space, same noise, same network.

x in sigma space is x_vp * sqrt(1 + sigma^2). The noise of a run is drawn from a generator with the same seed on both
sides, in the same order.
"""

import pytest
import torch

from lcm_kit.samplers.multistep import sample_lcm
from lcm_kit.samplers.schedule import lcm_timesteps, sigmas_at
from lcm_kit.tests.samplers.toy import as_denoiser, diffusers, sigma_table, tape, toy_network

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (2, 4, 8, 8)
# Float32, and one step from sigma 14.6 multiplies rounding by as much: measured 5e-6 at most.
TOLERANCE = {"rtol": 0, "atol": 2e-5}


def initial_noise():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(11))


def run_diffusers(scheduler, x_vp, **step_arguments):
    """Latents before each step, and the last step's output, all in variance-preserving space."""
    generator = torch.Generator().manual_seed(22)
    trajectory = [x_vp]
    for timestep in scheduler.timesteps:
        output = toy_network(trajectory[-1], int(timestep))
        step = scheduler.step(output, timestep, trajectory[-1], generator=generator, **step_arguments)
        trajectory.append(step.prev_sample)
    return trajectory


def run_ours(prediction_type, x, schedule, **arguments):
    """The same from our sampler, in sigma space."""
    table, trajectory = sigma_table(), []
    result = sample_lcm(
        as_denoiser(prediction_type, table),
        x,
        sigmas_at(schedule, table),
        callback=lambda state: trajectory.append(state["x"]),
        noise=tape(22),
        table=table,
        **arguments,
    )
    return [*trajectory, result]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 25, 50])
def test_text_to_image_equals_lcm_scheduler(steps, prediction_type):
    scheduler = diffusers().LCMScheduler(prediction_type=prediction_type, **BETAS)
    scheduler.set_timesteps(steps)
    theirs = run_diffusers(scheduler, initial_noise())
    timesteps = lcm_timesteps(steps)
    start = initial_noise() * (1 + sigma_table()[timesteps[0]] ** 2).sqrt()
    ours = run_ours(prediction_type, start, timesteps, timesteps=timesteps)
    torch.testing.assert_close(ours[-1], theirs[-1], **TOLERANCE)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("steps", "strength"), [(1, 0.5), (2, 0.75), (4, 0.6), (4, 0.9), (5, 0.1), (8, 0.3)])
def test_image_to_image_equals_lcm_scheduler(steps, strength, prediction_type):
    scheduler = diffusers().LCMScheduler(prediction_type=prediction_type, **BETAS)
    scheduler.set_timesteps(steps, strength=strength)
    image = torch.randn(SHAPE, generator=torch.Generator().manual_seed(33))
    theirs = run_diffusers(scheduler, scheduler.add_noise(image, initial_noise(), scheduler.timesteps[:1]))
    timesteps = lcm_timesteps(steps, strength=strength)
    start = image + sigma_table()[timesteps[0]] * initial_noise()
    ours = run_ours(prediction_type, start, timesteps, timesteps=timesteps)
    torch.testing.assert_close(ours[-1], theirs[-1], **TOLERANCE)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("steps", [2, 4, 8, 25])
def test_gamma_below_one_equals_tcd_scheduler_before_every_step(steps, gamma, prediction_type):
    scheduler = diffusers().TCDScheduler(prediction_type=prediction_type, **BETAS)
    scheduler.set_timesteps(steps)
    timesteps = lcm_timesteps(steps)
    assert scheduler.timesteps.tolist() == timesteps
    theirs = run_diffusers(scheduler, initial_noise(), eta=gamma)
    levels = (1 + sigma_table()[timesteps] ** 2).sqrt()
    ours = run_ours(prediction_type, initial_noise() * levels[0], timesteps, gamma=gamma)
    # Without the last output: diffusers' TCD ends at the noise of timestep 0, we end at x0.
    for x, x_vp, level in zip(ours[:-1], theirs[:-1], levels, strict=True):
        torch.testing.assert_close(x / level, x_vp, **TOLERANCE)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_gamma_one_is_near_tcd_scheduler_but_lcm(steps):
    """TCD's gamma 1 keeps the noise of timestep 0, sigma 0.029; ours keeps none. Hence not the tolerance above."""
    scheduler = diffusers().TCDScheduler(**BETAS)
    scheduler.set_timesteps(steps)
    timesteps = lcm_timesteps(steps)
    theirs = run_diffusers(scheduler, initial_noise(), eta=1.0)
    levels = (1 + sigma_table()[timesteps] ** 2).sqrt()
    ours = run_ours("epsilon", initial_noise() * levels[0], timesteps)
    difference = (ours[1] / levels[1] - theirs[1]).abs().max()
    assert 1e-4 < difference < 0.15
