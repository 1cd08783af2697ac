"""Joins the LCM maths in samplers/ to ComfyUI's MODEL, SAMPLER, SIGMAS and LATENT."""

import logging
import math

import torch

from .empty_prompt import negative_for
from .experts import staged
from .guidance import FirstStepsGuider
from .latents import fitted, given_out, has_picture
from .pure_noise import from_pure_noise
from .runs import WHOLE, Section, run
from .sampler import Relay, chosen_gamma, lcm_sampler
from .schedules import lcm_sigmas

logger = logging.getLogger(__name__)


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
    section=WHOLE,
    experts=None,
    clip=None,
    watch=None,
) -> dict:
    """A LATENT, sampled. Image k of a batch is the image made alone with batch index k.

    preset: a Preset, which replaces steps, cfg, gamma and original_steps, or None.
    section: the steps of the schedule that are run.
    experts: (MODEL, boundary) of the model for the levels below the boundary, or None; see experts.steps_above.
    clip: the CLIP that encodes the empty prompt, or None; see empty_prompt.negative_for, whose error is raised.
    watch: see runs.run.   Where no step is left to run, the latent as it is.
    """
    schedule = lcm_sigmas(model, steps=steps, denoise=denoise, original_steps=original_steps, preset=preset)
    if len(schedule) == 0:  # denoise 0
        latent = fitted(model, latent)
        return given_out(latent, latent["samples"])
    gamma = chosen_gamma(gamma, gammas, preset)
    cfg = cfg if preset is None else preset.cfg
    sigmas = section.of(schedule)
    _say_what_is_left(section, schedule, sigmas, latent)
    _say_that_it_is_empty(section, latent, denoise)
    if len(sigmas) < 2:
        latent = fitted(model, latent)
        return given_out(latent, latent["samples"])

    negative = negative_for(model, positive, negative, clip, cfg=cfg, guided=cfg_steps != 0)

    def guider(patcher):
        made = FirstStepsGuider(patcher)
        made.set_conds(positive, negative)
        made.set_cfg(cfg, _last_guided_sigma(schedule, cfg_steps))
        return made

    stages = [(guider(patcher), levels) for patcher, levels in staged(model, experts, sigmas)]
    relay = Relay() if len(stages) > 1 else None
    return run(
        stages,
        latent,
        lambda indices: from_pure_noise(
            lcm_sampler(gamma=gamma, seed=seed, batch_indices=indices, schedule=schedule, relay=relay), preset
        ),
        seed=seed,
        calls=len(sigmas) - 1,
        add_noise=section.add_noise,
        watch=watch,
    )


def _say_what_is_left(section: Section, schedule: torch.Tensor, sigmas: torch.Tensor, latent: dict) -> None:
    """Warnings about a section that does nothing, or that keeps noise in the picture."""
    if len(sigmas) < 2:
        logger.warning(
            "LCM KSampler: no step from %d on and before %d in a run of %d; the latent is given on as it came.",
            section.start,
            section.end,
            len(schedule) - 1,
        )
    elif not section.add_noise and latent.get("noise_mask") is not None:
        logger.warning(
            "LCM KSampler: add_noise is off and the latent has a noise mask. What the mask keeps stays as it came, with the "
            "noise of the sampler before, as in KSampler (Advanced). Use one node, which model_low does for two models, "
            "or paste the picture back with ImageCompositeMasked."
        )


def _say_that_it_is_empty(section: Section, latent: dict, denoise: float) -> None:
    """A warning where the run counts on a picture, or on noise, in a latent that has neither."""
    if (section.add_noise and denoise >= 1 and section.start == 0) or has_picture(latent["samples"]):
        return
    if not section.add_noise:
        logger.warning(
            "LCM KSampler: add_noise is off and latent_image is empty, so there is no noise to make a picture of. Switch "
            "add_noise on, or connect the latent of the sampler before, which leaves its noise in it."
        )
        return
    start = f"denoise is {denoise:g}" if denoise < 1 else f"start_at_step is {section.start}"
    logger.warning(
        "LCM KSampler: %s and latent_image is empty: the run starts from less than full noise over nothing, which comes out "
        "flat and dull. Connect a picture (VAE Encode), or start from pure noise with denoise 1 and start_at_step 0.",
        start,
    )


def _last_guided_sigma(sigmas: torch.Tensor, cfg_steps: int) -> float:
    if cfg_steps == 0:
        return math.inf
    return 0.0 if cfg_steps < 0 or cfg_steps >= len(sigmas) else float(sigmas[cfg_steps - 1])
