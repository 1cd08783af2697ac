"""Where the modules of a LoRA belong in a MODEL and a CLIP, and which belong nowhere."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import comfy.lora
import comfy.lora_convert
import torch

from ...lora_merge.files.keys import BIAS_PARTS, DIFF_PARTS, parse
from ...lora_merge.files.lora import Pieces
from ...lora_merge.files.reading import unread_keys
from ...lora_merge.updates.build import build
from ...lora_merge.updates.layer import check_factors
from ...lora_merge.updates.unmade import Unmade
from .lokr_workaround import without_cores
from .terms import for_one_model, terms
from .weights import named

TEXT_PREFIXES = ("lora_te", "lora_prior_te", "text_encoder", "text_model.", "te1_", "te2_")


@dataclass(frozen=True)
class Clash:
    """update: the shape that the module's update has, or what is wrong with it in the words of who builds it.
    weight: shape of the weight, None where nothing is known."""

    module: str
    update: tuple[int, ...] | str
    weight: tuple[int, ...] | None


@dataclass(frozen=True)
class Fit:
    """targets: weights, or parts of weights, that the placed modules change -> shape, None where it is not known.
    placed: modules with a place and the right shape.
    homeless: modules that ComfyUI's key maps do not know in this model.
    clashing: modules with a place but another shape.
    twice: pairs of modules of the file that are one weight; only the first of the two has an effect.
    waiting: text-encoder modules while no CLIP is connected.
    unread: keys that ComfyUI's loader has no use for, whatever the model.
    pieces: of the LoRA, as ComfyUI's loader reads it.   homes: module -> its place.
    loaded: what that makes of them: target -> ComfyUI's patch.
    """

    targets: Mapping
    placed: tuple[str, ...]
    homeless: tuple[str, ...]
    clashing: tuple["Clash", ...]
    twice: tuple[tuple[str, str], ...]
    waiting: tuple[str, ...]
    unread: tuple[str, ...] = ()
    pieces: Mapping[str, torch.Tensor | Unmade] = field(default_factory=dict)
    homes: Mapping = field(default_factory=dict)
    loaded: Mapping = field(default_factory=dict)

    def patches(self) -> list[dict]:
        """Target -> ComfyUI's patch, for the placed modules only; one dict for each term of a sum, and all of them add up.
        What lies in a file is read when ComfyUI patches."""
        loaded = [self.loaded]
        if any(isinstance(piece, Unmade) and piece.shares for piece in self.pieces.values()):
            sums = terms(dict(self.pieces), modules(self.pieces))
            loaded = [comfy.lora.load_lora(term, self.homes, log_missing=False) for term in sums]
        return [
            {
                target: for_one_model(_in_shape(patch, self.targets[target]))
                for target, patch in patches.items()
                if target in self.targets
            }
            for patches in loaded
        ]

    @property
    def asked(self) -> int:
        """Modules that should have had a place."""
        return len(self.placed) + len(self.homeless) + len(self.clashing) + len(self.twice)

    @property
    def complete(self) -> bool:
        return len(self.placed) == self.asked > 0


def fit(weights: Mapping[str, torch.Tensor], model, clip=None, state: Mapping | None = None) -> Fit:
    """Looks up every module of a LORA_MODEL; changes nothing, and reads nothing that lies in a file.

    state: of the model, where somebody has asked for it already.
    """
    shapes, homes = _weights_and_homes(model, clip, state)
    lora = _modulations(comfy.lora_convert.convert_lora(named(weights).pieces), homes)
    lora = without_cores(lora, modules(lora))
    # A LoRA of rank 0 beside an alpha would stop load_lora.
    if unread := unread_keys(lora):
        lora = {key: tensor for key, tensor in lora.items() if key not in unread}
    parts_of = modules(lora)
    # The key maps also name weights that this very model lacks; add_patches drops patches for them in silence. And
    # load_lora tries a dozen spellings of each name it is given, so it is given those of this file only.
    homes = {module: homes[module] for module in parts_of if module in homes and weight_of(homes[module]) in shapes}
    patches = comfy.lora.load_lora(lora, homes, log_missing=False)

    fates: dict[str, list] = {fate: [] for fate in ("placed", "homeless", "clashing", "twice", "waiting")}
    taken: dict = {}
    for module, parts in sorted(parts_of.items()):
        targets = _targets(homes.get(module), set(parts))
        if not targets or any(target not in patches or weight_of(target) not in shapes for target in targets):
            waits = clip is None and module.startswith(TEXT_PREFIXES)
            fates["waiting" if waits else "homeless"].append(module)
        elif other := next((taken[target] for target in targets if target in taken), None):
            fates["twice"].append((other, module))
        elif clash := _clash(module, targets, {part: lora[key] for part, key in parts.items()}, shapes):
            # ComfyUI would log an error for every picture and keep the weight as it is.
            fates["clashing"].append(clash)
        else:
            fates["placed"].append(module)
            taken |= dict.fromkeys(targets, module)
    sorted_out = {fate: tuple(modules) for fate, modules in fates.items()}
    return Fit(
        targets={target: _shape_of(target, shapes) for target in taken},
        unread=tuple(sorted(unread)),
        pieces={key: lora[key] for module in homes for key in parts_of[module].values()},
        homes=homes,
        loaded=patches,
        **sorted_out,
    )


def _weights_and_homes(model, clip, state: Mapping | None) -> tuple[dict, dict]:
    """Key -> weight, and ComfyUI's key map: module -> its place."""
    shapes = dict(model.model.state_dict() if state is None else state)
    homes = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        shapes |= clip.cond_stage_model.state_dict()
        homes = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, homes)
    return shapes, homes


def _hollow(piece: torch.Tensor | Unmade) -> torch.Tensor:
    """A tensor of that shape, without values where it has none yet."""
    return torch.empty(piece.shape, dtype=piece.dtype, device="meta") if isinstance(piece, Unmade) else piece


def _modulations(lora: Pieces, homes: Mapping) -> Pieces:
    """A LORA_MODEL with `x.diff_m` as `x.modulation.diff`, where the model has such a parameter: a difference of
    a Wan block's modulation, for which those who extract LoRAs have a name of their own and ComfyUI has none.
    """
    renamed = {}
    for key, tensor in lora.items():
        block = key.removesuffix(".diff_m")
        known = block != key and f"{block}.modulation" in homes
        renamed[f"{block}.modulation.diff" if known else key] = tensor
    return renamed


def modules(lora: Mapping[str, object]) -> dict[str, dict[str, str]]:
    """Module, as the file spells it -> part of it -> key; without keys of no known form."""
    found: dict[str, dict[str, str]] = {}
    for key in lora:
        if (known := parse(key)) is not None:
            found.setdefault(known[0], {})[known[1]] = key
    return found


def weight_of(target) -> str:
    """The weight that a patch target changes: itself, or the first of (weight, part of it)."""
    return target if isinstance(target, str) else target[0]


def _targets(home, parts: set[str]) -> list:
    """What a module's keys patch: its weight, and the bias beside it, as comfy.lora.load_lora names them."""
    if home is None or not isinstance(home, str):
        return [] if home is None else [home]
    weight = [home] if parts - {*BIAS_PARTS, "alpha"} else []
    return weight + ([f"{home.removesuffix('.weight')}.bias"] if parts & {*BIAS_PARTS} else [])


def _clash(module: str, targets: list, parts: Pieces, shapes) -> Clash | None:
    """What is wrong with the shape of a module's updates, None if nothing is or if nothing is known about it."""
    for target in targets:
        shape = _shape_of(target, shapes)
        is_bias = weight_of(target).endswith(".bias")
        try:
            delta = _delta_shape({part: tensor for part, tensor in parts.items() if (part in BIAS_PARTS) == is_bias})
        except ValueError as error:
            return Clash(module, str(error), shape)
        if shape is not None and delta is not None and not _suits(delta, shape, parts):
            return Clash(module, delta, shape)
    return None


def _suits(delta: tuple[int, ...], shape: tuple[int, ...], parts: Mapping[str, object]) -> bool:
    if "set_weight" in parts:  # is copied into the weight, a single number into all of it
        return prod(delta) in (1, prod(shape))
    # Some kinds tell only how many rows the weight has.
    rows_only = len(delta) == 1 and "oft_blocks" in parts
    return delta[:1] == shape[:1] and (rows_only or prod(delta) == prod(shape))


def _shape_of(target, shapes) -> tuple[int, ...] | None:
    """Shape of a weight, or of the part of it that a target names; None where the shape says nothing."""
    weight = shapes.get(weight_of(target))
    # A packed weight (nf4 and the like) is stored in another shape than it acts in.
    if weight is None or not weight.is_floating_point():
        return None
    shape = list(weight.shape)
    if not isinstance(target, str):
        dim, _, length = target[1]
        shape[dim] = length
    return tuple(shape)


def _delta_shape(parts: Pieces) -> tuple[int, ...] | None:
    """Shape of the weight that parts of one module change. Raises ValueError if they contradict one another."""
    for part in (*DIFF_PARTS, "set_weight"):
        if part in parts:
            return tuple(parts[part].shape)
    if parts.keys() - {"alpha"} == {"up", "down"}:
        up, down = tuple(parts["up"].shape), tuple(parts["down"].shape)
        check_factors(up, down)
        return (up[0], *down[1:])
    update = build({part: _hollow(piece) for part, piece in parts.items()}, None) if parts else None
    return None if update is None else update.shape


def _in_shape(patch, shape: tuple[int, ...] | None):
    """ComfyUI adds a difference only if it has the very shape of the weight: (out, in, 1, 1) is not (out, in)."""
    if isinstance(patch, tuple) and patch[0] == "diff" and shape is not None:
        return ("diff", (patch[1][0].reshape(shape), *patch[1][1:]))
    return patch
