"""Our sampler against diffusers' LCMScheduler, TCDScheduler and FlowMatchLCMScheduler: see parity.py for how.

Where diffusers itself is wrong, test_flaws_of_diffusers.py shows it.
"""

import math

import pytest
import torch

from lcm_kit.samplers.multistep import sample_lcm
from lcm_kit.samplers.preset import Preset
from lcm_kit.samplers.schedule import custom_timesteps, lcm_timesteps
from lcm_kit.tests.samplers.parity import (
    BETAS,
    SEED,
    TABLE,
    difference,
    drawn,
    lcm_difference,
    run_diffusers,
    run_ours,
    scheduler_of,
    started,
)
from lcm_kit.tests.samplers.toy import (
    as_flow_denoiser,
    diffusers,
    rectified_flow,
    sigma_table,
    step_generator,
    tape,
    toy_network,
    zero_snr_alphas_cumprod,
)

PREDICTIONS = ["epsilon", "v_prediction", "sample"]
ORIGINAL_STEPS = [25, 50, 100, 250]
STRENGTHS = [tenth / 10 for tenth in range(1, 11)]
ZERO_SNR_TABLE = sigma_table(zero_snr_alphas_cumprod())
# Float32, and one step from sigma 14.6 multiplies rounding by as much. Measured over all cases: 3.9e-6 at most.
TOLERANCE = 1e-4


# ---- LCMScheduler


@pytest.mark.parametrize("original_steps", ORIGINAL_STEPS)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_every_schedule_equals_lcm_scheduler_or_both_refuse(original_steps, strength):
    scheduler = scheduler_of("LCMScheduler", "epsilon")
    for steps in range(1, 51):
        if steps <= int(original_steps * strength):
            scheduler.set_timesteps(steps, original_inference_steps=original_steps, strength=strength)
            ours = lcm_timesteps(steps, original_steps=original_steps, strength=strength)
            assert ours == scheduler.timesteps.tolist(), f"{steps} steps"
            continue
        with pytest.raises(ValueError, match=r"reduce `num_inference_steps`|cannot be larger"):
            scheduler.set_timesteps(steps, original_inference_steps=original_steps, strength=strength)
        with pytest.raises(ValueError, match=f"steps is {steps} but .* at most"):
            lcm_timesteps(steps, original_steps=original_steps, strength=strength)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("original_steps", ORIGINAL_STEPS)
def test_text_to_image_equals_lcm_scheduler_at_every_number_of_steps(original_steps, prediction_type):
    """Every number at the usual 50; on the other grids every number with one of the prediction types."""
    scheduler = scheduler_of("LCMScheduler", prediction_type)
    for steps in range(1, min(50, original_steps) + 1):
        if original_steps == 50 or PREDICTIONS[steps % 3] == prediction_type:
            scheduler.set_timesteps(steps, original_inference_steps=original_steps)
            timesteps = lcm_timesteps(steps, original_steps=original_steps)
            assert lcm_difference(scheduler, timesteps) <= TOLERANCE, f"{steps} steps"


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_image_to_image_equals_lcm_scheduler_at_every_strength(strength, prediction_type):
    scheduler = scheduler_of("LCMScheduler", prediction_type)
    for original_steps in ORIGINAL_STEPS:
        for steps in [n for n in (1, 2, 4, 8, 25) if n <= int(original_steps * strength)]:
            scheduler.set_timesteps(steps, original_inference_steps=original_steps, strength=strength)
            timesteps = lcm_timesteps(steps, original_steps=original_steps, strength=strength)
            found = lcm_difference(scheduler, timesteps, image=drawn(33))
            assert found <= TOLERANCE, f"{steps} of {original_steps}"


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(
    "timesteps",
    [
        [999, 749, 499, 249],
        [399],
        [999, 875, 751, 627, 499, 251],
        [990, 731, 500, 3, 2, 1],
        # At timestep 0 the consistency function returns its input, whatever the network says.
        [999, 0],
    ],
)
def test_custom_timesteps_equal_lcm_scheduler(timesteps, prediction_type):
    scheduler = scheduler_of("LCMScheduler", prediction_type)
    scheduler.set_timesteps(timesteps=timesteps)
    assert lcm_difference(scheduler, custom_timesteps(timesteps)) <= TOLERANCE


# ---- zero terminal SNR


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 25, 50])
def test_a_zero_terminal_snr_model_equals_lcm_scheduler(steps, prediction_type):
    scheduler = scheduler_of("LCMScheduler", prediction_type, zero_snr=True)
    scheduler.set_timesteps(steps)
    assert lcm_difference(scheduler, lcm_timesteps(steps), table=ZERO_SNR_TABLE) <= TOLERANCE


@pytest.mark.parametrize(
    ("prediction_type", "steps", "distance"),
    [("v_prediction", 1, 1e-3), ("v_prediction", 4, 1e-5), ("sample", 1, 1e-5), ("sample", 4, 1e-5)],
)
def test_how_far_the_clamped_end_of_the_table_is_from_a_pure_zero(prediction_type, steps, distance):
    """diffusers' own rescale_betas_zero_snr ends in an alpha_bar of exactly 0, where no sigma exists. ComfyUI's 4.9e-8
    leaves a share of sqrt(4.9e-8) = 2.2e-4 of the latent in a v-model's first x0: measured 6.6e-4 after one step, 3e-6
    after four.
    """
    scheduler = diffusers().LCMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True, **BETAS)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(scheduler.alphas_cumprod[:-1], zero_snr_alphas_cumprod()[:-1], rtol=1e-3, atol=1e-7)
    assert scheduler.alphas_cumprod[-1] == 0
    assert lcm_difference(scheduler, lcm_timesteps(steps), table=ZERO_SNR_TABLE) < distance


# ---- TCDScheduler: gamma below 1


def tcd_trajectories(prediction_type, steps, gammas):
    """(ours, theirs) as lists of variance-preserving latents before each step, and the end; gammas: one each step.

    TCDScheduler does not stop at x0 but at timestep 0, whose sigma is 0.029. Ours does if the run's levels say so.
    """
    scheduler = scheduler_of("TCDScheduler", prediction_type)
    scheduler.set_timesteps(steps)
    timesteps = lcm_timesteps(steps)
    assert scheduler.timesteps.tolist() == timesteps
    sigmas = torch.cat([TABLE[timesteps], TABLE[:1]])
    x_vp, x = started(scheduler, sigmas[0])
    ours = run_ours(prediction_type, x, sigmas, gamma=gammas)
    levels = (1 + sigmas**2).sqrt()
    return [x / level for x, level in zip(ours, levels, strict=True)], run_diffusers(scheduler, x_vp, gammas)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7])
def test_gamma_below_one_equals_tcd_scheduler_before_every_step_and_after_the_last(gamma, prediction_type):
    for steps in (1, 2, 3, 4, 6, 8, 16, 25, 50):
        for ours, theirs in zip(*tcd_trajectories(prediction_type, steps, [gamma] * steps), strict=True):
            assert difference(ours, theirs) <= TOLERANCE, f"{steps} steps"


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("gammas", [[0.0, 0.3, 0.7, 0.2], [0.9, 0.0, 0.5, 0.0, 0.1, 0.0], [0.0, 0.0, 0.6]])
def test_a_gamma_for_each_step_equals_tcd_scheduler_with_that_eta_at_that_step(gammas, prediction_type):
    for ours, theirs in zip(*tcd_trajectories(prediction_type, len(gammas), gammas), strict=True):
        assert difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_tcd_scheduler_at_eta_one_is_the_gamma_just_below_one(steps, prediction_type):
    """Its s is 0 then, and it keeps that timestep's noise. Our gamma 1 keeps none, as LCM; between lie up to 0.15."""
    below, _ = tcd_trajectories(prediction_type, steps, [1 - 1e-9] * steps)
    lcm, theirs = tcd_trajectories(prediction_type, steps, [1.0] * steps)
    for x, at_one, x_vp in list(zip(below, lcm, theirs, strict=True))[1:-1]:
        assert difference(x, x_vp) <= TOLERANCE
        assert TOLERANCE < difference(at_one, x_vp) < 0.15


# ---- FlowMatchLCMScheduler


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 25, 50])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_flow_models_equal_flow_match_lcm_scheduler(strength, steps, shift):
    scheduler = diffusers().FlowMatchLCMScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[strength * (1 - step / steps) for step in range(steps)])
    sigmas, noise, image = scheduler.sigmas, drawn(11), drawn(33)
    x = theirs = rectified_flow(sigmas[0], noise, image)
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = toy_network(theirs, timestep.item())
        theirs = scheduler.step(velocity, timestep, theirs, generator=step_generator(SEED, step)).prev_sample
    source = tape(SEED, sigmas)
    ours = sample_lcm(as_flow_denoiser, x, sigmas, noise=source, noise_scaling=rectified_flow, disable=True)
    assert difference(ours, theirs) <= TOLERANCE


def flow_run(scheduler, sigmas, gamma):
    """Difference of the finished latents: the scheduler's on its own levels and ours on these, the same noise."""
    noise, image = drawn(11), drawn(33)
    theirs = rectified_flow(scheduler.sigmas[0], noise, image)
    x = rectified_flow(sigmas[0], noise, image)
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = toy_network(theirs, timestep.item())
        theirs = scheduler.step(velocity, timestep, theirs, generator=step_generator(SEED, step)).prev_sample
    ours = sample_lcm(
        as_flow_denoiser, x, sigmas, noise=tape(SEED, sigmas), gamma=gamma, noise_scaling=rectified_flow, disable=True
    )
    return difference(ours, theirs)


@pytest.mark.parametrize(("kind", "gamma"), [("FlowMatchLCMScheduler", 1.0), ("FlowMatchEulerDiscreteScheduler", 0.0)])
@pytest.mark.parametrize("levels", [1000, 10_000])
@pytest.mark.parametrize(("shift", "mu"), [(1.0, None), (3.0, None), (8.0, None), (math.exp(1.15), 1.15)])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_flow_models_own_schedule_equals_diffusers_on_tables_of_any_length(kind, gamma, levels, shift, mu, strength):
    """Levels and all, from a table as ComfyUI has it. mu: diffusers' resolution-dependent shift, log of ours."""
    times = torch.arange(1, levels + 1) / levels
    table = shift * times / (1 + (shift - 1) * times)
    scheduler = getattr(diffusers(), kind)(shift=1.0 if mu else shift, use_dynamic_shifting=mu is not None)
    for steps in (1, 2, 3, 4, 6, 8, 25):
        even = [strength * (1 - step / steps) for step in range(steps)]
        scheduler.set_timesteps(sigmas=even, **({} if mu is None else {"mu": mu}))
        sigmas = Preset("", steps, 1.0, gamma).levels(table, strength=strength)
        assert difference(sigmas, scheduler.sigmas) <= 2e-5, f"{steps} steps"
        assert flow_run(scheduler, sigmas, gamma) <= TOLERANCE, f"{steps} steps"
