"""The noise levels of LCM Scheduler on ComfyUI's own model_sampling, whatever the length of its table."""

import logging
import math
from itertools import pairwise

import comfy.model_base
import comfy.samplers
import pytest
import torch
from comfy.k_diffusion.sampling import get_sigmas_karras
from comfy.model_base import ModelType
from comfy_extras import nodes_custom_sampler as custom

from lcm_kit.host.sampling.tables import sigma_table
from lcm_kit.nodes.sampling import LCMSampler
from lcm_kit.nodes.scheduling import LCMPreset, LCMScheduler
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.samplers.renoise import noise_kept
from lcm_kit.tests.samplers.toy import diffusers
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.levels import Sampled, shifted

STEPPED = [name for name, preset in PRESETS.items() if preset.timesteps]


def published(timesteps):
    """Training timesteps as their authors mean them: a thousandth of the way from clean to noise each."""
    return [(t + 1) / 1000 for t in timesteps]


# Flow models as ComfyUI sets them up -> kind, settings, and the shift of its odds.
FLOWS = {
    "1,000 levels, shift 1": (ModelType.FLOW, {"multiplier": 1.0, "shift": 1.0}, 1.0),
    "1,000 levels, shift 8": (ModelType.FLOW, {"shift": 8.0}, 8.0),
    "10,000 levels, mu 1.15": (ModelType.FLUX, {}, math.exp(1.15)),
    "10,000 levels, mu 2.37": (ModelType.FLUX, {"shift": 2.37}, math.exp(2.37)),
}
EVERY_FLOW = pytest.mark.parametrize("flow", FLOWS)


def sigmas(model, *, steps=4, denoise=1.0, original_steps=50, timesteps="", preset=None):
    given = {} if preset is None else {"preset": LCMPreset.execute(preset, 0).result[0]}
    return LCMScheduler.execute(model, steps, denoise, original_steps, timesteps, **given).result[0]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- timesteps are thousandths, whatever the length of the table


@EVERY_FLOW
@pytest.mark.parametrize("name", STEPPED)
def test_a_presets_timesteps_are_thousandths_of_every_table(flow, name):
    kind, settings, shift = FLOWS[flow]
    preset = PRESETS[name]
    expected = [*shifted(shift, published(preset.timesteps[: preset.steps])), 0.0]
    torch.testing.assert_close(sigmas(Sampled(kind, settings), preset=name), torch.tensor(expected), rtol=0, atol=1e-6)


@EVERY_FLOW
@pytest.mark.parametrize("timesteps", [[999, 749, 499, 249], [999, 0], [600, 3, 2, 1]])
def test_typed_timesteps_are_thousandths_of_every_table(flow, timesteps):
    kind, settings, shift = FLOWS[flow]
    found = sigmas(Sampled(kind, settings), timesteps=", ".join(map(str, timesteps)))
    expected = [*shifted(shift, published(timesteps)), 0.0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


def test_stable_cascades_ten_thousand_levels_are_read_in_thousandths():
    model = Sampled(ModelType.STABLE_CASCADE, {"shift": 2.0})
    timesteps = [999, 749, 499, 249]
    expected = [float(model.model_sampling.sigma(torch.tensor(t))) for t in published(timesteps)]
    torch.testing.assert_close(sigmas(model, preset="DMD2"), torch.tensor([*expected, 0.0]), rtol=1e-5, atol=0)


@EVERY_FLOW
@pytest.mark.parametrize("timesteps", ["1000, 499", "9999", "-1"])
def test_a_timestep_beyond_the_thousandths_is_refused_on_every_table(flow, timesteps):
    kind, settings, _ = FLOWS[flow]
    with pytest.raises(ValueError, match="lie outside 0 to 999"):
        sigmas(Sampled(kind, settings), timesteps=timesteps)


@pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.V_PREDICTION])
@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if not preset.flow])
def test_a_thousand_levels_are_their_own_timesteps(kind, name):
    model = Sampled(kind, {})
    expected = torch.cat([model.model_sampling.sigmas[PRESETS[name].schedule()], torch.zeros(1)])
    assert torch.equal(sigmas(model, preset=name), expected)


# ---- flow models: evenly spaced times through their own shift


def core_simple(model, steps):
    return comfy.samplers.calculate_sigmas(model.model_sampling, "simple", steps)


@EVERY_FLOW
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 8, 12, 30, 1000])
def test_the_default_of_a_flow_model_is_evenly_spaced_through_its_shift(flow, steps):
    kind, settings, shift = FLOWS[flow]
    found = sigmas(Sampled(kind, settings), steps=steps)
    expected = [*shifted(shift, [1 - i / steps for i in range(steps)]), 0.0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=5e-5)
    assert abs(float(found[0]) - 1.0) < 1e-6


@EVERY_FLOW
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20, 25])
def test_it_is_cores_simple_to_the_bit_where_that_needs_no_rounding(flow, steps):
    kind, settings, _ = FLOWS[flow]
    model = Sampled(kind, settings)
    assert torch.equal(sigmas(model, steps=steps), core_simple(model, steps))


@EVERY_FLOW
@pytest.mark.parametrize("denoise", [0.01, 0.05, 0.2, 0.333, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("preset", [None, "LCM", "DMD2", "Turbo"])
def test_below_denoise_one_a_flow_model_runs_all_steps_from_the_time_asked_for(flow, denoise, preset):
    kind, settings, shift = FLOWS[flow]
    steps = 4 if preset is None else PRESETS[preset].steps
    found = sigmas(Sampled(kind, settings), steps=steps, denoise=denoise, preset=preset)
    expected = [*shifted(shift, [denoise * (1 - i / steps) for i in range(steps)]), 0.0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=2e-4)


@EVERY_FLOW
def test_original_steps_mean_nothing_to_a_flow_model(flow, caplog):
    kind, settings, _ = FLOWS[flow]
    model = Sampled(kind, settings)
    assert torch.equal(sigmas(model, steps=8, original_steps=3), sigmas(model, steps=8))
    sigmas(model, timesteps="999, 749, 499, 249")
    assert warnings_of(caplog) == []


# ---- denoise: from the level asked for, at every value

DENOISE = [0.001, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.333, 0.4, 0.49, 0.5, 0.6, 0.74, 0.75, 0.9, 0.99, 1.0]


def entry_of(model, level):
    """The timestep of a level of a table of 1000."""
    found = (model.model_sampling.sigmas == level).nonzero()
    return int(found[0, 0])


@pytest.mark.parametrize("name", STEPPED)
def test_listed_timesteps_start_at_the_level_asked_for_to_one_timestep(name):
    model, preset = Sampled(ModelType.EPS, {}), PRESETS[name]
    for denoise in DENOISE:
        levels = sigmas(model, denoise=denoise, preset=name)
        start = (preset.timesteps[0] + 1) * denoise - 1
        assert abs(entry_of(model, levels[0]) - max(start, 0)) <= 0.5 + 1e-9, denoise
        assert levels[-1] == 0
        assert bool((levels.diff() < 0).all()), denoise
        if denoise >= 0.01 and preset.gamma > 0:
            assert len(levels) == preset.steps + 1, denoise


@pytest.mark.parametrize("name", [name for name in STEPPED if PRESETS[name].gamma == 0.0])
def test_a_model_of_steps_of_one_length_runs_none_that_are_longer(name):
    model, preset = Sampled(ModelType.EPS, {}), PRESETS[name]
    for denoise in DENOISE:
        levels = sigmas(model, denoise=denoise, preset=name)
        timesteps = [entry_of(model, level) for level in levels[:-1]] + [-1]
        longest = max(above - below for above, below in pairwise(timesteps))
        assert longest <= 1000 / preset.steps + 1, denoise
        assert len(levels) - 1 == math.ceil(preset.steps * denoise - 1e-4), denoise


@pytest.mark.parametrize("denoise", [0.25, 0.5, 0.75])
def test_at_a_whole_number_of_its_steps_such_a_model_runs_the_very_ones_it_was_trained_for(denoise):
    model = Sampled(ModelType.EPS, {})
    own = sigmas(model, preset="Lightning 4 steps")
    assert torch.equal(sigmas(model, denoise=denoise, preset="Lightning 4 steps"), own[-int(4 * denoise) - 1 :])


@pytest.mark.parametrize(("steps", "denoise", "left"), [(4, 0.05, 2), (8, 0.15, 7), (20, 0.35, 17), (4, 0.01, 1)])
def test_a_training_grid_gives_the_steps_it_has_and_one_line_of_warning(steps, denoise, left, caplog):
    levels = sigmas(Sampled(ModelType.EPS, {}), steps=steps, denoise=denoise)
    assert len(levels) == left + 1
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"denoise {denoise:g} leaves {left} of the 50 timesteps")
    assert f"{left} model call{'s' * (left > 1)} in place of {steps}" in warning


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20, 50])
@pytest.mark.parametrize("flow", [False, True])
def test_every_denoise_runs_at_every_number_of_steps(steps, flow):
    model = Sampled(*FLOWS["1,000 levels, shift 8"][:2]) if flow else Sampled(ModelType.EPS, {})
    for denoise in DENOISE:
        levels = sigmas(model, steps=steps, denoise=denoise)
        assert levels[-1] == 0
        assert bool((levels.diff() < 0).all()), denoise
        assert levels.isfinite().all(), denoise


@pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.FLOW, ModelType.EDM])
@pytest.mark.parametrize("preset", [None, "LCM", "DMD2"])
def test_denoise_zero_is_an_empty_schedule_as_cores_schedulers_have_it(kind, preset):
    assert len(sigmas(Sampled(kind, {}), denoise=0.0, preset=preset)) == 0


def test_typed_timesteps_keep_at_least_their_last(caplog):
    model = Sampled(ModelType.EPS, {})
    levels = sigmas(model, timesteps="999, 759, 499, 259", denoise=0.1)
    assert torch.equal(levels, torch.stack([model.model_sampling.sigmas[259], torch.tensor(0.0)]))
    assert warnings_of(caplog) == ["denoise 0.1 leaves none of the 4 timesteps: the last one, 259, is run."]


# ---- models of continuous noise levels

CONTINUOUS = {
    "SVD": (ModelType.V_PREDICTION_EDM, {"sigma_max": 700.0, "sigma_min": 0.002}),
    "CosXL": (ModelType.V_PREDICTION_CONTINUOUS, {}),
    "Playground 2.5": (ModelType.EDM, {"sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.002}),
    "Cosmos": (ModelType.FLOW_COSMOS, {"sigma_data": 1.0, "sigma_max": 80.0, "sigma_min": 0.002}),
}


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_model_of_continuous_levels_takes_evenly_from_karras_levels(name, steps):
    """The i-th of n steps is level i (N / n) of Karras' N, the noisiest first, as consistency models are sampled."""
    model = Sampled(*CONTINUOUS[name])
    low, high = float(model.model_sampling.sigma_min), float(model.model_sampling.sigma_max)
    karras = get_sigmas_karras(1000, low, high)[:-1].double()
    found = sigmas(model, steps=steps)
    assert float(found[0]) == pytest.approx(high, rel=1e-6)
    assert found[-1] == 0
    torch.testing.assert_close(
        found[:-1].double(), torch.stack([karras[i * 1000 // steps] for i in range(steps)]), rtol=2e-5, atol=0
    )


def test_animatelcm_svds_own_scheduler_takes_the_same_levels_from_forty():
    """Its scheduler is diffusers' for consistency models, with 40 levels up to 700: one more level is 1/40 of time."""
    scheduler = diffusers().CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=700.0)
    scheduler.set_timesteps(4)
    found = sigmas(Sampled(*CONTINUOUS["SVD"]), steps=4)
    roots = [level ** (1 / 7) for level in scheduler.sigmas[:4].tolist()]
    assert found[:4].pow(1 / 7).tolist() == pytest.approx(roots, abs=0.05)


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("steps", [1, 3, 4, 50])
def test_continuous_levels_at_every_denoise(name, steps):
    model = Sampled(*CONTINUOUS[name])
    starts = []
    for denoise in DENOISE:
        levels = sigmas(model, steps=steps, denoise=denoise)
        assert len(levels) == steps + 1
        assert bool((levels.diff() < 0).all())
        starts.append(float(levels[0]))
    assert starts == sorted(starts)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_gamma_between_counts_the_time_of_continuous_levels_as_the_schedule_does(name):
    """TCD's s = (1 - gamma) t, in thousandths of Karras' levels; the share of old noise is sigma_s / sigma_t."""
    model = Sampled(*CONTINUOUS[name])
    levels, table = sigmas(model, steps=4), sigma_table(model.model_sampling)
    found = noise_kept(levels, 0.3, table=table)
    expected = [float(table[int(0.7 * t)] / table[t]) for t in (749, 499, 249)]
    assert found[:3] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.FLOW, ModelType.EDM])
def test_core_gives_the_latent_back_on_the_schedule_of_denoise_zero(kind):
    model, latent = tiny.small_model(kind), tiny.latent(seed=9)
    empty = LCMScheduler.execute(model, 4, 0.0, 50, "").result[0]
    sampler = LCMSampler.execute(1.0, -1).result[0]
    for noisy in (True, False):
        result = custom.SamplerCustom.execute(model, noisy, 5, 1.0, tiny.cond(1), tiny.cond(2), sampler, empty, latent)
        assert torch.equal(result.result[0]["samples"], latent["samples"])
