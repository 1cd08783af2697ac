"""What a family of transformers says of its module names, out of its tables."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from .family import Family, Part, Rows, underscored
from .tables import Fused, Stack, alike

# What stands before a module's name in a canonical name.
_PREFIX = re.compile(
    r"(?!lora_te|text_encoders?_|text_model_)"
    r"(lora_unet_|lora_transformer_|lora_prior_unet_|model_diffusion_model_|Hunyuan_video_I2V_lora_|)(.+)",
    re.DOTALL,
)
_BLOCK = re.compile(r"(.*?)_(\d{1,3})_(.+)", re.DOTALL)
_DOTTED_BLOCK = re.compile(r"(.*?)\.(\d{1,3})\.(.+)", re.DOTALL)
_KOHYA, _THEIRS, _DOTTED = "lora_unet_", "lora_transformer_", "diffusion_model."

# (template of a fused weight, its Fused, number of the first slice, how many)
_Holder = tuple[str, Fused, int, int]


@dataclass
class _Entry:
    """What one name means. name: its template with dots. own: template of the whole weight's own name, "" for a slice.
    holders: of a slice. depth: blocks there can be."""

    name: str
    own: str = ""
    depth: int = 0
    holders: tuple[_Holder, ...] = ()
    is_own: bool = False


def _key(template: str) -> tuple[str, str]:
    """(stack, module) of a template, as names that lost their dots are looked up; ("", module) outside of blocks."""
    stack, numbered, module = template.partition(".{}.")
    if not numbered:
        return "", alike(underscored(template))
    return underscored(stack), alike(underscored(f"{stack}.0.{module}")).removeprefix(f"{underscored(stack)}_0_")


class Tables:
    """The tables of one family; the methods are what `Family` asks."""

    def __init__(
        self,
        stacks: Collection[Stack],
        outside: Mapping[str, str],
        turned: Mapping[str, str],
        parameters: Collection[str],
        own_read_as: Collection[str],
        theirs_read_as: Collection[str],
        theirs_behind_kohya: bool,
    ):
        # What a name is in this family never changes, and every family is asked for every name, often.
        self._parse = lru_cache(maxsize=4096)(self._parsed)
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._theirs_of: dict[str, list[str]] = {}
        self._slices_of: dict[str, tuple[list[str], Fused]] = {}
        # own template -> diffusers' of a weight whose halves diffusers has the other way about; and back.
        self.turned = {own: theirs.removeprefix("~") for own, theirs in turned.items()}
        self._turned_back = {_key(theirs): own for own, theirs in self.turned.items()}
        self._turned_last = {f"{stack.own}.{{}}.{name}" for stack in stacks for name in stack.turned_last.split()}
        self._dotted_only = {*parameters, *(name for stack in stacks for name in stack.dotted_only())}
        # Prefix -> names that ComfyUI reads behind it, own ones and diffusers'.
        self._read: dict[str, set[str]] = {
            prefix: set() for prefix in ("", *own_read_as, *theirs_read_as, _DOTTED, _KOHYA)
        }
        self._own_read_as = (_DOTTED, _KOHYA, *own_read_as)
        self._theirs_read_as = tuple(theirs_read_as)
        self._behind_kohya = theirs_behind_kohya
        for stack in stacks:
            for own, theirs in stack.modules():
                self._put(own, theirs, stack.depth)
        for own, others in outside.items():
            self._put(own, others.split(), 0)
        for name in turned.values():
            self._read_theirs(name)
        for stack in stacks:
            for own, slices, fused in stack.slices():
                self._put_slices(own, slices, fused, stack)

    def _put(self, own: str, theirs: list[str], depth: int) -> None:
        self._add(_Entry(own, own=own, depth=depth, is_own=True))
        self._theirs_of[own] = [name.removeprefix("~") for name in theirs]
        for prefix in self._own_read_as:
            if own not in self._dotted_only or prefix == _DOTTED:
                self._read[prefix].add(underscored(own) if prefix.endswith("_") else own)
        for name in theirs:
            self._add(_Entry(name.removeprefix("~"), own=own, depth=depth))
            self._read_theirs(name)

    def _put_slices(self, own: str, slices: list[str], fused: Fused, stack: Stack) -> None:
        self._slices_of.setdefault(own, ([name.removeprefix("~") for name in slices], fused))
        for number, name in enumerate(slices):
            self._add(_Entry(name.removeprefix("~"), own="", depth=stack.depth, holders=((own, fused, number, 1),)))
            self._read_theirs(name)
        for piece, (first, count) in fused.pieces.items():
            entry = self._entries[_key(f"{stack.own}.{{}}.{piece}")]
            entry.holders = ((own, fused, first, count),)

    def _read_theirs(self, name: str) -> None:
        if not name.startswith("~"):
            for prefix in self._theirs_read_as:
                self._read[prefix].add(underscored(name) if prefix.endswith("_") else name)

    def _add(self, entry: _Entry) -> None:
        known = self._entries.setdefault(_key(entry.name), entry)
        if known is not entry:
            if known.own != entry.own:
                raise ValueError(f"{entry.name} is {known.own or 'a slice'} and {entry.own or 'a slice'}")
            known.holders += tuple(one for one in entry.holders if one not in known.holders)

    # ---- what Family asks

    def _parsed(self, canonical: str) -> tuple[_Entry, str, str] | None:
        """(entry, number of the block, prefix)."""
        match = _PREFIX.fullmatch(canonical)
        if match is None:
            return None
        prefix, body = match[1], alike(match[2])
        if entry := self._entries.get(("", body)):
            return entry, "", prefix
        block = _BLOCK.fullmatch(body)
        entry = self._entries.get((block[1], block[3])) if block else None
        return (entry, block[2], prefix) if block and entry else None

    def knows(self, canonical: str) -> bool:
        """Whether the module is one of the family, in any naming, of a block that such a model may have."""
        found = self._parse(canonical)
        if found is None:
            name = canonical.removesuffix("_bias")
            return self._is_turned(canonical) or (name != canonical and self.knows(name))
        entry, number, prefix = found
        if entry.depth and int(number) >= entry.depth:
            return False
        return entry.is_own or self._behind_kohya or prefix != _KOHYA

    def fits(self, names: Collection[str]) -> bool:
        return bool(names) and all(map(self.knows, names))

    def _is_turned(self, canonical: str) -> bool:
        match = _PREFIX.fullmatch(canonical)
        return match is not None and ("", alike(match[2])) in self._turned_back

    def own(self, canonical: str) -> str | None:
        found = self._parse(canonical)
        if found is None:
            name = canonical.removesuffix("_bias")
            whole = self._parse(name) if name != canonical else None
            return f"{self.own(name)}_bias" if whole and whole[0].own else None
        entry, number, _ = found
        if entry.own:
            return f"{_KOHYA}{underscored(entry.own).format(number)}"
        # One prefix for the slices, which stay diffusers'.
        return f"{_THEIRS}{underscored(entry.name).format(number)}"

    def turn(self, canonical: str, shape: tuple[int, ...]) -> str | None:
        """The canonical own name of a weight that is named as diffusers', who have its halves the other way about."""
        if shape[0] % 2:
            return None
        match, found = _PREFIX.fullmatch(canonical), self._parse(canonical)
        if match and (own := self._turned_back.get(("", alike(match[2])))):
            return f"{_KOHYA}{underscored(own)}"
        if found and not found[0].is_own and self._is_last(found[0].own, shape):
            return self.own(canonical)
        return None

    def _is_last(self, template: str, shape: tuple[int, ...]) -> bool:
        return template in self._turned_last and shape[0] == 2 * prod(shape[1:])

    def fused(self, canonical: str) -> frozenset[str]:
        found = self._parse(canonical)
        if found is None:
            return frozenset()
        return frozenset(f"{_KOHYA}{underscored(own).format(found[1])}" for own, *_ in found[0].holders)

    def rows(self, canonical: str, fused: str, shape: tuple[int, ...]) -> Rows | None:
        for own, holder, first, count in self._holders(canonical, fused):
            if len(shape) == 2 and own:
                return holder.rows(first, count, shape)
        return None

    def _holders(self, canonical: str, fused: str) -> list[_Holder]:
        part, whole = self._parse(canonical), self._parse(fused)
        if part is None or whole is None or part[1] != whole[1]:
            return []
        return [holder for holder in part[0].holders if holder[0] == whole[0].own]

    def whole_shape(self, fused: str, slices: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        """Shape of a fused weight, told from the shapes of some of its slices by their canonical names."""
        known: dict[int, tuple[int, ...]] = {}
        for name, shape in slices.items():
            known |= {first: shape for _, _, first, count in self._holders(name, fused) if count == 1}
        whole = self._parse(fused)
        found = self._slices_of.get(whole[0].own) if whole else None
        return found[1].shape(known) if found and known else None

    def dots(self, own: str) -> str | None:
        """The dotted own name of a canonical own one, without prefix."""
        found = self._parse(own)
        return found[0].own.format(found[1]) if found and found[0].own else None

    def parts(self, own: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        found = self._parse(own)
        if found is None or not found[0].own:
            return ()
        template, number = found[0].own, found[1]
        halves = Rows(shape[0] // 2, shape[0] // 2), Rows(0, shape[0] // 2)
        if template in self.turned:
            return ((self.turned[template], halves),)
        if template in self._slices_of:
            names, fused = self._slices_of[template]
            rows = [fused.rows(place, 1, shape) for place in range(len(names))]
            return tuple((name.format(number), (one,)) for name, one in zip(names, rows, strict=True) if one)
        turned = self._is_last(template, shape)
        theirs = self._theirs_of[template][:1]
        return tuple((name.format(number), halves if turned else (Rows(0, shape[0]),)) for name in theirs)

    def slice_name(self, canonical: str) -> str | None:
        """How ComfyUI reads a slice, with prefix and dots; None if it does not read it."""
        found = self._parse(canonical)
        if found is None or found[0].own:
            return None
        entry = found[0]
        for prefix in self._theirs_read_as:
            if not prefix.endswith("_") and entry.name in self._read[prefix]:
                return f"{prefix}{entry.name.format(found[1])}"
        return None

    def reads(self, spelling: str) -> bool:
        """Whether ComfyUI reads the spelling, in every version that we know."""
        spelling = spelling.removesuffix(".bias")
        for prefix, names in self._read.items():
            if spelling.startswith(prefix):
                body = spelling[len(prefix) :]
                block = (_BLOCK if prefix.endswith("_") else _DOTTED_BLOCK).fullmatch(body)
                sep = "_" if prefix.endswith("_") else "."
                template = f"{block[1]}{sep}{{}}{sep}{block[3]}" if block else body
                if body in names or template in names:
                    return True
        return False

    def reads_behind(self, spelling: str, prefixes: Collection[str]) -> bool:
        """Whether it is an own name behind one of these prefixes."""
        return any(
            spelling.startswith(prefix) and self.reads(f"{_DOTTED}{spelling.removeprefix(prefix)}")
            for prefix in prefixes
        )

    def suits(self, own: str, shape: tuple[int, ...], ratios: Mapping[str, float]) -> bool:
        found = self._parse(own)
        ratio = ratios.get(found[0].own) if found else None
        return ratio is None or abs(shape[0] / prod(shape[1:]) - ratio) < 1e-3 * ratio

    def templates(self) -> Iterator[tuple[tuple[str, str], str, tuple[str, ...]]]:
        """((stack, module), own template, templates of the fused weights) of every name that there is."""
        for key, entry in self._entries.items():
            yield key, entry.own, tuple(own for own, *_ in entry.holders)
        for key, own in self._turned_back.items():
            yield key, own, ()


def transformer(
    name: str,
    *,
    stacks: Collection[Stack],
    outside: Mapping[str, str],
    turned: Mapping[str, str] | None = None,
    parameters: Collection[str] = (),
    own_read_as: Collection[str] = (),
    own_read_lately: Collection[str] = (),
    theirs_read_as: Collection[str] = (),
    theirs_behind_kohya: bool = False,
    ratios: Mapping[str, float] | None = None,
    sure: bool = False,
    width: int = 0,
    widths: tuple[int, ...] = (),
    saved: Literal["comfy", "diffusers"] = "comfy",
    saved_fused: Literal["comfy", "kohya"] = "comfy",
) -> Family:
    """A family out of its tables.

    outside: own module that is in no block -> diffusers' names, as in Stack.whole.
    turned: own module -> diffusers' name of the same weight with its two halves the other way about.
    parameters: own names in `outside` that are no module's weight.
    own_read_as, theirs_read_as: what every ComfyUI reads before an own name, besides `diffusion_model.` and `lora_unet_`,
        and before one of diffusers', the one to write first.
    own_read_lately: what newer versions alone read before an own name with dots.
    theirs_behind_kohya: whether trainers write diffusers' names behind `lora_unet_` or `diffusion_model.`.
    ratios: template of an own name -> rows for each column, where that tells the family from one with like names.
    sure, width, widths, saved, saved_fused: see Family.
    """
    turned = turned or {}
    outside = {**dict.fromkeys(turned, ""), **outside}
    tables = Tables(stacks, outside, turned, parameters, own_read_as, theirs_read_as, theirs_behind_kohya)
    return Family(
        name=name,
        recognises=tables.fits,
        own=tables.own,
        fused=tables.fused,
        rows=tables.rows,
        turn=tables.turn,
        whole_shape=tables.whole_shape,
        dots=tables.dots,
        parts=tables.parts,
        slice_name=tables.slice_name,
        reads=tables.reads,
        reads_lately=lambda spelling: tables.reads_behind(spelling, own_read_lately),
        templates=tables.templates,
        suits=lambda own, shape: tables.suits(own, shape, ratios or {}),
        sure=sure,
        width=width,
        widths=widths,
        saved=saved,
        saved_fused=saved_fused,
    )
