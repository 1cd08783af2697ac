"""The values that a node is given, held against its schema."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import rules
from .choices import chosen, is_dynamic_choice, keys, option_of
from .links import KINDS

ANYTHING = "*"


@dataclass(frozen=True)
class Fault:
    """input: its name.   value: as given.   rule: what it has to be, in words.   way: what to do about it."""

    input: str
    value: Any
    rule: str
    way: str

    def __str__(self) -> str:
        return f"{self.input} is {rules.shown(self.value)}, but it has to be {self.rule}. {self.way}"


def name_in_words(schema) -> str:
    """The node's name without the words in brackets, by which it is found: in texts it is called so."""
    return schema.display_name.partition(" (")[0]


def check(schema, given: Mapping[str, Any], own: Collection[str]) -> None:
    """Nothing, if every value is what the schema says its input takes; what is not given is not looked at.

    given: input -> value; where the schema asks for lists, a list of values.
    own: inputs whose text names a file, which is seen when it is opened, in place of a list.
    Raises ValueError, naming node, inputs, values, what is allowed and the way out.
    """
    inputs = {entry.id: entry for entry in schema.inputs}
    found = [*_misplaced(schema, inputs, given)]
    for name in inputs.keys() & given.keys():
        values = given[name] if schema.is_input_list else [given[name]]
        for value in values:
            if name not in own:
                found += map(str, faults_of(inputs[name], value))
            elif rule := rules.text(value):
                found.append(str(Fault(name, value, rule, "Choose one of the list.")))
    if found:
        raise ValueError(f"{name_in_words(schema)}: {' '.join(sorted(dict.fromkeys(found)))}")


def _misplaced(schema, inputs: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    """Values for inputs that there are not, and choices that are not made.

    ComfyUI hands on a link to an input that no node has, and leaves out a choice with inputs of its own whose value is none
    of the choices.
    """
    for name in given.keys() - inputs.keys():
        yield f"There is no input {rules.shown(name)}. The inputs are {', '.join(inputs)}."
    for name, entry in inputs.items():
        if name not in given and is_dynamic_choice(entry):
            yield f"{name} is missing or unknown. Choose one of {', '.join(keys(entry))}."
        elif schema.is_input_list and name in given and not given[name] and not _may_be_absent(entry):
            yield f"{name} is an empty list, but it has to hold a value. Connect something that is not empty."


def faults_of(entry, value: Any, name: str = "") -> Iterator[Fault]:
    """What is wrong with the value of one input of a schema. name: under which it is told, if not its own."""
    name = name or entry.id
    if is_dynamic_choice(entry):
        yield from _faults_of_choice(entry, value, name)
    elif value is None and entry.optional:
        return
    elif hasattr(entry, "template"):  # an input that grows: one value for each of its links
        for key, one in value.items() if isinstance(value, Mapping) else [(name, value)]:
            if one is not None:
                yield from faults_of(entry.template.input, one, f"{name}.{key}")
    elif rule := _broken_rule(entry, value):
        yield Fault(name, value, rule, _way(entry))


def _faults_of_choice(entry, value: Any, name: str) -> Iterator[Fault]:
    """Faults of a choice whose options have inputs of their own: of the choice, then of those. The values come as one dict."""
    choice = chosen(entry, value)
    if rule := rules.choice(choice, keys(entry)):
        yield Fault(name, choice, rule, "Choose one of these.")
        return
    for own in option_of(entry, value).inputs if isinstance(value, Mapping) else ():
        if own.id in value:
            yield from faults_of(own, value[own.id], f"{name}.{own.id}")


def _broken_rule(entry, value: Any) -> str | None:
    """The rule of the input's type that the value breaks, in words."""
    match str(entry.get_io_type()):
        case "FLOAT":
            return rules.number(value, entry.min, entry.max)
        case "INT":
            return rules.whole_number(value, entry.min, entry.max, entry.step)
        case "BOOLEAN":
            return rules.truth(value)
        case "STRING":
            return rules.text(value)
    if hasattr(entry, "options"):
        return _broken_choice(entry, value)
    return _broken_link(str(entry.get_io_type()), value)


def _broken_choice(entry, value: Any) -> str | None:
    if getattr(entry, "multiselect", False):
        several = value if isinstance(value, list | tuple) else [value]
        return next(filter(None, (rules.choice(one, entry.options) for one in several)), None)
    return rules.choice(value, entry.options or ())


def _broken_link(io_type: str, value: Any) -> str | None:
    kinds = [KINDS.get(name.strip()) for name in io_type.split(",")]
    if ANYTHING in io_type or None in kinds or any(kind.fits(value) for kind in kinds):
        return None
    return " or ".join(kind.words for kind in kinds)


def _way(entry) -> str:
    """What to do about a value that an input does not take."""
    kinds = [KINDS[name] for name in str(entry.get_io_type()).split(",") if name in KINDS]
    if kinds:
        way = f"Connect {' or '.join(kind.source for kind in kinds)}"
        return f"{way}, or nothing." if entry.optional else f"{way}."
    default = getattr(entry, "default", None)
    example = "" if default is None else f", such as its default {default!r}"
    if hasattr(entry, "options"):
        return f"Choose one of these{example}."
    return f"Set it to one{example}, or mend what is connected to it."


def _may_be_absent(entry) -> bool:
    """A list that holds nothing is none at all for a link; for a widget somebody lost its values on the way."""
    return entry.optional and getattr(entry, "default", None) is None
