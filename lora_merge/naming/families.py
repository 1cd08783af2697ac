"""The families of models whose module names are known, in the order in which they are asked."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from . import (
    ace_step,
    aura_flow,
    clip,
    cosmos,
    ernie,
    flux,
    hidream,
    hunyuan_dit,
    hunyuan_video,
    kandinsky,
    krea,
    ltx,
    omnigen,
    pixart,
    qwen_image,
    sd3,
    unet,
    wan,
    z_image,
)
from .family import Family

TRANSFORMERS: tuple[Family, ...] = (
    flux.FAMILY,
    flux.FLUX_2,
    flux.CHROMA,
    hunyuan_video.FAMILY,
    qwen_image.FAMILY,
    z_image.Z_IMAGE,
    z_image.LUMINA_2,
    wan.FAMILY,
    sd3.FAMILY,
    ltx.FAMILY,
    hidream.FAMILY,
    cosmos.FAMILY,
    krea.FAMILY,
    aura_flow.FAMILY,
    pixart.FAMILY,
    omnigen.FAMILY,
    kandinsky.FAMILY,
    ernie.FAMILY,
    hunyuan_dit.FAMILY,
    ace_step.ACE_STEP,
    ace_step.ACE_STEP_15,
)
FAMILIES: tuple[Family, ...] = (clip.FAMILY, unet.FAMILY, *TRANSFORMERS)


def family_of(loras: Iterable[Collection[str]]) -> Family | None:
    """The family that every one of these LoRAs, each the canonical names of a whole one, is for; None if none is.

    Of families that have a naming of their own beside others: where `Family.own` translates. None, too, where several
    families know all of the names and some name means another weight in one than in another.
    """
    loras = [[*names] for names in loras]
    # A few names are a UNet's and a transformer's.
    if not loras or any(all(map(_is_of_unet, names)) for names in loras):
        return None
    of_each = [[family for family in TRANSFORMERS if family.recognises(names)] for names in loras]
    common = [family for family in of_each[0] if all(family in known for known in of_each)]
    every = {name for names in loras for name in names}
    if not common or not all(_agree(common[0], other, every) for other in common):
        return None
    for names, known in zip(loras, of_each, strict=True):
        if common[0].sure and not all(_agree(common[0], other, names) for other in known):
            return None
    return common[0]


def _is_of_unet(canonical: str) -> bool:
    return unet.FAMILY.recognises([canonical.removesuffix("_bias")])


def _agree(one: Family, other: Family, names: Iterable[str]) -> bool:
    if one is other:
        return True
    return all(one.own(name) == other.own(name) and one.fused(name) == other.fused(name) for name in names)


# A query, which reads the stream of the model, as wide as that is, in names of diffusers' and in others like them.
_QUERY = re.compile(r".*_att(?:n|ention)_to_q")


def one_for_all(
    shapes: Mapping[str, tuple[int, ...]], spellings: Mapping[str, Collection[str]]
) -> dict[str, str] | None:
    """A spelling for each weight of LoRAs whose family is not told; what has one alone keeps it.

    shapes: of all weights of the LoRAs by their canonical names, () where nothing is known.
    spellings: canonical name -> how the LoRAs spell it.
    The spelling is one of the given ones that ComfyUI reads in every family that has all the names, as far as it reads any
    of them there, and that may be as wide. None where there is no such spelling, or no such family.
    """
    known = _as_wide([family for family in TRANSFORMERS if family.recognises(shapes)], shapes)
    if not known:
        return None
    found = {}
    for name, given in spellings.items():
        read = [{s for s in given if family.reads(s) or family.reads_lately(s)} for family in known]
        every = set(given).intersection(*filter(None, read))
        if not every:
            return None
        found[name] = min(every, key=[*given].index)
    return found


def _as_wide(families: list[Family], shapes: Mapping[str, tuple[int, ...]]) -> list[Family]:
    """Those that may have such queries: without the families of other widths, if there is one of this very width."""
    found = {shape[1] for name, shape in shapes.items() if len(shape) == 2 and _QUERY.fullmatch(name)}
    if len(found) != 1 or not any(found <= {*family.widths} for family in families):
        return families
    return [family for family in families if not family.widths or found <= {*family.widths}]


def family_by_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Family | None:
    """The family of one LoRA, {canonical name: shape}, told from its shapes, too: what diffusers calls its weights.

    None if none is known, or several that call a weight differently there.
    """
    if all(map(_is_of_unet, shapes)):
        return None
    known = [family for family in TRANSFORMERS if family.recognises(shapes)]
    known = [family for family in known if all(family.suits(_own(family, n), shape) for n, shape in shapes.items())]
    if not known or not all(_agree(known[0], other, shapes) for other in known):
        return None

    def parts(family: Family) -> list[object]:
        return [family.parts(_own(family, name), shape) for name, shape in shapes.items()]

    return known[0] if all(parts(other) == parts(known[0]) for other in known) else None


def family_by_width(loras: Iterable[Mapping[str, tuple[int, ...]]]) -> Family | None:
    """The family of LoRAs whose names are two families', each {canonical name: shape}: by the width of their models."""
    loras = list(loras)
    known = [
        family
        for family in TRANSFORMERS
        if family.width
        and all(
            family.recognises(shapes) and any(shape[1:] == (family.width,) for shape in shapes.values())
            for shapes in loras
        )
    ]
    return known[0] if loras and len(known) == 1 else None


def _own(family: Family, canonical: str) -> str:
    return family.own(canonical) or canonical


def readable(spellings: Mapping[str, str]) -> dict[str, str]:
    """{canonical name: spelling} of a LoRA, in spellings that ComfyUI reads where those that it does not read are known.

    If one has to be changed, all are, into the model's own names with their dots behind `diffusion_model.`.
    """
    spellings = dict(spellings)
    family = family_of([spellings])
    if family is None or all(map(family.reads, spellings.values())):
        return spellings
    return {name: written(family, name) or spelling for name, spelling in spellings.items()}


def written(family: Family, canonical: str) -> str | None:
    """How a weight of the family is written, with dots; None for what ComfyUI has no name for."""
    own = family.own(canonical)
    dots = family.dots(own.removesuffix("_bias")) if own else None
    if own is None or dots is None:
        return family.slice_name(canonical)
    return f"diffusion_model.{dots}{'.bias' if own.endswith('_bias') else ''}"
