"""Factors on one LoRA's strength by block, by kind of layer and by pattern, and the text that people write them in."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..naming import globs
from ..naming.block_lists import is_complete, names_of_list
from ..naming.blocks import KINDS, Place, names_for, path_of, place
from ..naming.unet import Layout
from ..words import many

_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_FOLDED = re.compile(r"^(?:lora_unet_|diffusion_model_)")
# Text comes out of shared workflows and files, so it is bounded.
MAX_TEXT, MAX_GLOBS = 100_000, 100


@dataclass(frozen=True)
class BlockStrengths:
    """Factors on one LoRA's strength by block, by kind of layer and by glob.

    by_block: name of a place (blocks.names_for) as it was written -> factor; of several the most exact one holds.
    by_kind: one of KINDS -> factor.
    by_glob: (glob, factor) pairs, each for the modules whose name, path or block it fits.
    listed: the numbers of a list, one a block (block_lists.py), () if there is none; names are more exact.
    The factor of a module is the product over the three; what nothing names has 1.
    """

    by_block: Mapping[str, float]
    by_kind: Mapping[str, float]
    by_glob: Sequence[tuple[str, float]]
    listed: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        table: dict[str, float] = {}
        if self.listed:
            for those, factor in zip(names_of_list(len(self.listed)), self.listed, strict=True):
                table |= dict.fromkeys(those, factor)
        object.__setattr__(self, "_table", table | {_folded(name): factor for name, factor in self.by_block.items()})

    def factor(self, module: str, layout: Layout = Layout()) -> float:  # noqa: B008, it is frozen
        table: Mapping[str, float] = self._table  # type: ignore[attr-defined]
        by_block = next((table[name] for name in names_for(module, layout) if name in table), 1.0) if table else 1.0
        where = place(module, layout)
        by_glob = math.prod(factor for glob, factor in self.by_glob if _fits(glob, module, where))
        return by_block * self.by_kind.get(where.kind, 1.0) * by_glob

    @property
    def entries(self) -> tuple[str, ...]:
        """All that has to mean something: names, kinds and globs as they were written, and the list as one."""
        listed = (f"the list of {many(len(self.listed), 'numbers')}",) if self.listed else ()
        return (*self.by_block, *self.by_kind, *(glob for glob, _ in self.by_glob), *listed)

    def met(self, modules: Iterable[str], layout: Layout) -> set[str]:
        """The entries that mean at least one of these modules."""
        table: Mapping[str, float] = self._table  # type: ignore[attr-defined]
        places = {module: place(module, layout) for module in modules}
        named = {name for module in places for name in names_for(module, layout)} & table.keys()
        found = {name for name in self.by_block if _folded(name) in named}
        found |= self.by_kind.keys() & {where.kind for where in places.values()}
        for glob, _ in self.by_glob:
            if any(_fits(glob, module, where) for module, where in places.items()):
                found.add(glob)
        if self.listed and self._list_fits({where.block for where in places.values()}, named):
            found.update(self.entries[-1:])
        return found

    def _list_fits(self, blocks: set[str], named: set[str]) -> bool:
        """Whether these are the blocks of a model that the list is for, and it means one of them."""
        # The text encoders' number alone fits every model.
        mine = {name for those in names_of_list(len(self.listed)) if not those[0].startswith("te") for name in those}
        return is_complete(len(self.listed), blocks) and not mine.isdisjoint(named)

    @property
    def text(self) -> str:
        """As `parse_block_strengths` reads it."""
        named = [*self.by_block.items(), *self.by_kind.items(), *self.by_glob]
        lines = [", ".join(f"{name}={factor!r}" for name, factor in named)] if named else []
        if self.listed:
            lines.insert(0, ",".join(map(repr, self.listed)))
        return "\n".join(lines)


def _folded(name: str) -> str:
    return _FOLDED.sub("", name.replace(".", "_"))


def _fits(glob: str, module: str, where: Place) -> bool:
    glob = glob.replace(".", "_")
    return any(globs.matches(glob, name) for name in (module, path_of(module), where.block.replace(".", "_")) if name)


def parse_block_strengths(text: str) -> BlockStrengths | None:
    """Factors from a text such as "down=0.5, mid=1, up.1=0.3, attention=1.2, te=0, *attn2_to_k=0"; None if blank.

    Commas, semicolons and line ends separate; a line of numbers alone is a list for all blocks (block_lists.py).
    Raises ValueError for what is no NAME=NUMBER, a name given twice, a number that is not finite, a list of a length that
    no model has, and a regular expression. Whether a name means anything is seen where the modules are: `strengths_of`.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"block strengths: the text has {len(text)} letters; at most {MAX_TEXT} are read.")
    entries = _Entries()
    for line in re.split(r"[;\n]", text):
        entries.read(line)
    if len(entries.by_glob) > MAX_GLOBS:
        raise ValueError(
            f"block strengths: {many(len(entries.by_glob), 'names')} have * or ? in them; at most {MAX_GLOBS} are read."
        )
    return entries.strengths()


class _Entries:
    """What the lines of a text have said so far."""

    def __init__(self) -> None:
        self.by_block: dict[str, float] = {}
        self.by_kind: dict[str, float] = {}
        self.by_glob: dict[str, float] = {}
        self.listed: tuple[float, ...] = ()
        self.seen: set[str] = set()

    def read(self, line: str) -> None:
        entries = [entry.strip() for entry in line.split(",") if entry.strip()]
        if entries and not any("=" in entry for entry in entries):
            self._list(entries)
        else:
            for entry in entries:
                self._add(*_named(entry))

    def _list(self, numbers: Sequence[str]) -> None:
        if self.listed:
            raise ValueError("block strengths: two lists of numbers are given. Give one.")
        self.listed = tuple(map(_number, numbers))
        names_of_list(len(self.listed))

    def _add(self, name: str, factor: float) -> None:
        table = self.by_glob if globs.is_glob(name) else self.by_kind if name in KINDS else self.by_block
        if _folded(name) in self.seen:
            raise ValueError(f"block strengths: {name} is given twice.")
        self.seen.add(_folded(name))
        table[name] = factor

    def strengths(self) -> BlockStrengths | None:
        if not (self.by_block or self.by_kind or self.by_glob or self.listed):
            return None
        return BlockStrengths(self.by_block, self.by_kind, tuple(self.by_glob.items()), self.listed)


def _named(entry: str) -> tuple[str, float]:
    name, _, number = (part.strip() for part in entry.rpartition("="))
    if name.startswith("/"):
        raise ValueError(
            f"block strengths: {name[:60]} is a regular expression, and these are not read. Write * for any letters and ? for "
            "one, for example *attn2_to_k=0"
        )
    if not name:
        _number(entry)
    if globs.is_glob(name):
        if len(name) > globs.MAX_LENGTH:
            raise ValueError(f"block strengths: {name[:60]!r}... is longer than {globs.MAX_LENGTH} letters.")
    elif not _NAME.fullmatch(name):
        raise ValueError(
            f"block strengths: {entry[:60]!r} is no NAME=NUMBER. Write for example down=0.5, mid=1, attention=1.2"
        )
    return name, _number(number, entry)


def _number(text: str, entry: str | None = None) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"block strengths: {(entry or text)[:60]!r} is no NAME=NUMBER. Write for example down=0.5, mid=1, attention=1.2"
        )
    return value
