"""The modules that two LoRAs have in common, or one has alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from .lora import Lora
from .one_naming import in_own_naming

Which = Literal["shared", "unique"]
WHICH: tuple[Which, ...] = get_args(Which)


def only(lora: Lora, other: Lora, which: Which) -> Lora:
    """The LoRA without all but the modules that the other one has, too ("shared"), or has not ("unique").

    Namings of one family meet, and where one has a fused weight the other's slices become part of it.
    Raises ValueError if nothing is left.
    """
    lora, other = in_own_naming([lora, other]) or [lora, other]
    kept = {module for module in lora.spellings if (module in other.spellings) == (which == "shared")}
    if not kept:
        none = "no module of it" if which == "shared" else "every module of it"
        raise ValueError(
            f"{lora.source}: {other.source} has {none}, so nothing is left. Use another LoRA, or the other way."
        )
    return replace(
        lora,
        modules={module: layer for module, layer in lora.modules.items() if module in kept},
        diffs={(module, part): diff for (module, part), diff in lora.diffs.items() if module in kept},
        carried={module: update for module, update in lora.carried.items() if module in kept},
        unread={},
    )
