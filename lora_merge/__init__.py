"""LoRA arithmetic: tau' = lambda_1 tau_1 + lambda_2 tau_2 + ..., exact, from file to file.

    style, lcm = load("style.safetensors"), load("lcm.safetensors")
    save(merge([(style, 0.8), (lcm, 1.0)]), "fast-style.safetensors")
    save(resize(lcm, keep=0.99), "small-lcm.safetensors")

Data takes one road: file or state dict -> Lora (layers under canonical module names) -> arithmetic -> Lora -> file or
state dict. Pure torch and safetensors; ComfyUI is not needed.
"""

from .files.load_save import load, save
from .files.lora import Lora
from .files.reading import KeyAccount, account_keys
from .merging.merge import Account, merge, merge_with_account, resize, resize_with_account
from .merging.report import describe, describe_merge
from .methods.table import METHODS
from .settings.block_strengths import BlockStrengths, parse_block_strengths
from .settings.options import MergeOptions
from .updates.layer import Layer, LoraLayer
from .updates.loha import LohaLayer
from .updates.lokr import LokrLayer
from .updates.weight_dependent import Carried

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
