"""The keys of a LoRA file: which module and which part of its update a key names, or why it cannot be merged."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Suffix -> the part it names. "up" and "B" are the (out, rank) factor, "down" and "A" the (rank, in) one.
_FACTORS = (
    re.compile(r"(.+)\.lora_(up|down|mid)\.weight"),  # kohya, ComfyUI
    re.compile(r"(.+)_lora\.(up|down)\.weight"),  # diffusers' attention processors
    re.compile(r"(.+)\.lora\.(up|down)\.weight"),  # diffusers
    re.compile(r"(.+)\.lora_linear_layer\.(up|down)\.weight"),  # diffusers, text encoders
    re.compile(r"(.+)\.lora_([AB])(?:(?:\.[^.]+)?\.weight)?"),  # PEFT, with or without the adapter's name
)
_ALPHA = re.compile(r"(.+?)(?:_lora|\.lora|\.lora_linear_layer)?\.alpha")
# Dense differences to a weight, a bias or a norm: additive, small, written by LyCORIS and ComfyUI's trainer.
_DIFF = re.compile(r"(.+)\.(diff|diff_b|w_norm|b_norm)")
_PART = {"B": "up", "A": "down"}

DIFF_PARTS = ("diff", "diff_b", "w_norm", "b_norm")

_REFUSED = (
    ("LoHa", re.compile(r"(.+)\.hada_.+")),
    ("LoKr", re.compile(r"(.+)\.lokr_.+")),
    ("DoRA", re.compile(r"(.+)\.(?:dora_scale|lora_magnitude_vector(?:\..+)?)")),
    ("OFT or BOFT", re.compile(r"(.+)\.(?:oft_.+|boft_.+|rescale)")),
    ("GLoRA", re.compile(r"(.+)\.[ab][12]\.weight")),
    ("IA3", re.compile(r"(.+)\.(?:on_input|ia3_l(?:\..+)?)")),
    ("LoRA with a bias of its own", re.compile(r"(.+)\.(?:lora_(?:[AB]|up|down)(?:\.[^.]+)?|lora\.(?:up|down))\.bias")),
    ("LoRA of an embedding", re.compile(r"(.+)\.lora_embedding_.+")),
    ("replaced weight", re.compile(r"(.+)\.set_weight")),
    ("resized weight", re.compile(r"(.+)\.reshape_weight")),
    ("bundled textual inversion", re.compile(r"(bundle_emb)\..+")),
)
UNKNOWN = "unknown"
_SHOWN = 3


def parse(key: str) -> tuple[str, str] | None:
    """(module as the file spells it, part), part one of up, down, mid, alpha or DIFF_PARTS; None for any other key."""
    for pattern in _FACTORS:
        if match := pattern.fullmatch(key):
            return match[1], _PART.get(match[2], match[2])
    if match := _ALPHA.fullmatch(key):
        return match[1], "alpha"
    if match := _DIFF.fullmatch(key):
        return match[1], match[2]
    return None


def refused_format(key: str) -> tuple[str, str]:
    """(name of the format, module) of a key that `parse` does not know; ("unknown", key) for a stray one."""
    for name, pattern in _REFUSED:
        if match := pattern.fullmatch(key):
            return name, match[1]
    return UNKNOWN, key


def refusal(source: str, keys: Iterable[str]) -> str:
    """One message that names every format found among refused keys, with how many keys and the first of them."""
    formats: dict[str, list[str]] = {}
    for key in sorted(keys):
        formats.setdefault(refused_format(key)[0], []).append(key)
    parts = []
    for name, found in sorted(formats.items()):
        more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        parts.append(f"{name} ({len(found)} keys: {', '.join(found[:_SHOWN])}{more})")
    return (
        f"{source}: cannot be merged, since it holds more than plain LoRA: {'; '.join(parts)}. "
        "Only LoRA and LoCon factors and weight differences add up; use this file in a LoRA loader of its own."
    )
