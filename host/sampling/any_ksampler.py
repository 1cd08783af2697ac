"""Core's sampler "lcm" made exact in every node that takes samplers by name: a wrapper that a MODEL carries there.

A node that has only the name "lcm" asks core for a run at its scheduler's levels. The wrapper stands around that run
(ComfyUI's OUTER_SAMPLE), sees which sampler was asked for, and puts the sampler and the levels of this pack in its place.
"""

import logging
import math
from itertools import pairwise

import torch
from comfy.k_diffusion import sampling as core
from comfy.patcher_extension import WrappersMP

from ...lora_merge.words import many
from ...samplers.preset import Preset
from ...samplers.renoise import gamma_per_step
from ...samplers.schedule import timesteps_at
from ..door.node import in_the_name_of
from ..reports import tell
from .pure_noise import from_pure_noise
from .sampler import chosen_gamma, lcm_sampler
from .schedules import lcm_sigmas
from .tables import sigma_table, time_table

logger = logging.getLogger(__name__)

KEY = "lcm_kit.any_ksampler"
NAME = "LCM for any KSampler"


def with_exact_lcm(model, *, gamma: float, gammas: str, original_steps: int, preset: Preset | None):
    """A clone of the MODEL on which core's sampler "lcm" is this pack's; all other samplers stay as they are.

    It holds for what is put on the clone later too. Of two in a row the later one holds.
    Raises ValueError for a text of gammas that is none.
    """
    exact = ExactLCM(chosen_gamma(gamma, gammas, preset), original_steps, preset)
    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, exact.outer_sample)
    return model


class ExactLCM:
    """gamma: a number, or one for each step.   original_steps: replaced by that of the preset, if there is one."""

    def __init__(self, gamma, original_steps: int, preset: Preset | None):
        self.gamma, self.preset = gamma, preset
        self.original_steps = original_steps if preset is None else preset.original_steps

    def outer_sample(
        self,
        executor,
        noise,
        latent_image,
        sampler,
        sigmas,
        denoise_mask=None,
        callback=None,
        disable_pbar=False,
        seed=None,
        **more,
    ):
        """Around CFGGuider.outer_sample, whose arguments these are."""
        if is_cores_lcm(sampler) and is_run(sigmas):
            # The guider's MODEL: what other nodes put on it after this one counts.
            model = executor.class_obj.model_patcher
            with in_the_name_of(NAME):
                levels, gamma = self.run(model, sigmas, noisy=not bool(noise.count_nonzero()))
            sigmas = levels.to(sigmas)
            sampler = from_pure_noise(
                lcm_sampler(gamma=gamma, seed=-1 if seed is None else seed, schedule=levels), self.preset
            )
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **more)

    def run(self, model, asked: torch.Tensor, *, noisy: bool):
        """(levels, gamma): what to run in place of the (steps + 1,) noise levels that were asked for.

        noisy: the latent comes with the noise of the first level, so that no other will do.
        """
        model_sampling = model.get_model_object("model_sampling")
        table = time_table(model_sampling)
        if table is None:
            table = sigma_table(model_sampling)
        times = [_time(sigma, table) for sigma in asked.tolist()]
        if noisy or times[-1]:
            levels, gamma = self._part(model, asked, times, table, noisy)
        else:
            levels = self._whole(model, times, table)
            gamma = self._gamma_of_each(len(levels) - 1)
        _say_start(times[0], _time(float(levels[0]), table), asked, levels)
        return levels, gamma

    def _whole(self, model, times, table):
        """A run from fresh noise to the picture: the LCM schedule that begins nearest to the level asked for."""
        steps = len(times) - 1
        if self.preset is not None and self.preset.timesteps:
            return self._schedule(model, steps, times[0])
        first = 1 / self.original_steps
        starts = (max(round(times[0] / first), 1) * first, max(times[0], first))
        runs = [self._schedule(model, self._fitting(model, steps, start), start) for start in starts]
        run = min(runs, key=lambda run: abs(_time(float(run[0]), table) - times[0]))
        if len(run) <= steps:
            logger.warning(
                "LCM for any KSampler: %s asked for, but from timestep %d on the model was trained on %d "
                "only: these are run. Raise denoise for more.",
                many(steps, "steps were", "step was"),
                _timestep(times[0]),
                len(run) - 1,
            )
        return run

    def _part(self, model, asked, times, table, noisy):
        """(levels, gamma) of a run that is handed a noisy latent or leaves noise for another node.

        The levels where they meet stay as they are; those between are the run's of which this is a part.
        """
        total = round((len(times) - 1) / max(times[0] - times[-1], 1 / len(table)))
        whole = self._schedule(model, self._fitting(model, total, 1.0), 1.0, exactly=False)
        known = [_time(sigma, table) for sigma in whole.tolist()[:-1]]
        steps = [min(range(len(known)), key=lambda i: abs(known[i] - time)) for time in times[:-1]]
        levels = torch.cat([whole[steps], asked[-1:].to(whole)])
        if noisy:
            levels[0] = asked[0]
        gamma = self._gamma_of_each(len(known))
        if not isinstance(gamma, int | float):
            gamma = [gamma[step] for step in steps]
        return (levels if is_run(levels) else asked), gamma

    def _gamma_of_each(self, steps):
        """The gamma, or a list of one for each step of a run."""
        return self.gamma if isinstance(self.gamma, int | float) else gamma_per_step(self.gamma, steps)

    def _fitting(self, model, steps, time):
        """Not more steps than the model has trained timesteps from here on; others know every time."""
        if time_table(model.get_model_object("model_sampling")) is not None:
            return steps
        return max(min(steps, math.floor(self.original_steps * time + 1e-4)), 1)

    def _schedule(self, model, steps, denoise, exactly=True):
        preset = self.preset
        if preset is not None:
            try:
                preset = preset.with_steps(steps)
            except ValueError:
                if exactly:
                    raise ValueError(
                        f"the sampler node asks for {many(steps, 'steps')}, and the preset {preset.name} is not made for that "
                        f"many. Set steps to {preset.steps} there, or choose another preset."
                    ) from None
        return lcm_sigmas(model, steps=steps, denoise=denoise, original_steps=self.original_steps, preset=preset)


def is_cores_lcm(sampler) -> bool:
    """True for what the name "lcm" stands for; a SAMPLER with options of its own was put together by hand."""
    if getattr(sampler, "sampler_function", None) is not core.sample_lcm:
        return False
    return not sampler.extra_options and not sampler.inpaint_options


def is_run(sigmas) -> bool:
    """True for levels that fall. Not for none, nor for those that climb, which add noise to a picture."""
    levels = sigmas.tolist()
    return len(levels) > 1 and all(before > after for before, after in pairwise(levels))


def _time(sigma: float, table: torch.Tensor) -> float:
    """[0, 1], how much of the schedule lies at or below a level: 1 for pure noise, 0 for the picture."""
    return (int(timesteps_at(torch.tensor([sigma]), table)) + 1) / len(table) if sigma > 0 else 0.0


def _timestep(time: float) -> int:
    """As users write it: 0 to 999, whatever the length of a model's table."""
    return round(1000 * time) - 1


def _say_start(asked, ours, asked_sigmas, levels):
    if abs(asked - ours) > 1.5e-3:
        line = (
            f"LCM for any KSampler: asked to start at timestep {_timestep(asked)} (sigma {float(asked_sigmas[0]):.4g}), starts at "
            f"{_timestep(ours)} (sigma {float(levels[0]):.4g}): the nearest that the model was trained on."
        )
        logger.info("%s", line)
        tell(line)
