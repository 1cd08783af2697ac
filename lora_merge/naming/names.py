"""Module names: many spellings in files, one canonical name here.

Canonical is `lora_unet_` + the ldm name for Stable Diffusion UNets (`lora_unet_input_blocks_1_1_proj_in`), `lora_te1_`
and `lora_te2_` for the CLIP text encoders, `lora_unet_` + the underscored name for modules that a file spells
`diffusion_model.`, `lora_transformer_` for those it spells `transformer.`; anything else is its own name, underscored.
Canonical names decide which modules meet. What is written is the spelling that was read, so a model whose names mean
nothing here (Wan, LTX, ...) is written as it came. Each family (families.py) is asked first; what none knows is left to
the rules here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from . import unet
from .aliases import text_encoder
from .families import FAMILIES, readable
from .family import underscored
from .unet import Layout

_WRAPPED = re.compile(r"(?:(unet|transformer|text_encoder(?:_[23])?)\.)?base_model\.model\.(.+)")
_OF_TRANSFORMER = re.compile(r"(?:transformer\.|lycoris_|(?:unet\.|transformer\.)?base_model\.model\.)(.+)")


@lru_cache(maxsize=1 << 14)
def kohya_name(module: str) -> str:
    """How a module of a file is written in kohya format, in a form that ComfyUI's key maps know.

    UNet and CLIP modules get kohya's prefix and underscores, their block naming (diffusers or ldm) stays;
    any other module stays as it is, and so does a parameter that is named whole (`diffusion_model.x.bias`): kohya's
    format names modules only.
    """
    name = module
    if match := _WRAPPED.fullmatch(module):
        name = f"{match[1]}.{match[2]}" if match[1] else match[2]
    if name.startswith("diffusion_model.") and name.endswith(".bias"):
        return module
    for family in FAMILIES:
        if (found := family.kohya_name(name)) is not None:
            return found
    return f"lora_unet_{unet.body_as_written(name)}" if name.startswith("lora_unet_") else module


def canonical(name: str, layout: Layout) -> str:
    """The canonical name of a `kohya_name`; `layout` translates between the block namings of its UNet."""
    for family in FAMILIES:
        if (found := family.canonical(name, layout)) is not None:
            return found
    if name.startswith("lora_unet_"):
        return name
    if name.startswith("diffusion_model."):
        return f"lora_unet_{underscored(name.removeprefix('diffusion_model.'))}"
    if match := _OF_TRANSFORMER.fullmatch(name):
        return f"lora_transformer_{underscored(match[1])}"
    return underscored(name)


def kernel(canonical: str) -> tuple[int, ...]:
    """Kernel size of a module that is known to be a convolution wider than 1x1; () for all others."""
    return next((found for family in FAMILIES if (found := family.kernel(canonical)) is not None), ())


def unet_bodies(spellings: Iterable[str]) -> list[str]:
    """The UNet names among spellings, without prefix: what `unet.infer_layout` works on."""
    return unet.bodies(spellings)


def tidy(names: dict[str, str]) -> dict[str, str]:
    """Canonical name -> spelling to write, in one naming: files that mix two are read by ComfyUI but not by all. What
    ComfyUI does not read is written as it reads it, where that is known."""
    for family in FAMILIES:
        names = family.tidy(names)
    model = {module: name for module, name in names.items() if text_encoder(name) is None}
    return names | readable(model)


def dotted(name: str, layout: Layout) -> str | None:
    """The diffusers spelling of a `kohya_name`, with dots (`unet.down_blocks.0...`); None if there is no safe one."""
    if name.startswith("transformer."):
        return name
    return next((found for family in FAMILIES if (found := family.dotted(name, layout)) is not None), None)
