"""The families of models whose module names are known, in the order in which they are asked."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from . import clip, flux, unet
from .family import Family

FAMILIES: tuple[Family, ...] = (clip.FAMILY, unet.FAMILY, flux.FAMILY)


def family_of(loras: Iterable[Collection[str]]) -> Family | None:
    """The family that every one of these LoRAs, each the canonical names of a whole one, is for; None if none is.

    Of families that have a naming of their own beside others: where `Family.own` translates.
    """
    loras = list(loras)
    known = (family for family in FAMILIES if family.translates and all(map(family.recognises, loras)))
    return next(known, None) if loras else None
