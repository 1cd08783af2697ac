"""The LCM sampler as a SAMPLER of ComfyUI: what it is asked for, and what it finds out about the run that it is in."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch

from ...samplers.multistep import sample_lcm
from ...samplers.noise import StepNoise
from ...samplers.preset import Preset
from ...samplers.renoise import gammas_of_part, noise_kept, parse_gammas, places_in
from ...samplers.shaped_noise import ShapedNoise, feathered_factors, ramp
from .batch import indices_by_noise
from .foreign_noise import foreign_noise
from .plans import plan_for
from .tables import check_levels, forward_process, sigma_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a run of the sampler is asked for.

    gamma: a number, or one for each step.   seed: of the step noise, -1 for the noise input's.
    batch_indices: (b,), None takes those that the initial noise is of, see batch.indices_by_noise.
    schedule: (steps + 1,) all levels of a run that may be made in parts; step numbers count in it. None: every call is
    a run of its own.
    s_noise, s_noise_end: the fresh noise is multiplied by a number that goes evenly from the one in the first step to
    the other in the last.   noise_clip_std: and limited to so many standard deviations of its own before; 0 is off. As
    in core's SamplerLCM.
    """

    gamma: float | Sequence[float]
    seed: int
    batch_indices: Sequence[int] | None = None
    schedule: torch.Tensor | None = None
    s_noise: float = 1.0
    s_noise_end: float = 1.0
    noise_clip_std: float = 0.0


@dataclass
class Relay:
    """What a stage of a run leaves for the next, whose model is another.

    x: the noisy latent as models see it, so that it is handed on to the bit; None before the first stage.
    table: of the first stage's model. Levels are numbered by one table in the whole run, or a number could come twice.
    kept: share of the initial noise in the noise of x.   staged: False in a run of one stage, which leaves nothing.
    """

    x: torch.Tensor | None = None
    table: torch.Tensor | None = None
    kept: float = 1.0
    staged: bool = True


def lcm_sampler(*, gamma, seed, batch_indices=None, schedule=None, relay=None, **noise) -> comfy.samplers.KSAMPLER:
    """A SAMPLER. The arguments are those of Settings.   relay: between the stages of one run, or None."""
    settings = Settings(gamma=gamma, seed=seed, batch_indices=batch_indices, schedule=schedule, **noise)
    return comfy.samplers.KSAMPLER(_sample_function, {"settings": settings, "relay": relay})


def chosen_gamma(gamma: float, gammas: str, preset: Preset | None):
    """What holds of the three: the text of gammas if it is not blank, else the preset's, else the number."""
    return parse_gammas(gammas) or (gamma if preset is None else preset.gamma)


def _sample_function(model, x, sigmas, extra_args=None, callback=None, disable=None, *, settings, relay, **others):
    """k-diffusion's protocol as ComfyUI calls it; model is its KSamplerX0Inpaint around a guider.

    others: what wrappers around a SAMPLER hand to every sampler alike, as RES4LYF's do.
    """
    if others:
        logger.info("The LCM sampler has no use for the option %s.", ", ".join(sorted(others)))
    relay = relay or Relay(staged=False)
    if relay.x is not None:
        x = relay.x.to(x)
    if relay.staged and relay.table is None:
        relay.table = sigma_table(model.inner_model.model_patcher.get_model_object("model_sampling"))
    part = Part(model, x, sigmas, extra_args or {}, settings, relay)
    check_levels(part.model_sampling, sigmas)

    def after_step(info):
        # The server's progress hook raises too, but only where a progress bar is attached.
        comfy.model_management.throw_exception_if_processing_interrupted()
        if callback is not None:
            callback(info)

    gamma = part.gamma()
    plan = plan_for(part.model_sampling, sigmas, gamma, table=relay.table, masked=part.mask is not None)
    relay.x = sample_lcm(
        model,
        x,
        sigmas,
        extra_args=part.extra_args,
        callback=after_step,
        disable=disable,
        noise=part.noise(gamma, plan.numbers),
        plan=plan,
        trange=comfy.utils.model_trange,
    )
    return relay.x


class Part:
    """One call of the sampler: a whole run, or a part of one whose whole it is told (Settings.schedule) or not.

    sigmas: (steps + 1,) the levels of this call.   The other arguments are those of _sample_function.
    """

    def __init__(self, model, x, sigmas, extra_args: dict, settings: Settings, relay: Relay):
        self.model, self.x, self.sigmas, self.extra_args = model, x, sigmas, extra_args
        self.settings, self.relay = settings, relay
        self.model_sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
        self.mask = extra_args.get("denoise_mask")

    def goes_on(self) -> bool:
        """Whether the latent came with its noise: core hands samplers zeros where the noise input is off."""
        noise = getattr(self.model, "noise", None)  # samplers of other nodes around this one may hide it
        return noise is not None and not bool(noise.any())

    def gamma(self):
        """For the steps of this call. Raises ValueError for a list where which of its entries these are cannot be known."""
        gamma, schedule = self.settings.gamma, self.settings.schedule
        if schedule is None and not isinstance(gamma, int | float) and len(set(gamma)) > 1 and self.goes_on():
            raise ValueError(
                _unknown_steps("gammas has a number for each step of a run", "give one gamma for all steps")
            )
        return gammas_of_part(gamma, self.sigmas, schedule)

    def noise(self, gamma, numbers: Sequence[int]):
        """The source of the step noise, with what the settings and a feathered mask make of it.   numbers: of the levels."""
        source = foreign_noise(self.x, self.sigmas, self.extra_args.get("seed"))
        source = source or StepNoise(self._seed(gamma), self._batch_indices())
        factors = [*filter(None, (self._ramp(), self._feathers(gamma)))]
        if not factors and not self.settings.noise_clip_std:
            return source
        by_level = {number: math.prod(of_step) for number, *of_step in zip(numbers, *factors, strict=True)}
        return ShapedNoise(source, clip_std=self.settings.noise_clip_std, factors=by_level)

    def _seed(self, gamma) -> int:
        of_noise_input = self.extra_args.get("seed") or 0
        if self.settings.seed >= 0:
            return self.settings.seed
        draws = gamma not in (0, [0], (0,)) and len(self.sigmas) > 2
        if not of_noise_input and draws and self.goes_on():
            logger.warning(
                "The seed of the step noise is that of the noise input, and that is off and names seed 0, so it is 0. To go "
                "on with a run that stopped, set the seed of LCM Multistep Sampler, here and there, to one number."
            )
        return of_noise_input

    def _batch_indices(self) -> Sequence[int]:
        if self.settings.batch_indices is not None:
            return self.settings.batch_indices
        noise, latent = getattr(self.model, "noise", None), getattr(self.model, "latent_image", self.x)
        return indices_by_noise(noise, latent, self.extra_args.get("seed"))

    def _ramp(self) -> list[float] | None:
        """Each step's s_noise, None if all are 1."""
        start, end, schedule = self.settings.s_noise, self.settings.s_noise_end, self.settings.schedule
        if start == end == 1.0:
            return None
        if schedule is None and start != end and (self.goes_on() or self.sigmas[-1] > 0):
            raise ValueError(
                _unknown_steps("s_noise changes from the first step of a run to the last", "set s_noise_end to s_noise")
            )
        whole = self.sigmas if schedule is None else schedule
        return ramp(start, end, places_in(self.sigmas, whole), len(whole) - 1)

    def _feathers(self, gamma) -> list[torch.Tensor] | None:
        """Each step's factor under a mask that is partly between 0 and 1; None where there is nothing to even out.

        Not where another node decides what the mask is at each step (Differential Diffusion), nor where the latent came
        with its noise, of which there is no second draw then.
        """
        if self.mask is None or "denoise_mask_function" in self.extra_args.get("model_options", {}):
            return None
        if not bool(((self.mask > 0) & (self.mask < 1)).any()) or self.goes_on():
            return None
        forward = forward_process(self.model_sampling)
        table = sigma_table(self.model_sampling) if self.relay.table is None else self.relay.table
        shares = noise_kept(self.sigmas.cpu(), gamma, table=table, noise_scaling=forward)
        factors = feathered_factors(self.mask, shares, self.relay.kept)
        self.relay.kept *= math.prod(shares)
        return factors


def _unknown_steps(what: str, else_do: str) -> str:
    return (
        f"{what}, and this is a part of one (the noise input is off, or the last sigma is above 0): which of its steps these "
        "are cannot be seen here. Connect the whole schedule, as it was before it was split, to the sigmas input of LCM "
        f"Multistep Sampler, or {else_do}."
    )
