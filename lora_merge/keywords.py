"""A wrong name in a call answered with the nearest right one, as Python does from 3.13 on."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def named(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: a TypeError for names that the function does not take says which it does.

    It calls the function by the name that the caller used: wrap what people call, not what that calls.
    """
    takes = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not parameter.POSITIONAL_ONLY
    ]

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if wrong := [name for name in kwargs if name not in takes]:
            raise TypeError(_refusal(function.__name__, wrong, takes))
        return function(*args, **kwargs)

    return call


def nearest(name: str, names: list[str]) -> str | None:
    """The name that was meant, as far as letters tell."""
    return next(iter(difflib.get_close_matches(name[:100], names, 1)), None)


def _refusal(function: str, wrong: list[str], takes: list[str]) -> str:
    meant = [nearest(name, takes) for name in wrong]
    asked = [
        repr(name) + (f" (did you mean {near!r}?)" if near else "") for name, near in zip(wrong, meant, strict=True)
    ]
    return f"{function}() takes no {', no '.join(asked)}. It takes {', '.join(takes)}."
