"""Joins the LCM maths in samplers/ to ComfyUI's MODEL, SAMPLER, SIGMAS and LATENT."""

import logging
import math

import torch

from ...samplers.presets import PRESETS, Preset
from ...samplers.schedule import off_grid, parse_timesteps
from .experts import staged
from .guidance import FirstStepsGuider
from .latents import fitted, given_out
from .runs import WHOLE, Section, run
from .sampler import Relay, chosen_gamma, lcm_sampler
from .tables import sigmas_of, trained_sigma_table

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
) -> dict:
    """A LATENT, sampled. Image k of a batch is the image made alone with batch index k.

    preset: a Preset, which replaces steps, cfg, gamma and original_steps, or None.
    section: the steps of the schedule that are run.
    experts: (MODEL, boundary) of the model for the levels below the boundary, or None; see experts.steps_above.
    Where no step is left to run, the latent as it is.
    """
    schedule = lcm_sigmas(model, steps=steps, denoise=denoise, original_steps=original_steps, preset=preset)
    gamma = chosen_gamma(gamma, gammas, preset)
    cfg = cfg if preset is None else preset.cfg
    _check_cfg(cfg, negative, cfg_steps)
    sigmas = section.of(schedule)
    _say_what_is_left(section, schedule, sigmas, latent)
    if len(sigmas) < 2:
        latent = fitted(model, latent)
        return given_out(latent, latent["samples"])

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
        lambda indices: lcm_sampler(gamma=gamma, seed=seed, batch_indices=indices, schedule=schedule, relay=relay),
        seed=seed,
        calls=len(sigmas) - 1,
        add_noise=section.add_noise,
    )


def _check_cfg(cfg: float, negative, cfg_steps: int) -> None:
    if negative is None and not math.isclose(cfg, 1.0) and cfg_steps != 0:
        raise ValueError(
            f"cfg is {cfg:g}, which compares the prompt with a negative prompt, but none is connected. Connect one, "
            "or set cfg to 1: an LCM-LoRA has its guidance built in."
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


def _last_guided_sigma(sigmas: torch.Tensor, cfg_steps: int) -> float:
    if cfg_steps == 0:
        return math.inf
    return 0.0 if cfg_steps < 0 or cfg_steps >= len(sigmas) else float(sigmas[cfg_steps - 1])
