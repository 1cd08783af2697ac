"""The keys of a LoRA file: which module and which part of its update a key names, or why it cannot be used."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from ..updates.build import PARTS
from ..updates.parts import BIAS_PARTS, DIFF_PARTS, WEIGHT_PARTS
from ..words import many

__all__ = ["BIAS_PARTS", "DIFF_PARTS", "UNKNOWN", "WEIGHT_PARTS", "parse", "suffix", "unread_format", "unread_text"]

# Spellings of LoRA's factors. "up" and "B" are the (out, rank) factor, "down" and "A" the (rank, in) one.
_FACTORS = (
    re.compile(r"(.+)\.lora_(up|down|mid)\.weight"),  # kohya, ComfyUI
    re.compile(r"(.+)_lora\.(up|down)\.weight"),  # diffusers' attention processors
    re.compile(r"(.+)\.lora\.(up|down)\.weight"),  # diffusers
    re.compile(r"(.+)\.lora_linear_layer\.(up|down)\.weight"),  # diffusers, text encoders
    re.compile(r"(.+)\.lora_([AB])(?:(?:\.[^.]+)?\.weight)?"),  # PEFT, with or without the adapter's name
)
# What may stand between a module and `.alpha`.
_BEFORE_ALPHA = ("_lora", ".lora", ".lora_linear_layer")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:(?:\.[^.]+)?\.weight)?")
_BUNDLED = re.compile(r"bundle_emb\..+")
_PART = {"B": "up", "A": "down"}

# Part -> what stands behind the module in kohya's and ComfyUI's key, where that is not the part's own name.
_SUFFIXES = {
    "up": ".lora_up.weight",
    "down": ".lora_down.weight",
    "mid": ".lora_mid.weight",
    "a1": ".a1.weight",
    "a2": ".a2.weight",
    "b1": ".b1.weight",
    "b2": ".b2.weight",
    "bundle": "",  # each of its keys is a module of its own
}
# Parts that stand at the end of a key by their own name.
_NATIVE = PARTS - _SUFFIXES.keys() - {"magnitude"}
_GLORA = re.compile(r"(.+)\.([ab][12])\.weight")

_UNREAD = (
    ("IA3", re.compile(r"(.+)\.(?:on_input|ia3_l(?:\..+)?)")),
    ("LoRA with a bias of its own", re.compile(r"(.+)\.(?:lora_(?:[AB]|up|down)(?:\.[^.]+)?|lora\.(?:up|down))\.bias")),
    ("LoRA of an embedding", re.compile(r"(.+)\.lora_embedding_.+")),
    ("weights that PEFT saves whole", re.compile(r"(.+)\.modules_to_save\..+|(.+)\.trainable_tokens_.+")),
    ("scale that is a tensor of its own", re.compile(r"(.+)\.scalar")),
    ("difference that is no weight's or bias's", re.compile(r"(.+)\.diff_m")),
    ("LoHa, LoKr or OFT of another kind", re.compile(r"(.+)\.(?:hada|lokr|oft|boft)_.+")),
)
UNKNOWN = "unknown"
_SHOWN = 3


@lru_cache(maxsize=1 << 14)
def parse(key: str) -> tuple[str, str] | None:
    """(module as the file spells it, part) of a key that ComfyUI reads; None for any other key.

    Parts: up, down, mid, alpha; hada_*, lokr_*, oft_blocks, rescale, a1, a2, b1, b2; dora_scale, magnitude (PEFT's
    way to write dora_scale), reshape_weight, set_weight; DIFF_PARTS; and bundle, where the module is the whole key.
    """
    # By the end of the key: each pattern costs as much as the module's name is long.
    module, _, end = key.rpartition(".")
    if end in _NATIVE or end == "alpha":
        if end == "alpha":
            module = next((module[: -len(a)] for a in _BEFORE_ALPHA if module[1:].endswith(a)), module)
        return (module, end) if module and "\n" not in module else None
    for pattern in _FACTORS:
        if match := pattern.fullmatch(key):
            return match[1], _PART.get(match[2], match[2])
    if match := _GLORA.fullmatch(key):
        return match[1], match[2]
    if match := _MAGNITUDE.fullmatch(key):
        return match[1], "magnitude"
    return (key, "bundle") if _BUNDLED.fullmatch(key) else None


def suffix(part: str) -> str:
    """What kohya's keys, which ComfyUI reads, have behind the module for a part that `parse` knows."""
    return _SUFFIXES.get(part, f".{part}")


def unread_format(key: str) -> str:
    """Name of the format of a key that `parse` does not know; "unknown" for a stray one."""
    return next((name for name, pattern in _UNREAD if pattern.fullmatch(key)), UNKNOWN)


def unread_text(keys: Iterable[str]) -> str:
    """Every format found among keys without effect, with how many keys and the first of them."""
    formats: dict[str, list[str]] = {}
    for key in sorted(keys):
        name = "scale of nothing" if parse(key) is not None else unread_format(key)
        formats.setdefault(name, []).append(key)
    parts = []
    for name, found in sorted(formats.items()):
        more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        parts.append(f"{name} ({many(len(found), 'keys')}: {', '.join(found[:_SHOWN])}{more})")
    return "; ".join(parts)
