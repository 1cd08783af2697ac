"""Choices whose options have inputs of their own (ComfyUI's DynamicCombo): the choice and those come as one dict."""

from collections.abc import Iterator, Mapping
from typing import Any


def is_dynamic_choice(entry) -> bool:
    return any(hasattr(option, "inputs") for option in getattr(entry, "options", None) or ())


def keys(entry) -> list[str]:
    return [option.key for option in entry.options]


def chosen(entry, value: Any) -> Any:
    """What is chosen: of the dict that ComfyUI makes, or a name alone, as a link gives it."""
    return value.get(entry.id) if isinstance(value, Mapping) else value


def option_of(entry, value: Any):
    """The option that is chosen. Raises StopIteration for a choice that there is not."""
    return next(option for option in entry.options if option.key == chosen(entry, value))


def with_all_inside(inputs) -> Iterator:
    """The inputs, and after a dynamic choice those of all its options."""
    for entry in inputs:
        yield entry
        if is_dynamic_choice(entry):
            for option in entry.options:
                yield from with_all_inside(option.inputs)


def in_full(entry, value: Any) -> dict[str, Any]:
    """The choice with the numbers of its option and no others; what is not given, or null, is as it is by default."""
    given = value if isinstance(value, Mapping) else {}
    full = {entry.id: chosen(entry, value)}
    for own in option_of(entry, value).inputs:
        one = given.get(own.id)
        full[own.id] = getattr(own, "default", None) if one is None else one
    return full
