"""The strength of each input at each module: its own, times what blocks, kinds of layers and patterns ask for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ..files.lora import Lora
from ..naming import names
from ..naming.blocks import BlockStrengths, parse_block_strengths
from ..naming.unet import Layout, infer_layout

Blocks = BlockStrengths | str | None
_PREFIX = re.compile(r"\s*(?:lora_)?(\d+)\s*:(.*)", re.S)


class Strengths:
    """base: of each input.   blocks: of each input, None for 1 everywhere.   layout: of the UNet the names belong to."""

    def __init__(self, base: Sequence[float], blocks: Sequence[BlockStrengths | None], layout: Layout):
        self.base = tuple(base)
        self.blocks = tuple(blocks)
        self.layout = layout

    def at(self, module: str) -> tuple[float, ...]:
        """Of each input, by the module's canonical name."""
        if not any(self.blocks):
            return self.base
        return tuple(
            strength if blocks is None else strength * blocks.factor(module, self.layout)
            for strength, blocks in zip(self.base, self.blocks, strict=True)
        )


def strengths_of(loras: Sequence[Lora], base: Sequence[float], blocks: Blocks | Sequence[Blocks]) -> Strengths:
    """blocks: one for all inputs, or one for each.

    Raises ValueError for a strength that is not finite, another number of blocks than inputs, or a text that
    places.parse_block_strengths refuses.
    """
    for lora, strength in zip(loras, base, strict=True):
        if not math.isfinite(strength):
            raise ValueError(f"{lora.source}: strength is {strength}, but it has to be a finite number")
    each = [blocks] * len(loras) if blocks is None or isinstance(blocks, (BlockStrengths, str)) else list(blocks)
    if len(each) != len(loras):
        raise ValueError(f"there are block strengths for {len(each)} inputs, but {len(loras)} inputs")
    parsed = [parse_block_strengths(one) if isinstance(one, str) else one for one in each]
    layout = Layout()
    if any(parsed):
        bodies = names.unet_bodies([name for lora in loras for pair in lora.spellings.items() for name in pair])
        layout = infer_layout(bodies)
    return Strengths([float(strength) for strength in base], parsed, layout)


def for_inputs(text: str, labels: Sequence[str]) -> list[str]:
    """Texts for parse_block_strengths, one for each input, from lines such as "down=0.5" (all) and "2: up=0.3" (one).

    labels: number of each input as people see it, "1", "2", ...; "lora_2:" is the same as "2:".
    Raises ValueError for a number that no input has.
    """
    result: list[list[str]] = [[] for _ in labels]
    for line in text.splitlines():
        match = _PREFIX.match(line)
        if match and match[1] not in labels:
            raise ValueError(
                f"block strengths: {line.strip()!r} is for LoRA {match[1]}; there are {', '.join(labels)}."
            )
        for label, lines in zip(labels, result, strict=True):
            if match is None or match[1] == label:
                lines.append(match[2] if match else line)
    return ["\n".join(lines) for lines in result]
