"""The inputs lora_1, strength_1, lora_2, ... of nodes that take several LoRAs."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...lora_merge import Lora
from .weights import to_lora

LORA, STRENGTH = "lora_", "strength_"
NUMBERS = range(1, 7)  # of the slots of a node that takes several LoRAs


@dataclass(frozen=True, kw_only=True)
class Slot:
    """number: of the input, from 1 on.   weights: the LORA_MODEL in it."""

    number: int
    weights: Mapping
    strength: float

    @property
    def name(self) -> str:
        return f"{LORA}{self.number}"

    @property
    def lora(self) -> Lora:
        """Called by the input where the LORA_MODEL has no name of its own. Raises ValueError for what is no LoRA."""
        return to_lora(self.weights, self.name)


def connected(inputs: Mapping[str, object]) -> list[Slot]:
    """The slots that hold a LoRA, in the order of their numbers; an empty one is left out."""
    numbers = sorted(int(name.removeprefix(LORA)) for name in inputs if name.startswith(LORA))
    return [
        Slot(number=number, weights=weights, strength=inputs[f"{STRENGTH}{number}"])
        for number in numbers
        if (weights := inputs[f"{LORA}{number}"]) is not None
    ]
