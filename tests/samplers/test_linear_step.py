"""The weights of one step against the formulas they were multiplied out of."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcm_kit.samplers.consistency import boundary_scalings
from lcm_kit.samplers.linear_step import StepWeights, plan_run, step_weights
from lcm_kit.samplers.renoise import noise_kept, variance_exploding
from lcm_kit.samplers.schedule import lcm_timesteps, sigmas_at
from lcm_kit.tests.samplers.toy import rectified_flow, sigma_table

TABLE = sigma_table()
TIMESTEPS = lcm_timesteps(4)
SIGMAS = sigmas_at(TIMESTEPS, TABLE)
FLOW_TABLE = torch.linspace(0.001, 1.0, 1000)
FLOW_SIGMAS = sigmas_at([999, 749, 499, 249], FLOW_TABLE)


PROCESSES = {"ve": (variance_exploding, TABLE, SIGMAS), "flow": (rectified_flow, FLOW_TABLE, FLOW_SIGMAS)}


def spelled_out(x, denoised, fresh, i, sigmas, share, scalings, noise_scaling):
    """One step in the words of the papers, in float64: consistency function, predicted noise, mix, forward process."""
    one, zero = torch.tensor(1.0).double(), torch.tensor(0.0).double()
    sigma, sigma_next = sigmas[i].double(), sigmas[i + 1].double()
    a, b = noise_scaling(sigma, zero, one), noise_scaling(sigma, one, zero)
    c_skip, c_out = scalings
    f = c_skip * x / (a * a + b * b).sqrt() + c_out * denoised
    if sigma_next == 0:
        return f
    predicted = (x - a * f) / b
    return noise_scaling(sigma_next, share * predicted + math.sqrt(1 - share * share) * fresh, f)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, [0.0, 1.0, 0.5]])
@pytest.mark.parametrize("low", [False, True])
def test_the_weights_are_the_papers_step(process, gamma, low):
    noise_scaling, table, sigmas = PROCESSES[process]
    # At timestep 0 and 1 the boundary scalings are far from 0 and 1, which makes them count.
    timesteps = [3, 2, 1, 0] if low else TIMESTEPS
    arguments = {"gamma": gamma, "table": table, "noise_scaling": noise_scaling}
    weights = step_weights(sigmas, timesteps=timesteps, **arguments)
    shares = noise_kept(sigmas, gamma, table=table, noise_scaling=noise_scaling)
    scalings = list(zip(*(values.double() for values in boundary_scalings(timesteps)), strict=True))
    x, denoised, fresh = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i, weight in enumerate(weights):
        expected = spelled_out(x, denoised, fresh, i, sigmas, shares[i], scalings[i], noise_scaling)
        ours = weight.x * x + weight.denoised * denoised + weight.fresh * fresh
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)  # a and b are read off in float32


def test_c_skip_multiplies_the_variance_preserving_latent():
    # sigma^2 = 3: x_vp = x / 2, so half of c_skip falls on x.
    (weight,) = step_weights(torch.tensor([3.0**0.5, 0.0]), timesteps=[1])
    c_skip, c_out = boundary_scalings([1])
    assert (weight.x, weight.denoised) == (pytest.approx(c_skip.item() / 2), pytest.approx(c_out.item()))


def test_without_scalings_lcm_is_x0_plus_sigma_times_noise():
    assert step_weights(SIGMAS) == [StepWeights(0.0, 1.0, float(level)) for level in SIGMAS[1:]]


@pytest.mark.parametrize("count", [0, 1])
def test_without_a_step_there_are_no_weights(count):
    assert step_weights(SIGMAS[:count]) == step_weights(SIGMAS[:count], timesteps=[]) == []


@pytest.mark.parametrize("levels", [[0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0]])
def test_only_the_last_level_may_be_zero(levels):
    with pytest.raises(ValueError, match="all must be finite and above 0, the last may be 0"):
        plan_run(torch.tensor(levels))
    assert plan_run(torch.tensor([1.0, 0.0])).weights == (StepWeights(0.0, 1.0, 0.0),)


def test_eulers_method_is_a_mix_of_the_latent_and_x0():
    for weight, ratio in zip(step_weights(SIGMAS, gamma=0.0), (SIGMAS[1:] / SIGMAS[:-1]).tolist(), strict=True):
        assert weight.fresh == 0.0
        assert (weight.x, weight.denoised) == (pytest.approx(ratio, rel=1e-6), pytest.approx(1 - ratio, rel=1e-6))


@given(gamma=st.floats(0.0, 1.0), low=st.integers(1, 900), high=st.integers(1, 99))
def test_a_black_image_keeps_the_level_that_the_model_is_told(gamma, low, high):
    """x = sigma * e, D = 0: the next latent has variance sigma_next^2 at every gamma."""
    sigmas = torch.stack([TABLE[low + high], TABLE[low], torch.tensor(0.0)])
    weight = step_weights(sigmas, gamma=gamma, table=TABLE)[0]
    assert math.hypot(weight.x * float(sigmas[0]), weight.fresh) == pytest.approx(float(sigmas[1]), rel=1e-6)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_perfect_prediction_stays_on_the_forward_process(process):
    """For x = a x0 + b e and D = x0 the next latent is a' x0 plus unit noise times b'."""
    noise_scaling, table, sigmas = PROCESSES[process]
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    for gamma in (0.0, 0.4, 1.0):
        weights = step_weights(sigmas, gamma=gamma, table=table, noise_scaling=noise_scaling)
        for weight, sigma, sigma_next in zip(weights, sigmas[:-1], sigmas[1:], strict=True):
            a, b = float(noise_scaling(sigma, zero, one)), float(noise_scaling(sigma, one, zero))
            signal = float(noise_scaling(sigma_next, zero, one))
            noise = float(noise_scaling(sigma_next, one, zero))
            assert weight.x * a + weight.denoised == pytest.approx(signal, abs=2e-6)
            assert math.hypot(weight.x * b, weight.fresh) == pytest.approx(noise, abs=2e-6)


@pytest.mark.parametrize("timestep", [19, 59, 99])
def test_c_skip_counts_at_every_timestep_where_float32_can_see_it(timestep):
    """Timestep 19 is the last of every whole run: 0.5^2 / ((10 * 19)^2 + 0.5^2) is 6.9e-6, seventy units of float32."""
    sigmas = torch.tensor([1.0, 0.0])
    (weight,) = step_weights(sigmas, timesteps=[timestep])
    c_skip = 0.25 / ((10.0 * timestep) ** 2 + 0.25)
    assert weight.x == pytest.approx(c_skip / math.sqrt(2.0), rel=1e-5)
    assert weight.denoised == pytest.approx(10.0 * timestep / math.sqrt((10.0 * timestep) ** 2 + 0.25), rel=1e-7)


def no_noise(sigma, noise, latent):
    """A process from picture to picture, as ComfyUI's IMG_TO_IMG_FLOW."""
    return latent


def noise_from_half_on(sigma, noise, latent):
    return latent + (sigma < 0.5) * noise


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.999, 1.0, (0.0, 1.0)])
def test_a_process_without_noise_takes_each_prediction_as_it_is(gamma):
    table = torch.linspace(0.001, 1.0, 1000)
    weights = step_weights(torch.tensor([1.0, 0.75, 0.25, 0.0]), gamma=gamma, table=table, noise_scaling=no_noise)
    assert weights == [StepWeights(0.0, 1.0, 0.0)] * 3


def test_noise_that_was_never_there_cannot_be_kept():
    table = torch.linspace(0.001, 1.0, 1000)
    sigmas = torch.tensor([1.0, 0.75, 0.25, 0.0])
    for gamma in (0.0, 0.5):
        with pytest.raises(ValueError, match=r"without noise to one with noise 1, .* Set gamma to 1"):
            step_weights(sigmas, gamma=gamma, table=table, noise_scaling=noise_from_half_on)
    assert step_weights(sigmas, table=table, noise_scaling=noise_from_half_on)[1] == StepWeights(0.0, 1.0, 1.0)
