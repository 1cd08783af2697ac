"""Every kind of model, latent and front end that ComfyUI has: the sampler against core's own on the same noise levels.

The oracle is core's sample_lcm with our schedule and our step noise. It knows no boundary scalings, which are below 7e-6,
and no gamma; everything else must be equal, whatever a model predicts and however its latents are shaped and noised.
"""

from functools import cache, partial

import comfy.latent_formats
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.model_base import ModelType
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras import nodes_model_advanced
from nodes import SetLatentNoiseMask

from lcm_kit.host.sampling.runs import initial_noise
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.sampled import SEED, cores_sampler, ksampler, ours, sampler_custom, scheduled

IMAGE, VIDEO = (4, 8, 8), (16, 3, 4, 6)


pytestmark = pytest.mark.usefixtures("no_gradients")


def told(prediction):
    """An epsilon model that the user's ModelSamplingDiscrete says otherwise of."""
    return nodes_model_advanced.ModelSamplingDiscrete().patch(tiny.small_model(), prediction, False)[0]


# What a model predicts -> how to make it, and the shape of its latents without the batch.
MODELS = {
    "epsilon": (tiny.small_model, IMAGE),
    "v": (lambda: tiny.small_model(ModelType.V_PREDICTION), IMAGE),
    "v, zero terminal SNR": (
        lambda: tiny.small_model(ModelType.V_PREDICTION, sampling_settings={"zsnr": True}),
        IMAGE,
    ),
    "x0": (lambda: told("x0"), IMAGE),
    "image to image": (lambda: told("img_to_img"), IMAGE),
    "flow": (lambda: tiny.small_model(ModelType.FLOW), IMAGE),
    "flow, 10000 levels": (lambda: tiny.small_model(ModelType.FLUX), IMAGE),
    "flow of videos": (tiny.tiny_video_model, VIDEO),
    "EDM": (lambda: tiny.small_model(ModelType.EDM), IMAGE),
    "v, continuous": (lambda: tiny.small_model(ModelType.V_PREDICTION_CONTINUOUS), IMAGE),
    "v, EDM up to 700": (
        lambda: tiny.small_model(ModelType.V_PREDICTION_EDM, sampling_settings={"sigma_max": 700.0}),
        IMAGE,
    ),
    "flow, Cosmos": (lambda: tiny.small_model(ModelType.FLOW_COSMOS, sampling_settings={"sigma_max": 80.0}), IMAGE),
    "flow, noise of spread 8": (
        lambda: tiny.small_model(ModelType.FLOW, sampling_settings={"shift": 3.0, "noise_scale": 8.0}),
        IMAGE,
    ),
    "Stable Cascade": (lambda: tiny.small_model(ModelType.STABLE_CASCADE), IMAGE),
}
# Older ComfyUIs lack some of these.
LATER = {
    "flow, image to image": "IMG_TO_IMG_FLOW",
    "v of DDPM": "V_PREDICTION_DDPM",
    "flow of picture and sound": "FLOW_AV",
}
MODELS |= {
    kind: (partial(tiny.small_model, ModelType[name]), IMAGE)
    for kind, name in LATER.items()
    if name in ModelType.__members__
}
EVERY_MODEL = pytest.mark.parametrize("kind", MODELS)


@cache
def made(kind):
    return MODELS[kind][0]()


@pytest.fixture(autouse=True, scope="module")
def _models_are_let_go():
    yield
    made.cache_clear()


def latent_for(kind, batch=2, seed=9):
    shape = (batch, *MODELS[kind][1])
    return {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


# ---- every kind of model


def test_every_type_of_model_that_comfyui_has_is_here():
    here = {made(kind).model.model_type for kind in MODELS if not kind.startswith("flow of videos")}
    assert here | {ModelType.IMG_TO_IMG} == set(ModelType)  # that one by the user's ModelSamplingDiscrete, above


@EVERY_MODEL
@pytest.mark.parametrize(("steps", "denoise"), [(4, 1.0), (1, 1.0), (2, 0.58)])
def test_the_sampler_is_cores_on_exact_levels(kind, steps, denoise):
    model, latent = made(kind), latent_for(kind)
    expected, _ = sampler_custom(model, latent, cores_sampler(), scheduled(model, steps, denoise))
    result = ksampler(model, latent, steps=steps, denoise=denoise)
    assert result.shape == latent["samples"].shape
    assert relative(result, expected["samples"]) < 2e-5


@EVERY_MODEL
def test_every_front_end_gives_the_same(kind):
    model, latent, sigmas = made(kind), latent_for(kind), scheduled(made(kind), denoise=0.8)
    noise = custom.RandomNoise.execute(SEED).result[0]
    expected = {cfg: ksampler(model, latent, denoise=0.8, cfg=cfg, negative=tiny.cond(2)) for cfg in (1.0, 1.5)}
    guiders = {
        1.0: custom.BasicGuider.execute(model, tiny.cond(1)),
        1.5: custom.CFGGuider.execute(model, tiny.cond(1), tiny.cond(2), 1.5),
    }
    for cfg, guider in guiders.items():
        result = custom.SamplerCustomAdvanced.execute(noise, guider.result[0], ours(), sigmas, latent).result[0]
        assert torch.equal(result["samples"], expected[cfg])
    assert torch.equal(sampler_custom(model, latent, ours(), sigmas, cfg=1.5)[0]["samples"], expected[1.5])


@EVERY_MODEL
def test_gamma_zero_is_eulers_method(kind):
    # Without noise in the process there is none to keep, and each prediction is taken as it is: one step is Euler's too.
    steps = 1 if kind == "flow, image to image" else 4
    model, latent, sigmas = made(kind), latent_for(kind), scheduled(made(kind), steps)
    euler, _ = sampler_custom(model, latent, comfy.samplers.sampler_object("euler"), sigmas)
    # Euler's method takes differences of nearly equal numbers at sigma 4519.
    assert relative(ksampler(model, latent, gamma=0.0, steps=steps), euler["samples"]) < (
        1e-3 if "zero" in kind else 2e-5
    )


@pytest.mark.parametrize(("prediction", "kind"), [("v_prediction", "v"), ("eps", "epsilon")])
def test_what_the_model_predicts_is_what_the_users_patch_says(prediction, kind):
    latent = latent_for(kind)
    assert torch.equal(ksampler(told(prediction), latent), ksampler(made(kind), latent))


# ---- latents: batches, masks, splits, nesting


@EVERY_MODEL
def test_an_image_or_video_of_a_batch_is_the_one_made_alone(kind):
    model, latent = made(kind), latent_for(kind, batch=2)
    together = ksampler(model, latent, gamma=0.6, denoise=0.8, steps=3)
    alone = {"samples": latent["samples"][1:], "batch_index": [1]}
    assert relative(ksampler(model, alone, gamma=0.6, denoise=0.8, steps=3), together[1:]) < 2e-5


@EVERY_MODEL
@pytest.mark.parametrize("denoise", [1.0, 0.1])
def test_the_part_that_a_noise_mask_keeps_is_the_input(kind, denoise):
    """To the bit as core leaves it, which scales latents into the model's space and back."""
    model, latent = made(kind), latent_for(kind)
    mask = torch.zeros(latent["samples"].shape[2:])
    mask[..., :4] = 1.0
    mask[..., 4:5] = 0.5
    (masked,) = SetLatentNoiseMask().set_mask(latent, mask)
    # Core ends every run with this: of "flow, image to image" it makes 1 - latent, of the others at sigma 0 the latent.
    ended = model.get_model_object("model_sampling").inverse_noise_scaling(
        torch.zeros(()), model.model.process_latent_in(latent["samples"])
    )
    scaled = model.model.process_latent_out(ended)
    for gamma in (1.0, 0.5, 0.0):
        result = ksampler(model, masked, denoise=denoise, gamma=gamma)
        assert torch.equal(result[..., mask == 0], scaled[..., mask == 0])
        assert (result - scaled)[..., mask == 1].abs().mean() > 0.01


def test_a_mask_for_each_image_of_a_batch():
    latent = latent_for("v")
    mask = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    (masked,) = SetLatentNoiseMask().set_mask(latent, mask)
    result, free = ksampler(made("v"), masked, denoise=0.6), ksampler(made("v"), latent, denoise=0.6)
    assert torch.equal(result[0], latent["samples"][0])  # the scale of this model's latents is a power of 2
    assert relative(result[1], free[1]) < 2e-5


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_a_split_schedule_leaves_the_noise_of_its_last_level(kind):
    model, latent = made(kind), latent_for(kind, batch=1)
    high, _ = custom.SplitSigmas.execute(scheduled(model), 2).result
    expected, _ = sampler_custom(model, latent, cores_sampler(), high)
    assert relative(sampler_custom(model, latent, ours(), high)[0]["samples"], expected["samples"]) < 2e-5


def test_nested_latents_are_sampled_together():
    model, latent = tiny.pair_model(), tiny.nested(torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 5))
    together = ksampler(model, latent).unbind()
    assert [part.shape for part in together] == [(2, 4, 8, 8), (2, 3, 5)]
    expected = comfy.sample.sample_custom(
        model,
        initial_noise(latent["samples"], SEED, [0, 1]),
        1.0,
        cores_sampler(),
        scheduled(model),
        tiny.cond(1),
        tiny.cond(1),
        latent["samples"],
        seed=SEED,
    ).unbind()
    for part, of_core in zip(together, expected, strict=True):
        assert relative(part, of_core) < 2e-5


@pytest.mark.parametrize("sound", [(1, 3, 5), (1, 8, 7, 16)])
def test_the_noise_of_one_nested_latent_is_cores_and_leaves_torchs_generator_as_core_does(sound):
    samples = tiny.nested(torch.zeros(1, 4, 7, 9), torch.zeros(sound))["samples"]
    theirs = comfy.sample.prepare_noise(samples, SEED)
    state = torch.get_rng_state()
    for part, of_core in zip(initial_noise(samples, SEED, [0]).unbind(), theirs.unbind(), strict=True):
        assert torch.equal(part, of_core)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_nested_latent_of_a_batch_is_the_one_made_alone():
    model = tiny.pair_model()
    together = ksampler(model, tiny.nested(torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 5))).unbind()
    for index in (0, 1):
        alone = tiny.nested(torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 5)) | {"batch_index": [index]}
        for part, of_batch in zip(ksampler(model, alone).unbind(), together, strict=True):
            assert relative(part, of_batch[index : index + 1]) < 2e-5


# ---- progress, preview, interrupt


@pytest.fixture
def reports():
    """What ComfyUI's progress bar tells the server: (value, total, preview image or None)."""
    seen = []

    def hook(value, total, preview, node_id=None):
        seen.append((value, total, None if preview is None else preview[1]))

    comfy.utils.set_progress_bar_global_hook(hook)
    yield seen
    comfy.utils.set_progress_bar_global_hook(None)


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
def test_the_progress_bar_counts_model_calls(reports, steps, gamma):
    model, seen = tiny.count_calls(made("v"))
    ksampler(model, latent_for("v"), steps=steps, gamma=gamma)
    assert [report[:2] for report in reports] == [(call, seen.calls) for call in range(1, seen.calls + 1)]
    assert seen.calls == steps


@pytest.mark.parametrize("kind", ["v", "flow of videos"])
def test_the_preview_shows_x0_of_every_step(reports, kind, monkeypatch):
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    model, latent = made(kind), latent_for(kind, batch=1)
    if kind == "v":  # the tiny image model has no colours of its own
        colours = comfy.latent_formats.SD15().latent_rgb_factors
        monkeypatch.setattr(model.model.latent_format, "latent_rgb_factors", colours, raising=False)
    shown = []
    monkeypatch.setattr(
        latent_preview.Latent2RGBPreviewer,
        "decode_latent_to_preview",
        lambda previewer, x0, decode=latent_preview.Latent2RGBPreviewer.decode_latent_to_preview: (
            shown.append(x0.clone()) or decode(previewer, x0)
        ),
    )
    finished = ksampler(model, latent)
    assert [report[2].size for report in reports] == [latent["samples"].shape[:-3:-1]] * 4
    assert relative(model.model.process_latent_out(shown[-1]), finished) < 1e-5
    # x0 and not the noisy latent: at the first level that one is as large as sigma, 14.6
    assert all(x0.std() < 3 for x0 in shown)


@pytest.mark.parametrize("steps", [8])
def test_an_interrupt_stops_within_one_step_and_the_model_works_afterwards(steps):
    model, latent = made("v"), latent_for("v")
    before = ksampler(model, latent)
    interrupted, seen = tiny.count_calls(model)
    count = interrupted.model_options["model_function_wrapper"]

    def stop_in_the_second_call(apply_model, args):
        result = count(apply_model, args)
        if seen.calls == 2:
            comfy.model_management.interrupt_current_processing()
        return result

    interrupted.set_model_unet_function_wrapper(stop_in_the_second_call)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sampler_custom(interrupted, latent, ours(), scheduled(model, steps))
    assert seen.calls == 2
    assert not comfy.model_management.processing_interrupted()
    assert torch.equal(ksampler(model, latent), before)
