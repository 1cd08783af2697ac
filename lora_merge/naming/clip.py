"""Text encoders: kohya's, diffusers' and ComfyUI's names of CLIP; where a module is, in encoders of any kind."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from .family import Family, Place, block_of, kind_of, numbered, underscored, with_dots

_TEXT_ENCODER = re.compile(r"text_encoder(_[23])?\.(.+)")
_COMFY_CLIP = re.compile(r"text_encoders\.clip_([lhg])\.transformer\.(.+)")
# kohya's and ComfyUI's names of text encoders; clip_l is the first and clip_g the second wherever they are together.
_TEXT = re.compile(r"(?:lora_te([123]?)_|text_encoders_(?:[a-z0-9_]+?)_transformer_|(?=text_model_))(.+)")
_DOTTED = re.compile(r"lora_te([123]?)_(.+)")
# What text encoders wrap their layers in.
_LAYERS = re.compile(r"(?:\w+_)?layers")


def _recognises(names: Collection[str]) -> bool:
    return any(_TEXT.fullmatch(name) for name in names)


def _kohya_name(name: str) -> str | None:
    if match := _TEXT_ENCODER.fullmatch(name):
        return f"lora_te{(match[1] or '')[1:]}_{underscored(match[2])}"
    if name.startswith("text_model."):
        return f"lora_te_{underscored(name)}"
    return None


def _canonical(name: str, layout: Any) -> str | None:
    if name.startswith("lora_te_"):
        return f"lora_te1_{name.removeprefix('lora_te_')}"
    if match := _COMFY_CLIP.fullmatch(name):
        return f"lora_te{'2' if match[1] == 'g' else '1'}_{underscored(match[2])}"
    return None


def _dotted(name: str, layout: Any) -> str | None:
    match = _DOTTED.fullmatch(name)
    if match is None or (body := with_dots(match[2])) is None:
        return None
    return f"text_encoder_{match[1]}.{body}" if match[1] in ("2", "3") else f"text_encoder.{body}"


def _tidy(spellings: Mapping[str, str]) -> dict[str, str]:
    """`lora_te_` beside `lora_te1_` or `lora_te2_` becomes `lora_te1_`."""
    two_encoders = any(name.startswith(("lora_te1_", "lora_te2_")) for name in spellings.values())
    return {
        module: module if two_encoders and name.startswith("lora_te_") else name for module, name in spellings.items()
    }


def _place(module: str, layout: Any) -> Place | None:
    match = _TEXT.fullmatch(module)
    if match is None:
        return None
    side, number = numbered(match[2])
    block = f"layers.{number}" if _LAYERS.fullmatch(side) else block_of(match[2])
    return Place(f"te{match[1]}" if match[1] else "te", block, kind_of(match[2]))


def _path(module: str) -> str | None:
    match = _TEXT.fullmatch(module)
    return match[2] if match else None


FAMILY = Family(
    name="text encoder",
    recognises=_recognises,
    kohya_name=_kohya_name,
    canonical=_canonical,
    dotted=_dotted,
    tidy=_tidy,
    place=_place,
    path=_path,
)
