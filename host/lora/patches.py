"""A LORA_MODEL on a MODEL and a CLIP, through ComfyUI's own patches; every node that applies one takes this road."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from comfy_execution.graph_utils import ExecutionBlocker

from ...lora_merge.recognise.identity import Identity
from ...samplers.preset import Preset
from .case import Case
from .fit import fit, weight_of
from .identity import KnownWeights, identity_of, preset_of
from .model_base import base_of, uncovered
from .reports import applied_lines, metadata_lines, not_applied, refusal
from .stored import change_objects, never_patched
from .weights import LoraWeights, named

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Applied:
    """model, clip: clones with the patches, or what was given where there was nothing to do.
    preset: the sampling settings that go with the LoRA, None if they are not known.   name: of the LoRA.
    """

    model: object
    clip: object
    report: str
    preset: Preset | None
    name: str

    @property
    def steps(self) -> int | ExecutionBlocker:
        """For an output that others take a number from: whoever does is told that there is none."""
        return self._no_settings("steps") if self.preset is None else self.preset.steps

    @property
    def cfg(self) -> float | ExecutionBlocker:
        return self._no_settings("cfg") if self.preset is None else self.preset.cfg

    def _no_settings(self, output: str) -> ExecutionBlocker:
        return ExecutionBlocker(
            f"LCM-LoRA Loader has no {output} to give: {self.name} is no acceleration LoRA whose settings are known. "
            f"Disconnect {output}, and set it as the LoRA's page says."
        )


def apply(model, clip, weights, strength_model, strength_clip, *, demand_all=False, allow_misfit=False) -> Applied:
    """Raises ValueError, before anything is patched, for a LoRA that was made for another model, or names a weight twice.

    demand_all: for LoRAs that have to fit as a whole: nearly every module needs a place, and one that accelerates has
    to cover the model.   allow_misfit: makes a warning of that and applies what fits.
    """
    weights = named(weights)
    identity = identity_of(weights)
    preset = preset_of(identity)
    if strength_model == 0 and (clip is None or strength_clip == 0):
        return Applied(
            model=model,
            clip=clip,
            report=not_applied(weights.name),
            preset=preset,
            name=weights.name,
        )
    case = case_of(weights, identity, model, clip)
    found, wrong = case.found, case.wrong(demand_all)
    if wrong and not allow_misfit:
        raise ValueError(refusal(case))
    lines = applied_lines(case, strength_model, strength_clip, clip, wrong=wrong, for_sampling=demand_all)
    lines += metadata_lines(weights.metadata)
    # Text-encoder modules wait by choice, everything else that is left out is news.
    complete = len(found.placed) == case.counts.asked > 0
    (logger.info if complete and not wrong else logger.warning)("%s", " ".join(lines))
    terms = found.patches()
    for_model = [_only(term, lambda weight: weight in case.model.weights) for term in terms]
    for_clip = [_only(term, lambda weight: weight not in case.model.weights) for term in terms]
    return Applied(
        model=_patched(model, for_model, strength_model),
        clip=_patched(clip, for_clip, strength_clip),
        report="\n".join(lines),
        preset=preset,
        name=weights.name,
    )


def case_of(weights: LoraWeights, identity: Identity | None, model, clip) -> Case:
    """All about a LoRA on a model; remembered with the LoRA's file, for a changed strength changes nothing of it."""
    remembered = isinstance(weights, KnownWeights) and clip is None and weights.untouched
    if remembered and model.model in weights.cases:
        return weights.cases[model.model]
    state = model.model.state_dict()
    found, model_base = fit(weights, model, clip, state), base_of(model, state)
    kinds = identity.structure.recognised.kinds if identity else frozenset()
    left, could = uncovered(found, model_base, kinds)
    case = Case(name=weights.name, identity=identity, found=found, model=model_base, left=tuple(left), could=could)
    if remembered:
        weights.cases[model.model] = case
    return case


def _only(patches: dict, wanted: Callable[[str], bool]) -> dict:
    return {target: patch for target, patch in patches.items() if wanted(weight_of(target))}


def _patched(patcher, terms: Sequence[dict], strength: float):
    """A clone of a MODEL or CLIP with the patches, of all terms; itself if there are none or strength is 0."""
    if patcher is None or not any(terms) or strength == 0:
        return patcher
    patcher = patcher.clone()
    inner = getattr(patcher, "patcher", patcher)  # a CLIP has one
    alone = never_patched(inner.model)
    for patches in terms:
        patcher.add_patches(_only(patches, lambda weight: not alone(weight)), strength)
    change_objects(inner, [_only(patches, alone) for patches in terms], strength)
    return patcher
