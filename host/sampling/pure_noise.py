"""Runs from pure noise whose network is told a lower level, as some one-step models are published."""

import math

import comfy.samplers

from ...samplers.preset import Preset
from .tables import sigmas_of, time_table


def from_pure_noise(sampler: comfy.samplers.KSAMPLER, preset: Preset | None) -> comfy.samplers.KSAMPLER:
    """The SAMPLER, starting as the preset's authors do: itself where they tell the network the noise that there is."""
    if preset is None or preset.noise_timestep is None:
        return sampler
    return _FromPureNoise(sampler, preset.noise_timestep)


class _FromPureNoise(comfy.samplers.KSAMPLER):
    """Takes the noise of a run that begins at `timestep` for noise without a picture, of unit variance for the network.

    Core does so at a model's highest level only. A run from elsewhere, as below denoise 1, is noised as usual.
    """

    def __init__(self, sampler: comfy.samplers.KSAMPLER, timestep: int):
        super().__init__(sampler.sampler_function, sampler.extra_options, sampler.inpaint_options)
        self.timestep = timestep

    def max_denoise(self, model_wrap, sigmas):
        model_sampling = model_wrap.inner_model.model_sampling
        if time_table(model_sampling) is None:
            level = float(sigmas_of(model_sampling, [self.timestep])[0])
            if math.isclose(float(sigmas[0]), level, rel_tol=1e-5):
                return True
        return super().max_denoise(model_wrap, sigmas)
