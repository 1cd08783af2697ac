"""The public functions and classes of lora_merge, in one place."""

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
