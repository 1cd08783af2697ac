"""Joins the LCM maths in samplers/ to ComfyUI's MODEL, SAMPLER, SIGMAS and LATENT."""

import logging
import math
from collections.abc import Callable

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ...samplers.multistep import sample_lcm
from ...samplers.noise import StepNoise
from ...samplers.preset import Preset
from ...samplers.renoise import parse_gammas
from .guidance import FirstStepsGuider
from .latents import fitted, given_out
from .schedules import lcm_sigmas
from .tables import boundary_timesteps, forward_process, sigma_table

logger = logging.getLogger(__name__)


def lcm_sampler(*, gamma, seed, batch_indices=None) -> comfy.samplers.KSAMPLER:
    """A SAMPLER.

    gamma: a number, or one for each step.   seed: of the step noise, -1 for the noise input's.
    batch_indices: (b,), None counts from 0.
    """
    return comfy.samplers.KSAMPLER(
        _sample_function, {"gamma": gamma, "noise_seed": seed, "batch_indices": batch_indices}
    )


def chosen_gamma(gamma: float, gammas: str, preset: Preset | None):
    """What holds of the three: the text of gammas if it is not blank, else the preset's, else the number."""
    return parse_gammas(gammas) or (gamma if preset is None else preset.gamma)


def _sample_function(
    model, x, sigmas, extra_args=None, callback=None, disable=None, *, gamma, noise_seed, batch_indices
):
    """k-diffusion's protocol as ComfyUI calls it; model is its KSamplerX0Inpaint around a guider."""
    extra_args = extra_args or {}
    model_sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
    if noise_seed < 0:
        noise_seed = extra_args.get("seed") or 0

    # Boundary scalings blend a little of the noisy latent in, 7e-6 at most. What a mask keeps must stay as it is.
    masked = extra_args.get("denoise_mask") is not None
    timesteps = None if masked else boundary_timesteps(model_sampling, sigmas)

    def after_step(info):
        # The server's progress hook raises too, but only where a progress bar is attached.
        comfy.model_management.throw_exception_if_processing_interrupted()
        if callback is not None:
            callback(info)

    return sample_lcm(
        model,
        x,
        sigmas,
        extra_args=extra_args,
        callback=after_step,
        disable=disable,
        noise=StepNoise(noise_seed, batch_indices),
        gamma=gamma,
        timesteps=timesteps,
        table=sigma_table(model_sampling),
        noise_scaling=forward_process(model_sampling),
        trange=comfy.utils.model_trange,
    )


def sample(
    model,
    positive,
    negative,
    latent,
    *,
    seed,
    steps,
    cfg,
    denoise,
    gamma,
    cfg_steps,
    original_steps,
    gammas="",
    preset=None,
) -> dict:
    """A LATENT, sampled. Image k of a batch is the image made alone with batch index k.

    preset: a Preset, which replaces steps, cfg, gamma and original_steps, or None.
    """
    sigmas = lcm_sigmas(model, steps=steps, denoise=denoise, original_steps=original_steps, preset=preset)
    if len(sigmas) == 0:  # denoise 0
        return latent
    gamma = chosen_gamma(gamma, gammas, preset)
    cfg = _possible_cfg(cfg if preset is None else preset.cfg, negative, cfg_steps)
    guider = FirstStepsGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg, _last_guided_sigma(sigmas, cfg_steps))
    return run(
        guider,
        latent,
        sigmas,
        lambda indices: lcm_sampler(gamma=gamma, seed=seed, batch_indices=indices),
        seed=seed,
        calls=len(sigmas) - 1,
    )


def run(
    guider,
    latent: dict,
    sigmas: torch.Tensor,
    sampler_for: Callable[[list[int]], comfy.samplers.Sampler],
    *,
    seed: int,
    calls: int,
) -> dict:
    """A LATENT sampled as ComfyUI's own nodes do it, with previews and a progress bar of so many calls.

    sampler_for: batch indices of the images -> the sampler.
    """
    model = guider.model_patcher
    latent = fitted(model, latent)
    indices = batch_indices_of(latent)
    samples = guider.sample(
        initial_noise(latent["samples"], seed, indices),
        latent["samples"],
        sampler_for(indices),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, calls),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return given_out(latent, samples)


def initial_noise(samples: torch.Tensor, seed: int, batch_indices: list[int]) -> torch.Tensor:
    """Core's initial noise, drawn image by image: what is drawn at once differs where an image's size is no
    multiple of 16. torch's own generator is left as it was, which core's function reseeds.

    The parts of a nested latent are drawn as one, as they are sampled. Core draws one part for all images, then the
    next: how many images there are would change the second.
    """
    with torch.random.fork_rng(devices=[]):
        if not samples.is_nested:
            return comfy.sample.prepare_noise(samples, seed, batch_indices)
        packed, shapes = comfy.utils.pack_latents(samples.unbind())
        noise = comfy.sample.prepare_noise(packed, seed, batch_indices)
        return type(samples)(comfy.utils.unpack_latents(noise, shapes))


def _possible_cfg(cfg: float, negative, cfg_steps: int) -> float:
    """cfg, or 1 where there is no negative prompt to guide away from.

    No stand-in is made up: the empty prompt needs the text encoder, which a sampler has not, and zeros in its place are
    another prompt (of the usual models only SDXL's was trained with them).
    """
    if negative is not None or math.isclose(cfg, 1.0) or cfg_steps == 0:
        return cfg
    logger.warning(
        "cfg is %g, but no negative prompt is connected to guide away from: cfg 1 is used, without guidance. Connect "
        "CLIP Text Encode, its text empty, for cfg %g.",
        cfg,
        cfg,
    )
    return 1.0


def _last_guided_sigma(sigmas: torch.Tensor, cfg_steps: int) -> float:
    if cfg_steps == 0:
        return math.inf
    return 0.0 if cfg_steps < 0 or cfg_steps >= len(sigmas) else float(sigmas[cfg_steps - 1])


def batch_indices_of(latent: dict) -> list[int]:
    count = latent["samples"].shape[0]
    indices = latent.get("batch_index")
    if indices is None:
        return list(range(count))
    if len(indices) != count:
        logger.warning(
            "The latent has %d images but %d batch indices; its noise is numbered from 0 instead.", count, len(indices)
        )
        return list(range(count))
    return [int(index) for index in indices]
