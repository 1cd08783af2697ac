"""Captions as the text encoder has them, each encoded once and kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from ..distillation.kept import Kept, key_of

Entry = Any
"""[tensor, options]: the one entry of the CONDITIONING that CLIPTextEncode makes."""

COND = "cond"
OTHERS = "other options"  # as JSON, in bytes


def entries_of(captions: Sequence[str], encode: Callable[[str], Entry], encoder: str, kept: Kept) -> list[Entry]:
    """The entry of each caption. encode: makes one.   encoder: identity of what does."""
    keys = [key_of("text", encoder, caption) for caption in captions]
    made: dict[str, Entry] = {}
    bar = tqdm([*zip(keys, captions, strict=True)], desc="Encoding captions", disable=len(captions) < 8)
    for key, caption in bar:
        if key not in kept and key not in made:
            entry = encode(caption)
            tensors = _tensors(entry)
            if tensors is None:
                made[key] = entry
            else:
                kept.add({key: tensors})
    found = kept.get(key for key in keys if key not in made)
    return [made[key] if key in made else _entry(found[key]) for key in keys]


def _tensors(entry: Entry) -> dict[str, Tensor] | None:
    """All of an entry as tensors; None if it holds something else than tensors and plain values."""
    cond, options = entry
    tensors = {name: value for name, value in options.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in options.items() if name not in tensors}
    try:
        text = json.dumps(others)
    except TypeError:
        return None
    if json.loads(text) != others or COND in tensors:  # a tuple would come back as a list
        return None
    return {COND: cond, OTHERS: torch.tensor([*text.encode()], dtype=torch.uint8)} | tensors


def _entry(tensors: dict[str, Tensor]) -> Entry:
    options = {name: value for name, value in tensors.items() if name not in (COND, OTHERS)}
    others = json.loads(bytes(tensors[OTHERS].tolist()))
    return [tensors[COND], options | others]


def zeros(entry: Entry) -> Entry:
    """What ConditioningZeroOut makes of an entry."""
    tensor, options = entry
    pooled = options.get("pooled_output")
    return [torch.zeros_like(tensor), options | ({} if pooled is None else {"pooled_output": torch.zeros_like(pooled)})]
