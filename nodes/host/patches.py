"""A LORA_MODEL on a MODEL and a CLIP, through ComfyUI's own patches."""

import logging

from .fit import Fit, fit, weight_of
from .weights import LoraWeights, named

logger = logging.getLogger(__name__)
SHOWN = 5


def apply(model, clip, weights, strength_model, strength_clip, *, demand_all=False, allow_misfit=False):
    """(MODEL, CLIP, report): clones with the patches; the given model or clip itself where there is nothing to do.

    Raises ValueError, before anything is patched, for a LoRA that was made for another model; with demand_all also
    if a single module finds no place. allow_misfit makes a warning of both and applies what fits.
    """
    weights = named(weights)
    if strength_model == 0 and (clip is None or strength_clip == 0):
        return model, clip, f"{weights.name}: not applied, its strength is 0."
    found = fit(weights, model, clip)
    if not allow_misfit and (found.foreign or (demand_all and not found.complete)):
        raise ValueError(refusal(weights, found, model))
    lines = describe(weights, found, strength_model, strength_clip, clip)
    # Text-encoder modules wait by choice, everything else that is left out is news.
    (logger.info if found.complete else logger.warning)("%s", " ".join(lines))
    in_model = model.model.state_dict().keys()
    for_model = {target: patch for target, patch in found.patches.items() if weight_of(target) in in_model}
    for_clip = {target: patch for target, patch in found.patches.items() if target not in for_model}
    return _patched(model, for_model, strength_model), _patched(clip, for_clip, strength_clip), "\n".join(lines)


def describe(weights: LoraWeights, found: Fit, strength_model: float, strength_clip: float, clip) -> list[str]:
    """What was applied and what was not, in lines for a person."""
    strength = f"{strength_model:g}" if clip is None else f"{strength_model:g} (text encoder {strength_clip:g})"
    lines = [f"{weights.name}: {len(found.placed)} of {found.asked} modules applied at strength {strength}."]
    if found.waiting:
        lines.append(f"{len(found.waiting)} text-encoder modules not applied: no CLIP is connected.")
    for what, names in (
        ("have no place in this model", found.homeless),
        ("have another shape than this model's weights", found.clashing),
        ("name a weight that another module of the file already changes", found.twice),
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}.")
    return lines


def refusal(weights: LoraWeights, found: Fit, model) -> str:
    """Why a LoRA is not applied, with counts, the first offender and the way out."""
    if found.waiting and not found.asked:
        return f"{weights.name} changes the text encoder only ({len(found.waiting)} modules). Connect a CLIP."
    if not found.asked:
        return f"{weights.name} is empty. Use another LoRA."
    reasons = []
    if found.homeless:
        reasons.append(f"{len(found.homeless)} have no place in it (the first: {found.homeless[0]})")
    if found.clashing:
        reasons.append(f"{len(found.clashing)} have another shape (the first: {found.clashing[0]})")
    if found.twice:
        reasons.append(f"{len(found.twice)} name a weight twice (the first: {found.twice[0]})")
    kind = type(model.model.model_config).__name__
    return (
        f"{weights.name} does not fit this model ({kind}): of its {found.asked} modules {len(found.placed)} fit, "
        f"{', '.join(reasons)}. It was made for another base model; use the LoRA for this one, or load the "
        "checkpoint family it was made for."
    )


def _patched(patcher, patches: dict, strength: float):
    """A clone of a MODEL or CLIP with the patches; itself if there are none or strength is 0."""
    if patcher is None or not patches or strength == 0:
        return patcher
    patcher = patcher.clone()
    patcher.add_patches(patches, strength)
    return patcher
