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
from ...samplers.presets import PRESETS, Preset
from ...samplers.renoise import parse_gammas
from ...samplers.schedule import off_grid, parse_timesteps
from .foreign_noise import foreign_noise
from .guidance import FirstStepsGuider
from .latents import fitted, given_out
from .tables import boundary_timesteps, forward_process, sigma_table, sigmas_of, trained_sigma_table

logger = logging.getLogger(__name__)


def preset_named(name: str, steps: int) -> tuple[Preset, str]:
    """(preset, what it says in words). steps: 0 for the preset's own."""
    preset = PRESETS[name].with_steps(steps)
    gamma = ", ".join(f"{value:g}" for value in (preset.gamma if isinstance(preset.gamma, tuple) else [preset.gamma]))
    grid = f"{preset.original_steps} original steps"
    return preset, (
        f"{preset.name}: {preset.steps} steps, cfg {preset.cfg:g}, gamma {gamma}, "
        f"{'timesteps ' + ', '.join(map(str, preset.timesteps)) if preset.timesteps else grid}.\nFrom {preset.source}."
    )


def lcm_sigmas(model, *, steps, denoise, original_steps, timesteps="", preset=None) -> torch.Tensor:
    """(steps + 1,) noise levels of the LCM schedule in the model's own table, the last one 0.

    timesteps: text, replaces steps and original_steps unless it is empty.   preset: a Preset, likewise, or None.
    """
    model_sampling = model.get_model_object("model_sampling")
    train_timesteps = len(trained_sigma_table(model_sampling))
    if denoise <= 0:
        raise ValueError(
            f"denoise is {denoise:g}, so there is nothing to sample. Set it above 0 (1 starts from pure noise), "
            "or bypass this node to keep the latent as it is."
        )
    own = parse_timesteps(timesteps)
    if own and preset is not None:
        raise ValueError(
            f"timesteps are given ({timesteps.strip()}) and the preset {preset.name} brings its own schedule. Clear "
            "timesteps or disconnect the preset."
        )
    if preset is None:
        preset = Preset("", len(own) or steps, 1.0, 1.0, original_steps, tuple(own))
    schedule = preset.schedule(strength=denoise, train_timesteps=train_timesteps)
    if own:
        _warn_off_grid(schedule, original_steps, train_timesteps)
    return sigmas_of(model_sampling, schedule)


def _warn_off_grid(schedule: list[int], original_steps: int, train_timesteps: int) -> None:
    if missing := off_grid(schedule, original_steps=original_steps, train_timesteps=train_timesteps):
        pairs = ", ".join(f"{t} (nearest {nearest})" for t, nearest in missing.items())
        logger.warning(
            "timesteps: %s: not among those an LCM of %d original steps was trained on. Used as given; for a model "
            "trained elsewhere set original_steps to its grid (100 holds 999, 749, 499, 249).",
            pairs,
            original_steps,
        )


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
    model, x, sigmas, extra_args=None, callback=None, disable=None, *, gamma, noise_seed, batch_indices, **others
):
    """k-diffusion's protocol as ComfyUI calls it; model is its KSamplerX0Inpaint around a guider.

    others: what wrappers around a SAMPLER hand to every sampler alike, as RES4LYF's do.
    """
    if others:
        logger.info("The LCM sampler has no use for the option %s.", ", ".join(sorted(others)))
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
        noise=foreign_noise(x, sigmas, extra_args.get("seed")) or StepNoise(noise_seed, batch_indices),
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
    gamma = chosen_gamma(gamma, gammas, preset)
    cfg = cfg if preset is None else preset.cfg
    guider = FirstStepsGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg, _last_guided_sigma(sigmas, cfg_steps))
    if negative is None and not math.isclose(cfg, 1.0) and cfg_steps != 0:
        raise ValueError(
            f"cfg is {cfg:g}, which compares the prompt with a negative prompt, but none is connected. Connect one, "
            "or set cfg to 1: an LCM-LoRA has its guidance built in."
        )

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
