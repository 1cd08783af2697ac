"""The sampling loop: perfect denoisers with known answers, the k-diffusion protocol, dtypes, errors."""

from itertools import pairwise

import pytest
import torch

from lcm_kit.samplers.linear_step import Plan, StepWeights, plan_run
from lcm_kit.samplers.multistep import sample_lcm
from lcm_kit.samplers.noise import StepNoise, level_numbers
from lcm_kit.samplers.schedule import lcm_timesteps, sigmas_at
from lcm_kit.tests.samplers.toy import as_denoiser, sigma_table

TABLE = sigma_table()
TIMESTEPS = lcm_timesteps(4)
SIGMAS = sigmas_at(TIMESTEPS, TABLE)
MODEL = as_denoiser("epsilon", TABLE)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def no_noise(step, like):
    pytest.fail("noise was drawn")


def recorded(run, **arguments):
    """The run's result and what its callback was given, with a copy of every tensor made at that moment."""
    seen = []

    def callback(state):
        seen.append((state, {key: torch.as_tensor(value).clone() for key, value in state.items()}))

    return run(callback=callback, **arguments), seen


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_a_perfect_denoiser_of_one_image_returns_it(gamma):
    image = normal(1, 4, 8, 8, seed=1)
    x = image + SIGMAS[0] * normal(1, 4, 8, 8)
    result = sample_lcm(lambda x, sigma: image, x, SIGMAS, noise=StepNoise(0), gamma=gamma, table=TABLE)
    assert torch.equal(result, image)


def test_a_run_takes_place_where_the_latent_is():
    """Levels come to its device: meta stands for one without numbers."""
    told = []

    def model(x, sigma):
        told.append((x.device.type, sigma.device.type, sigma.dtype))
        return 0.5 * x

    x, plan = torch.zeros(2, 4, 8, 8, device="meta"), plan_run(SIGMAS, table=TABLE)
    assert sample_lcm(model, x, SIGMAS.double(), noise=StepNoise(0), plan=plan).device.type == "meta"
    assert told == [("meta", "meta", torch.float32)] * 4


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.0])
def test_every_gamma_leaves_the_noise_level_that_the_model_is_told(gamma):
    """With a perfect denoiser of a black image, x is pure noise of level sigma at every step."""
    x = SIGMAS[0] * normal(1, 4, 64, 64)
    _, seen = recorded(
        lambda callback: sample_lcm(
            lambda x, sigma: torch.zeros_like(x),
            x,
            SIGMAS,
            noise=StepNoise(0),
            gamma=gamma,
            table=TABLE,
            callback=callback,
        )
    )
    for state, _ in seen:
        # Standard deviation of 16384 samples: five standard errors are 5 / sqrt(2 * 16384) = 2.8 %.
        assert state["x"].std().item() == pytest.approx(SIGMAS[state["i"]].item(), rel=0.028)


def test_gamma_one_is_the_denoised_image_plus_fresh_noise():
    x, source = SIGMAS[0] * normal(2, 4, 8, 8), StepNoise(9)
    expected = x
    for (sigma, sigma_next), level in zip(pairwise(SIGMAS), level_numbers(SIGMAS[1:]), strict=True):
        denoised = MODEL(expected, sigma.expand(2))
        expected = denoised + sigma_next * source(level, x) if sigma_next > 0 else denoised
    # One rounding less than here: sigma * noise + denoised is a single operation.
    torch.testing.assert_close(sample_lcm(MODEL, x, SIGMAS, noise=source), expected, rtol=0, atol=2e-6)


def test_gamma_zero_is_eulers_method_and_draws_no_noise():
    x = SIGMAS[0].double() * normal(2, 4, 8, 8).double()
    expected = x
    for sigma, sigma_next in pairwise(SIGMAS):
        derivative = (expected - MODEL(expected, sigma.expand(2))) / sigma
        expected = expected + derivative * (sigma_next - sigma)
    result = sample_lcm(MODEL, x, SIGMAS, noise=no_noise, gamma=0.0)
    # Same formula in another order; float64, but sigma_next - sigma above is float32.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_gamma_tends_to_its_ends():
    x = SIGMAS[0] * normal(1, 4, 8, 8)
    ends = {gamma: sample_lcm(MODEL, x, SIGMAS, noise=StepNoise(0), gamma=gamma, table=TABLE) for gamma in (0.0, 1.0)}
    near_zero = sample_lcm(MODEL, x, SIGMAS, noise=StepNoise(0), gamma=1e-9, table=TABLE)
    torch.testing.assert_close(near_zero, ends[0.0], rtol=0, atol=1e-4)
    near_one = sample_lcm(MODEL, x, SIGMAS, noise=StepNoise(0), gamma=1 - 1e-9, table=TABLE)
    # At s = 0 the share of old noise is sigma(0) / sigma(259) = 4 % at most: near LCM, not equal to it.
    torch.testing.assert_close(near_one, ends[1.0], rtol=0, atol=0.15)
    assert not torch.equal(near_one, ends[1.0])


def test_one_step_draws_no_noise():
    x = SIGMAS[0] * normal(1, 4, 8, 8)
    sigmas = sigmas_at([999], TABLE)
    assert torch.equal(sample_lcm(MODEL, x, sigmas, noise=no_noise), MODEL(x, sigmas[:1]))


@pytest.mark.parametrize(("gamma", "table"), [(1.0, None), (1.0, TABLE), (0.3, TABLE), (0.0, None)])
@pytest.mark.parametrize("steps", [4, 8])
def test_a_run_that_stops_at_any_level_and_goes_on_is_the_undivided_run(steps, gamma, table):
    """Its noise is that of the level, whatever call it is added in; also when every step is a call of its own."""
    sigmas = sigmas_at(lcm_timesteps(steps), TABLE)
    x = sigmas[0] * normal(2, 4, 8, 8)

    def run(x, sigmas):
        return sample_lcm(MODEL, x, sigmas, noise=StepNoise(4), gamma=gamma, table=table)

    undivided = run(x, sigmas)
    for place in range(1, steps):
        assert torch.equal(run(run(x, sigmas[: place + 1]), sigmas[place:]), undivided)
    for place in range(steps):
        x = run(x, sigmas[place : place + 2])
    assert torch.equal(x, undivided)


@pytest.mark.parametrize("sigmas", [torch.ones(0), torch.ones(1)])
def test_no_steps_return_the_latent(sigmas):
    x = normal(1, 4, 8, 8)
    assert torch.equal(sample_lcm(MODEL, x, sigmas, noise=no_noise), x)


def test_boundary_scalings_pull_the_result_towards_the_latent_near_timestep_zero():
    """At timestep 0 the consistency function is the identity: x_vp comes back, whatever the model says."""
    x = normal(1, 4, 8, 8)
    result = sample_lcm(lambda x, sigma: 7 + x, x, torch.tensor([3.0**0.5, 0.0]), noise=no_noise, timesteps=[0])
    torch.testing.assert_close(result, x / 2)  # sqrt(1 + sigma^2) = 2


def test_the_protocol_of_k_diffusion():
    x, calls = SIGMAS[0] * normal(2, 4, 8, 8), []

    def model(x, sigma, **extra_args):
        calls.append((sigma.clone(), extra_args))
        return MODEL(x, sigma)

    def run(callback):
        extra_args = {"denoise_mask": None, "seed": 3}
        return sample_lcm(model, x, SIGMAS, extra_args=extra_args, callback=callback, noise=StepNoise(0))

    result, seen = recorded(run)
    for step, (state, _) in enumerate(seen):
        assert torch.equal(calls[step][0], SIGMAS[step].expand(2))
        assert calls[step][1] == {"denoise_mask": None, "seed": 3}
        assert set(state) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert state["i"] == step
        assert state["sigma"] == state["sigma_hat"] == SIGMAS[step]
    assert len(seen) == len(calls) == 4
    assert torch.equal(seen[0][0]["x"], x)
    assert torch.equal(seen[-1][0]["denoised"], result)


@pytest.mark.parametrize("timesteps", [None, TIMESTEPS])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_tensors_given_to_the_callback_and_inputs_never_change(gamma, timesteps):
    x, sigmas = SIGMAS[0] * normal(1, 4, 8, 8), SIGMAS.clone()
    x_before = x.clone()
    arguments = {"noise": StepNoise(0), "gamma": gamma, "table": TABLE, "timesteps": timesteps}
    _, seen = recorded(lambda callback: sample_lcm(MODEL, x, sigmas, callback=callback, **arguments))
    for state, copies in seen:
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), copies[key]), f"{key} of step {state['i']} changed"
    assert torch.equal(x, x_before)
    assert torch.equal(sigmas, SIGMAS)


def test_an_exception_of_the_model_ends_the_run():
    class Interrupted(Exception):
        pass

    def model(x, sigma):
        if sigma[0] < SIGMAS[1]:
            raise Interrupted
        return x

    seen = []
    with pytest.raises(Interrupted):
        sample_lcm(model, normal(1, 4, 8, 8), SIGMAS, noise=StepNoise(0), callback=seen.append)
    assert len(seen) == 2


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_an_image_alone_equals_the_image_in_a_batch(gamma):
    x = SIGMAS[0] * normal(3, 4, 8, 8)
    arguments = {"gamma": gamma, "table": TABLE, "timesteps": TIMESTEPS}
    batch = sample_lcm(MODEL, x, SIGMAS, noise=StepNoise(8), **arguments)
    for index in range(3):
        alone = sample_lcm(MODEL, x[index : index + 1], SIGMAS, noise=StepNoise(8, [index]), **arguments)
        torch.testing.assert_close(alone[0], batch[index], rtol=0, atol=1e-5)  # vector kernels round by position


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_half_precision_goes_in_and_out_and_is_float32_inside(dtype, gamma):
    x = (SIGMAS[0] * normal(1, 4, 8, 8)).to(dtype)
    half_image = normal(1, 4, 8, 8, seed=1).to(dtype)
    kinds = []

    def model(x, sigma):
        kinds.append((x.dtype, sigma.dtype))
        return half_image

    def noise(level, like):
        assert like.dtype == torch.float32
        return StepNoise(0)(level, like)

    arguments = {"noise": noise, "gamma": gamma, "table": TABLE, "timesteps": TIMESTEPS}
    result, seen = recorded(lambda callback: sample_lcm(model, x, SIGMAS, callback=callback, **arguments))
    assert result.dtype == dtype
    assert all(state["x"].dtype == state["denoised"].dtype == dtype for state, _ in seen)
    # sigma stays float32: 14.6146 would be timestep 998 after rounding to half precision.
    assert set(kinds) == {(dtype, torch.float32)}
    torch.testing.assert_close(result, half_image, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 16), (2, 1, 37), (1, 4, 3, 8, 8)])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_any_number_of_dimensions(shape, gamma):
    def model(x, sigma):
        assert sigma.shape == x.shape[:1]
        return 0.5 * x

    x = SIGMAS[0] * normal(*shape)
    result = sample_lcm(model, x, SIGMAS, noise=StepNoise(0), gamma=gamma, table=TABLE, timesteps=TIMESTEPS)
    assert result.shape == shape
    assert result.isfinite().all()


def test_the_global_generator_is_untouched_and_a_run_repeats():
    x = SIGMAS[0] * normal(1, 4, 8, 8)
    before = torch.get_rng_state()
    first = sample_lcm(MODEL, x, SIGMAS, noise=StepNoise(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(sample_lcm(MODEL, x, SIGMAS, noise=StepNoise(1)), first)
    assert not torch.equal(sample_lcm(MODEL, x, SIGMAS, noise=StepNoise(2)), first)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_flow_models_bring_their_own_forward_process(gamma):
    """Rectified flow of a known image: at every step x = (1 - sigma) * image + sigma * unit noise."""
    table = torch.linspace(0.001, 1.0, 1000)
    sigmas = sigmas_at([999, 749, 499, 249], table)
    image = torch.full((1, 4, 64, 64), 3.0)

    def flow(sigma, noise, latent):
        return sigma * noise + (1.0 - sigma) * latent

    arguments = {"noise": StepNoise(0), "gamma": gamma, "table": table, "noise_scaling": flow}
    x = normal(*image.shape)
    result, seen = recorded(
        lambda callback: sample_lcm(lambda x, sigma: image, x, sigmas, callback=callback, **arguments)
    )
    assert torch.equal(result, image)
    for state, _ in seen:
        unit_noise = (state["x"] - (1 - state["sigma"]) * image) / state["sigma"]
        assert abs(unit_noise.mean().item()) < 5 / 128  # five standard errors of 16384 samples
        assert unit_noise.std().item() == pytest.approx(1.0, rel=0.028)


def test_the_progress_bar_is_the_callers():
    bars = []

    def trange(steps, *, disable):
        bars.append((steps, disable))
        return range(steps)

    sample_lcm(MODEL, normal(1, 4, 8, 8), SIGMAS, noise=StepNoise(0), trange=trange, disable=True)
    assert bars == [(4, True)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigmas": torch.tensor([14.6, 0.0, 0.7, 0.0])}, r"sigmas are \[14\.6.*, the last may be 0"),
        ({"sigmas": torch.tensor([14.6, -1.0])}, "all must be finite and above 0"),
        ({"sigmas": torch.tensor([float("inf"), 0.0])}, r"sigmas are \[inf, 0\.0\]"),
        ({"sigmas": torch.ones(2, 2)}, r"sigmas has shape \(2, 2\)"),
        ({"timesteps": [999, 499]}, r"2 timesteps for 4 steps; .* sigmas\[:-1\], or None"),
        ({"gamma": 1.5}, r"gamma is 1\.5"),
        ({"gamma": 0.5}, r"gamma is 0\.5; .*table="),
    ],
)
def test_bad_arguments_are_refused_before_the_first_model_call(changes, message):
    def model(x, sigma):
        pytest.fail("the model was called")

    arguments = {"sigmas": SIGMAS, "noise": StepNoise(0)} | changes
    with pytest.raises(ValueError, match=message):
        sample_lcm(model, normal(1, 4, 8, 8), **arguments)


def test_a_noise_source_keeps_its_tensors_unless_it_hands_them_over():
    """A tape that returns the tensors that it holds, the same in every step."""
    tape = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    before = tape.clone()
    x = sample_lcm(lambda x, sigma: torch.ones_like(x), torch.zeros(2, 3), SIGMAS, noise=lambda level, like: tape)
    assert torch.equal(tape, before)
    torch.testing.assert_close(x, torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_shares_no_memory_with_what_the_model_returned(dtype):
    """A model may keep its tensor, and a host may scale a latent in place."""
    image = normal(1, 4, 8, 8, seed=1).to(dtype)
    result = sample_lcm(lambda x, sigma: image, image + SIGMAS[0], SIGMAS, noise=StepNoise(0))
    assert torch.equal(result, image)
    assert result.data_ptr() != image.data_ptr()


def test_a_trace_of_the_latent_is_not_added_into_what_the_model_returned():
    """A prediction whose own weight is 1 in float32 is the result as it is, but for the latent's small share."""
    image = normal(1, 4, 8, 8, seed=1)
    kept, x = image.clone(), image + 14.0
    plan = Plan((StepWeights(x=0.25, denoised=1.0, fresh=0.0),), (0,))
    result = sample_lcm(lambda x, sigma: image, x, torch.tensor([14.0, 0.0]), noise=StepNoise(0), plan=plan)
    assert torch.equal(image, kept)
    torch.testing.assert_close(result, kept + 0.25 * x)


@pytest.mark.parametrize("weight", [2.0, -1.0, 0.0, 0.5, 1.0])
def test_a_prediction_has_the_weight_that_the_plan_says(weight):
    image = normal(1, 4, 8, 8, seed=1)
    plan = Plan((StepWeights(0.0, weight, 0.0),), (0,))
    result = sample_lcm(lambda x, sigma: image, image, torch.tensor([1.0, 0.0]), noise=no_noise, plan=plan)
    assert torch.equal(result, weight * image)


def test_in_float64_a_weight_counts_that_float32_cannot_tell_from_one():
    plan = Plan((StepWeights(0.0, 1 - 2.0**-30, 0.0),), (0,))
    image = normal(1, 4, 8, 8, seed=1).double()
    result = sample_lcm(lambda x, sigma: image, image, torch.tensor([1.0, 0.0]), noise=no_noise, plan=plan)
    assert torch.equal(result, image * (1 - 2.0**-30))
