"""What LCM Grid varies: an axis is a setting and its values, read from a text such as "0:1.2:0.4" or "LCM, DMD2"."""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...lora_merge.words import many
from ...samplers.presets import PRESETS
from ..door.lists import numbers
from ..door.rules import LONGEST_TEXT

MOST_VALUES, MOST_CELLS = 64, 1024  # of an axis; of a grid


@dataclass(frozen=True)
class Axis:
    """setting: one of SETTINGS, or NOTHING.   values: at least one.   labels: of each value, for people."""

    setting: str
    values: tuple[Any, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class _Setting:
    """read: (text, setting) -> values.   label: value -> words."""

    read: Callable[[str, str], tuple[Any, ...]]
    label: Callable[[Any], str]


def parse_axis(setting: str, text: str) -> Axis:
    """The axis that a text describes. An empty text, or NOTHING, is an axis of one cell that changes nothing.

    Numbers stand between commas or spaces; first:last:step is a range with both ends, "0:1.2:0.4" is 0, 0.4, 0.8, 1.2.
    Presets stand between commas or on lines of their own, and so do prompt words: the first is what the others replace.
    Raises ValueError naming the entry, for one that is none of the setting's values, and for more than MOST_VALUES.
    """
    if setting == NOTHING or not text.strip():
        return Axis(NOTHING, (None,), ("",))
    known = _SETTINGS[setting]
    values = known.read(text, setting)
    if len(values) > MOST_VALUES:
        raise ValueError(f"{setting}: {len(values):,} values, but an axis has at most {MOST_VALUES}. Give fewer.")
    return Axis(setting, values, tuple(map(known.label, values)))


def check_axes(rows: Axis, columns: Axis) -> None:
    """Raises ValueError for two axes of one setting, and for more than MOST_CELLS."""
    if rows.setting == columns.setting != NOTHING:
        raise ValueError(f"rows and columns both vary {rows.setting}. Choose another setting for one of them.")
    cells = len(rows.values) * len(columns.values)
    if cells > MOST_CELLS:
        raise ValueError(
            f"The grid has {cells:,} cells, but at most {MOST_CELLS:,} are made at once. Give fewer values."
        )


def cells(rows: Axis, columns: Axis) -> list[tuple[int, int, dict[str, Any]]]:
    """(row, column, setting -> value) of each cell, in the order in which to make them.

    All cells of one strength follow each other, so that the model is patched once for each; within them few steps come
    first, so that the grid soon shows something everywhere.
    """
    found = []
    for r, down in enumerate(rows.values):
        for c, across in enumerate(columns.values):
            own = {axis.setting: value for axis, value in ((rows, down), (columns, across)) if axis.setting != NOTHING}
            found.append((r, c, own))
    strengths = list(dict.fromkeys(own.get(STRENGTH) for *_, own in found))
    return sorted(found, key=lambda cell: (strengths.index(cell[2].get(STRENGTH)), cell[2].get("steps", 0), *cell[:2]))


def with_word(prompt: str, first: str, word: str) -> str:
    """The prompt with `word` wherever `first` stands. Raises ValueError for one that would be longer than any text may be."""
    length = len(prompt) + prompt.count(first) * (len(word) - len(first))
    if length > LONGEST_TEXT:
        raise ValueError(
            f"{WORDS}: with {word[:40]!r} the prompt has {length:,} characters, and it may have at most {LONGEST_TEXT:,}. Write less."
        )
    return prompt.replace(first, word)


def _presets(text: str, setting: str) -> tuple[str, ...]:
    names = _words(text, setting)
    for name in names:
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4) or sorted(PRESETS)[:3]
            raise ValueError(f"{setting}: there is no preset {name[:40]!r}. Near it: {', '.join(near)}.")
    return names


def _words(text: str, setting: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in re.split(r"[,\n]", text) if word.strip())


def _numbers(low: float, high: float, whole: bool = False) -> Callable[[str, str], tuple[float, ...]]:
    return partial(numbers, low=low, high=high, most=MOST_VALUES, whole=whole)


def _steps(value: int) -> str:
    return many(value, "steps")


def _named(name: str) -> Callable[[Any], str]:
    return lambda value: f"{name} {value:g}"


NOTHING, STRENGTH, WORDS = "nothing", "strength of lora", "prompt words"
_SETTINGS = {
    STRENGTH: _Setting(_numbers(-100, 100), _named("x")),
    "steps": _Setting(_numbers(1, 1000, whole=True), _steps),
    "cfg": _Setting(_numbers(0, 100), _named("cfg")),
    "gamma": _Setting(_numbers(0, 1), _named("gamma")),
    "denoise": _Setting(_numbers(0, 1), _named("denoise")),
    "seed": _Setting(_numbers(0, 2**64 - 1, whole=True), lambda seed: f"seed {seed}"),
    "preset": _Setting(_presets, str),
    WORDS: _Setting(_words, str),
}
SETTINGS: Sequence[str] = (*_SETTINGS, NOTHING)
