"""The names that a file's LoRA gets for its readers: those of kohya's trainers, of diffusers, of ComfyUI."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch

from ..naming.aliases import text_encoder
from ..naming.families import family_by_shapes, family_by_width, written
from ..naming.family import Family, underscored
from ..updates.layer import Layer, LoraLayer
from .lora import Format, Lora
from .one_naming import family_of_loras, in_own_naming, model_shapes, of_model, split

SaveFormat = Literal["auto", "kohya", "diffusers", "comfy"]
SAVE_FORMATS: tuple[SaveFormat, ...] = get_args(SaveFormat)
THEIRS = "transformer."


def named_for(lora: Lora, format: SaveFormat) -> tuple[Lora, Format]:
    """(the LoRA under the names of a format, the format to write it in).

    auto: for transformers of a known family what both ComfyUI and diffusers read, at no larger size (Family.saved), else
    kohya.
    kohya: `lora_unet_` and underscores.   diffusers: `transformer.` and diffusers' names, fused weights in slices.
    comfy: `diffusion_model.` and the model's own names with their dots; its writers are PEFT's keys.
    UNets and models of no known family keep the names that they have: kohya's format is what ComfyUI reads of them.
    Fused weights and slices become one another exactly: ranks add up, or `down` is repeated.
    Raises ValueError for what a format has no name for, or cannot hold.
    """
    family = family_of_loras([lora])
    if family is None:
        # Names of diffusers' that several models have: they stay, in the keys that go with them.
        theirs = (
            format == "auto" and _is_plain(lora) and all(name.startswith(THEIRS) for name in lora.spellings.values())
        )
        return lora, "diffusers" if format == "diffusers" or theirs else "kohya"
    if format == "auto":
        return _for_all_readers(lora, family)
    return (_of_diffusers(lora) if format == "diffusers" else _own(lora, family, format)), format


def _for_all_readers(lora: Lora, family: Family) -> tuple[Lora, Format]:
    if family.saved == "comfy":
        own = _own(lora, family, "comfy")
        return _in_common(own, family) or own, "comfy"
    own = _own(lora, family, family.saved_fused)
    if _is_plain(lora) and not _has_fused(lora, family):
        try:
            theirs = _of_diffusers(lora)
        except ValueError:  # a weight that diffusers' model has not
            return own, family.saved_fused
        if all(family.reads(theirs.spellings[module]) for module in of_model(theirs)):
            return theirs, "diffusers"
    return own, family.saved_fused


def _in_common(lora: Lora, family: Family) -> Lora | None:
    """A LoRA in the model's own names, in those that both ComfyUI and diffusers read; None where they have no such names for
    all of it."""
    modules = of_model(lora)
    common = {module: name for module in modules if (name := family.common(module))}
    if len(common) < len(modules) or not _is_plain(lora) or not any(map(family.tells_diffusers, common.values())):
        return None
    return replace(lora, spellings=dict(lora.spellings) | {m: f"diffusion_model.{name}" for m, name in common.items()})


def _is_plain(lora: Lora) -> bool:
    """Whether diffusers' format can hold all of it."""
    plain = all(isinstance(layer, LoraLayer) and layer.mid is None for layer in lora.modules.values())
    return plain and not lora.diffs and not lora.carried


def _has_fused(lora: Lora, family: Family) -> bool:
    """Whether a weight is whole in it that diffusers has in slices, where it would take more numbers."""
    return any(len(family.parts(module, layer.shape)) > 1 for module, layer in lora.modules.items())


def _own(lora: Lora, family: Family, format: Format) -> Lora:
    """In the model's own names, every slice part of its fused weight."""
    lora = _in_own_naming(lora)
    _check_slices(lora, family)
    spelled = {}
    for module, known in lora.spellings.items():
        bare = module.removesuffix("_bias")
        dots = None if text_encoder(known) else family.dots(bare)
        if dots is None:
            spelled[module] = known
            continue
        kohya = f"lora_unet_{underscored(dots)}"
        # A bias or a bare parameter has a name in ComfyUI's format only.
        own = format == "comfy" or bare != module or not family.reads(kohya)
        spelled[module] = f"diffusion_model.{dots}{'.bias' if bare != module else ''}" if own else kohya
    return replace(lora, spellings=spelled)


def _check_slices(lora: Lora, family: Family) -> None:
    """Raises ValueError for slices of a fused weight that could not become part of it, where ComfyUI has no name for them."""
    unread = [module for module in lora.spellings if family.fused(module) and written(family, module) is None]
    if unread:
        kinds = {lora.carried[m].kind if m in lora.carried else "" for m in unread} - {""}
        why = (
            f"they are {' and '.join(sorted(kinds))}" if kinds else "the other slices do not tell where they lie in it"
        )
        names = ", ".join(sorted(lora.spellings[module] for module in unread)[:3])
        raise ValueError(
            f"{lora.source}: {len(unread)} of its modules ({names}) are slices of weights that {family.name} has in one piece "
            f"in ComfyUI, which has no names for the slices, and they cannot become part of the whole: {why}. Save it for "
            "diffusers if it is a plain LoRA, or train on the names of the whole weight."
        )


def _of_diffusers(lora: Lora) -> Lora:
    """In diffusers' names, every fused weight in its slices."""
    # Families with the same names of their own may have others in diffusers: the names that came may tell.
    came, lora = lora, _in_own_naming(lora)
    family = next(filter(None, map(family_by_shapes, map(_model_shapes, (came, lora)))), None)
    family = family or family_by_width([model_shapes(came)])
    if family is None:
        raise ValueError(
            f"{lora.source}: its modules do not tell which model it is for, so not what diffusers calls them"
        )
    modules: dict[str, Layer] = {}
    spelled: dict[str, str] = {}
    unnamed = []
    for module, layer in lora.modules.items():
        if text_encoder(lora.spellings[module]) is not None:
            modules[module], spelled[module] = layer, lora.spellings[module]
            continue
        parts = family.parts(module, layer.shape)
        if not parts or not isinstance(layer, LoraLayer):
            unnamed.append(lora.spellings[module])
            continue
        for name, own in _without_empty(split(layer, parts)).items():
            modules[f"{THEIRS}{name}"], spelled[f"{THEIRS}{name}"] = own, f"{THEIRS}{name}"
    if unnamed:
        raise ValueError(
            f"{lora.source}: diffusers has no name for {len(unnamed)} of its modules ({', '.join(sorted(unnamed)[:3])}), or "
            "they are no plain LoRA; use comfy, which ComfyUI reads"
        )
    return replace(lora, modules=modules, spellings=spelled | _kept(lora))


def _in_own_naming(lora: Lora) -> Lora:
    named = in_own_naming([lora], whole=True)
    if named is None:
        raise ValueError(f"{lora.source}: two of its modules are one weight; apply it, or save it as kohya, as it is")
    return named[0]


def _model_shapes(lora: Lora) -> dict[str, tuple[int, ...]]:
    return {module: layer.shape for module, layer in lora.modules.items() if not text_encoder(lora.spellings[module])}


def _kept(lora: Lora) -> dict[str, str]:
    """Spellings of what the format cannot hold, which Lora.diffusers_spellings names."""
    others = {module for module, _ in lora.diffs} | lora.carried.keys()
    return {module: lora.spellings[module] for module in others}


def _without_empty(parts: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """Slices that change anything, if any do: a LoRA of some slices became a fused one with rows of zeros."""
    changing = {name: layer for name, layer in parts.items() if bool(layer.up.any())}
    return changing or dict(parts)


def exact_in_peft(lora: Lora) -> tuple[Lora, int]:
    """The LoRA for keys that have no scale of their own, and how many modules are float32 for it.

    A power of two goes into a factor without rounding; any other scale would be rounded with it, and float32 has room.
    """
    wider = {
        module: replace(layer, up=layer.up.float(), down=layer.down.float())
        for module, layer in lora.modules.items()
        if isinstance(layer, LoraLayer)
        and layer.up.dtype != torch.float32
        and abs(math.frexp(layer.scale)[0]) not in (0.0, 0.5)
    }
    return replace(lora, modules={**lora.modules, **wider}), len(wider)
