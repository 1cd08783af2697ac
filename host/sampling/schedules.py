"""The noise levels of a run in a MODEL's own table, from steps, timesteps or a preset."""

import logging

import torch

from ...lora_merge.words import many
from ...samplers.preset import Preset
from ...samplers.preset_words import describe
from ...samplers.presets import PRESETS
from ...samplers.schedule import custom_timesteps, off_grid, parse_timesteps
from ...samplers.times import shift_of
from .tables import is_cosmos, is_flow, sigmas_of, time_table

logger = logging.getLogger(__name__)

SHIFT_TOLERANCE = 0.01
"""Share by which a model's shift may miss a preset's: no level is off by more than 0.0025."""


def preset_named(name: str, steps: int) -> tuple[Preset, str]:
    """(preset, what it says in words). steps: 0 for the preset's own."""
    preset = PRESETS[name].with_steps(steps)
    return preset, describe(preset)


def lcm_sigmas(model, *, steps, denoise, original_steps, timesteps="", preset=None) -> torch.Tensor:
    """(calls + 1,) noise levels of the LCM schedule in the model's own table, the last one 0; (0,) at denoise 0.

    Stable Diffusion's models take steps from the training grid of original_steps. Flow models and those of continuous
    levels know every time: they take evenly spaced ones, the former through their own shift.
    timesteps: text, 0 to 999, replaces steps and original_steps unless it is empty.   preset: a Preset, likewise, or
    None.
    """
    if denoise <= 0:
        return torch.empty(0)  # as core's schedulers have it: there is nothing to run
    model_sampling = model.get_model_object("model_sampling")
    if own := parse_timesteps(timesteps):
        if preset is not None:
            raise ValueError(
                f"timesteps are given ({timesteps.strip()}) and the preset {preset.name} brings its own schedule. "
                "Clear timesteps or disconnect the preset."
            )
        return _typed(model_sampling, own, denoise, original_steps)
    if preset is None:
        preset = Preset("", steps=steps, cfg=1.0, gamma=1.0, original_steps=original_steps)
    sigmas = _of_preset(model_sampling, preset, denoise)
    if len(sigmas) - 1 < preset.steps and not preset.timesteps:
        logger.warning(
            "denoise %g leaves %d of the %s that the steps are picked from: %s in place of %d.",
            denoise,
            len(sigmas) - 1,
            many(preset.original_steps, "timesteps"),
            many(len(sigmas) - 1, "model calls"),
            preset.steps,
        )
    return sigmas


def _of_preset(model_sampling, preset: Preset, denoise: float) -> torch.Tensor:
    table = time_table(model_sampling)
    if preset.flow and not is_flow(model_sampling):
        return _flow_preset_elsewhere(model_sampling, preset, denoise)
    if table is None:
        return sigmas_of(model_sampling, preset.schedule(strength=denoise))
    if preset.shift is not None:
        _warn_of_shift(model_sampling, preset, shift_of(table))
    return preset.levels(table, strength=denoise)


def _flow_preset_elsewhere(model_sampling, preset: Preset, denoise: float) -> torch.Tensor:
    """Levels that a preset lists, for Cosmos, whose sigma is a flow's sigma / (1 - sigma), if it knows the first. Else a
    ValueError."""
    table = time_table(model_sampling)
    if is_cosmos(model_sampling) and preset.sigmas:
        flow_table = table / (1.0 + table)
        if preset.sigmas[0] <= float(flow_table[-1]) + 1e-4:
            levels = preset.levels(flow_table, strength=denoise)
            return levels / (1.0 - levels)
    raise ValueError(
        f"The preset {preset.name} is for flow models ({preset.models or 'noise levels up to 1'}), and this model is none: "
        f"its noise levels reach {float(model_sampling.sigma_max):.4g}. Choose the preset of this model's own few-step "
        "file."
    )


def _warn_of_shift(model_sampling, preset: Preset, found: float) -> None:
    if abs(found / preset.shift - 1.0) <= SHIFT_TOLERANCE:
        return
    # What a model is told of its level: a thousandth of it, or the level itself. The nodes differ in this alone.
    node = "ModelSamplingSD3" if float(model_sampling.timestep(torch.ones(1))) > 1.0 else "ModelSamplingAuraFlow"
    logger.warning(
        "%s: shift %g expected, this model has %.3g. Put %s with shift %g before this node.",
        preset.name,
        preset.shift,
        found,
        node,
        preset.shift,
    )


def _typed(model_sampling, timesteps: list[int], denoise: float, original_steps: int) -> torch.Tensor:
    """Levels of the timesteps that a user wrote: the last of them below denoise 1, and at least one."""
    least = max(denoise, 1.0 / len(timesteps))
    kept = custom_timesteps(timesteps, strength=least)
    if least > denoise:
        logger.warning(
            "denoise %g leaves none of the %s: the last one, %d, is run.",
            denoise,
            many(len(timesteps), "timesteps"),
            kept[0],
        )
    table = time_table(model_sampling)
    if table is not None:
        return Preset("", steps=len(kept), cfg=1.0, gamma=1.0, timesteps=tuple(kept)).levels(table)
    _warn_off_grid(kept, original_steps)
    return sigmas_of(model_sampling, kept)


def _warn_off_grid(schedule: list[int], original_steps: int) -> None:
    if missing := off_grid(schedule, original_steps=original_steps):
        pairs = ", ".join(f"{t} (nearest {nearest})" for t, nearest in missing.items())
        logger.warning(
            "timesteps: %s: not among those an LCM of %s was trained on. Used as given; for a model "
            "trained elsewhere set original_steps to its grid (100 holds 999, 749, 499, 249).",
            pairs,
            many(original_steps, "original steps"),
        )
