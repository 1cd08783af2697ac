"""LCM KSampler, LCM Multistep Sampler and LCM Scheduler on ComfyUI's own models and samplers."""

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy_extras.nodes_post_processing  # noqa: F401  first: it and nodes_latent import each other
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras import nodes_latent, nodes_model_advanced
from nodes import LatentFromBatch, SetLatentNoiseMask

from lcm_kit.nodes.sampling import LCMKSampler, LCMSampler
from lcm_kit.nodes.scheduling import LCMScheduler
from lcm_kit.samplers.noise import StepNoise, level_numbers
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import tiny

STEP_COUNTS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 25, 50]
SEED = 5


pytestmark = pytest.mark.usefixtures("no_gradients")


def lcm(model, latent, **changed):
    """LCM KSampler with its defaults; the samples it returns."""
    inputs = {
        "positive": tiny.cond(1),
        "seed": SEED,
        "steps": 4,
        "cfg": 1.0,
        "denoise": 1.0,
        "gamma": 1.0,
        "cfg_steps": -1,
        "original_steps": 50,
    }
    return LCMKSampler.execute(model=model, latent_image=latent, **inputs | changed).result[0]["samples"]


def scheduled(model, **changed):
    inputs = {"steps": 4, "denoise": 1.0, "original_steps": 50, "timesteps": ""}
    return LCMScheduler.execute(model=model, **inputs | changed).result[0]


def through_sampler_custom(model, latent, *, steps=4, denoise=1.0, gamma=1.0, seed=-1, noise_seed=SEED):
    sigmas = scheduled(model, steps=steps, denoise=denoise)
    sampler = LCMSampler.execute(gamma=gamma, seed=seed).result[0]
    return custom.SamplerCustom.execute(
        model, True, noise_seed, 1.0, tiny.cond(1), tiny.cond(2), sampler, sigmas, latent
    ).result[0]["samples"]


# ---- schedule


@pytest.mark.parametrize("model_type", [ModelType.EPS, ModelType.V_PREDICTION])
def test_schedule_holds_the_entries_of_the_models_own_table(model_type):
    model = tiny.small_model(model_type)
    table = model.get_model_object("model_sampling").sigmas
    expected = torch.cat([table[[999, 759, 499, 259]], torch.zeros(1)])
    assert torch.equal(scheduled(model), expected)


@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_schedule_is_unchanged_by_cores_lcm_patch(steps):
    model = tiny.small_model()
    (patched,) = nodes_model_advanced.ModelSamplingDiscrete().patch(model, "lcm", False)
    expected = scheduled(model, steps=steps)
    # rtol: the patch keeps logarithms, float32 rounds them
    torch.testing.assert_close(scheduled(patched, steps=steps), expected, rtol=2e-6, atol=0)
    told = patched.get_model_object("model_sampling").timestep(scheduled(patched, steps=steps)[:-1])
    assert torch.equal(told, model.get_model_object("model_sampling").timestep(expected[:-1]))


def test_timesteps_that_cores_lcm_patch_removed_become_the_next_above_and_that_is_said(caplog):
    model = tiny.small_model()
    (patched,) = nodes_model_advanced.ModelSamplingDiscrete().patch(model, "lcm", False)
    torch.testing.assert_close(scheduled(patched, original_steps=100), scheduled(model), rtol=2e-6, atol=0)
    assert "every 20th timestep only (19, 39, ...)" in caplog.text
    assert "749 to 759, 249 to 259" in caplog.text
    assert "beta_schedule" in caplog.text
    caplog.clear()
    typed = LCMScheduler.execute(patched, 4, 1.0, 50, "999, 757, 745, 3").result[0]
    table = model.get_model_object("model_sampling").sigmas
    torch.testing.assert_close(typed[:-1], table[[999, 759, 19]], rtol=2e-6, atol=0)
    scheduled(patched, original_steps=50)
    assert caplog.text.count("every 20th") == 1


def test_schedule_of_a_zero_terminal_snr_model_starts_at_its_last_entry():
    model = tiny.small_model(ModelType.V_PREDICTION, sampling_settings={"zsnr": True})
    sigmas = scheduled(model)
    assert sigmas[0] == model.get_model_object("model_sampling").sigma_max > 4000
    assert torch.isfinite(lcm(model, tiny.latent())).all()


def test_custom_timesteps_replace_the_schedule():
    model = tiny.small_model()
    table = model.get_model_object("model_sampling").sigmas
    assert torch.equal(scheduled(model, timesteps="999, 749 ,499")[:-1], table[[999, 749, 499]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 51}, r"steps is 51 .*original_steps = 50"),
        ({"original_steps": 1001}, r"original_steps is 1001"),
        ({"timesteps": "999, x"}, r"'x' is not a whole number"),
        ({"timesteps": "499, 999"}, r"499 then 999"),
        ({"timesteps": "1000"}, r"1000 lie outside 0 to 999"),
    ],
)
def test_schedule_refuses_with_the_value_and_the_way_out(changed, message):
    with pytest.raises(ValueError, match=message):
        scheduled(tiny.small_model(), **changed)


# ---- the sampler against diffusers


def diffusers_lcm(model, prediction_type, steps, noise, strength=1.0, image=None, **config):
    """The picture, in ComfyUI's scale, that diffusers' LCMScheduler makes with the same UNet and the same noise."""
    from diffusers.schedulers import scheduling_lcm

    scheduler = scheduling_lcm.LCMScheduler(prediction_type=prediction_type, **config)
    scheduler.set_timesteps(steps, strength=strength)
    context = tiny.cond(1)[0][0].expand(noise.shape[0], -1, -1)
    step_noise, table = StepNoise(SEED), model.get_model_object("model_sampling").sigmas
    levels = [*level_numbers(table[scheduler.timesteps[1:]], table), 0]
    x = noise
    if image is not None:
        x = scheduler.add_noise(model.model.process_latent_in(image), noise, scheduler.timesteps[:1])
    with pytest.MonkeyPatch.context() as patch:
        for step, t in enumerate(scheduler.timesteps):
            drawn = step_noise(levels[step], noise)
            patch.setattr(scheduling_lcm, "randn_tensor", lambda *args, drawn=drawn, **kwargs: drawn)
            times = torch.full((noise.shape[0],), float(t))
            x, denoised = scheduler.step(
                model.model.diffusion_model(x, times, context=context), t, x, return_dict=False
            )
    return model.model.process_latent_out(denoised)


@pytest.mark.parametrize("steps", STEP_COUNTS)
@pytest.mark.parametrize(("model_type", "name"), [(ModelType.EPS, "epsilon"), (ModelType.V_PREDICTION, "v_prediction")])
def test_ksampler_equals_diffusers(model_type, name, steps):
    model, latent = tiny.small_model(model_type), tiny.latent(2)
    expected = diffusers_lcm(model, name, steps, comfy.sample.prepare_noise(latent["samples"], SEED))
    # float32 rounding, of the largest value: an untrained epsilon model makes pictures with a spread far above 1
    assert relative(lcm(model, latent, steps=steps), expected) < 1e-5


def test_ksampler_equals_diffusers_on_a_zero_terminal_snr_model():
    model = tiny.small_model(ModelType.V_PREDICTION, sampling_settings={"zsnr": True})
    latent = tiny.latent()
    noise = comfy.sample.prepare_noise(latent["samples"], SEED)
    expected = diffusers_lcm(model, "v_prediction", 4, noise, rescale_betas_zero_snr=True)
    # ComfyUI keeps an alpha_bar of 5e-8 where diffusers has 0
    assert relative(lcm(model, latent), expected) < 1e-3


@pytest.mark.parametrize("denoise", [0.3, 0.58, 0.75, 0.9])
def test_image_to_image_equals_diffusers_at_that_strength(denoise):
    model, latent = tiny.small_model(ModelType.V_PREDICTION), tiny.latent(seed=9)
    noise = comfy.sample.prepare_noise(latent["samples"], SEED)
    # 1e-9: diffusers cuts its grid at int(50 * strength) without a guard, 28 for 0.58
    expected = diffusers_lcm(model, "v_prediction", 4, noise, strength=denoise + 1e-9, image=latent["samples"])
    assert relative(lcm(model, latent, denoise=denoise), expected) < 1e-4


@pytest.mark.parametrize("model_type", [ModelType.EPS, ModelType.V_PREDICTION, ModelType.FLOW])
@pytest.mark.parametrize("gamma", [1.0, 0.4, 0.0])
def test_sampler_node_in_sampler_custom_equals_the_ksampler_node(model_type, gamma):
    model, latent = tiny.small_model(model_type), tiny.latent(2)
    assert torch.equal(through_sampler_custom(model, latent, gamma=gamma), lcm(model, latent, gamma=gamma))


def test_sampler_node_in_sampler_custom_advanced_equals_the_ksampler_node():
    model, latent = tiny.small_model(), tiny.latent(2)
    noise = custom.RandomNoise.execute(SEED).result[0]
    guider = custom.BasicGuider.execute(model, tiny.cond(1)).result[0]
    sampler = LCMSampler.execute(gamma=1.0, seed=-1).result[0]
    result = custom.SamplerCustomAdvanced.execute(noise, guider, sampler, scheduled(model), latent)
    assert torch.equal(result.result[0]["samples"], lcm(model, latent))


@pytest.mark.parametrize(("gamma", "tolerance"), [(1.0, 1e-5), (0.4, 1e-3)])
def test_cores_lcm_patch_changes_nothing_but_rounding(gamma, tolerance):
    """Between its 50 entries, where only gamma looks, the patched table is interpolated."""
    model, latent = tiny.small_model(), tiny.latent()
    (patched,) = nodes_model_advanced.ModelSamplingDiscrete().patch(model, "lcm", False)
    expected = lcm(model, latent, steps=8, gamma=gamma)
    assert relative(lcm(patched, latent, steps=8, gamma=gamma), expected) < tolerance


def test_gamma_zero_is_eulers_method():
    model, latent = tiny.small_model(), tiny.latent()
    noise = comfy.sample.prepare_noise(latent["samples"], SEED)
    sigmas, euler = scheduled(model, steps=8), comfy.samplers.sampler_object("euler")
    expected = comfy.sample.sample_custom(
        model, noise, 1.0, euler, sigmas, tiny.cond(1), tiny.cond(1), latent["samples"], seed=SEED
    )
    # the boundary scalings, which Euler's method lacks, are below 1e-6 here
    assert relative(lcm(model, latent, steps=8, gamma=0.0), expected) < 1e-5


# ---- noise


@pytest.mark.parametrize(("height", "width"), [(8, 8), (10, 14)])
def test_an_image_of_a_batch_is_the_image_made_alone(height, width):
    model, latent = tiny.small_model(), tiny.latent(3, height, width)
    together = lcm(model, latent)
    for index in range(3):
        (alone,) = LatentFromBatch().frombatch(latent, index, 1)
        assert alone["batch_index"] == [index]
        assert relative(lcm(model, alone), together[index : index + 1]) < 1e-5


def test_the_noise_of_an_image_is_the_same_to_the_bit_alone_and_in_a_batch():
    """Also where an image's size is no multiple of 16, for which torch draws a batch differently at once."""
    from lcm_kit.host.sampling.runs import initial_noise

    together = initial_noise(torch.zeros(3, 4, 5, 5), SEED, [0, 1, 2])
    for index in range(3):
        assert torch.equal(initial_noise(torch.zeros(1, 4, 5, 5), SEED, [index])[0], together[index])


def test_initial_noise_is_cores_own():
    from lcm_kit.host.sampling.runs import initial_noise

    samples = torch.zeros(3, 4, 8, 8)
    assert torch.equal(initial_noise(samples, SEED, [0, 1, 2]), comfy.sample.prepare_noise(samples, SEED))


def test_repeated_images_of_a_batch_are_equal_where_their_index_is():
    model = tiny.small_model()
    repeated = tiny.latent(2) | {"batch_index": [4, 4]}
    images = lcm(model, repeated)
    assert relative(images[0], images[1]) < 1e-5


def test_a_latent_whose_batch_index_is_too_short_counts_from_zero(caplog):
    model = tiny.small_model()
    images = lcm(model, tiny.latent(2) | {"batch_index": [7]})
    assert "2 images but 1 batch index;" in caplog.text
    assert torch.equal(images, lcm(model, tiny.latent(2)))


def test_torchs_own_generator_is_left_alone():
    torch.manual_seed(123)
    expected = torch.randn(3)
    torch.manual_seed(123)
    lcm(tiny.small_model(), tiny.latent())
    assert torch.equal(torch.randn(3), expected)


def test_step_noise_has_a_seed_of_its_own_in_the_sampler_node():
    model, latent = tiny.small_model(), tiny.latent()
    follows = through_sampler_custom(model, latent)
    assert torch.equal(through_sampler_custom(model, latent, seed=SEED), follows)
    assert relative(through_sampler_custom(model, latent, seed=SEED + 1), follows) > 0.01


# ---- guidance


def test_cfg_one_asks_the_model_once_a_step_with_or_without_a_negative():
    model, seen = tiny.count_calls(tiny.small_model())
    alone = lcm(model, tiny.latent())
    assert seen.calls == 4
    assert torch.equal(lcm(model, tiny.latent(), negative=tiny.cond(2)), alone)
    assert seen.calls == 8


@pytest.mark.parametrize(("cfg_steps", "calls"), [(-1, 8), (0, 4), (1, 5), (2, 6), (4, 8), (9, 8)])
def test_cfg_is_used_in_the_first_cfg_steps(cfg_steps, calls):
    model, seen = tiny.count_calls(tiny.small_model())
    lcm(model, tiny.latent(), cfg=2.0, negative=tiny.cond(2), cfg_steps=cfg_steps)
    assert seen.calls == calls


def test_cfg_equals_cores_cfg():
    model, latent = tiny.small_model(), tiny.latent()
    sampler = LCMSampler.execute(gamma=1.0, seed=-1).result[0]
    expected = custom.SamplerCustom.execute(
        model, True, SEED, 1.5, tiny.cond(1), tiny.cond(2), sampler, scheduled(model), latent
    ).result[0]["samples"]
    assert torch.equal(lcm(model, latent, cfg=1.5, negative=tiny.cond(2)), expected)


def test_cfg_without_a_negative_is_fine_where_no_step_uses_it():
    model = tiny.small_model()
    assert torch.equal(lcm(model, tiny.latent(), cfg=1.5, cfg_steps=0), lcm(model, tiny.latent()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"steps": 51}, "steps is 51"), ({"gamma": 1.5}, r"gamma is 1\.5")],
)
def test_ksampler_refuses_with_the_value(changed, message):
    with pytest.raises(ValueError, match=message):
        lcm(tiny.small_model(), tiny.latent(), **changed)


# ---- the latent, and the host around the loop


def test_a_noise_mask_keeps_what_it_does_not_cover():
    model, latent = tiny.small_model(ModelType.V_PREDICTION), tiny.latent(seed=9)
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1.0
    (masked,) = SetLatentNoiseMask().set_mask(latent, mask)
    images = lcm(model, masked, denoise=0.8)
    assert torch.equal(images[..., 4:], latent["samples"][..., 4:])  # the scale of this model's latents is a power of 2
    assert (images[..., :4] - latent["samples"][..., :4]).abs().max() > 0.1


def test_an_empty_latent_gets_the_models_number_of_channels():
    latent = {"samples": torch.zeros(1, 1, 8, 8)}
    assert lcm(tiny.small_model(), latent).shape == (1, 4, 8, 8)
    assert latent["samples"].shape == (1, 1, 8, 8)


def test_the_rest_of_the_latent_is_passed_on_and_the_input_kept():
    latent = tiny.latent(2) | {"batch_index": [3, 4]}
    before = latent["samples"].clone()
    result = LCMKSampler.execute(tiny.small_model(), tiny.cond(1), latent, SEED, 1, 1.0, 1.0, 1.0, -1, 50).result[0]
    assert result["batch_index"] == [3, 4]
    assert torch.equal(latent["samples"], before)


def test_an_interrupt_stops_before_the_next_step():
    model, seen = tiny.count_calls(tiny.small_model())
    inner = model.model_options["model_function_wrapper"]

    def interrupted(apply_model, args):
        result = inner(apply_model, args)
        if seen.calls == 2:
            comfy.model_management.interrupt_current_processing()
        return result

    model.set_model_unet_function_wrapper(interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        lcm(model, tiny.latent(), steps=8)
    assert seen.calls == 2


def test_the_models_sampling_is_left_untouched():
    model = tiny.small_model()
    before = model.get_model_object("model_sampling")
    state = {name: value.clone() for name, value in before.named_buffers()}
    lcm(model, tiny.latent())
    assert model.get_model_object("model_sampling") is before
    assert model.object_patches == {}
    assert all(torch.equal(value, state[name]) for name, value in before.named_buffers())


def test_works_on_a_latent_batch_made_by_core():
    model = tiny.small_model()
    batch = nodes_latent.LatentBatch.execute(tiny.latent(1), tiny.latent(2)).result[0]
    assert lcm(model, batch).shape == (3, 4, 8, 8)


@pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.FLOW, ModelType.V_PREDICTION_EDM])
def test_denoise_zero_gives_the_latent_back_as_it_came(kind):
    latent = tiny.latent(2, seed=9) | {"batch_index": [4, 2], "noise_mask": torch.ones(1, 64, 64)}
    result = LCMKSampler.execute(tiny.small_model(kind), tiny.cond(1), latent, SEED, 4, 1.0, 0.0, 1.0, -1, 50).result[0]
    assert result.keys() == latent.keys()
    assert all(result[key] is latent[key] for key in latent)
