"""Which names may be of one weight, in models whose namings are not translated into one another.

Transformers have a naming of their own and one of diffusers', and each appears behind several prefixes. A module is
known here by its sites: the underscored names, without prefix, that it may have in its model's own naming. Modules that
have a site in common may be one weight. A fused weight and its slices (qkv beside q) are patched one after the other by
ComfyUI and are no such case; `slices_of` tells them.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache

from . import unet
from .families import TRANSFORMERS
from .family import underscored
from .tables import alike

# What stands before a module's name in a canonical name, and what some trainers put there besides.
_PREFIX = re.compile(r"(?:lora_prior_unet_|lora_unet_|lora_transformer_|model_diffusion_model_)?(?:model_|decoder_)?")

_BLOCK = re.compile(r"(.*?)_(\d+)_(.+)", re.DOTALL)
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
_TEXT = re.compile(
    r"lora_(te[123]?|prior_te)_(.+)|text_encoders\.(?:(\w+)\.)?transformer\.(.+)|text_encoders\.(\w+)\.(.+)"
)
_CLIP = re.compile(r"text_model_|text_projection")
# Names that a file, a merge and its result ask about again and again; the largest LoRAs have some 4,000 modules.
_remembered = lru_cache(maxsize=1 << 14)
_FIRST, _SECOND = {"te", "te1", "clip_l", "clip_h"}, {"te2", "clip_g"}


@cache
def _meanings() -> dict[tuple[str, str], tuple[frozenset[str], frozenset[str]]]:
    """(block, module) -> own names, and fused weights that it is a slice of, in any family, with {} for the number."""
    found: dict[tuple[str, str], tuple[set[str], set[str]]] = {}
    for family in TRANSFORMERS:
        for place, own, holders in family.templates():
            names, fused = found.setdefault(place, (set(), set()))
            if own:
                names.add(_template(own))
            fused |= set(map(_template, holders))
    return {place: (frozenset(names), frozenset(fused)) for place, (names, fused) in found.items()}


def _template(own: str) -> str:
    return alike(underscored(own))


def _meaning(body: str) -> tuple[str, tuple[frozenset[str], frozenset[str]]]:
    """(number of the block, meanings) of a name in its families."""
    nothing: tuple[frozenset[str], frozenset[str]] = frozenset(), frozenset()
    if body.startswith(unet.LDM_BLOCKS):
        return "", nothing  # which no transformer has
    if ("", body) in _meanings():
        return "", _meanings()["", body]
    match = _BLOCK.fullmatch(body)
    return (match[2], _meanings().get((match[1], match[3]), nothing)) if match else ("", nothing)


@_remembered
def body(canonical: str) -> str:
    """A model's module without prefix, endings that differ from tool to tool made alike."""
    return alike(_PREFIX.sub("", canonical, count=1))


@_remembered
def sites(canonical: str) -> frozenset[str]:
    """Every name that this module of a model may have in its own naming, its own body among them."""
    name = body(canonical)
    number, (own, _) = _meaning(name)
    twin = unet.twin_outside_blocks(name)
    return frozenset({name, *(template.format(number) for template in own), *([twin] if twin else [])})


def slices_of(canonical: str) -> frozenset[str]:
    """Bodies of the fused weights that this module may be a slice of; empty for a whole weight."""
    number, (_, fused) = _meaning(body(canonical))
    return frozenset(template.format(number) for template in fused)


def is_foreign(canonical: str) -> bool:
    """Whether the name may be one of diffusers', or a slice's, rather than the model's own."""
    return bool(slices_of(canonical)) or len(sites(canonical)) > 1 or canonical.endswith("_to_out_0")


def pattern(canonical: str) -> str:
    """The body with every number as #."""
    return _NUMBER.sub("#", body(canonical).replace("_", " ")).replace(" ", "_")


def is_known(canonical: str) -> bool:
    """Whether the module is one whose names in other namings are known here; those of Stable Diffusion UNets are."""
    name = canonical.removeprefix("lora_unet_")
    if any(map(any, (_meaning(body(known))[1] for known in (canonical, canonical.removesuffix("_bias"))))):
        return True
    return unet.is_ldm(name) or unet.is_diffusers(name)


def behind_one_prefix(canonical: str) -> str:
    """A model's module behind kohya's prefix, whichever of the prefixes that are written before all names it had."""
    return f"lora_unet_{re.sub('^(?:lora_unet_|lora_transformer_)', '', canonical)}"


def prefix_class(canonical: str) -> str:
    """What the module's prefix was, as far as canonical names tell: names of one class are compared letter by letter."""
    return next((p for p in ("lora_unet_", "lora_transformer_") if canonical.startswith(p)), "")


@_remembered
def text_encoder(spelling: str) -> tuple[str, str] | None:
    """(encoder, body) of a text encoder's module: te, te1, te2, te3, prior_te, or ComfyUI's word; None for a model's."""
    match = _TEXT.fullmatch(spelling)
    if match is None:
        return None
    encoder = match[1] or match[3] or match[5] or ""
    name = (match[2] or match[4] or match[6]).replace(".", "_")
    return encoder, re.sub(r"^(?:bert|model)_", "", name)


def one_encoder(first: str, second: str, body: str, encoders: frozenset[str]) -> bool:
    """Whether two names of text encoders, of modules with the same body, may be one encoder.

    encoders: all that are named anywhere; with two of kohya's numbers in it `te` is the first one.
    """
    pair = {first, second}
    if len(pair) == 1:
        return True
    numbered = {"te", "te1", "te2", "te3"}
    if _CLIP.match(body):
        if _FIRST.issuperset(pair) or _SECOND.issuperset(pair):
            return True
        if "prior_te" in pair:  # Stable Cascade's one
            return not pair & {"te1", "clip_l", "clip_h"}
        if pair == {"te", "clip_g"}:
            return encoders.isdisjoint({"te1", "te2"})
        if pair <= _FIRST | _SECOND | numbered:
            return False
    # ComfyUI's words are names of different encoders; kohya's numbers depend on the model.
    return bool(pair & numbered) or "" in pair
