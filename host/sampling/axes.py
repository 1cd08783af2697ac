"""What LCM Grid varies: an axis is a setting and its values, read from a text such as "0:1.2:0.4" or "LCM, DMD2"."""

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...samplers.presets import PRESETS

MOST_VALUES, MOST_CELLS = 64, 1024  # of an axis; of a grid
MANY = 64  # cells: from here on it is said that this takes long
_NUMBER = r"[+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})"
_WHOLE = r"[+-]?[0-9]{1,20}"
_RANGE = re.compile(rf"({_NUMBER}):({_NUMBER}):({_NUMBER})")


@dataclass(frozen=True)
class Axis:
    """setting: one of SETTINGS, or NOTHING.   values: at least one.   labels: of each value, for people."""

    setting: str
    values: tuple[Any, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class _Setting:
    """read: (text, setting) -> values.   label: value -> words.   low, high: of numbers."""

    read: Callable[[str, str], tuple[Any, ...]]
    label: Callable[[Any], str]
    low: float = -math.inf
    high: float = math.inf


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
    for value in values:
        if isinstance(value, int | float) and not known.low <= value <= known.high:
            raise ValueError(
                f"{setting}: {value:g} is not from {known.low:g} to {known.high:g}. Leave it out or change it."
            )
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


def _numbers(text: str, setting: str) -> tuple[float, ...]:
    values: list[float] = []
    for entry in text.replace(",", " ").split():
        # Stricter than float(), which also reads "1_0", "nan" and digits of other scripts.
        if found := _RANGE.fullmatch(entry):
            values += _range(*map(float, found.groups()), entry=entry, setting=setting)
        elif re.fullmatch(_NUMBER, entry):
            values.append(float(entry))
        else:
            raise ValueError(
                f"{setting}: {entry[:40]!r} is no number. Write numbers between commas, such as 0, 0.4, 0.8, or a range, "
                "0:1.2:0.4."
            )
    return tuple(values)


def _whole(text: str, setting: str) -> tuple[int, ...]:
    values: list[int] = []
    for entry in text.replace(",", " ").split():
        if re.fullmatch(_WHOLE, entry):  # a float has no room for a seed
            values.append(int(entry))
            continue
        for value in _numbers(entry, setting):
            if value != int(value):
                raise ValueError(f"{setting}: {value:g} is no whole number. Write numbers such as 1, 2, 4, 8.")
            values.append(int(value))
    return tuple(values)


def _range(first: float, last: float, step: float, *, entry: str, setting: str) -> list[float]:
    if step == 0 or (last - first) / step < 0:
        raise ValueError(f"{setting}: {entry} never gets from {first:g} to {last:g}. Write first:last:step, 0:1.2:0.4.")
    count = math.floor((last - first) / step + 1e-9) + 1
    if count > MOST_VALUES:
        raise ValueError(
            f"{setting}: {entry} is {count:,} values, but an axis has at most {MOST_VALUES}. Widen the step."
        )
    # Rounded, or 0:1.2:0.4 ends in 1.2000000000000002.
    return [round(first + number * step, 10) for number in range(count)]


def _presets(text: str, setting: str) -> tuple[str, ...]:
    names = _words(text, setting)
    for name in names:
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4) or sorted(PRESETS)[:3]
            raise ValueError(f"{setting}: there is no preset {name[:40]!r}. Near it: {', '.join(near)}.")
    return names


def _words(text: str, setting: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in re.split(r"[,\n]", text) if word.strip())


def _steps(value: int) -> str:
    return "1 step" if value == 1 else f"{value} steps"


def _named(name: str) -> Callable[[Any], str]:
    return lambda value: f"{name} {value:g}"


NOTHING, STRENGTH, WORDS = "nothing", "strength of lora", "prompt words"
_SETTINGS = {
    STRENGTH: _Setting(_numbers, _named("x"), -100.0, 100.0),
    "steps": _Setting(_whole, _steps, 1, 1000),
    "cfg": _Setting(_numbers, _named("cfg"), 0.0, 100.0),
    "gamma": _Setting(_numbers, _named("gamma"), 0.0, 1.0),
    "denoise": _Setting(_numbers, _named("denoise"), 0.0, 1.0),
    "seed": _Setting(_whole, lambda seed: f"seed {seed}", 0, 2**64 - 1),
    "preset": _Setting(_presets, str),
    WORDS: _Setting(_words, str),
}
SETTINGS: Sequence[str] = (*_SETTINGS, NOTHING)
