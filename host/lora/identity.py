"""What a LORA_MODEL is, kept beside it where it was read from a file."""

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch

from ...lora_merge.recognise.identity import Identity, identify
from ...lora_merge.updates.unmade import Unmade
from ...samplers.preset import Preset
from ...samplers.presets import preset_called
from .weights import LoraWeights, to_lora


class KnownWeights(LoraWeights):
    """LoraWeights as they came from a file, with what was found out about them. Copies by other means are LoraWeights.

    identity: what they are.   original: the file's pieces, shared by all copies.
    cases: what other modules remember about the original, shared by all copies.
    """

    def __init__(
        self, original: Mapping[str, torch.Tensor | Unmade], *, name: str, metadata, identity: Identity, cases=None
    ):
        super().__init__(original, name=name, metadata=metadata)
        self.original = original
        self.identity = identity
        self.cases = WeakKeyDictionary() if cases is None else cases

    def again(self) -> "KnownWeights":
        """A copy of the dict, not of the tensors."""
        return KnownWeights(
            self.original, name=self.name, metadata=self.metadata, identity=self.identity, cases=self.cases
        )

    @property
    def untouched(self) -> bool:
        """False once somebody put something else into this dict; then nothing that is remembered holds for it."""
        pieces = self.pieces
        return len(pieces) == len(self.original) and all(
            (mine := pieces.get(key)) is piece or (isinstance(piece, Unmade) and piece.gave(mine))
            for key, piece in self.original.items()
        )


def identity_of(weights: LoraWeights) -> Identity | None:
    """None for a LORA_MODEL of another make that lora_merge cannot read, which ComfyUI may still apply."""
    if isinstance(weights, KnownWeights) and weights.untouched:
        return weights.identity
    try:
        return identify(to_lora(weights))
    except ValueError:
        return None


def preset_of(identity: Identity | None) -> Preset | None:
    """The sampling settings that go with a LoRA; None for one that is not known, or whose settings are not."""
    return preset_called(identity.preset or "") if identity else None
