"""Core's sampler "lcm" made exact in every node that takes samplers by name: a wrapper that a MODEL carries there.

A node that has only the name "lcm" asks core for a run at its scheduler's levels. The wrapper stands around that run
(ComfyUI's OUTER_SAMPLE), sees which sampler was asked for, and puts the sampler and the levels of this pack in its place.
"""

import logging
import math
from itertools import pairwise

import comfy.model_sampling
import torch
from comfy.k_diffusion import sampling as core
from comfy.patcher_extension import WrappersMP

from ...samplers.preset import Preset
from ...samplers.schedule import timesteps_at
from .sampler import chosen_gamma, lcm_sampler
from .schedules import lcm_sigmas
from .tables import sigma_table

logger = logging.getLogger(__name__)

KEY = "lcm_kit.any_ksampler"


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
            sigmas = self.levels(model, sigmas, noisy=not bool(noise.count_nonzero())).to(sigmas)
            sampler = lcm_sampler(gamma=self.gamma, seed=-1)
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **more)

    def levels(self, model, asked: torch.Tensor, *, noisy: bool) -> torch.Tensor:
        """The noise levels to run in place of those (steps + 1,) that were asked for.

        noisy: the latent comes with the noise of the first level, so that no other will do.
        """
        model_sampling = model.get_model_object("model_sampling")
        if isinstance(model_sampling, comfy.model_sampling.ModelSamplingContinuousEDM):
            logger.info("LCM for any KSampler: the model has no numbered timesteps; the scheduler's levels are kept.")
            return asked
        table = sigma_table(model_sampling)
        times = [_time(sigma, table) for sigma in asked.tolist()]
        if noisy or times[-1]:
            levels = self._part(model, asked, times, table, noisy)
        else:
            levels = self._whole(model, times, table)
        _say_start(times[0], _time(float(levels[0]), table), table, asked, levels)
        return levels

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
                "LCM for any KSampler: %d steps were asked for, but from timestep %d on the model was trained on %d "
                "only: these are run. Raise denoise for more.",
                steps,
                round(times[0] * len(table)) - 1,
                len(run) - 1,
            )
        return run

    def _part(self, model, asked, times, table, noisy):
        """A run that is handed a noisy latent or leaves noise for another node: the levels where they meet stay as
        they are, and those between are the run's of which this is a part.
        """
        total = round((len(times) - 1) / max(times[0] - times[-1], 1 / len(table)))
        whole = self._schedule(model, self._fitting(model, total, 1.0), 1.0, exactly=False)
        known = [_time(sigma, table) for sigma in whole.tolist()[:-1]]
        levels = [whole[min(range(len(known)), key=lambda i: abs(known[i] - time))] for time in times]
        if noisy:
            levels[0] = asked[0].to(whole)
        levels = torch.stack([*levels[:-1], asked[-1].to(whole)])
        return levels if is_run(levels) else asked

    def _fitting(self, model, steps, time):
        """Not more steps than the model has trained timesteps from here on; a flow model knows every time."""
        if isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST):
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
                        f"The sampler node asks for {steps} steps, but the preset {preset.name} on LCM for any KSampler was "
                        f"made for exactly {preset.steps}. Set steps to {preset.steps} there, or choose another preset."
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


def _say_start(asked, ours, table, asked_sigmas, levels):
    if abs(asked - ours) > 1.5e-3:
        logger.info(
            "LCM for any KSampler: asked to start at timestep %d (sigma %.4g), starts at %d (sigma %.4g): the nearest that "
            "the model was trained on.",
            round(asked * len(table)) - 1,
            float(asked_sigmas[0]),
            round(ours * len(table)) - 1,
            float(levels[0]),
        )
