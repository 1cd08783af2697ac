"""A LORA_MODEL whose strength changes in the course of sampling, by ComfyUI's own hooks on the prompts."""

from collections.abc import Sequence
from itertools import pairwise

import comfy.hooks

from .identity import identity_of
from .patches import case_of
from .reports import by_step_lines, refusal
from .weights import named

# Of a step: how far before a step of the schedule its strength begins. Schedules round their steps to the next trained
# timestep, by up to a tenth of a step; more than a half would reach the step before.
EARLY = 0.25


def by_step(model, weights, strengths: Sequence[float], conditionings: Sequence):
    """(the CONDITIONINGs with hooks that apply the LoRA, the HOOKS, report). None among the former stays None.

    strengths: of equal shares of the schedule, first share first; as many as there are steps is one for each step.
    The MODEL is not changed: it has to be the one that is sampled, and is asked whether the LoRA is for it.
    Raises ValueError for a LoRA of another base, or one with nothing for the model.
    """
    weights = named(weights)
    case = case_of(weights, identity_of(weights), model, None)
    if case.wrong(False):
        raise ValueError(refusal(case))
    frames = _frames(strengths)
    hooks = _hooks(case.found.patches(), frames)
    hooked = [None if one is None else comfy.hooks.set_hooks_for_conditioning(one, hooks) for one in conditionings]
    return hooked, hooks, "\n".join(by_step_lines(case, frames))


def _frames(strengths: Sequence[float]) -> list[tuple[float, float]]:
    """(share of the schedule, strength that holds from there), without those that change nothing."""
    count = len(strengths)
    frames = [(max(0.0, (number - EARLY) / count), strength) for number, strength in enumerate(strengths)]
    return frames[:1] + [now for before, now in pairwise(frames) if before[1] != now[1]]


def _hooks(terms: Sequence[dict], frames: Sequence[tuple[float, float]]) -> comfy.hooks.HookGroup:
    """terms: patches that add up, each as a hook of its own."""
    hooks = comfy.hooks.HookGroup()
    for patches in terms:
        hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0.0)
        # Placed already, by the road that every other node takes; core would look their names up again, and knows fewer.
        hook.weights, hook.weights_clip, hook.need_weight_init = patches, {}, False
        hooks.add(hook)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for start, strength in frames:
        # Where a level lies tells its strength, not how many steps came before: a run may begin anywhere.
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start, guarantee_steps=0))
    hooks.set_keyframes_on_hooks(keyframes)
    return hooks
