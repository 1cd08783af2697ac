"""The preset socket and the gammas text: what they replace, what overrides them, and what is refused."""

import logging

import comfy.sample
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import nodes_custom_sampler as custom

from lcm_kit.host.door.check import faults_of
from lcm_kit.nodes import NODES
from lcm_kit.nodes.sampling import LCMKSampler, LCMSampler
from lcm_kit.nodes.scheduling import LCMPreset, LCMScheduler
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.tests.with_comfyui import tiny

SEED = 5


pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def model():
    """Predicts v, with which an untrained network keeps its latents near 1."""
    return tiny.small_model(ModelType.V_PREDICTION)


def preset(name, steps=0):
    return LCMPreset.execute(name, steps).result[0]


def lcm(model, **changed):
    inputs = {
        "positive": tiny.cond(1),
        "negative": tiny.cond(2),
        "latent_image": tiny.latent(seed=9),
        "seed": SEED,
        "steps": 4,
        "cfg": 1.0,
        "denoise": 1.0,
        "gamma": 1.0,
        "cfg_steps": -1,
        "original_steps": 50,
    }
    return LCMKSampler.execute(model, **inputs | changed).result[0]["samples"]


def scheduled(model, *, steps=4, denoise=1.0, original_steps=50, timesteps="", **preset):
    return LCMScheduler.execute(model, steps, denoise, original_steps, timesteps, **preset).result[0]


def with_sampler(model, sampler, sigmas):
    return custom.SamplerCustom.execute(
        model, True, SEED, 1.0, tiny.cond(1), tiny.cond(2), sampler, sigmas, tiny.latent(seed=9)
    ).result[0]["samples"]


# ---- a preset is its numbers


@pytest.mark.parametrize(
    ("name", "steps", "numbers"),
    [
        ("LCM", 0, {}),
        ("LCM", 6, {"steps": 6}),
        ("AnimateLCM", 0, {"original_steps": 100}),
        ("TCD", 8, {"steps": 8, "gamma": 0.3}),
        ("TDD", 0, {"cfg": 1.7, "gamma": 0.2, "original_steps": 250}),
        ("Turbo", 2, {"steps": 2, "original_steps": 4}),
        # These bring timesteps, which happen to be those of a grid.
        ("DMD2", 0, {"original_steps": 1000}),
        ("Lightning 4 steps", 0, {"gamma": 0.0, "original_steps": 4}),
    ],
)
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_a_preset_gives_the_picture_of_its_numbers_typed_in(model, name, steps, numbers, denoise):
    if name == "Lightning 4 steps" and denoise < 1:
        numbers = numbers | {"steps": 2}  # its steps are as long as it was trained for
    expected = lcm(model, denoise=denoise, **numbers)
    others = {"steps": 3, "cfg": 2.0, "gamma": 0.9, "original_steps": 25}
    assert torch.equal(lcm(model, denoise=denoise, preset=preset(name, steps), **others), expected)


@pytest.fixture(scope="module")
def flow_model():
    return tiny.small_model(ModelType.FLOW)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_samples_and_its_nodes_agree(model, flow_model, name):
    """LCM KSampler on the one hand, scheduler and sampler node in core's SamplerCustom on the other."""
    model = flow_model if PRESETS[name].flow else model
    chosen, steps, cfg, report = LCMPreset.execute(name, 0).result
    sigmas = scheduled(model, steps=9, preset=chosen)
    assert len(sigmas) == steps + 1
    assert report.startswith(f"{name}: {steps} step{'s' * (steps > 1)}, cfg {cfg:g}, gamma ")
    assert f"From {PRESETS[name].source}, {PRESETS[name].date}." in report
    assert f"Made for {PRESETS[name].models}; there sampled with {PRESETS[name].sampler}." in report
    picture = lcm(model, preset=chosen)
    assert picture.isfinite().all()
    if cfg == 1:
        sampler = LCMSampler.execute(0.5, -1, preset=chosen).result[0]
        assert torch.equal(with_sampler(model, sampler, sigmas), picture)


def test_a_preset_says_its_timesteps():
    assert "timesteps 999, 749, 499, 249" in LCMPreset.execute("DMD2", 0).result[3]
    assert "8 steps, cfg 1, gamma 0.3, 50 original steps" in LCMPreset.execute("TCD", 8).result[3]
    assert "Below denoise 1 fewer steps are run" in LCMPreset.execute("Lightning 4 steps", 0).result[3]
    assert "Below denoise 1" not in LCMPreset.execute("DMD2", 0).result[3]
    wan = LCMPreset.execute("Wan 2.2 lightx2v", 0).result[3]
    assert "4 steps, cfg 1, gamma 0, evenly spaced through the model's own shift." in wan
    assert "It also asks for: shift 5; LoRA at strength 1; the first 2 steps by the high-noise model." in wan
    assert "sigmas 0.9094, 0.725, 0.4219." in LCMPreset.execute("LTX-2 second stage", 0).result[3]
    assert "normal spaced through the model's own shift" in LCMPreset.execute("HiDream dev", 0).result[3]


# ---- none


@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_a_preset_of_none_is_no_preset(model, denoise):
    assert torch.equal(lcm(model, preset=None, denoise=denoise), lcm(model, denoise=denoise))
    assert torch.equal(scheduled(model, denoise=denoise, preset=None), scheduled(model, denoise=denoise))
    sampler = LCMSampler.execute(0.3, -1, preset=None).result[0]
    expected = with_sampler(model, LCMSampler.execute(0.3, -1).result[0], scheduled(model))
    assert torch.equal(with_sampler(model, sampler, scheduled(model)), expected)


TAKE_A_PRESET = {
    node: [entry for entry in node.define_schema().inputs if entry.get_io_type() == "LCM_PRESET"] for node in NODES
}


@pytest.mark.parametrize("node", [node for node, entries in TAKE_A_PRESET.items() if entries])
def test_every_node_that_takes_a_preset_takes_none(node):
    """As a loader gives for a file it does not know; the door lets it pass."""
    for entry in TAKE_A_PRESET[node]:
        assert entry.optional
        assert list(faults_of(entry, None)) == []
        assert list(faults_of(entry, "LCM")) != []


# ---- what holds of gamma, gammas and a preset


def test_gammas_are_one_gamma_for_each_step_and_the_last_one_holds(model):
    assert torch.equal(lcm(model, gammas="0.4", gamma=1.0), lcm(model, gamma=0.4))
    assert torch.equal(lcm(model, gammas="0, 1"), lcm(model, gammas="0 1 1, 1"))
    mixed = lcm(model, gammas="0, 1")
    assert all((mixed - lcm(model, gamma=gamma)).abs().max() > 0.01 for gamma in (0.0, 0.5, 1.0))


def test_blank_gammas_leave_gamma_as_it_is(model):
    assert torch.equal(lcm(model, gammas=" \n", gamma=0.3), lcm(model, gamma=0.3))


def test_gammas_override_a_preset_which_overrides_gamma(model):
    tcd = preset("TCD")
    assert torch.equal(lcm(model, preset=tcd, gamma=0.9), lcm(model, gamma=0.3))
    assert torch.equal(lcm(model, preset=tcd, gamma=0.9, gammas="0, 0.6"), lcm(model, gammas="0, 0.6"))


def test_gammas_and_preset_of_the_sampler_node_do_the_same(model):
    sigmas, tcd = scheduled(model), preset("TCD")
    for inputs in ({"gammas": "0, 1"}, {"preset": tcd}, {"preset": tcd, "gammas": "0.2, 0.6"}):
        sampler = LCMSampler.execute(0.9, -1, **inputs).result[0]
        assert torch.equal(with_sampler(model, sampler, sigmas), lcm(model, gamma=0.9, **inputs))


# ---- what is refused


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"gammas": "1, 1, 1, 1, 1"}, "gamma has 5 entries but the run has 4 steps. Give at most one for each step"),
        ({"gammas": "1, 1.5"}, r"gammas: '1\.5' is not a number from 0 .* to 1 .*Write one for each step"),
        ({"gammas": "fast"}, r"gammas: 'fast' is not a number"),
    ],
)
def test_the_samplers_refuse_gammas_that_cannot_be(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        lcm(model, **inputs)
    with pytest.raises(ValueError, match=message):
        with_sampler(model, LCMSampler.execute(1.0, -1, **inputs).result[0], scheduled(model))


def test_gammas_that_fit_the_steps_typed_in_but_not_the_presets_are_refused(model):
    with pytest.raises(ValueError, match="gamma has 3 entries but the run has 2 steps"):
        lcm(model, steps=4, gammas="0, 0, 1", preset=preset("Lightning 2 steps"))


def test_a_model_made_for_one_number_of_steps_takes_no_other():
    with pytest.raises(ValueError, match=r"steps is 6, but DMD2 was made for exactly 4 .*Set steps to 0 for its own"):
        preset("DMD2", 6)
    with pytest.raises(ValueError, match=r"steps is 60 but .* original_steps = 50"):
        preset("LCM", 60).schedule()


def test_timesteps_and_a_preset_together_are_refused(model):
    with pytest.raises(ValueError, match=r"timesteps are given \(999, 499\) and the preset TCD brings its own .*Clear"):
        scheduled(model, timesteps=" 999, 499", preset=preset("TCD"))


# ---- custom timesteps of the scheduler node


def test_custom_timesteps_below_denoise_one_are_the_last_of_the_list(model):
    table = model.get_model_object("model_sampling").sigmas
    for denoise, kept in ((0.75, [759, 499, 259]), (0.5, [499, 259]), (0.3, [259])):
        sigmas = scheduled(model, timesteps="999 759 499 259", denoise=denoise)
        assert torch.equal(sigmas, torch.cat([table[kept], torch.zeros(1)]))


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_timesteps_off_the_training_grid_are_named_once_with_the_nearest(model, caplog):
    scheduled(model, timesteps="999, 749, 499, 249")
    assert len(warnings_of(caplog)) == 1
    assert warnings_of(caplog)[0].startswith("timesteps: 749 (nearest 739), 249 (nearest 239): not among those")


@pytest.mark.parametrize(
    "inputs",
    [
        {"timesteps": "999, 759, 499, 259"},
        {"timesteps": "999, 749, 499, 249", "original_steps": 100},
        # Only what is run counts.
        {"timesteps": "990, 749, 499", "denoise": 0.4},
        {"preset": preset("DMD2")},
        {},
    ],
)
def test_nothing_is_warned_of_where_every_timestep_was_trained(model, caplog, inputs):
    scheduled(model, **inputs)
    assert warnings_of(caplog) == []


# ---- pure noise told to be less


def first_input(model):
    """A clone of the MODEL, and a list that gets the latent and the level of its first call."""
    model, seen = model.clone(), []

    def wrapper(apply_model, args):
        seen.append((args["input"].clone(), args["timestep"].clone()))
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    return model, seen


OF_PURE_NOISE = [name for name, own in PRESETS.items() if own.timesteps and own.timesteps[0] < 999]


def test_the_models_that_are_told_less_than_their_noise():
    assert OF_PURE_NOISE == ["DMD2 1 step", "Hyper-SD 1 step UNet"]


@pytest.mark.parametrize("name", OF_PURE_NOISE)
@pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.V_PREDICTION])
def test_a_run_from_noise_hands_the_network_noise_of_unit_variance_as_its_authors_do(name, kind):
    """They hand over torch.randn and tell the network timestep 399 or 800. Core would mix in that level's noise only,
    0.76 and 0.98 of it over an empty picture.
    """
    model, seen = first_input(tiny.small_model(kind))
    chosen, empty = preset(name), tiny.latent()
    lcm(model, preset=chosen, latent_image=empty)
    level = model.get_model_object("model_sampling").sigmas[chosen.timesteps[0]]
    noise = comfy.sample.prepare_noise(empty["samples"], SEED)
    torch.testing.assert_close(seen[0][0], noise * (1 + level**2).sqrt())
    assert seen[0][1] == level
    sampler = LCMSampler.execute(1.0, -1, preset=chosen).result[0]
    sigmas = scheduled(model, preset=chosen)
    custom.SamplerCustom.execute(model, True, SEED, 1.0, tiny.cond(1), tiny.cond(2), sampler, sigmas, empty)
    assert torch.equal(seen[1][0], seen[0][0])


@pytest.mark.parametrize("name", [*OF_PURE_NOISE, "DMD2", "Turbo"])
def test_below_denoise_one_a_picture_gets_the_noise_of_its_level(name):
    model, seen = first_input(tiny.small_model())
    picture = tiny.latent(seed=9)
    lcm(model, preset=preset(name), latent_image=picture, denoise=0.6)
    noise, level = comfy.sample.prepare_noise(picture["samples"], SEED), seen[0][1]
    torch.testing.assert_close(seen[0][0], model.model.process_latent_in(picture["samples"]) + level * noise)
