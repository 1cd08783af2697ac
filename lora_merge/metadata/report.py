"""What people read about the metadata of a LoRA file, and about what a merge kept of it."""

from __future__ import annotations

from collections.abc import Mapping

from ..words import many
from .about import most_frequent_tags, trigger_words, unreadable
from .adapter_config import Misfit, OfPeft
from .inherit import Cut, Licences, Note, TooLong, Unreadable
from .tags import KEY as TAGS_KEY

_FIELDS = (
    ("title", ("modelspec.title", "ssmd_display_name", "ss_output_name")),
    ("author", ("modelspec.author", "ssmd_author", "author")),
    ("licence", ("modelspec.license", "license")),
    ("base model", ("ss_base_model_version", "modelspec.architecture")),
    ("trained on", ("ss_sd_model_name",)),
    ("resolution", ("modelspec.resolution", "ss_resolution")),
    ("date", ("modelspec.date",)),
    ("usage hint", ("modelspec.usage_hint",)),
    ("description", ("modelspec.description", "ssmd_description")),
)
_SHOWN = 200
_CONFIG = "adapter_config.json"


def describe_metadata(metadata: Mapping[str, str]) -> list[str]:
    """Lines for a report on one LoRA, and a sentence for each thing that cannot be read."""
    lines = []
    for name, keys in _FIELDS:
        value = next((metadata[key] for key in keys if metadata.get(key, "").strip()), None)
        if value is not None:
            lines.append(f"  {name}: {shown(value)}")
    if words := trigger_words(metadata):
        lines.append(f"  trigger words: {shown(', '.join(words))}")
    if frequent := most_frequent_tags(metadata):
        lines.append(f"  most frequent tags: {shown(', '.join(frequent))}")
    return [*lines, *(f"  {remark}" for remark in remarks(metadata))]


def remarks(metadata: Mapping[str, str]) -> list[str]:
    """A sentence for each thing in the metadata that would be used and cannot be read. The weights do not depend on it."""
    return [f"Its metadata {_left_aside(key, reason)}." for key, reason in unreadable(metadata).items()]


def _left_aside(key: str, reason: str) -> str:
    return f"{key} is left aside, because it cannot be read: {shown(reason).rstrip('.')}"


def in_words(note: Note) -> str:
    """A sentence, without its full stop where others put one, on what a merge did not keep as it was."""
    match note:
        case Unreadable():
            return f"{note.source}: its metadata {_left_aside(note.key, note.reason)}."
        case TooLong():
            return f"{note.source}: its metadata {note.key} is left out, because it has {note.characters} characters"
        case Licences():
            each = "; ".join(f"{shown(value, 60)} ({source})" for value, source in note.stated)
            return f"the inputs have different licences, {each}, and the metadata names all"
        case Cut():
            return f"of {many(note.tags, 'tags')} in {TAGS_KEY} the {note.kept} most frequent are kept, since the others are too many"


def peft_remarks(known: OfPeft) -> list[str]:
    """Sentences for the report about a LoRA that PEFT made."""
    found = []
    if known.config == "used":
        found.append(f"its scale is that of {_CONFIG} beside it")
    elif known.config is not None:
        found.append(
            f"{_CONFIG} beside it was not used: {_misfit(known.config)}. If it is its own, name the file adapter_model.safetensors"
        )
    if known.changed_base:
        found.append(
            f"it was trained with init_lora_weights {known.changed_base[:40]!r}, which changes the base model too: on the original base "
            "it is wrong. Use the changed base, or convert it with PEFT (path_initial_model_for_weight_conversion)"
        )
    if known.dora:
        found.append(
            "its DoRA was trained by PEFT, which divides by the norm of the tuned weight; ComfyUI divides by that of the "
            "base weight, so its effect is not quite the trained one"
        )
    return found


def _misfit(why: Misfit) -> str:
    if not why.module:
        return "it is not JSON"
    if why.rank is None:
        return f"it does not name {why.module}"
    return f"it says rank {why.said}, but {why.module} has {why.rank}"


def shown(text: str, most: int = _SHOWN) -> str:
    """In one line, printable, and no longer than that: the text is anybody's."""
    line = " ".join(text[: 10 * most].split())
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    return line if len(line) <= most else f"{line[: most - 3]}..."
