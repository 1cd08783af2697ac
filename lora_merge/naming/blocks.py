"""Where in a model a module sits, and by which names people can mean it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .families import FAMILIES
from .family import KINDS, Place, block_of, kind_of, numbered, without_prefix
from .unet import Layout

__all__ = ["KINDS", "Place", "names_for", "path_of", "place"]

_OTHER = re.compile(r"(?:first_stage_model|vae|conditioner|cond_stage_model)_")
_LONGEST = 200


def place(module: str, layout: Layout = Layout()) -> Place:  # noqa: B008, it is frozen
    """The place of a module by its canonical name (names.py)."""
    if _OTHER.match(module):
        return Place("other", "", kind_of(module))
    for family in FAMILIES:
        if (found := family.place(module, layout)) is not None:
            return found
    name = without_prefix(module)
    return Place("unet", block_of(name), kind_of(name))


def names_for(module: str, layout: Layout = Layout()) -> Iterator[str]:  # noqa: B008, it is frozen
    """All names, underscored, that mean a place with this module in it, the most exact one first.

    Its path and the beginnings of it down to its numbered block ("double_blocks_0_img_attn"), in each naming of its UNet;
    then its block ("up_1"), the block's side ("double_blocks", "up"), its part ("te1", "unet") and the part without number.
    """
    where = place(module, layout)
    for path in _paths(module, layout):
        side, number = numbered(f"{path}_")
        shortest = len(f"{side}_{number}") if side else 1
        # No name that people write is longer, and beginnings of what a file may make up would be many.
        words = path[:_LONGEST].split("_")
        while words and len(found := "_".join(words)) >= shortest:
            yield found
            words.pop()
    others = (where.block.replace(".", "_"), where.side, where.part, where.part.rstrip("123"))
    yield from dict.fromkeys(name for name in others if name)


def path_of(module: str) -> str:
    """The canonical name without what says which part of the model it is."""
    known = next((found for family in FAMILIES if (found := family.path(module)) is not None), None)
    return without_prefix(module) if known is None else known


def _paths(module: str, layout: Layout) -> Iterator[str]:
    body = path_of(module)
    yield body
    if any(family.path(module) is not None for family in FAMILIES):
        return
    for family in FAMILIES:
        if other := family.twin(body, layout):
            yield other
