"""Text encoders other than CLIP: which names of several LoRAs are of one encoder.

ComfyUI calls each by a word (`text_encoders.t5xxl.transformer.`), kohya's trainers by a number that depends on the model
(`lora_te2_`, `lora_te3_`), some files by neither (`text_encoders.transformer.`, `lora_te_`). Where LoRAs have one word and one
number for encoders of a kind, told by its modules, these are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .aliases import text_encoder

_KINDS = (
    ("CLIP", re.compile(r"text_model_|text_projection")),
    ("T5", re.compile(r"encoder_block_|shared$|encoder_final_layer_norm|encoder_embed_tokens")),
    ("language model", re.compile(r"layers_|embed_tokens|norm$")),
)
_NUMBERED, _NONE = {"te1", "te2", "te3"}, {"te", ""}


def _kind(body: str) -> str:
    return next((kind for kind, words in _KINDS if words.match(body)), "other")


def aligned(spellings: Iterable[str]) -> dict[str, str]:
    """{spelling of a module: spelling of the same one} for all that LoRAs together call a module of a text encoder, where
    they have several; ComfyUI's word is written where there is one."""
    called: dict[tuple[str, str], dict[str, str]] = {}
    encoders: dict[str, set[str]] = {}
    for spelling in spellings:
        if (found := text_encoder(spelling)) is not None and (kind := _kind(found[1])) != "CLIP":
            called.setdefault((kind, found[1]), {}).setdefault(found[0], spelling)
            encoders.setdefault(kind, set()).add(found[0])
    result: dict[str, str] = {}
    for (kind, _), names in called.items():
        words, numbers = encoders[kind] - _NUMBERED - _NONE, encoders[kind] & _NUMBERED
        if len(names) > 1 and len(words) <= 1 and len(numbers) <= 1:
            # A word is read in every version, a number by what the model is, nothing in the newest alone.
            first = min(names, key=lambda encoder: (encoder not in words, encoder not in numbers))
            result |= dict.fromkeys(names.values(), names[first])
    return result
