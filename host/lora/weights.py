"""LORA_MODEL: ComfyUI's dict of tensors, here with the file's metadata and a name riding along."""

from collections.abc import Mapping

import torch

from ...lora_merge import Lora
from ..door.rules import shown
from ..page import plain


class LoraWeights(dict):
    """key -> tensor, as in a LoRA file. Any node that takes a LORA_MODEL reads it as the plain dict it is.

    name: what to call it in messages.   metadata: the file's, text to text.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, name: str, metadata: Mapping[str, str] | None = None):
        super().__init__(tensors)
        self.name = name
        self.metadata = dict(metadata or {})

    def __repr__(self) -> str:
        # Of a node that failed ComfyUI keeps and sends each input as text: that of a dict has every tensor in it.
        return plain(f"LORA_MODEL {shown(self.name)} of {len(self)} tensors")


def named(weights: Mapping[str, torch.Tensor], fallback: str = "The LoRA") -> LoraWeights:
    """Any LORA_MODEL, such as that of core's Train LoRA, as LoraWeights."""
    return weights if isinstance(weights, LoraWeights) else LoraWeights(weights, name=fallback)


def from_lora(lora: Lora) -> LoraWeights:
    """As ComfyUI reads it: the keys of kohya and LyCORIS, every kind in its own parts, LoRA with its alpha, also where
    the file had it in metadata only. Tensors are shared with the Lora, as ComfyUI shares those of a file.
    """
    return LoraWeights(lora.to_state_dict(copy=False), name=lora.source, metadata=lora.metadata)


def to_lora(weights: Mapping[str, torch.Tensor], fallback: str = "The LoRA") -> Lora:
    """Raises ValueError, naming the keys, for what is no LoRA, or an incomplete one."""
    weights = named(weights, fallback)
    return Lora.from_state_dict(weights, metadata=weights.metadata, source=weights.name)
