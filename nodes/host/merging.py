"""LORA_MODELs through lora_merge/ and back."""

from collections.abc import Mapping

from ...lora_merge import describe_merge, merge_with_account
from .weights import LoraWeights, from_lora, to_lora


def merge(slots: Mapping[str, object], *, method: str, rank: int, density: float) -> tuple[LoraWeights, str]:
    """(merged, report). slots: lora_1, strength_1, lora_2, ... as the node has them; an empty lora slot is left out."""
    if density != 1:
        raise ValueError(f"density is {density:g}, but method {method} keeps every LoRA whole. Set density to 1.")
    numbers = [key.removeprefix("lora_") for key in slots if key.startswith("lora_") and slots[key] is not None]
    inputs = [
        (to_lora(slots[f"lora_{number}"], f"lora_{number}"), slots[f"strength_{number}"])
        for number in sorted(numbers, key=int)
    ]
    merged, account = merge_with_account(inputs, method=method, rank=rank)
    return from_lora(merged), describe_merge(account, merged)
