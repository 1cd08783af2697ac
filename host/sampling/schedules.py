"""The noise levels of a run in a MODEL's own table, from steps, timesteps or a preset."""

import logging

import torch

from ...samplers.presets import PRESETS, Preset
from ...samplers.schedule import off_grid, parse_timesteps
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

    timesteps: text, 0 to 999, replaces steps and original_steps unless it is empty.   preset: a Preset, likewise, or None.
    """
    model_sampling = model.get_model_object("model_sampling")
    trained_sigma_table(model_sampling)  # refuses a model without timesteps before anything else is said
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
    schedule = preset.schedule(strength=denoise)
    if own:
        _warn_off_grid(schedule, original_steps)
    return sigmas_of(model_sampling, schedule)


def _warn_off_grid(schedule: list[int], original_steps: int) -> None:
    if missing := off_grid(schedule, original_steps=original_steps):
        pairs = ", ".join(f"{t} (nearest {nearest})" for t, nearest in missing.items())
        logger.warning(
            "timesteps: %s: not among those an LCM of %d original steps was trained on. Used as given; for a model "
            "trained elsewhere set original_steps to its grid (100 holds 999, 749, 499, 249).",
            pairs,
            original_steps,
        )
