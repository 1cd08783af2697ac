"""What a merge keeps of the metadata of its inputs.

Of one input: all but its previews, since the merge makes other pictures. Of several: facts about the base model that all agree
on, everybody's tags, trigger words, authors and licences, and what they say of their use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from . import tags
from .about import WORDS, unreadable, words_in
from .fields import PRESET_KEY, is_hash, is_scale

# Facts about the base model and how to sample: true of the sum if all who state them agree.
_AGREED = (
    "ss_base_model_version",
    "ss_v2",
    "ss_sd_model_name",
    "ss_sd_model_hash",
    "ss_new_sd_model_hash",
    "ss_vae_name",
    "ss_vae_hash",
    "ss_new_vae_hash",
    "ss_clip_skip",
    "ss_resolution",
    "ss_network_module",
    "base_model",
    "baseModel",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.prediction_type",
    "modelspec.resolution",
    "modelspec.encoder_layer",
    "modelspec.timestep_range",
    PRESET_KEY,
)
_TAGS = ("modelspec.tags", "tags", "ssmd_keywords", "ssmd_tags")
_AUTHORS = ("modelspec.author", "ssmd_author", "author")
_LICENCES = ("modelspec.license", "license")
_TEXTS = (
    "modelspec.description",
    "modelspec.usage_hint",
    "description",
    "usage_hint",
    "ssmd_description",
    "ss_training_comment",
)
# A longer text is no note to anybody.
_LONG = 100_000
_PICTURES = ("modelspec.thumbnail", "ssmd_cover_images")


class Described(Protocol):
    """A Lora, of which nothing else is looked at here."""

    @property
    def source(self) -> str: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...


class Unreadable(NamedTuple):
    """A field that would be used and cannot be read, and why."""

    source: str
    key: str
    reason: str


class TooLong(NamedTuple):
    """A field that is left out."""

    source: str
    key: str
    characters: int


class Licences(NamedTuple):
    """Different ones, all of which are named. stated: (licence, source) of each input that has one."""

    stated: tuple[tuple[str, str], ...]


class Cut(NamedTuple):
    """kept: of so many tags, the most frequent."""

    tags: int
    kept: int


Note: TypeAlias = Unreadable | TooLong | Licences | Cut
"""What a user should know of what is kept; report.py says it in words."""

Stated = Sequence[tuple[Described, str]]


def inherited(loras: Sequence[Described]) -> tuple[dict[str, str], list[Note]]:
    """(metadata, what the user should know of it) for the sum of LoRAs that all have a part in it."""
    notes: list[Note] = [
        Unreadable(lora.source, key, reason) for lora in loras for key, reason in unreadable(lora.metadata).items()
    ]
    if len(loras) == 1:
        return _all_of(loras[0]), notes
    result: dict[str, str] = {}
    for keys, join in (
        (_AGREED, _one_for_all),
        (WORDS + _TAGS, _words),
        (_AUTHORS, _names),
        (_LICENCES, _licences),
        (_TEXTS, _by_name),
    ):
        for key in keys:
            if stated := _stated(loras, key, notes):
                value = join(stated)
                if value is not None:
                    result[key] = value
    _add_tags(loras, result, notes)
    notes += _differing_licences(loras)
    # One file may be there twice.
    return result, list(dict.fromkeys(notes))


def is_picture(key: str, value: str) -> bool:
    """Whether it shows what a LoRA makes."""
    return key in _PICTURES or value[:20].lower().startswith("data:image/")


def size_of(metadata: Mapping[str, str]) -> int:
    """Bytes that it takes in a file."""
    return sum(len(json.dumps(text, ensure_ascii=False).encode()) + 1 for pair in metadata.items() for text in pair)


def _all_of(lora: Described) -> dict[str, str]:
    return {
        key: value
        for key, value in lora.metadata.items()
        if not is_scale(key) and not is_hash(key) and not is_picture(key, value)
    }


def _stated(loras: Sequence[Described], key: str, notes: list[Note]) -> Stated:
    found = [(lora, lora.metadata[key].strip()) for lora in loras if lora.metadata.get(key, "").strip()]
    for lora, value in found:
        if len(value) > _LONG:
            notes.append(TooLong(lora.source, key, len(value)))
    return [(lora, value) for lora, value in found if len(value) <= _LONG]


def _one_for_all(stated: Stated) -> str | None:
    values = {value for _, value in stated}
    return values.pop() if len(values) == 1 else None


def _words(stated: Stated) -> str:
    found = [words_in(value) for _, value in stated]
    words = list(dict.fromkeys(word for each, _ in found for word in each))
    return json.dumps(words, ensure_ascii=False) if all(is_list for _, is_list in found) else ", ".join(words)


def _names(stated: Stated) -> str:
    return ", ".join(dict.fromkeys(value for _, value in stated))


def _licences(stated: Stated) -> str:
    return _by_name(stated, "; ", "{value} ({name})")


def _by_name(stated: Stated, between: str = "\n", form: str = "{name}: {value}") -> str:
    """What all say, or what each says with the name of the file."""
    if (common := _one_for_all(stated)) is not None:
        return common
    return between.join(form.format(name=lora.source, value=value) for lora, value in stated)


def _differing_licences(loras: Sequence[Described]) -> list[Note]:
    for key in _LICENCES:
        stated = _stated(loras, key, [])
        if stated and _one_for_all(stated) is None:
            return [Licences(tuple((value, lora.source) for lora, value in stated))]
    return []


def _add_tags(loras: Sequence[Described], result: dict[str, str], notes: list[Note]) -> None:
    each = []
    for lora in loras:
        try:
            each.append(tags.read(lora.metadata))
        except ValueError:
            continue  # unreadable has said so
    total = tags.total(each)
    if not total:
        return
    result[tags.KEY], kept = tags.to_text(total)
    if kept < (all_tags := sum(map(len, total.values()))):
        notes.append(Cut(all_tags, kept))
