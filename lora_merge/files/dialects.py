"""Files in spellings of their own: Flux Tools' and USO's, which ComfyUI recognises by single keys and renames as a whole, and
keys of LoRAs extracted from Wan, which it does not know."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..updates.unmade import Unmade

_CONTROL = ("img_in.lora_A.weight", "img_in.lora_B.weight", "single_blocks.0.norm.key_norm.scale")
_USO = ("single_blocks.37.processor.qkv_lora.up.weight", "double_blocks.18.processor.qkv_lora2.up.weight")
# In this order: the names without a number are part of those with one.
_OF_USO = {
    ".down.weight": ".lora_down.weight",
    ".up.weight": ".lora_up.weight",
    ".qkv_lora2.": ".txt_attn.qkv.",
    ".qkv_lora1.": ".img_attn.qkv.",
    ".proj_lora1.": ".img_attn.proj.",
    ".proj_lora2.": ".txt_attn.proj.",
    ".qkv_lora.": ".linear1_qkv.",
    ".proj_lora.": ".linear2.",
    ".processor.": ".",
}
# A difference of a Wan block's modulation, for which those who extract LoRAs have a word of their own.
_MODULATION_END = ".diff_m"
_MODULATED = re.compile(r".*\b(?:blocks\.\d+|head)")
RESHAPED = "diffusion_model.img_in.reshape_weight"


def renamed(state_dict: Mapping[str, object]) -> dict[str, str]:
    """Key of the file -> key in the spelling that everything else here knows."""
    if all(key in state_dict for key in _CONTROL):
        return {key: f"diffusion_model.{_of_control(key)}" for key in state_dict}
    if all(key in state_dict for key in _USO):
        result = {}
        for key in state_dict:
            name = key
            for theirs, ours in _OF_USO.items():
                name = name.replace(theirs, ours)
            result[key] = f"diffusion_model.{name}"
        return result
    return {key: _of_extracted(key) for key in state_dict}


def added(state_dict: Mapping[str, Tensor | Unmade]) -> dict[str, Tensor]:
    """What such a file means without saying it: a control LoRA makes the weight of its input layer wider."""
    if not all(key in state_dict for key in _CONTROL):
        return {}
    a, b = (state_dict[key] for key in _CONTROL[:2])
    return {RESHAPED: torch.tensor([b.shape[0], a.shape[1]])} if a.ndim > 1 and b.ndim > 1 else {}


def _of_extracted(key: str) -> str:
    module = key.removesuffix(_MODULATION_END)
    return f"{module}.modulation.diff" if module != key and _MODULATED.fullmatch(module) else key


def _of_control(key: str) -> str:
    return key.replace(".lora_B.bias", ".diff_b").replace("_norm.scale", "_norm.set_weight")
