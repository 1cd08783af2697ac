"""The families of models whose module names are known, in the order in which they are asked."""

from __future__ import annotations

from . import clip, unet
from .family import Family

FAMILIES: tuple[Family, ...] = (clip.FAMILY, unet.FAMILY)
