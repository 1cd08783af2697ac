"""Rules for values. Each answers None for a value that keeps it, and else says in words what the value has to be."""

import difflib
import math
from collections.abc import Mapping, Sequence, Sized
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from ...lora_merge.words import many

LONGEST_TEXT = 100_000
# Longer lists are not written out: what is near the value is.
LONGEST_LIST = 40
SHOWN = 60


def number(value: Any, low: float | None = None, high: float | None = None) -> str | None:
    """A finite number from low to high, both allowed; None for no bound."""
    if isinstance(value, Real) and not _is_truth(value) and _is_finite(value) and _within(value, low, high):
        return None
    return f"a finite number{_range(low, high)}"


def whole_number(value: Any, low: int | None = None, high: int | None = None, step: int | None = None) -> str | None:
    """An integer from low to high, both allowed. step: a width of 1 or None asks nothing, else it counts from low."""
    step = step or 1
    if isinstance(value, Integral) and not _is_truth(value) and _within(value, low, high):
        if (int(value) - int(low or 0)) % step == 0:
            return None
    return f"a whole number{_range(low, high)}{f' in steps of {step}' if step > 1 else ''}"


def truth(value: Any) -> str | None:
    """True or false; also 1 and 0, as other nodes say it."""
    if _is_truth(value) or (isinstance(value, Integral) and value in (0, 1)):
        return None
    return "true or false"


def text(value: Any, longest: int = LONGEST_TEXT) -> str | None:
    """Text that can be stored and sent: valid Unicode without the character NUL, of bounded length."""
    if not isinstance(value, str):
        return "text"
    if len(value) > longest:
        return f"text of at most {longest:,} characters"
    if "\0" in value:
        return "text without the character NUL"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"valid Unicode, and character {error.start + 1} is half of one"
    return None


def choice(value: Any, options: Sequence[Any]) -> str | None:
    """One of the options."""
    if any(isinstance(value, type(option)) and value == option for option in options):
        return None
    if not options:
        return "one of a list that is empty as yet"
    if len(options) <= LONGEST_LIST:
        return f"one of {', '.join(map(str, options))}"
    near = nearest(value, options)
    return f"one of {many(len(options), 'names')}{f' (near it: {near})' if near else ''}"


def nearest(value: Any, options: Sequence[Any]) -> str:
    """Up to three options that are spelled like the value, as words; "" if none is. Endings of files do not count."""
    if not isinstance(value, str) or len(value) > 4 * SHOWN:
        return ""
    stems: dict[str, str] = {}
    for option in map(str, options):
        stems.setdefault(_stem(option), option)
    return ", ".join(stems[stem] for stem in difflib.get_close_matches(_stem(value), list(stems), n=3))


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


def not_there(name: str, where: str, names: Sequence[str]) -> str:
    """What to say of a file that is not there. where: "not in the loras folder".   names: of those that are."""
    near = nearest(name, names)
    return (
        f"{shown(name)} is {where}{f' (near it: {near})' if near else ''}. Put it there and press R to refresh the lists, or "
        "choose another file."
    )


def shown(value: Any) -> str:
    """A value in few words, whatever it is. Of what is no text or number only the kind is told, not the inside."""
    if value is None:
        return "empty"
    if isinstance(value, str):
        return repr(value) if len(value) <= SHOWN else f"{value[:SHOWN]!r}... ({len(value):,} characters)"
    if isinstance(value, np.generic):
        return shown(value.item())
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    kind = type(value).__name__
    if isinstance(value, Mapping | list | tuple | set) and isinstance(value, Sized):
        return f"a {kind} of {many(len(value), 'entries', 'entry')}"
    return f"a {kind}"


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (OverflowError, TypeError, ValueError):  # an integer beyond floats
        return False


def _within(value: Any, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f", at least {_plain(low)}"
    return f", at most {_plain(high)}" if low is None else f" from {_plain(low)} to {_plain(high)}"


def _plain(bound: float | None) -> str:
    return f"{bound:,}".removesuffix(".0")
