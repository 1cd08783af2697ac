"""What a family of transformers says of its module names, out of tables.

Such a model has a naming of its own, ComfyUI's, and mostly one of diffusers'. A table lists the modules of each kind of
block by their own names and says what diffusers calls the same weight; where the model has one fused weight (qkv), it says
which slices diffusers has of it and how they share its rows. Names in tables have their dots: files that lost them get
them back. Each naming occurs behind several prefixes, a few of which ComfyUI reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from math import prod

from .family import Rows

# Endings that differ from tool to tool within one naming.
_ENDINGS = (
    (re.compile(r"mlp_fc1$"), "mlp_0"),
    (re.compile(r"mlp_fc2$"), "mlp_2"),
    (re.compile(r"(mod|modulation)_linear$"), r"\1_lin"),
    (re.compile(r"to_out_0$"), "to_out"),
    (re.compile(r"(query|key)_norm_scale$"), r"\1_norm"),
    (re.compile(r"(?<!text_)attention_to_out$"), "attention_out"),
    (re.compile(r"attention_norm_([qk])$"), r"attention_\1_norm"),
    (re.compile(r"^all_(final_layer|x_embedder)_2-1"), r"\1"),
)
# One of these is there where any of them matches: most names end otherwise, and are as they are.
_WITH_ENDING = ("_fc1", "_fc2", "_linear", "to_out_0", "_norm_scale", "attention_to_out", "_norm_q", "_norm_k")


@lru_cache(maxsize=16384)  # every family is asked for every name of a LoRA, several times
def alike(body: str) -> str:
    """An underscored name without prefix, endings that differ from tool to tool made alike."""
    if not body.rstrip("\n").endswith(_WITH_ENDING) and not body.startswith("all_"):
        return body
    for pattern, ending in _ENDINGS:
        body = pattern.sub(ending, body)
    return body


@dataclass(frozen=True)
class Fused:
    """A weight of the model's own that diffusers has in slices.

    slices: diffusers' names in the order of their rows, separated by spaces, the one to write first; more than one line
        where versions differ.
    sizes: a letter a slice: "w" for as many rows as the weight has columns, "r" for an equal share of the rest.
    share: rows of an "r", in widths, where it is the same in all models of the family.
    pieces: own name of some neighbouring slices together -> (first of them, how many).
    """

    slices: tuple[str, ...]
    sizes: str
    share: int = 0
    pieces: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def rows(self, first: int, count: int, shape: tuple[int, ...]) -> Rows | None:
        """Rows of `count` slices from the one of number `first` on, in a weight of this shape; None if it cannot be."""
        width, shares = prod(shape[1:]), self.sizes.count("r")
        rest = shape[0] - width * self.sizes.count("w")
        if len(shape) != 2 or rest < 0 or (rest if not shares else rest % shares):
            return None
        lengths = [width if size == "w" else rest // shares for size in self.sizes]
        starts = [0, *accumulate(lengths)]
        return Rows(starts[first], starts[first + count] - starts[first])

    def shape(self, known: Mapping[int, tuple[int, ...]]) -> tuple[int, ...] | None:
        """Shape of the whole weight, told from that of some slices by their number; None if they do not tell."""
        widths = {prod(shape[1:]) for shape in known.values()}
        if len(widths) != 1:
            return None
        width = widths.pop()
        shares = {shape[0] for number, shape in known.items() if self.sizes[number] == "r"} or {self.share * width}
        if len(shares) > 1 or ("r" in self.sizes and 0 in shares):
            return None
        share = shares.pop()
        return (width * self.sizes.count("w") + share * self.sizes.count("r"), width)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Numbered blocks of one kind; names are of what follows the number.

    own, theirs: what stands before the number, in the model's own naming and in diffusers' (the same if it is empty).
    depth: blocks of the deepest model of the family.
    whole: own module -> diffusers' names of the same weight, the one to write first; behind a ~ those that ComfyUI does not
        read. An empty text where diffusers has no such module.
    same: modules that have one name in both namings, separated by spaces.
    fused: own module -> its slices.
    parameters: own name -> diffusers', of parameters that are no module's weight or bias.
    also: own module -> other names of it in blocks of the own naming, as in `whole`.
    turned_last: own modules whose halves diffusers has the other way about in the last block, where they have only two
        parts and as many rows for each as columns.
    """

    own: str
    theirs: str = ""
    depth: int = 128
    whole: Mapping[str, str] = field(default_factory=dict)
    same: str = ""
    fused: Mapping[str, Fused] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    also: Mapping[str, str] = field(default_factory=dict)
    turned_last: str = ""

    def modules(self) -> Iterator[tuple[str, list[str]]]:
        """(own template, templates of diffusers') of every whole module."""
        pairs = {**dict.fromkeys((*self.fused, *self.also), ""), **{name: name for name in self.same.split()}}
        for own, theirs in {**pairs, **self.whole, **self.parameters}.items():
            others = [_in_block(self.own, name) for name in self.also.get(own, "").split()]
            yield f"{self.own}.{{}}.{own}", [self._theirs(name) for name in theirs.split()] + others

    def _theirs(self, name: str) -> str:
        return _in_block(self.theirs or self.own, name)

    def dotted_only(self) -> Iterator[str]:
        """Own templates that ComfyUI knows by their dots alone: bare parameters, and pieces of fused weights."""
        pieces = (piece for fused in self.fused.values() for piece in fused.pieces)
        yield from (f"{self.own}.{{}}.{name}" for name in (*self.parameters, *pieces))

    def slices(self) -> Iterator[tuple[str, list[str], Fused]]:
        """(own template, templates of the slices, Fused) of every fused module, one for each naming of the slices."""
        for own, fused in self.fused.items():
            for names in fused.slices:
                yield f"{self.own}.{{}}.{own}", [self._theirs(name) for name in names.split()], fused


def _in_block(stack: str, name: str) -> str:
    bare = name.removeprefix("~")
    return f"{'~' if bare != name else ''}{stack}.{{}}.{bare}"
