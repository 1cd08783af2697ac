"""JSON out of files that may come from anybody: bounded in size and depth, and nothing in it that JSON does not have.

Python's own reader takes NaN and Infinity, numbers that become infinite, names that stand twice in an object and halves of
surrogate pairs, and stops with RecursionError where values are nested deeply.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

# 100,000 tags with their counts are some 3 million characters.
MAX_CHARACTERS = 16_000_000
MAX_DEPTH = 100
# Objects and lists; each takes some 100 bytes of memory, and two characters of text.
MAX_CONTAINERS = 2_000_000
MAX_DIGITS = 300

Pairs = list[tuple[str, Any]]

_TOO_DEEP = f"nested deeper than {MAX_DEPTH}"
_NAMES: Mapping[type, str] = {
    list: "a list",
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def parse(text: str, *, characters: int = MAX_CHARACTERS, pairs: Callable[[Pairs], Any] | None = None) -> Any:
    """The value. Raises ValueError, whose words follow "it is no JSON that can be used:", for all else.

    characters: the most there may be.   pairs: what becomes of an object's names and values, a dict by default.
    """
    check_size(text, characters)
    try:
        value = json.loads(
            text,
            object_pairs_hook=pairs or _object,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_constant,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(value)
    if not text.isascii() or "\\u" in text:
        _check_text(value)
    return value


def check_size(text: str, characters: int = MAX_CHARACTERS) -> None:
    """What `parse` raises for a text that is too large, whatever is in it."""
    if len(text) > characters:
        raise ValueError(f"{len(text)} characters, more than {characters}")
    if text.count("[") + text.count("{") > MAX_CONTAINERS:
        raise ValueError(f"more than {MAX_CONTAINERS} lists and objects")


def parse_object(text: str) -> dict[str, Any]:
    """`parse` of what has to be an object."""
    value = parse(text)
    if not isinstance(value, dict):
        raise ValueError(f"{_NAMES[type(value)]} and no object")
    return value


def is_text(value: object) -> bool:
    """Whether it is a str that UTF-8 can hold: halves of surrogate pairs are no characters."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def twice(pairs: Pairs) -> str:
    """The first name that stands twice among pairs of which one does."""
    return next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)


def _object(pairs: Pairs) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{twice(pairs)[:60]!r} stands twice in one object")
    return found


def _whole(text: str) -> int | float:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    # safetensors reads -0 as the float it is.
    return -0.0 if text == "-0" else int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not in JSON")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, (dict, list))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        level = [one for found in level for one in (found.values() if isinstance(found, dict) else found)]


def _check_text(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character") from None
