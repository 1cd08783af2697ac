"""The LCM sampler as a SAMPLER of ComfyUI: what it is asked for, and what it finds out about the run that it is in."""

import logging
from dataclasses import dataclass

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch

from ...samplers.multistep import sample_lcm
from ...samplers.noise import StepNoise
from ...samplers.presets import Preset
from ...samplers.renoise import gammas_of_part, parse_gammas
from .batch import indices_by_noise
from .foreign_noise import foreign_noise
from .tables import boundary_timesteps, forward_process, sigma_table

logger = logging.getLogger(__name__)


def lcm_sampler(*, gamma, seed, batch_indices=None, schedule=None, relay=None) -> comfy.samplers.KSAMPLER:
    """A SAMPLER.

    gamma: a number, or one for each step.   seed: of the step noise, -1 for the noise input's.
    batch_indices: (b,), None takes those that the initial noise is of, see batch.indices_by_noise.
    schedule: (steps + 1,) all levels of a run that may be made in parts; step numbers count in it. None: every call is
    a run of its own.   relay: between the stages of one run, or None.
    """
    return comfy.samplers.KSAMPLER(
        _sample_function,
        {
            "gamma": gamma,
            "noise_seed": seed,
            "batch_indices": batch_indices,
            "schedule": schedule,
            "relay": relay,
        },
    )


@dataclass
class Relay:
    """What a stage of a run leaves for the next, whose model is another.

    x: the noisy latent as models see it, so that it is handed on to the bit; None before the first stage.
    table: of the first stage's model. Levels are numbered by one table in the whole run, or a number could come twice.
    """

    x: torch.Tensor | None = None
    table: torch.Tensor | None = None


def chosen_gamma(gamma: float, gammas: str, preset: Preset | None):
    """What holds of the three: the text of gammas if it is not blank, else the preset's, else the number."""
    return parse_gammas(gammas) or (gamma if preset is None else preset.gamma)


def _sample_function(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    *,
    gamma,
    noise_seed,
    batch_indices,
    schedule,
    relay,
    **others,
):
    """k-diffusion's protocol as ComfyUI calls it; model is its KSamplerX0Inpaint around a guider.

    others: what wrappers around a SAMPLER hand to every sampler alike, as RES4LYF's do.
    """
    if others:
        logger.info("The LCM sampler has no use for the option %s.", ", ".join(sorted(others)))
    extra_args = extra_args or {}
    model_sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
    part = Part(model, sigmas, schedule)
    if batch_indices is None:
        noise, latent = getattr(model, "noise", None), getattr(model, "latent_image", x)
        batch_indices = indices_by_noise(noise, latent, extra_args.get("seed"))

    # Boundary scalings blend a little of the noisy latent in, 7e-6 at most. What a mask keeps must stay as it is.
    masked = extra_args.get("denoise_mask") is not None
    timesteps = None if masked else boundary_timesteps(model_sampling, sigmas)

    def after_step(info):
        # The server's progress hook raises too, but only where a progress bar is attached.
        comfy.model_management.throw_exception_if_processing_interrupted()
        if callback is not None:
            callback(info)

    table = sigma_table(model_sampling)
    if relay is not None and relay.x is not None:
        x, table = relay.x.to(x), relay.table

    result = sample_lcm(
        model,
        x,
        sigmas,
        extra_args=extra_args,
        callback=after_step,
        disable=disable,
        noise=foreign_noise(x, sigmas, extra_args.get("seed"))
        or StepNoise(part.seed(noise_seed, extra_args.get("seed"), gamma), batch_indices),
        gamma=part.gamma(gamma),
        timesteps=timesteps,
        table=table,
        noise_scaling=forward_process(model_sampling),
        trange=comfy.utils.model_trange,
    )
    if relay is not None:
        relay.x, relay.table = result, table
    return result


class Part:
    """One call of a sampler: a whole run, or a part of one whose whole it is told or not.

    sigmas: (steps + 1,) the levels of this call.   schedule: those of the undivided run, or None.
    """

    def __init__(self, model, sigmas: torch.Tensor, schedule: torch.Tensor | None):
        self.model, self.sigmas, self.schedule = model, sigmas, schedule

    def goes_on(self) -> bool:
        """Whether the latent came with its noise: core hands samplers zeros where the noise input is off."""
        noise = getattr(self.model, "noise", None)  # samplers of other nodes around this one may hide it
        return noise is not None and not bool(noise.any())

    def seed(self, own: int, of_noise_input: int | None, gamma) -> int:
        """Of the noise between steps. own: -1 for that of the noise input."""
        if own >= 0:
            return own
        draws = gamma not in (0, [0], (0,)) and len(self.sigmas) > 2
        if not of_noise_input and draws and self.goes_on():
            logger.warning(
                "The seed of the step noise is that of the noise input, and that is off and names seed 0, so it is 0. To go "
                "on with a run that stopped, set the seed of LCM Multistep Sampler, here and there, to one number."
            )
        return of_noise_input or 0

    def gamma(self, gamma):
        """For the steps of this call. gamma: a number, or one for each step of the undivided run.

        Raises ValueError for a list where it cannot be known which of its entries these steps are.
        """
        if self.schedule is None and not isinstance(gamma, int | float) and len(set(gamma)) > 1 and self.goes_on():
            raise ValueError(
                "gammas has a number for each step of a run, and the noise input is off: this goes on with a run, and "
                "which of its steps these are cannot be seen here. Connect the whole schedule, as it was before it was "
                "split, to the sigmas input of LCM Multistep Sampler, or give one gamma for all steps."
            )
        return gammas_of_part(gamma, self.sigmas, self.schedule)
