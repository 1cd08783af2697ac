"""Which diffusion transformer a LoRA is for, and which one a model is, by the blocks in transformers.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod

from ..naming.blocks import place
from ..naming.families import FAMILIES
from ..naming.family import Rows, numbered, without_prefix
from .transformers import TRANSFORMERS, Shape, Transformer

# A LoRA that has this share of its modules in a base, of that very shape, can be for it.
_MOST = 0.95
# A model that shares this share of modules with a base is that base; pruned ones lack a few.
_SAME = 0.9


@dataclass(frozen=True)
class Blocks:
    """What the blocks that a LoRA changes say about its base.

    bases: names of every base it can be for, () if none is known.
    branches: parts of them that only some models of that base have, and that it changes.
    """

    bases: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Module:
    """One module of a LoRA: the names that it can have in a model, and the shape it would have there under each.

    body: its own name without prefix.   as_slice: names of fused weights that it can be rows of.
    """

    canonical: str
    body: str
    names: tuple[str, ...]
    slices: tuple[str, ...]
    shape: Shape


def recognise(modules: Mapping[str, Shape]) -> Blocks:
    """The bases that a LoRA with these modules (canonical name -> shape of the updated weight) can be for.

    Of several whose blocks have these shapes, those go first whose last block it changes too: nearly all LoRAs change
    whole stacks, and a deeper model's has numbers that a shallower one lacks.
    """
    mine = [_module(name, shape) for name, shape in modules.items() if place(name).part == "unet"]
    counted = [module for module in mine if numbered(module.body)[0]]
    if not counted:
        return Blocks()
    possible, whole = [], []
    for base in TRANSFORMERS:
        rest = [module for module in counted if base.branch(module.body) is None]
        found = [name for module in rest if (name := _place_in(base, module)) is not None]
        if not found or len(found) < _MOST * len(rest):
            continue
        possible.append(base)
        if _to_the_end(base, found):
            whole.append(base)
    bases = whole or possible
    branches = (base.branch(module.body) for base in bases for module in mine)
    return Blocks(tuple(base.name for base in bases), tuple(dict.fromkeys(filter(None, branches))))


def base_of(modules: Mapping[str, Shape | None]) -> Transformer | None:
    """The base of a whole model with these modules; None if it is none of TRANSFORMERS, or may be several of them: where all
    shapes are unknown, bases that differ in their widths alone are one another's equals.

    modules: name in ComfyUI's naming, underscored -> shape of the weight, None where it is stored packed.
    """
    scores: dict[Transformer, tuple[float, int]] = {}
    for base in TRANSFORMERS:
        theirs = _in_stacks(base, modules)
        same = sum(
            name in theirs and (theirs[name] is None or _same(shape, theirs[name]))
            for name, shape in base.modules.items()
        )
        # One model's blocks can be all among another's: the larger one is it.
        share = same / len(base.modules.keys() | theirs.keys())
        if share >= _SAME:
            scores[base] = (share, same)
    found = [base for base, score in scores.items() if score == max(scores.values())]
    return found[0] if len(found) == 1 else None


def make_of(modules: Iterable[str]) -> Transformer | None:
    """A base whose blocks have the modules that this model's have, whatever its width and depth; None if there is none.

    All that it says of another width is its kind, and so which branches such a model can have. modules: as in base_of.
    """
    mine: dict[str, set[str]] = {}
    for name in modules:
        stack, number = numbered(name)
        if stack:
            mine.setdefault(stack, set()).add(name[len(f"{stack}_{number}_") :])
    scores: dict[Transformer, tuple[float, int]] = {}
    for base in TRANSFORMERS:
        theirs = _names(base)
        found = {
            (stack, module)
            for stack in theirs
            for module in mine.get(stack, ())
            if base.branch(f"{stack}_0_{module}") is None
        }
        wanted = {(stack, module) for stack, module_names in theirs.items() for module in module_names}
        share = len(found & wanted) / len(found | wanted)
        if share >= _SAME:
            scores[base] = (share, len(found))
    # Of several the first: they differ in width and depth alone.
    return max(scores, key=scores.__getitem__, default=None)


def body_of(canonical: str) -> str:
    """A module's name as base_of takes it."""
    return without_prefix(canonical)


@lru_cache(maxsize=8192)  # a LoRA is looked at when it is loaded, applied, merged and saved
def _module(canonical: str, shape: Shape) -> _Module:
    body = body_of(canonical)
    names, slices = [body], []
    for family in FAMILIES:
        if family.translates and (own := family.own(canonical)) is not None:
            names.append(without_prefix(own))
        slices += sorted(family.fused(canonical))
    return _Module(
        canonical=canonical,
        body=body,
        names=tuple(dict.fromkeys(names)),
        slices=tuple(dict.fromkeys(slices)),
        shape=shape,
    )


def _place_in(base: Transformer, module: _Module) -> str | None:
    """The module of the base that this one is, or a part of, by name and shape."""
    for name in module.names:
        if (shape := base.modules.get(name)) is not None and _same(shape, module.shape):
            return name
    for fused in module.slices:
        name = without_prefix(fused)
        if (shape := base.modules.get(name)) is not None:
            lengths = {(rows.length, shape[1]) for rows in _rows(module.canonical, fused, shape)}
            if any(_same(part, module.shape) for part in lengths):
                return name
    return None


def _rows(canonical: str, fused: str, shape: Shape) -> Iterator[Rows]:
    for family in FAMILIES:
        if (rows := family.rows(canonical, fused, shape)) is not None:
            yield rows


def _same(expected: Shape, shape: Shape | None) -> bool:
    """Some tools write a linear layer's update with the shape of a 1x1 convolution."""
    return shape is not None and len(shape) >= 2 and expected[0] == shape[0] and expected[1] == prod(shape[1:])


def _to_the_end(base: Transformer, found: Sequence[str]) -> bool:
    """Whether the last block is among these, in each stack that they are in."""
    last: dict[str, int] = {}
    for name in found:
        stack, number = numbered(name)
        last[stack] = max(last.get(stack, int(number)), int(number))
    return all(number == len(base.stacks[stack]) - 1 for stack, number in last.items())


def _in_stacks(base: Transformer, modules: Mapping[str, Shape | None]) -> dict[str, Shape | None]:
    """What a model has in stacks of these names, without the branches that not every model has."""
    return {
        name: shape for name, shape in modules.items() if numbered(name)[0] in base.stacks and base.branch(name) is None
    }


@cache
def _names(base: Transformer) -> Mapping[str, frozenset[str]]:
    """Stack -> the modules that any of its blocks has."""
    return {stack: frozenset(name for block in blocks for name in block) for stack, blocks in base.stacks.items()}
