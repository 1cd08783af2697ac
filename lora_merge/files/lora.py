"""A whole LoRA: its layers under canonical module names, and the way from and to state dicts."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from ..algebra.precision import COARSE, cast, cast_part, rounding
from ..algebra.threads import in_order
from ..disk.garbage import uncollected
from ..metadata.adapter_config import noted
from ..naming import names
from ..naming.aliases import sites
from ..naming.unet import infer_layout
from ..updates.layer import Layer, LoraLayer
from ..updates.side_by_side import Sum
from ..updates.unmade import Unmade
from ..updates.weight_dependent import Carried
from ..words import many
from .keys import BIAS_PARTS, DIFF_PARTS, WEIGHT_PARTS, suffix
from .reading import KeyAccount, read
from .twice import Named, named

Format = Literal["kohya", "diffusers", "comfy"]
FORMATS: tuple[Format, ...] = ("kohya", "diffusers", "comfy")
Pieces = dict[str, Tensor | Unmade]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA that nothing changes: read-only mappings, tensors shared with whoever made it.

    modules: canonical module name (see naming/names.py) -> Layer (LoRA, LoHa or LoKr), in the order of the file.
    diffs: (canonical module name, part) -> dense difference, part one of keys.DIFF_PARTS.
    spellings: canonical module name -> how kohya format writes it.
    metadata: what the file says about itself, text to text.
    source: file name or other words for messages.
    carried: canonical module name -> update that depends on the weight (DoRA, OFT, ...) and is kept as it came.
    keys: where each key of the file ended; empty for a LoRA that was made here.
    unread: keys of the file that have no effect in ComfyUI -> tensor, kept for other readers while nothing is computed.
    """

    modules: Mapping[str, Layer]
    diffs: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)
    spellings: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    source: str = "LoRA"
    carried: Mapping[str, Carried] = field(default_factory=dict)
    keys: KeyAccount = field(default_factory=KeyAccount)
    unread: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        used = list(dict.fromkeys([*self.modules, *(module for module, _ in self.diffs), *self.carried]))
        spellings = {module: self.spellings.get(module, module) for module in used}
        for name, value in (
            ("modules", dict(self.modules)),
            ("diffs", dict(self.diffs)),
            ("spellings", spellings),
            ("metadata", dict(self.metadata)),
            ("carried", dict(self.carried)),
            ("unread", dict(self.unread)),
        ):
            object.__setattr__(self, name, MappingProxyType(value))

    @classmethod
    @uncollected()
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor | Unmade],
        *,
        metadata: Mapping[str, str] | None = None,
        source: str = "LoRA",
    ) -> Lora:
        """The LoRA in a dict of tensors, in any spelling that naming/names.py and keys.py know. Factors of plain LoRAs may be
        unmade, and are left so.

        Keys that ComfyUI's loader has no use for are listed in `keys` and kept in `unread`. Raises ValueError, naming
        `source` and the keys, if nothing else is there or a LoRA is incomplete, if shapes do not fit, values are not
        finite, or two keys spell one weight.
        """
        found = read(state_dict, metadata or {}, source)
        return cls(
            modules=found.modules,
            diffs=found.diffs,
            spellings=found.spellings,
            metadata=noted(metadata or {}, state_dict),
            source=source,
            carried=found.carried,
            keys=found.keys,
            unread=found.unread,
        )

    @property
    def parameters(self) -> int:
        """Number of values in all updates."""
        updates: list[Layer | Carried] = [*self.modules.values(), *self.carried.values()]
        return sum(update.parameters for update in updates) + sum(diff.numel() for diff in self.diffs.values())

    @property
    def kinds(self) -> dict[str, int]:
        """Kind -> number of modules, as people call the kinds; "difference" for what has no other update."""
        updates: list[Layer | Carried] = [*self.modules.values(), *self.carried.values()]
        found = Counter(update.kind for update in updates)
        only_diffs = {module for module, _ in self.diffs} - self.modules.keys() - self.carried.keys()
        return dict(found) | ({"difference": len(only_diffs)} if only_diffs else {})

    def shapes(self) -> Iterator[tuple[str, bool, tuple[int, ...]]]:
        """(module, whether it is the bias, shape) of every update that adds up."""
        for module, layer in self.modules.items():
            yield module, False, layer.shape
        for (module, part), diff in self.diffs.items():
            yield module, part in BIAS_PARTS, tuple(diff.shape)

    def named(self, owner: int) -> list[Named]:
        """Every update of a weight or bias under its names. owner: number of this LoRA among others."""
        return named(self.modules, self.diffs, self.carried, self.spellings, owner)

    def find(self, module: str) -> str:
        """The canonical name of a module given by any of its spellings. Raises KeyError if this LoRA has none."""
        if module in self.spellings:
            return module
        spelled = names.kohya_name(module)
        for name, known in self.spellings.items():
            if spelled == known:
                return name
        name = names.canonical(spelled, infer_layout(names.unet_bodies([*self.spellings.values(), spelled])))
        if name in self.spellings:
            return name
        # One weight in another naming of its family.
        meant = [known for known in self.spellings if not sites(known).isdisjoint(sites(name))]
        if len(meant) == 1:
            return meant[0]
        raise KeyError(f"{self.source} has no module {module!r}; it has {many(len(self.spellings), 'others')}")

    def delta(self, module: str) -> Tensor:
        """What strength 1 adds to the module's weight: (out, in, *kernel), float32. Any spelling of the module.

        Raises KeyError for a module without an update of its weight, ValueError for one that depends on the weight.
        """
        module = self.find(module)
        if module in self.carried:
            kind = self.carried[module].kind
            raise ValueError(f"{self.source}: {module} is {kind}, whose update depends on the weight it changes")
        if module in self.modules:
            try:
                return self.modules[module].delta()
            except ValueError as error:
                raise ValueError(f"{self.source}: {self.spellings[module]}: {error}") from None
        for part in WEIGHT_PARTS:
            if (module, part) in self.diffs:
                return self.diffs[module, part].detach().to(torch.float32, copy=True)
        raise KeyError(f"{self.source} changes the bias of {module!r} only, not its weight")

    def to_state_dict(
        self, dtype: torch.dtype | None = None, *, format: Format = "kohya", copy: bool = True
    ) -> dict[str, Tensor]:
        """The LoRA as a dict of new tensors, ready for safetensors, ComfyUI's LORA_MODEL or a training script.

        dtype: of the weights; None keeps each as it is. Alphas are float32, so that none is rounded.
        Keys that ComfyUI does not read stay as they came in kohya format, and have no place in diffusers'.
        format: "kohya" writes `.lora_up.weight`, `.lora_down.weight`, `.alpha` (always, since readers differ in what
            they assume without), every other kind in the keys of LyCORIS, and is what ComfyUI reads for any model;
            "diffusers" writes PEFT's `unet....lora_B.weight` with the scale multiplied into the factors; LoHa and LoKr as
            LoRA of as many ranks as they have; "comfy" writes LoRA in PEFT's keys too and every other kind in those of
            LyCORIS, for the names of transformers that formats.named_for gives.
        copy: False shares the tensors that need no conversion, and nobody may write into them then.
        float16: components that would overflow or be lost are balanced, see algebra/precision.py; a warning tells what is
        too small for it all the same.
        Raises ValueError for what the format cannot name or hold, and for values the dtype cannot hold.
        """
        return in_memory(self.pieces(dtype, format=format, copy=copy))

    def pieces(self, dtype: torch.dtype | None = None, *, format: Format = "kohya", copy: bool = True) -> Pieces:
        """`to_state_dict`, where the factors of a sum (updates/side_by_side.py) are unmade: they are finite, and whoever
        writes them elsewhere needs no memory for them."""
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}, but it has to be one of {', '.join(FORMATS)}")
        spelled = self.diffusers_spellings() if format == "diffusers" else dict(self.spellings)
        result: Pieces = {}
        if format != "diffusers":
            result |= {key: cast_part(tensor, None, copy=copy) for key, tensor in self.unread.items()}
        balanced, errors = [], {}
        for module, name in spelled.items():
            try:
                written, is_balanced, changed = self._written(module, dtype, format, copy)
            except ValueError as error:
                raise ValueError(f"{self.source}: {name}: {error}") from None
            result |= {f"{name}{end}": tensor for end, tensor in written.items()}
            if is_balanced:
                balanced.append(name)
            if changed > COARSE:
                errors[name] = changed
        if balanced:
            logger.info(
                "%s: factors of %s balanced to fit %s, the update is the same (first: %s)",
                self.source, many(len(balanced), "modules"), _name(dtype), balanced[0],
            )  # fmt: skip
        if errors:
            logger.warning("%s: %s", self.source, too_small(errors, dtype))
        return result

    def _written(
        self, module: str, dtype: torch.dtype | None, format: Format, copy: bool
    ) -> tuple[Pieces, bool, float]:
        """Ending of the key -> new piece for everything of one module, whether its factors were balanced, and the
        largest relative error of a tensor, or of the update, that is too small for the dtype."""
        result: Pieces = {}
        alpha, balanced, error = None, False, 0.0
        update = self.modules.get(module) or self.carried.get(module)
        others: Pieces = {}
        pefts = format == "diffusers" or (format == "comfy" and isinstance(update, LoraLayer) and update.mid is None)
        if isinstance(update, Layer) and (dtype is not None or pefts):
            plain = _without_scale(update) if pefts else update
            converted = cast(plain, dtype or next(iter(update.pieces().values())).dtype, into_alpha=not pefts)
            balanced, error, originals = converted.balanced, converted.error, update.pieces()
            for part, piece in converted.layer.pieces().items():
                end = suffix(part) if not pefts else {"up": ".lora_B.weight", "down": ".lora_A.weight"}[part]
                result[end] = _own(piece, originals.get(part)) if copy else _contiguous(piece)
            alpha = converted.layer.written_alpha
        elif update is not None:
            others = dict(update.pieces() if isinstance(update, Layer) else update.parts)
            alpha = update.written_alpha
        others |= {part: self.diffs[module, part] for part in DIFF_PARTS if (module, part) in self.diffs}
        for part, piece in others.items():
            if isinstance(piece, Unmade):
                result[suffix(part)] = piece
                continue
            written = result[suffix(part)] = cast_part(piece, dtype, copy=copy)
            error = max(error, rounding(piece, written))
        if alpha is not None and not pefts:
            number = result[suffix("alpha")] = torch.tensor(alpha, dtype=torch.float32)
            if alpha and not 0 < abs(float(number)) < math.inf:
                raise ValueError(f"alpha is {alpha:g}, and float32 has no such number. Change the scale of this module")
        return result, balanced, error

    def diffusers_spellings(self) -> dict[str, str]:
        """Canonical module name -> diffusers name. Raises ValueError for what diffusers format has no place for."""
        if self.diffs:
            shown = ", ".join(f"{self.spellings[module]}.{part}" for module, part in list(self.diffs)[:3])
            raise ValueError(
                f"{self.source}: diffusers format has no place for weight differences ({shown}); use kohya"
            )
        others = Counter(update.kind for update in self.carried.values())
        if others:
            shown = ", ".join(f"{kind} ({many(count, 'modules')})" for kind, count in sorted(others.items()))
            raise ValueError(f"{self.source}: diffusers format holds plain LoRA only, and this has {shown}; use kohya")
        layout = infer_layout(names.unet_bodies(self.spellings.values()))
        spelled = {module: names.dotted(name, layout) for module, name in self.spellings.items()}
        unnamed = sorted(self.spellings[module] for module, name in spelled.items() if name is None)
        if unnamed:
            raise ValueError(
                f"{self.source}: {many(len(unnamed), 'modules have', 'module has')} no known diffusers name ({', '.join(unnamed[:3])}); use kohya"
            )
        return {module: name for module, name in spelled.items() if name is not None}


def in_memory(
    pieces: Mapping[str, Tensor | Unmade], make: Callable[[Unmade], Tensor] = Unmade.made
) -> dict[str, Tensor]:
    """Pieces with all that is unmade made, in several threads."""
    unmade = {key: piece for key, piece in pieces.items() if isinstance(piece, Unmade)}
    with closing(in_order(make, unmade.values())) as results:
        made = dict(zip(unmade, results, strict=True))
    return {key: piece if isinstance(piece, Tensor) else made[key] for key, piece in pieces.items()}


def too_small(errors: Mapping[str, float], dtype: torch.dtype | None) -> str:
    """What to say of modules whose update a dtype does not hold. errors: module -> relative error, 1 for all of it."""
    worst = max(errors, key=lambda name: errors[name])
    return (
        f"{_name(dtype)} has no numbers small enough for {many(len(errors), 'modules')}: their updates change by up to {100 * errors[worst]:.3g} % "
        f"({worst}). Save as {'bfloat16 or float32' if dtype == torch.float16 else 'float32'} to keep them"
    )


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _contiguous(piece: Tensor | Unmade) -> Tensor | Unmade:
    return piece.contiguous() if isinstance(piece, Tensor) else piece


def _own(tensor: Tensor | Unmade, original: Tensor | Unmade | None) -> Tensor | Unmade:
    """The tensor, copied if it is still the LoRA's own: who gets a state dict may write into it."""
    if isinstance(tensor, Unmade):
        return tensor
    shared = isinstance(original, Tensor) and tensor.data_ptr() == original.data_ptr()
    return tensor.detach().clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()


def _without_scale(layer: Layer) -> LoraLayer:
    """A layer as LoRA of scale 1, float32; the scale goes half and half into the factors, or into one if that is
    exact."""
    if isinstance(layer, LoraLayer) and layer.scale == 1 and layer.mid is None:
        return layer
    if isinstance(layer, Sum):
        return layer.without_scale()
    up, down = layer.factors()
    kernel = (1 for _ in layer.kernel)
    if abs(math.frexp(layer.scale)[0]) == 0.5:  # a power of two: exact in one factor
        return LoraLayer((up * layer.scale).reshape(*up.shape, *kernel), down.reshape(-1, *layer.shape[1:]))
    half = abs(layer.scale) ** 0.5
    up = (up * math.copysign(half, layer.scale)).reshape(*up.shape, *kernel)
    return LoraLayer(up, (down * half).reshape(-1, *layer.shape[1:]))
