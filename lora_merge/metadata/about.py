"""What the metadata of a LoRA file tells people: names, licence, words to use, training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..disk import json_text
from . import tags
from .adapter_scales import METADATA_KEY as ADAPTER_KEY
from .fields import PROVENANCE_KEY

# Where programs and sites put the words that a LoRA answers to: text with commas, or a JSON list.
WORDS = (
    "modelspec.trigger_phrase",
    "modelspec.trigger_word",
    "modelspec.trigger_words",
    "trigger_phrase",
    "trigger_word",
    "trigger_words",
    "trained_words",
    "trainedWords",
    "ss_trained_words",
    "ss_trigger_words",
    "activation text",
    "ss_activation_text",
    "instance_prompt",
)
_TAGS, _LONG = 10, 100_000


def unreadable(metadata: Mapping[str, str]) -> dict[str, str]:
    """Field -> why, of each that would be used and cannot be read. The weights do not depend on it."""
    result = {}
    for key, read in _READ.items():
        try:
            read(metadata)
        except ValueError as error:
            result[key] = str(error)
    return result


def merged_inputs(metadata: Mapping[str, str]) -> list[tuple[str, float]]:
    """(name, strength) of what a file was merged from, [] where it does not say.

    Raises ValueError, whose words follow "cannot be read:", for what is no such account.
    """
    if PROVENANCE_KEY not in metadata:
        return []
    inputs = json_text.parse_object(metadata[PROVENANCE_KEY]).get("inputs")
    if not isinstance(inputs, list):
        raise ValueError("it names no inputs")
    try:
        return [(str(entry["name"]), float(entry["strength"])) for entry in inputs]
    except (KeyError, TypeError, ValueError):
        raise ValueError("its inputs have no names and strengths") from None


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The words that the LoRA answers to, each once."""
    found = [word for key in WORDS if len(value := metadata.get(key, "")) <= _LONG for word in words_in(value)[0]]
    return list(dict.fromkeys(found))


def most_frequent_tags(metadata: Mapping[str, str]) -> list[str]:
    """Tags of the captions it was trained on; [] where that is not said, or not so that it can be read."""
    try:
        return tags.top(tags.read(metadata), _TAGS)
    except ValueError:
        return []


def words_in(value: str) -> tuple[list[str], bool]:
    """(the words of a text with commas or of a JSON list, whether it is a list)."""
    if value.lstrip().startswith("["):
        try:
            found = json_text.parse(value)
        except ValueError:
            found = None
        if isinstance(found, list) and all(isinstance(word, str) for word in found):
            return [word.strip() for word in found if word.strip()], True
    return [word.strip() for word in value.split(",") if word.strip()], False


# A scale that is needed and cannot be read stops the loading of a file; here are those of files that say it in alphas too.
_READ: Mapping[str, Callable[[Mapping[str, str]], object]] = {
    tags.KEY: tags.read,
    PROVENANCE_KEY: merged_inputs,
    ADAPTER_KEY: lambda metadata: json_text.parse_object(metadata.get(ADAPTER_KEY, "{}")),
    "alpha_pattern": lambda metadata: json_text.parse_object(metadata.get("alpha_pattern", "{}")),
}
