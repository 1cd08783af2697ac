"""The strength of each input at each module: its own, times what blocks, kinds of layers and patterns ask for."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..files.lora import Lora
from ..naming import globs, names
from ..naming.block_lists import is_complete, names_of_list
from ..naming.blocks import KINDS, Place, names_for, path_of, place
from ..naming.unet import Layout, infer_layout

_INPUT = re.compile(r"\s*(?:lora_)?(\d{1,6})\s*:(.*)", re.S)
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_FOLDED = re.compile(r"^(?:lora_unet_|diffusion_model_)")
# Text comes out of shared workflows and files: what is done for every module is bounded.
MAX_TEXT, MAX_GLOBS, MAX_NEAR, MAX_WORK = 100_000, 100, 1_000, 100_000_000


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
        listed = (f"the list of {len(self.listed)} numbers",) if self.listed else ()
        return (*self.by_block, *self.by_kind, *(glob for glob, _ in self.by_glob), *listed)

    def met(self, modules: Iterable[str], layout: Layout) -> set[str]:
        """The entries that mean at least one of these modules."""
        table: Mapping[str, float] = self._table  # type: ignore[attr-defined]
        known: set[str] = set()
        found: set[str] = set()
        blocks: set[str] = set()
        for module in modules:
            where = place(module, layout)
            known.update(name for name in names_for(module, layout) if name in table)
            blocks.add(where.block)
            found.update(kind for kind in self.by_kind if kind == where.kind)
            found.update(glob for glob, _ in self.by_glob if _fits(glob, module, where))
        found.update(name for name in self.by_block if _folded(name) in known)
        if self.listed and is_complete(len(self.listed), blocks):
            # The text encoders' number alone fits every model.
            mine = [those for those in names_of_list(len(self.listed)) if not those[0].startswith("te")]
            if any(name in known for those in mine for name in those):
                found.update(self.entries[-1:])
        return found

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
    by_block: dict[str, float] = {}
    by_kind: dict[str, float] = {}
    by_glob: dict[str, float] = {}
    listed: tuple[float, ...] = ()
    seen: set[str] = set()
    for line in re.split(r"[;\n]", text):
        entries = [entry.strip() for entry in line.split(",") if entry.strip()]
        if entries and not any("=" in entry for entry in entries):
            if listed:
                raise ValueError("block strengths: two lists of numbers are given. Give one.")
            listed = tuple(map(_number, entries))
            names_of_list(len(listed))
            continue
        for entry in entries:
            name, factor = _named(entry)
            table = by_glob if globs.is_glob(name) else by_kind if name in KINDS else by_block
            if _folded(name) in seen:
                raise ValueError(f"block strengths: {name} is given twice.")
            seen.add(_folded(name))
            table[name] = factor
    if len(by_glob) > MAX_GLOBS:
        raise ValueError(f"block strengths: {len(by_glob)} names have * or ? in them; at most {MAX_GLOBS} are read.")
    if not (by_block or by_kind or by_glob or listed):
        return None
    return BlockStrengths(by_block, by_kind, tuple(by_glob.items()), listed)


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


Blocks = BlockStrengths | str | None


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

    Raises ValueError for a strength that is not finite, another number of blocks than inputs, a text that
    parse_block_strengths refuses, and a name in it that means no module of an input that it is for.
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
        _check_work(loras, parsed)
        _check_met(loras, parsed, layout)
    return Strengths([float(strength) for strength in base], parsed, layout)


def _check_work(loras: Sequence[Lora], parsed: Sequence[BlockStrengths | None]) -> None:
    """What globs cost at most is known before they are tried: their letters times those of the names."""
    for lora, blocks in zip(loras, parsed, strict=True):
        work = sum(len(glob) for glob, _ in blocks.by_glob) * sum(map(len, lora.spellings)) if blocks else 0
        if work > MAX_WORK:
            raise ValueError(
                f"block strengths: {len(blocks.by_glob if blocks else ())} names with * or ? take too long on the "
                f"{len(lora.spellings)} modules of {lora.source}. Write fewer or shorter ones, or blocks by their names."
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
    places = [place(module, layout) for lora in loras for module in lora.spellings]
    sides = sorted({where.side for where in places if where.side} | {where.part for where in places})
    blocks = sorted({where.block for where in places if where.block})[:MAX_NEAR]
    kinds = [kind for kind in KINDS if any(where.kind == kind for where in places)]
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
