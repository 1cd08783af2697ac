"""What a MODEL, CLIP or VAE is, so that what it made is known again in another process: by contents, not by names."""

import hashlib
from typing import Any

import torch
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import WeightAdapterBase

# Numbers of a weight that tell it from another: its first ones, and as many spread over it.
FIRST, SPREAD = 8, 64
# How far into the settings of a patch; deeper lie whole networks.
DEPTH = 8


def some(weight: torch.Tensor) -> torch.Tensor:
    """Enough of a weight to tell it from another, and from itself with any part of it changed."""
    numbers = (weight.dequantize() if isinstance(weight, QuantizedTensor) else weight).detach().flatten()
    spread = numbers[:: max(1, len(numbers) // SPREAD)]
    return torch.cat([numbers[:FIRST].float(), spread.float()])


def identity_of(patcher) -> str:
    """16 hexadecimal digits that change with any weight of a ModelPatcher, any patch on one, and the options that samplers
    hand to the network.

    The weights are taken without their patches, whether they are loaded or not.
    """
    digest = hashlib.sha256()
    backup = {key: kept.weight for key, kept in patcher.backup.items()}
    for name, weight in patcher.model.named_parameters():
        _feed(digest, [name, backup.get(name, weight)])
    _feed(digest, patcher.patches)
    # What nodes hang into a network counts its calls, or remembers the last picture: of that the kind is all that stays.
    _feed(digest, [patcher.object_patches, patcher.model_options], inside=False)
    return digest.hexdigest()[:16]


def _feed(digest, part: Any, depth: int = 0, inside: bool = True) -> None:
    """inside: whether what an object of a class of its own holds counts, too."""
    if isinstance(part, WeightAdapterBase):
        # By what it is, wherever its factors lie.
        part = [part.name, part.loaded_keys, part.weights]
    digest.update(type(part).__name__.encode())
    if isinstance(part, torch.Tensor):
        digest.update(str(tuple(part.shape)).encode())
        if part.numel():
            digest.update(some(part).cpu().contiguous().numpy().tobytes())
    elif isinstance(part, (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)):
        digest.update(repr(part).encode())
    elif depth < DEPTH:
        for one in _parts(part, inside):
            _feed(digest, one, depth + 1, inside)


def _parts(part: Any, inside: bool) -> list:
    # In the order of their names: LoRAs are the same in whatever order their keys come.
    if isinstance(part, dict):
        return [one for key in sorted(part, key=str) for one in (str(key), part[key])]
    if isinstance(part, (set, frozenset)):
        return sorted(map(str, part))
    if isinstance(part, (list, tuple)):
        return [*part]
    if isinstance(part, torch.nn.Module):
        return [*part.state_dict().values()]
    if hasattr(part, "__qualname__"):  # a function: where it is, and what it closes over
        cells = [cell.cell_contents for cell in getattr(part, "__closure__", None) or ()]
        return [part.__module__, part.__qualname__, cells]
    return [type(part).__qualname__, getattr(part, "__dict__", {}) if inside else {}]
