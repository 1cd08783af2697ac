"""LCM for any KSampler under each way in which packs run core's lcm by its name: detailers, tile upscalers, loaders with a sampler."""

import math

import comfy.sample
import comfy.samplers
import nodes
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom

from lcm_kit.nodes.any_ksampler import LCMAnyKSampler
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.sampled import CAT, DOG, SEED, ksampler, picture

pytestmark = pytest.mark.usefixtures("no_gradients")
STEPS = 4


@pytest.fixture(scope="module")
def model():
    return tiny.small_model()


def noise_for(latent):
    return comfy.sample.prepare_noise(latent["samples"], SEED)


def levels(model, denoise):
    """As BasicScheduler and core's KSampler have them: the last of a longer schedule."""
    return custom.BasicScheduler.execute(model, "simple", STEPS, denoise).result[0]


def common_ksampler(model, latent, cfg, denoise):
    """Tile upscalers."""
    (made,) = nodes.common_ksampler(model, SEED, STEPS, cfg, "lcm", "simple", CAT, DOG, latent, denoise=denoise)
    return made["samples"]


def common_ksampler_from_a_step(model, latent, cfg, denoise):
    """Detailers that count denoise in steps of a longer run."""
    total = math.floor(STEPS / denoise)
    (made,) = nodes.common_ksampler(
        model, SEED, total, cfg, "lcm", "simple", CAT, DOG, latent, start_step=total - STEPS, last_step=total, force_full_denoise=True
    )  # fmt: skip
    return made["samples"]


def comfy_sample(model, latent, cfg, denoise):
    return comfy.sample.sample(
        model, noise_for(latent), STEPS, cfg, "lcm", "simple", CAT, DOG, latent["samples"], denoise=denoise,
        noise_mask=latent.get("noise_mask"), seed=SEED,
    )  # fmt: skip


def sample_custom(model, latent, cfg, denoise):
    """FaceDetailer: the sampler by its name, the levels cut by hand."""
    sampler = comfy.samplers.sampler_object("lcm")
    return comfy.sample.sample_custom(
        model, noise_for(latent), cfg, sampler, levels(model, denoise), CAT, DOG, latent["samples"],
        noise_mask=latent.get("noise_mask"), seed=SEED,
    )  # fmt: skip


def sampler_class(model, latent, cfg, denoise):
    made = comfy.samplers.KSampler(
        model, steps=STEPS, device=model.load_device, sampler="lcm", scheduler="simple", denoise=denoise,
        model_options=model.model_options,
    )  # fmt: skip
    return made.sample(
        noise_for(latent), CAT, DOG, cfg=cfg, latent_image=latent["samples"], denoise_mask=latent.get("noise_mask"), seed=SEED
    )  # fmt: skip


def function_of_samplers(model, latent, cfg, denoise):
    """comfy.samplers.sample with what comfy.samplers.ksampler makes of the name."""
    return comfy.samplers.sample(
        model, noise_for(latent), CAT, DOG, cfg, model.load_device, comfy.samplers.ksampler("lcm"), levels(model, denoise),
        model.model_options, latent_image=latent["samples"], denoise_mask=latent.get("noise_mask"), seed=SEED,
    )  # fmt: skip


def own_guider(model, latent, cfg, denoise):
    class Guider(comfy.samplers.CFGGuider):
        """Of a pack: its own way to combine, here the usual one."""

        def predict_noise(self, x, timestep, model_options=None, seed=None):
            return super().predict_noise(x, timestep, model_options or {}, seed)

    guider = Guider(model)
    guider.set_conds(CAT, DOG)
    guider.set_cfg(cfg)
    return guider.sample(
        noise_for(latent), latent["samples"], comfy.samplers.sampler_object("lcm"), levels(model, denoise),
        denoise_mask=latent.get("noise_mask"), seed=SEED,
    )  # fmt: skip


def custom_advanced(model, latent, cfg, denoise):
    """The graphs that krita's plug-in writes: KSamplerSelect, and the last levels of a longer schedule by SplitSigmas."""
    total = math.floor(STEPS / denoise)
    whole = custom.BasicScheduler.execute(model, "simple", total, 1.0).result[0]
    _, rest = custom.SplitSigmas.execute(whole, total - STEPS).result
    guider = custom.CFGGuider.execute(model, CAT, DOG, cfg).result[0]
    noise, sampler = custom.RandomNoise.execute(SEED).result[0], custom.KSamplerSelect.execute("lcm").result[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, rest, latent).result[0]["samples"]


CALLERS = {
    made.__name__: made
    for made in (
        common_ksampler, common_ksampler_from_a_step, comfy_sample, sample_custom, sampler_class, function_of_samplers,
        own_guider, custom_advanced,
    )
}  # fmt: skip


def masked(latent):
    mask = torch.zeros(1, 8, 8)
    mask[..., 3:] = 1.0
    return nodes.SetLatentNoiseMask().set_mask(latent, mask)[0]


@pytest.mark.parametrize("name", CALLERS)
@pytest.mark.parametrize(("cfg", "denoise"), [(1.0, 1.0), (1.5, 0.5)])
def test_it_is_lcm_ksamplers_picture(model, name, cfg, denoise):
    exact = LCMAnyKSampler.execute(model=model, gamma=1.0, original_steps=50).result[0]
    for latent in (picture(batch=2), masked(picture())):
        made = CALLERS[name](exact, latent, cfg, denoise)
        expected = ksampler(model, latent, negative=DOG, cfg=cfg, denoise=denoise)
        assert torch.equal(made, expected)
    assert not torch.equal(CALLERS[name](model, latent, cfg, denoise), expected)
