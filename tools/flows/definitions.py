"""What ComfyUI's /object_info says of a node, in the order in which the page shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .flow import Node, Output

CONTROL = "control_after_generate"
_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
_DYNAMIC = "COMFY_DYNAMICCOMBO_V3"


@dataclass(frozen=True)
class Input:
    """kind: COMBO for every list of choices.   widget: whether the page shows a field for it."""

    name: str
    kind: str
    options: Mapping[str, Any]
    required: bool

    @property
    def widget(self) -> bool:
        return self.kind in _WIDGETS and not self.options.get("forceInput")

    @property
    def default(self) -> Any:
        """Of a widget. Raises ValueError where a person has to choose."""
        choices = self.options.get("options")
        if "default" in self.options:
            return self.options["default"]
        if choices:
            return choices[0]
        if self.kind in ("STRING", "BOOLEAN"):
            return "" if self.kind == "STRING" else False
        raise ValueError(f"{self.name} ({self.kind}) has no default: the description must give a value")


def inputs_of(entry: Mapping[str, Any], given: Mapping[str, Any]) -> list[Input]:
    """Inputs of a node, required ones first. given: values, which choose what a dynamic list of choices brings along."""
    return list(_walk(entry["input"], given, ""))


def _walk(groups: Mapping[str, Any], given: Mapping[str, Any], prefix: str) -> Iterator[Input]:
    for required in (True, False):
        for short, (kind, *more) in groups.get("required" if required else "optional", {}).items():
            name, options = prefix + short, dict(more[0]) if more else {}
            if isinstance(kind, list):
                kind, options = "COMBO", {**options, "options": kind}
            if kind != _DYNAMIC:
                yield Input(name, kind, options, required)
                continue
            choices = {choice["key"]: choice["inputs"] for choice in options["options"]}
            here = Input(name, "COMBO", {**options, "options": list(choices)}, required)
            yield here
            yield from _walk(choices[given.get(name, here.default)], given, f"{name}.")


def values_of(node: Node, inputs: list[Input]) -> dict[str, Any]:
    """The value of every widget, also of those behind a link. Raises ValueError naming the node where one is wrong."""
    known = {given.name for given in inputs}
    if unknown := set(node.inputs) - known:
        raise ValueError(f"{node.type} has no input {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    values = {}
    for given in inputs:
        value = node.inputs.get(given.name)
        if given.widget:
            values[given.name] = given.default if value is None or isinstance(value, Output) else value
        elif given.required and value is None:
            raise ValueError(f"{node.type}: {given.name} is not connected")
    return values
