"""Runs of the sampling nodes with their defaults, for tests: whole in LCM KSampler, in parts, and by core."""

import comfy.samplers
import torch
from comfy.k_diffusion import sampling as core
from comfy_extras import nodes_custom_sampler as custom

from lcm_kit.host.sampling.tables import sigma_table
from lcm_kit.nodes.editing import LCMEdit
from lcm_kit.nodes.sampling import LCMKSampler, LCMSampler
from lcm_kit.nodes.scheduling import LCMScheduler
from lcm_kit.samplers.noise import StepNoise, level_numbers
from lcm_kit.tests.with_comfyui import tiny

SEED = 5
CAT, DOG = tiny.cond(1), tiny.cond(2)


def ksampler(model, latent, **changed):
    """The samples that LCM KSampler returns."""
    inputs = {
        "positive": CAT,
        "seed": SEED,
        "steps": 4,
        "cfg": 1.0,
        "denoise": 1.0,
        "gamma": 1.0,
        "cfg_steps": -1,
        "original_steps": 50,
    }
    return LCMKSampler.execute(model=model, latent_image=latent, **inputs | changed).result[0]["samples"]


def scheduled(model, steps=4, denoise=1.0):
    return LCMScheduler.execute(model, steps, denoise, 50, "").result[0]


def sampler_custom(model, latent, sampler, sigmas, *, cfg=1.0, add_noise=True, seed=SEED):
    """(output, denoised output) of core's SamplerCustom, as latents."""
    return custom.SamplerCustom.execute(model, add_noise, seed, cfg, CAT, DOG, sampler, sigmas, latent).result


def ours(gamma=1.0, seed=-1, **changed):
    return LCMSampler.execute(gamma, seed, **changed).result[0]


def in_parts(model, latent, **changed):
    """LCM Scheduler and LCM Multistep Sampler in SamplerCustom."""
    return sampler_custom(model, latent, ours(**changed), scheduled(model))[0]["samples"]


def in_parts_advanced(model, latent):
    """The same in SamplerCustomAdvanced."""
    noise = custom.RandomNoise.execute(SEED).result[0]
    guider = custom.BasicGuider.execute(model, CAT).result[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, ours(), scheduled(model), latent).result[0]["samples"]


def edited(model, latent, **changed):
    """The samples that LCM Edit returns."""
    inputs = {
        "source": CAT,
        "target": DOG,
        "seed": SEED,
        "steps": 4,
        "cfg": 1.0,
        "denoise": 1.0,
        "original_steps": 50,
        "keep": 0.0,
    }
    return LCMEdit.execute(model=model, latent_image=latent, **inputs | changed).result[0]["samples"]


def cores_sampler(seed=SEED):
    """Core's "lcm" with our noise between the steps."""

    def sample(model, x, sigmas, **arguments):
        table, noise = sigma_table(model.inner_model.model_patcher.get_model_object("model_sampling")), StepNoise(seed)

        def noise_sampler(sigma, sigma_next):
            return noise(*level_numbers(sigma_next[None], table), x)

        return core.sample_lcm(model, x, sigmas, noise_sampler=noise_sampler, **arguments)

    return comfy.samplers.KSAMPLER(sample)


def picture(channels=4, size=8, batch=1, seed=9):
    return {"samples": torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))}
