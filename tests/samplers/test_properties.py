"""Whatever is asked for: either an error that says what to do, or a finite latent, nothing else changed."""

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lcm_kit.samplers.multistep import sample_lcm
from lcm_kit.samplers.noise import StepNoise
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.samplers.renoise import parse_gammas, variance_exploding
from lcm_kit.samplers.schedule import custom_timesteps, lcm_timesteps, parse_timesteps, sigmas_at, timesteps_at
from lcm_kit.tests.samplers.toy import rectified_flow, sigma_table, zero_snr_alphas_cumprod

PROCESSES = {
    "stable diffusion": (sigma_table(), variance_exploding),
    "zero terminal SNR": (sigma_table(zero_snr_alphas_cumprod()), variance_exploding),
    "flow": (torch.linspace(0.001, 1.0, 1000), rectified_flow),
}
# What a way out is written with. Naming the rule counts where it says what to write, as "must be from 0 to 1".
WAY_OUT = re.compile(
    r"[Uu]se |[Gg]ive |[Rr]aise |[Pp]ass |[Ss]et |at least|must be|must fall|nearest|[Ww]rite |LCM-LoRA uses"
)

numbers = st.floats(-0.5, 1.5) | st.sampled_from([0.0, 1.0, 1e-9, 1 - 1e-9, float("nan"), float("inf")])
gammas = numbers | st.floats(0.0, 1.0) | st.lists(numbers | st.floats(0.0, 1.0), max_size=8)
strengths = st.floats(0.05, 1.0) | numbers
shapes = st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple)
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
timestep_lists = (
    st.lists(st.integers(0, 999), min_size=1, max_size=8, unique=True).map(lambda values: sorted(values)[::-1])
    | st.lists(st.integers(-5, 1005), max_size=4)
)  # fmt: skip


def refused(error):
    """The error is one of ours: it names a way out."""
    assert WAY_OUT.search(str(error)), f"no way out in: {error}"


def normal(shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@given(steps=st.integers(-2, 60), original_steps=st.integers(1, 60) | st.integers(-2, 1005), strength=strengths)
def test_a_schedule_descends_from_the_requested_strength_or_is_refused(steps, original_steps, strength):
    try:
        timesteps = lcm_timesteps(steps, original_steps=original_steps, strength=strength)
    except ValueError as error:
        refused(error)
        return
    assert len(timesteps) == steps
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert 0 <= timesteps[-1]
    # As noisy as asked for, to within one point of the grid.
    assert (
        1000 * strength - 1000 // original_steps - 1000 % original_steps - 1 < timesteps[0] + 1 <= 1000 * strength + 1
    )


@given(values=timestep_lists, strength=strengths)
def test_custom_timesteps_are_the_end_of_the_list_or_are_refused(values, strength):
    before = list(values)
    try:
        timesteps = custom_timesteps(values, strength=strength)
    except ValueError as error:
        refused(error)
    else:
        assert timesteps == values[len(values) - len(timesteps) :]
        assert abs(len(timesteps) - strength * len(values)) < 1
        assert timesteps == parse_timesteps(str(timesteps)[1:-1])
    assert values == before


@given(values=timestep_lists, process=st.sampled_from(sorted(PROCESSES)))
def test_sigmas_are_the_tables_own_entries_in_falling_order(values, process):
    table, _ = PROCESSES[process]
    before = table.clone()
    try:
        sigmas = sigmas_at(values, table)
    except ValueError as error:
        refused(error)
    else:
        assert torch.equal(sigmas[:-1], before[values])
        assert sigmas[-1] == 0
        assert bool((sigmas.diff() < 0).all())
        assert timesteps_at(sigmas[:-1], table).tolist() == values
    assert torch.equal(table, before)


@settings(max_examples=300)
@given(
    steps=st.integers(1, 8) | st.integers(-1, 60),
    own=st.none() | timestep_lists,
    strength=st.just(1.0) | strengths,
    original_steps=st.sampled_from([25, 50, 100, 250]),
    gamma=gammas,
    shape=shapes,
    dtype=dtypes,
    process=st.sampled_from(sorted(PROCESSES)),
    scaled=st.booleans(),
)
def test_a_run_ends_in_a_finite_latent_or_in_an_error_before_the_model_is_called(
    steps, own, strength, original_steps, gamma, shape, dtype, process, scaled
):
    table, noise_scaling = PROCESSES[process]
    calls = []

    def model(x, sigma):
        calls.append(sigma)
        return torch.tanh(x)

    x = normal(shape, dtype)
    x_before, gamma_before, generator = x.clone(), str(gamma), torch.get_rng_state()
    try:
        if own is None:
            timesteps = lcm_timesteps(steps, original_steps=original_steps, strength=strength)
        else:
            timesteps = custom_timesteps(own, strength=strength)
        sigmas = sigmas_at(timesteps, table)
        sigmas_before = sigmas.clone()
        arguments = {"noise": StepNoise(3), "gamma": gamma, "table": table, "noise_scaling": noise_scaling}
        arguments["timesteps"] = timesteps if scaled else None
        result = sample_lcm(model, x, sigmas, disable=True, **arguments)
    except ValueError as error:
        refused(error)
        assert calls == []
    else:
        assert (result.shape, result.dtype, result.device) == (x.shape, x.dtype, x.device)
        assert result.isfinite().all()
        assert len(calls) == len(timesteps)
        assert torch.equal(sigmas, sigmas_before)
        assert result is not x
        assert torch.equal(sample_lcm(model, x, sigmas, disable=True, **arguments), result)
    assert torch.equal(x, x_before)
    assert str(gamma) == gamma_before
    assert torch.equal(torch.get_rng_state(), generator)


@given(shape=st.lists(st.integers(0, 9), max_size=4), dtype=dtypes, indices=st.lists(st.integers(0, 99), max_size=4))
def test_an_image_of_any_shape_has_the_same_noise_alone_and_in_a_batch(shape, dtype, indices):
    together = StepNoise(3, indices)(2, torch.zeros(len(indices), *shape, dtype=dtype))
    for position, index in enumerate(indices):
        assert torch.equal(StepNoise(3, [index])(2, torch.zeros(1, *shape, dtype=dtype))[0], together[position])


@given(name=st.sampled_from(sorted(PRESETS)), steps=st.integers(-1, 60), strength=strengths)
@example(name="PCM normal cfg 16 steps", steps=0, strength=5e-324)
@example(name="PCM normal cfg 16 steps", steps=0, strength=6e-6)
def test_a_preset_gives_a_schedule_or_says_why_not(name, steps, strength):
    try:
        timesteps = PRESETS[name].with_steps(steps).schedule(strength=strength)
    except ValueError as error:
        refused(error)
    else:
        assert timesteps == sorted(set(timesteps), reverse=True)
        assert 0 <= timesteps[-1] <= timesteps[0] <= 999
        # One point of the training grid is left at any strength.
        assert timesteps[0] <= max(1000 * strength, 1000 / PRESETS[name].original_steps)


@given(text=st.text(alphabet="0123456789,. -+abcxe\n\t٩", max_size=20) | st.text(max_size=10))
def test_any_text_is_read_or_refused(text):
    try:
        assert all(isinstance(value, int) for value in parse_timesteps(text))
        assert all(0.0 <= value <= 1.0 for value in parse_gammas(text))
    except ValueError as error:
        refused(error)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_an_empty_batch_gives_an_empty_batch(gamma):
    table = sigma_table()
    x = torch.zeros(0, 4, 8, 8)
    result = sample_lcm(
        lambda x, sigma: x, x, sigmas_at([999, 499], table), noise=StepNoise(0), gamma=gamma, table=table, disable=True
    )
    assert result.shape == (0, 4, 8, 8)
