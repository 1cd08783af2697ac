"""The strength of each input at each module: its own, times what blocks, kinds of layers and patterns ask for."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence

from ..files.lora import Lora
from ..naming import globs, names
from ..naming.blocks import KINDS, place
from ..naming.unet import Layout, infer_layout
from ..words import many
from .block_strengths import BlockStrengths, parse_block_strengths

_INPUT = re.compile(r"\s*(?:lora_)?(\d{1,6})\s*:(.*)", re.S)
# What is done for every module, or shown of all of them, is bounded.
MAX_NEAR, MAX_WORK = 1_000, 100_000_000

Blocks = BlockStrengths | str | None


class Strengths:
    """base: of each input, as it was given.   blocks: of each input, None for 1 everywhere.   layout: of the UNet the names
    belong to.   averaged: the sum of all is 1 instead, before blocks count.
    """

    def __init__(
        self, base: Sequence[float], blocks: Sequence[BlockStrengths | None], layout: Layout, averaged: bool = False
    ):
        self.base = tuple(base)
        self._shares = _mean(self.base) if averaged else self.base
        self.blocks = tuple(blocks)
        self.layout = layout

    def at(self, module: str) -> tuple[float, ...]:
        """Strength of each input at a module, which is given by its canonical name."""
        if not any(self.blocks):
            return self._shares
        return tuple(
            strength if blocks is None else strength * blocks.factor(module, self.layout)
            for strength, blocks in zip(self._shares, self.blocks, strict=True)
        )


def _mean(weights: Sequence[float]) -> tuple[float, ...]:
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def strengths_of(
    loras: Sequence[Lora], base: Sequence[float], blocks: Blocks | Sequence[Blocks], *, averaged: bool = False
) -> Strengths:
    """blocks: one for all inputs, or one for each.   averaged: the strengths are weights of a mean.

    Raises ValueError for a strength that is not finite, another number of blocks than inputs, a text that
    parse_block_strengths refuses, a name in it that means no module of an input that it is for, and for weights of a mean
    that are negative, or all 0.
    """
    for lora, strength in zip(loras, base, strict=True):
        if not math.isfinite(strength):
            raise ValueError(f"{lora.source}: strength is {strength}, but it has to be a finite number")
        if averaged and strength < 0:
            raise ValueError(
                f"{lora.source}: strength is {strength:g}, but in an average it is a weight, 0 or more. Choose method linear "
                "to subtract a LoRA."
            )
    if averaged and not any(base):
        raise ValueError("all strengths are 0, but in an average they are weights: give at least one above 0.")
    parsed = _parsed(blocks, len(loras))
    layout = Layout()
    if any(parsed):
        bodies = names.unet_bodies([name for lora in loras for pair in lora.spellings.items() for name in pair])
        layout = infer_layout(bodies)
        _check_work(loras, parsed)
        _check_met(loras, parsed, layout)
    return Strengths([float(strength) for strength in base], parsed, layout, averaged)


def _parsed(blocks: Blocks | Sequence[Blocks], inputs: int) -> list[BlockStrengths | None]:
    """Block strengths of each input, None where it has none."""
    each = [blocks] * inputs if blocks is None or isinstance(blocks, (BlockStrengths, str)) else list(blocks)
    if len(each) != inputs:
        raise ValueError(f"there are block strengths for {many(len(each), 'inputs')}, but {many(inputs, 'inputs')}")
    return [parse_block_strengths(one) if isinstance(one, str) else one for one in each]


def _check_work(loras: Sequence[Lora], parsed: Sequence[BlockStrengths | None]) -> None:
    """What globs cost at most is known before they are tried: their letters times those of the names."""
    for lora, blocks in zip(loras, parsed, strict=True):
        tried = [glob for glob, _ in blocks.by_glob] if blocks else []
        if sum(map(len, tried)) * sum(map(len, lora.spellings)) > MAX_WORK:
            raise ValueError(
                f"block strengths: {many(len(tried), 'names with * or ? take', 'name with * or ? takes')} too long on the "
                f"{many(len(lora.spellings), 'modules')} of {lora.source}. Write fewer or shorter ones, or blocks by their names."
            )


def _check_met(loras: Sequence[Lora], parsed: Sequence[BlockStrengths | None], layout: Layout) -> None:
    """A name for several inputs has to mean a module of one of them."""
    met = [blocks.met(lora.spellings, layout) if blocks else set() for lora, blocks in zip(loras, parsed, strict=True)]
    for blocks in parsed:
        for entry in blocks.entries if blocks else ():
            asked = [one for one, other in enumerate(parsed) if other and entry in other.entries]
            if not any(entry in met[one] for one in asked):
                raise ValueError(_nothing(entry, [loras[one] for one in asked], layout))


def _nothing(entry: str, loras: Sequence[Lora], layout: Layout) -> str:
    """What to say of an entry that means no module of these LoRAs: what there is, and what is spelled nearly so."""
    places = {place(module, layout) for lora in loras for module in lora.spellings}
    sides = sorted({where.side for where in places} - {""} | {where.part for where in places})
    blocks = sorted({where.block for where in places} - {""})[:MAX_NEAR]
    there = {where.kind for where in places}
    kinds = [kind for kind in KINDS if kind in there]
    near = difflib.get_close_matches(entry[: globs.MAX_LENGTH], [*sides[:MAX_NEAR], *blocks, *kinds], 5)
    return (
        f"block strengths: {entry[:80]} is no place in {' and '.join(dict.fromkeys(lora.source for lora in loras))}. "
        + (f"Near: {', '.join(near)}. " if near else "")
        + f"There are {', '.join([*sides[:20], *kinds])}, numbered blocks as in {blocks[0] if blocks else 'down.0'}, and "
        "patterns such as *attn*."
    )


def for_inputs(text: str, labels: Sequence[str]) -> list[str]:
    """Texts for parse_block_strengths, one for each input, from lines such as "down=0.5" (all) and "2: up=0.3" (one).

    labels: number of each input as people see it, "1", "2", ...; "lora_2:" is the same as "2:".
    Raises ValueError for a number that no input has.
    """
    result: list[list[str]] = [[] for _ in labels]
    for line in text.splitlines():
        match = _INPUT.match(line)
        if match and match[1] not in labels:
            raise ValueError(
                f"block strengths: {line.strip()!r} is for LoRA {match[1]}; there are {', '.join(labels)}."
            )
        for label, lines in zip(labels, result, strict=True):
            if match is None or match[1] == label:
                lines.append(match[2] if match else line)
    return ["\n".join(lines) for lines in result]
