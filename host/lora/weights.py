"""LORA_MODEL: ComfyUI's dict of tensors, here with the file's metadata and a name riding along, and large tensors left where
they lie until somebody asks for them."""

import copy
from collections.abc import Iterator, Mapping, ValuesView
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from ...lora_merge import Lora
from ...lora_merge.files.keys import suffix
from ...lora_merge.files.lora import Pieces, in_memory
from ...lora_merge.updates.side_by_side import Sum
from ...lora_merge.updates.unmade import Unmade
from ...lora_merge.words import many
from ..door.rules import shown
from ..page import plain


class LoraWeights(dict):
    """key -> tensor, as in a LoRA file. Any node that takes a LORA_MODEL reads it as the plain dict it is.

    name: what to call it in messages.   metadata: the file's, text to text.
    What came unmade (factors in a file, exact sums of such) is made when somebody asks for it, and in the dict from then on,
    as in any dict: people write into tensors, and safetensors compares their addresses; of `values` when it is used. What
    asks for none reads `pieces`.
    Asking raises ValueError where the file is not what it was.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor | Unmade], *, name: str, metadata: Mapping[str, str] | None = None
    ):
        super().__init__(tensors)
        self.name = name
        self.metadata = dict(metadata or {})

    def __repr__(self) -> str:
        # Of a node that failed ComfyUI keeps and sends each input as text: that of a dict has every tensor in it.
        return plain(f"LORA_MODEL {shown(self.name)} of {many(len(self), 'tensors')}")

    @property
    def pieces(self) -> Pieces:
        """A plain dict of what there is: tensors, and what was not asked for unmade."""
        return dict(super().items())

    def _ask_for_all(self) -> None:
        if any(isinstance(piece, Unmade) for piece in super().values()):
            super().update(in_memory(self.pieces, Unmade.shared))

    def __getitem__(self, key: str) -> torch.Tensor:
        piece = super().__getitem__(key)
        return self._made(key, piece) if isinstance(piece, Unmade) else piece

    def _made(self, key: str, piece: Unmade) -> torch.Tensor:
        """The tensor, in the dict from now on if the piece still is."""
        tensor = piece.shared()
        if super().get(key) is piece:
            super().__setitem__(key, tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Python copies what is in the table of a dict, asking nobody, unless it has a way of its own to be gone through."""
        return super().__iter__()

    def get(self, key: str, default: Any = None, /) -> Any:
        return self[key] if key in self else default

    def setdefault(self, key: str, default: Any = None, /) -> Any:
        return self[key] if key in self else super().setdefault(key, default)

    def pop(self, key: str, /, *default: Any) -> Any:
        self.get(key)
        return super().pop(key, *default)

    def popitem(self) -> tuple[str, torch.Tensor]:
        self.get(next(reversed(self), None))
        return super().popitem()

    def items(self):
        self._ask_for_all()
        return super().items()

    def values(self):
        return _Values(self)

    def copy(self) -> dict[str, torch.Tensor]:
        return dict(self.items())

    def __eq__(self, other: object) -> bool:
        return self.copy() == (other.copy() if isinstance(other, LoraWeights) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __reduce__(self):
        """A copy, also one in another process, has all tensors."""
        return _again, (self.copy(), self.name, self.metadata)


class _Values(ValuesView):
    """Of LoraWeights, the tensors that are not made as such by which they are made when they are used.

    ComfyUI goes through all values of every output of a node, looking for models among them (PromptModelTracker, 0.30): to
    make them for that would take the memory and the time that they are left in their files for, and an error of a file
    would end the thread that runs prompts.
    """

    def __iter__(self) -> Iterator[torch.Tensor]:
        for key, piece in self._mapping.pieces.items():
            yield _Later(self._mapping, key, piece) if isinstance(piece, Unmade) else piece

    def __reversed__(self) -> Iterator[torch.Tensor]:
        return reversed([*self])

    @property
    def mapping(self) -> MappingProxyType:
        return MappingProxyType(self._mapping)


class _Later(torch.Tensor):
    """A tensor that is that of a LORA_MODEL in all that is done with it, and made then."""

    # What is made of it are ordinary tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, weights: LoraWeights, key: str, piece: Unmade) -> "_Later":
        later = torch.Tensor._make_wrapper_subclass(cls, piece.shape, dtype=piece.dtype, device=piece.device)
        later.of, later.tensor = (weights, key, piece), None
        return later

    def made(self) -> torch.Tensor:
        if self.tensor is None:
            weights, key, piece = self.of
            self.tensor = weights._made(key, piece)
        return self.tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda later: later.made(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        return self.made().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return copy.deepcopy(self.made(), memo)


def _of_the_tensor_itself(name: str):
    def method(self, *args, **kwargs):
        return getattr(self.made(), name)(*args, **kwargs)

    return method


# What asks for memory and not for an operation.
for _name in ("data_ptr", "numpy", "__array__", "storage", "untyped_storage", "tolist", "share_memory_", "pin_memory"):
    setattr(_Later, _name, _of_the_tensor_itself(_name))


def _again(tensors: Mapping[str, torch.Tensor], name: str, metadata: Mapping[str, str]) -> LoraWeights:
    return LoraWeights(tensors, name=name, metadata=metadata)


def named(weights: Mapping[str, torch.Tensor], fallback: str = "The LoRA") -> LoraWeights:
    """Any LORA_MODEL, such as that of core's Train LoRA, as LoraWeights."""
    return weights if isinstance(weights, LoraWeights) else LoraWeights(weights, name=fallback)


def from_lora(lora: Lora) -> LoraWeights:
    """As ComfyUI reads it: the keys of kohya and LyCORIS, every kind in its own parts, LoRA with its alpha, also where
    the file had it in metadata only. Tensors are shared with the Lora, as ComfyUI shares those of a file; what needs more than
    files is made now, for others may write into tensors.
    """
    pieces = lora.pieces(copy=False) | _alphas(lora)
    now = {key: piece for key, piece in pieces.items() if not (isinstance(piece, Unmade) and piece.of_file)}
    return LoraWeights(pieces | in_memory(now), name=lora.source, metadata=lora.metadata)


def _alphas(lora: Lora) -> Pieces:
    """Those that float32 would round, as a strength in it does, in float64: ComfyUI multiplies by the number it finds."""
    sums = ((module, layer.written_alpha) for module, layer in lora.modules.items() if isinstance(layer, Sum))
    return {
        f"{lora.spellings[module]}{suffix('alpha')}": torch.tensor(alpha, dtype=torch.float64)
        for module, alpha in sums
        if float(np.float32(alpha)) != alpha
    }


def to_lora(weights: Mapping[str, torch.Tensor], fallback: str = "The LoRA") -> Lora:
    """Raises ValueError, naming the keys, for what is no LoRA, or an incomplete one."""
    weights = named(weights, fallback)
    return Lora.from_state_dict(weights.pieces, metadata=weights.metadata, source=weights.name)
