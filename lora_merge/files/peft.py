"""Scales that PEFT and diffusers keep in metadata instead of in `.alpha` keys."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

METADATA_KEY = "lora_adapter_metadata"
_PLAIN = re.compile(r"[\w.-]*")
_REPEATS = re.compile(r"[*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_COMPONENT = re.compile(r"(unet|transformer|text_encoder(?:_[23])?)\.(.+)")


def adapter_alpha(metadata: Mapping[str, str], module: str, rank: int) -> float | None:
    """The alpha of a module (as its file spells it) according to the file's metadata; None if it says nothing.

    Read are diffusers' `lora_adapter_metadata` (JSON, fields prefixed with the model part, `unet.lora_alpha`) and plain
    `lora_alpha`, with `alpha_pattern` and `use_rslora` (scale lora_alpha / sqrt(rank), Kalajdzievski 2023,
    arXiv 2312.03732) as in PEFT's LoraConfig. Raises ValueError for metadata that cannot be read.
    """
    config = _config(metadata, module)
    alpha = config.get("lora_alpha")
    name = module.rpartition("base_model.model.")[2]
    if match := _COMPONENT.fullmatch(name):
        name = match[2]
    name = name.replace(".processor.", ".")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"alpha_pattern in the metadata is {type(patterns).__name__}, but it has to be a JSON object")
    for pattern, value in patterns.items():
        if _matches(pattern, name):
            alpha = value
            break
    if alpha is None:
        return None
    try:
        alpha = float(alpha)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"lora_alpha in the metadata is {alpha!r}, but it has to be a number") from None
    return alpha * math.sqrt(rank) if config.get("use_rslora") in (True, "True", "true") else alpha


def _matches(pattern: str, name: str) -> bool:
    """Whether PEFT applies a pattern, a regular expression for the end of the name, to a module.

    Most patterns are plain names. Others are tried only while they are short and repeat no group, since some regular
    expressions take longer than anybody waits, and this one comes with a file.
    """
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    if _PLAIN.fullmatch(pattern):
        return False
    if len(pattern) > 200 or len(_REPEATS.findall(pattern)) > 3 or _REPEATED_GROUP.search(pattern):
        raise ValueError(f"alpha_pattern in the metadata is {pattern[:60]!r}, which is too involved to be tried")
    try:
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None
    except re.error as error:
        raise ValueError(f"alpha_pattern in the metadata is {pattern[:60]!r}, no regular expression: {error}") from None


def _config(metadata: Mapping[str, str], module: str) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        return {
            key: _json(metadata[key], key) if key == "alpha_pattern" else metadata[key]
            for key in ("lora_alpha", "alpha_pattern", "use_rslora")
            if key in metadata
        }
    packed = _json(metadata[METADATA_KEY], METADATA_KEY)
    match = _COMPONENT.fullmatch(module)
    prefix = f"{match[1]}." if match else ""
    return {key.removeprefix(prefix): value for key, value in packed.items() if key.startswith(prefix)}


def _json(text: str, key: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} in the metadata is not JSON ({error}), so the scale of the LoRA is unknown") from None
    if not isinstance(value, dict):
        raise ValueError(f"{key} in the metadata is {type(value).__name__}, but it has to be a JSON object")
    return value
