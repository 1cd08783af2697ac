"""Updates that depend on the weight they change: they cannot be added up, and are kept as they came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from .layer import check_alpha

DORA = "DoRA"
OFT = "OFT"
BOFT = "BOFT"
GLORA = "GLoRA"
REPLACED = "replaced weight"
RESIZED = "resized weight"
BUNDLED = "bundled textual inversion"


@dataclass(frozen=True, eq=False)
class Carried:
    """A module's tensors, untouched, for loaders that know the weight.

    kind: DoRA (any low-rank kind with dora_scale), OFT, BOFT, GLoRA, a weight replaced as a whole, LoRA of a resized
        weight, or an embedding that is bundled with the LoRA and changes no weight.
    parts: part name of files/keys.py -> tensor. alpha: as in the file.
    shape: of the weight, (out,) where the kind tells no more, None where nothing is known.
    """

    kind: str
    parts: Mapping[str, Tensor]
    alpha: float | None = None
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))

    @property
    def parameters(self) -> int:
        return sum(part.numel() for part in self.parts.values())

    @property
    def written_alpha(self) -> float | None:
        """alpha as written for ComfyUI, whose BOFT stops without one; 0 means no constraint (0.30.0)."""
        return 0.0 if self.alpha is None and self.kind == BOFT else self.alpha
