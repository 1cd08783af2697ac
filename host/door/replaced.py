"""What a preset that is connected replaces on its node, said in the node's report: a field of no effect is never silent."""

from collections.abc import Iterator, Mapping
from typing import Any

from ...samplers.preset import Preset
from ...samplers.preset_words import settings_in_words
from . import rules

REPLACES = "replaces"
"""Key of a preset's input under which pages find the names of the inputs that it replaces."""


def replaced(schema, given: Mapping[str, Any]) -> Iterator[str]:
    """A line for each preset that is connected: its settings, and the fields set otherwise that have no effect."""
    for entry in schema.inputs:
        preset = given.get(entry.id)
        names = (getattr(entry, "extra_dict", None) or {}).get(REPLACES)
        if not names or not isinstance(preset, Preset):
            continue
        line = f"Preset {preset.name}: {settings_in_words(preset)}."
        defaults = {other.id: getattr(other, "default", None) for other in schema.inputs}
        unused = [
            f"{name} {rules.shown(given[name])}" for name in names if given.get(name, defaults[name]) != defaults[name]
        ]
        if unused:
            line += f" It stands in place of this node's {', '.join(unused)}."
        if str(given.get("gammas") or "").strip():
            line += f" gammas ({rules.shown(given['gammas'])}) hold in place of its gamma."
        yield line
