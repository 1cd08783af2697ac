"""A whole LoRA: its layers under canonical module names, and the way from and to state dicts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from . import names
from .layer import LoraLayer
from .precision import cast
from .reading import read
from .unet import infer_layout

Format = Literal["kohya", "diffusers"]
FORMATS: tuple[Format, ...] = ("kohya", "diffusers")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA that nothing changes: read-only mappings, tensors shared with whoever made it.

    modules: canonical module name (see names.py) -> LoraLayer, in the order of the file.
    diffs: (canonical module name, part) -> dense difference, part one of keys.DIFF_PARTS.
    spellings: canonical module name -> how kohya format writes it.
    metadata: what the file says about itself, text to text.
    source: file name or other words for messages.
    """

    modules: Mapping[str, LoraLayer]
    diffs: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)
    spellings: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    source: str = "LoRA"

    def __post_init__(self) -> None:
        used = list(dict.fromkeys([*self.modules, *(module for module, _ in self.diffs)]))
        spellings = {module: self.spellings.get(module, module) for module in used}
        for name, value in (
            ("modules", dict(self.modules)),
            ("diffs", dict(self.diffs)),
            ("spellings", spellings),
            ("metadata", dict(self.metadata)),
        ):
            object.__setattr__(self, name, MappingProxyType(value))

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None, source: str = "LoRA"
    ) -> Lora:
        """The LoRA in a dict of tensors, in any spelling that names.py and keys.py know.

        Raises ValueError, naming `source` and the keys, if a key is not part of a LoRA or a LoRA is incomplete,
        if shapes do not fit, values are not finite, or two keys spell the same module.
        """
        modules, diffs, spellings = read(state_dict, metadata or {}, source)
        return cls(modules, diffs, spellings, metadata or {}, source)

    @property
    def parameters(self) -> int:
        """Number of values in all factors and differences."""
        return sum(layer.parameters for layer in self.modules.values()) + sum(d.numel() for d in self.diffs.values())

    def find(self, module: str) -> str:
        """The canonical name of a module given by any of its spellings. Raises KeyError if this LoRA has none."""
        if module in self.spellings:
            return module
        spelled = names.spelling(module)
        for name, known in self.spellings.items():
            if spelled == known:
                return name
        name = names.canonical(spelled, infer_layout(names.unet_bodies([*self.spellings.values(), spelled])))
        if name in self.spellings:
            return name
        raise KeyError(f"{self.source} has no module {module!r}; it has {len(self.spellings)} others")

    def delta(self, module: str) -> Tensor:
        """What strength 1 adds to the module's weight: (out, in, *kernel), float32. Any spelling of the module.

        Raises KeyError for a module without an update of its weight.
        """
        module = self.find(module)
        if module in self.modules:
            return self.modules[module].delta()
        for part in ("diff", "w_norm"):
            if (module, part) in self.diffs:
                return self.diffs[module, part].detach().to(torch.float32, copy=True)
        raise KeyError(f"{self.source} changes the bias of {module!r} only, not its weight")

    def to_state_dict(self, dtype: torch.dtype | None = None, *, format: Format = "kohya") -> dict[str, Tensor]:
        """The LoRA as a dict of new tensors, ready for safetensors, ComfyUI's LORA_MODEL or a training script.

        dtype: of the factors; None keeps each as it is. Alphas are float32, so that none is rounded.
        format: "kohya" writes `.lora_up.weight`, `.lora_down.weight`, `.alpha` (always, since readers differ in what
            they assume without) and is what ComfyUI reads for any model; "diffusers" writes PEFT's
            `unet....lora_B.weight` with the scale multiplied into the factors.
        float16: components that would overflow or be lost are balanced, see precision.py; a warning tells how many.
        Raises ValueError for modules that the format cannot name or values the dtype cannot hold.
        """
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}, but it has to be one of {', '.join(FORMATS)}")
        spelled = dict(self.spellings) if format == "kohya" else self.diffusers_spellings()
        result: dict[str, Tensor] = {}
        balanced = []
        for module, layer in self.modules.items():
            name = spelled[module]
            if format == "diffusers":
                layer = _without_scale(layer)
            try:
                converted = cast(layer, dtype or self.modules[module].up.dtype)
            except ValueError as error:
                raise ValueError(f"{self.source}: {name}: {error}") from None
            layer = converted.layer
            if converted.balanced:
                balanced.append(name)
            up, down = ("lora_up", "lora_down") if format == "kohya" else ("lora_B", "lora_A")
            result[f"{name}.{up}.weight"] = _own(layer.up, self.modules[module].up)
            result[f"{name}.{down}.weight"] = _own(layer.down, self.modules[module].down)
            if layer.mid is not None:
                result[f"{name}.lora_mid.weight"] = _own(layer.mid, self.modules[module].mid)
            if format == "kohya":
                alpha = float(layer.down.shape[0]) if layer.alpha is None else layer.alpha
                result[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        for (module, part), diff in self.diffs.items():
            converted_diff = diff.detach().to(dtype or diff.dtype, copy=True)
            if not bool(torch.isfinite(converted_diff).all()):
                raise ValueError(f"{self.source}: {spelled[module]}.{part}: values are too large; save as float32")
            result[f"{spelled[module]}.{part}"] = converted_diff.contiguous()
        if balanced:
            logger.warning(
                "%s: factors of %d modules balanced to fit float16, the update is the same (first: %s)",
                self.source, len(balanced), balanced[0],
            )  # fmt: skip
        return result

    def diffusers_spellings(self) -> dict[str, str]:
        if self.diffs:
            shown = ", ".join(f"{self.spellings[module]}.{part}" for module, part in list(self.diffs)[:3])
            raise ValueError(
                f"{self.source}: diffusers format has no place for weight differences ({shown}); use kohya"
            )
        layout = infer_layout(names.unet_bodies(self.spellings.values()))
        spelled = {module: names.dotted(name, layout) for module, name in self.spellings.items()}
        unnamed = sorted(self.spellings[module] for module, name in spelled.items() if name is None)
        if unnamed:
            raise ValueError(
                f"{self.source}: {len(unnamed)} modules have no known diffusers name ({', '.join(unnamed[:3])}); use kohya"
            )
        return {module: name for module, name in spelled.items() if name is not None}


def _own(tensor: Tensor, original: Tensor | None) -> Tensor:
    """The tensor, copied if it is still the LoRA's own: who gets a state dict may write into it."""
    shared = original is not None and tensor.data_ptr() == original.data_ptr()
    return tensor.detach().clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()


def _without_scale(layer: LoraLayer) -> LoraLayer:
    """The same update with scale 1 and `mid` folded in, float32; the scale goes half and half into the factors."""
    if layer.scale == 1 and layer.mid is None:
        return LoraLayer(layer.up, layer.down)
    up, down = layer.factors()
    half = abs(layer.scale) ** 0.5
    up = (up * (half if layer.scale >= 0 else -half)).reshape(*layer.up.shape[:2], *(1 for _ in layer.kernel))
    return LoraLayer(up, (down * half).reshape(-1, *layer.shape[1:]))
