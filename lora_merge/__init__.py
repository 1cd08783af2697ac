"""LoRA arithmetic: tau' = lambda_1 tau_1 + lambda_2 tau_2 + ..., exact, from file to file.

    style, lcm = load("style.safetensors"), load("lcm.safetensors")
    save(merge([(style, 0.8), (lcm, 1.0)]), "fast-style.safetensors")
    save(resize(lcm, keep=0.99), "small-lcm.safetensors")

Data takes one road: file or state dict -> Lora (layers under canonical module names) -> arithmetic -> Lora -> file or
state dict. Pure torch and safetensors; ComfyUI is not needed.
"""

from .carried import Carried
from .file import load, save
from .layer import Layer, LoraLayer
from .loha import LohaLayer
from .lokr import LokrLayer
from .lora import Lora
from .merging import Account, merge, merge_with_account, resize, resize_with_account
from .methods import METHODS
from .options import MergeOptions
from .places import BlockStrengths, parse_block_strengths
from .reading import KeyAccount, account_keys
from .report import describe, describe_merge

__all__ = [
    "METHODS",
    "Account",
    "BlockStrengths",
    "Carried",
    "KeyAccount",
    "Layer",
    "LohaLayer",
    "LokrLayer",
    "Lora",
    "LoraLayer",
    "MergeOptions",
    "account_keys",
    "describe",
    "describe_merge",
    "load",
    "merge",
    "merge_with_account",
    "parse_block_strengths",
    "resize",
    "resize_with_account",
    "save",
]
