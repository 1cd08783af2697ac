"""Where the modules of a LoRA belong in a MODEL and a CLIP, and which belong nowhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import comfy.lora
import comfy.lora_convert
import torch

from ...lora_merge.keys import parse, refused_format

BIAS_PARTS = {"diff_b", "b_norm"}
TEXT_PREFIXES = ("lora_te", "lora_prior_te", "text_encoder", "text_model.", "te1_", "te2_")


@dataclass(frozen=True)
class Fit:
    """patches: target weight -> ComfyUI's patch, for the placed modules only.
    placed: modules with a place and the right shape.
    homeless: modules that ComfyUI's key maps do not know in this model.
    clashing: modules with a place but another shape, as "module: (out, in) on a weight of (out, in)".
    twice: modules whose weight another module of the same file already takes.
    waiting: text-encoder modules while no CLIP is connected.
    """

    patches: dict
    placed: tuple[str, ...]
    homeless: tuple[str, ...]
    clashing: tuple[str, ...]
    twice: tuple[str, ...]
    waiting: tuple[str, ...]

    @property
    def asked(self) -> int:
        """Modules that should have had a place."""
        return len(self.placed) + len(self.homeless) + len(self.clashing) + len(self.twice)

    @property
    def complete(self) -> bool:
        return len(self.placed) == self.asked > 0

    @property
    def foreign(self) -> bool:
        """Made for another model: a wrong shape anywhere, or fewer than half of the modules placed."""
        return bool(self.clashing or self.twice) or 2 * len(self.placed) < max(self.asked, 1)


def fit(weights: Mapping[str, torch.Tensor], model, clip=None) -> Fit:
    """Looks up every module of a LORA_MODEL; changes nothing."""
    shapes, homes = dict(model.model.state_dict()), comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        shapes |= clip.cond_stage_model.state_dict()
        homes = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, homes)
    lora = comfy.lora_convert.convert_lora(dict(weights))
    # The key maps also name weights that this very model lacks; add_patches drops patches for them in silence.
    homes = {module: target for module, target in homes.items() if weight_of(target) in shapes}
    patches = comfy.lora.load_lora(lora, homes, log_missing=False)

    placed, homeless, clashing, twice, waiting = [], [], [], [], []
    taken: set = set()
    for module, parts in sorted(modules(lora).items()):
        targets = _targets(homes.get(module), parts)
        if not targets or any(target not in patches or weight_of(target) not in shapes for target in targets):
            waits = clip is None and module.startswith(TEXT_PREFIXES)
            (waiting if waits else homeless).append(module)
        elif not taken.isdisjoint(targets):
            twice.append(module)
        elif clashes := [clash for target in targets if (clash := _clash(patches[target], target, shapes))]:
            # ComfyUI would log an error for every picture and keep the weight as it is.
            clashing.append(f"{module}: {clashes[0]}")
        else:
            placed.append(module)
            taken.update(targets)
    patches = {target: patch for target, patch in patches.items() if target in taken}
    return Fit(patches, *map(tuple, (placed, homeless, clashing, twice, waiting)))


def modules(lora: Mapping[str, torch.Tensor]) -> dict[str, set[str]]:
    """Module, as the file spells it -> parts of it that are there; a key of no known form is a module of its own."""
    found: dict[str, set[str]] = {}
    for key in lora:
        module, part = parse(key) or (refused_format(key)[1], "other")
        found.setdefault(module, set()).add(part)
    return found


def weight_of(target) -> str:
    """The weight that a patch target changes: itself, or the first of (weight, part of it)."""
    return target if isinstance(target, str) else target[0]


def _targets(home, parts: set[str]) -> list:
    """What a module's keys patch: its weight, and the bias beside it, as comfy.lora.load_lora names them."""
    if home is None or not isinstance(home, str):
        return [] if home is None else [home]
    weight = [home] if parts - BIAS_PARTS else []
    return weight + ([f"{home.removesuffix('.weight')}.bias"] if parts & BIAS_PARTS else [])


def _clash(patch, target, shapes) -> str | None:
    """What is wrong with the shape of a patch, None if nothing is or if its kind has no shape of its own."""
    offset = None if isinstance(target, str) else target[1]
    weight = shapes.get(weight_of(target))
    # A packed weight (nf4 and the like) is stored in another shape than it acts in.
    if weight is None or not weight.is_floating_point():
        return None
    shape = list(weight.shape)
    if offset is not None:
        shape[offset[0]] = offset[2]
    delta = _delta_shape(patch)
    if delta is None or (delta[0] == shape[0] and prod(delta) == prod(shape)):
        return None
    return f"{delta} on a weight of {tuple(shape)}"


def _delta_shape(patch) -> tuple[int, ...] | None:
    if isinstance(patch, tuple):  # ("diff", (tensor,)) or ("set", (tensor,))
        return tuple(patch[1][0].shape)
    if getattr(patch, "name", None) != "lora":
        return None
    up, down, _, mid, _, reshape = patch.weights
    if reshape is not None:  # the weight is enlarged to fit
        return None
    kernel = down.shape[2:] if mid is None else mid.shape[2:]
    return (up.shape[0], down.shape[1], *kernel)
