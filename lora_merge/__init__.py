"""LoRA arithmetic: tau' = lambda_1 tau_1 + lambda_2 tau_2 + ..., exact, from file to file.

    style, lcm = load("style.safetensors"), load("lcm.safetensors")
    save(merge([(style, 0.8), (lcm, 1.0)]), "fast-style.safetensors")

Data takes one road: file or state dict -> Lora (layers under canonical module names) -> arithmetic -> Lora -> file or
state dict. Pure torch and safetensors; ComfyUI is not needed.
"""

from .file import load, save
from .layer import LoraLayer
from .lora import Lora
from .merging import Account, merge, merge_with_account
from .methods import METHODS
from .report import describe, describe_merge

__all__ = [
    "METHODS",
    "Account",
    "Lora",
    "LoraLayer",
    "describe",
    "describe_merge",
    "load",
    "merge",
    "merge_with_account",
    "save",
]
