"""Base models of the Stable Diffusion family, known by the modules of their UNets.

A LoRA names modules and shows their shapes, so both together say which bases it can be for: the width of the text
(768 in SD1.5, 1024 in SD2, 2048 in SDXL), linear or 1x1-convolution projections, the blocks that exist and how many
transformer layers each holds. One base's modules can be all among another's (SSD-1B's 423 are 423 of SDXL's 788), so
what a LoRA leaves out counts as well: see `recognise`.

Module names here are underscored and without prefix, as in naming/unet.py, in either of its two namings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from math import prod

from ..naming import unet
from ..naming.unet import Layout

Shape = tuple[int, ...]

# The fourteen kinds of modules that LCM-LoRAs are trained on (arXiv 2311.05556's released training scripts).
_KINDS = re.compile(
    r"(?:.*_)?(attn[12]_to_[qkv]|attn[12]_to_out_0|ff_net_0_proj|ff_net_2|proj_in|proj_out|conv1|conv2|conv_shortcut"
    r"|downsamplers_0_conv|upsamplers_0_conv|time_emb_proj|in_layers_2|out_layers_3|skip_connection|emb_layers_1)"
)
_KIND_OF_LDM = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
    "emb_layers_1": "time_emb_proj",
}
_DOWNSAMPLER = re.compile(r"input_blocks_\d+_0_op")
_UPSAMPLER = re.compile(r"output_blocks_\d+_[12]_conv")
# A LoRA that covers this share of a base's modules of its kinds was made for that base and not for a larger one.
_COMPLETE = 0.95
# A model that shares this share of modules with a base is that base; pruned ones and inpainting ones lack a few.
_SAME = 0.9


@dataclass(frozen=True)
class Base:
    """One base model's UNet.

    name: what people call it.   context: width of the text that cross-attention reads.
    linear: whether proj_in and proj_out are linear layers; SD1.5's are 1x1 convolutions.
    channels: of each level.
    down, up: number of transformer layers after each residual block, level by level, the way up from the deepest.
    middle: transformer layers of the middle block; 0 for a residual block without attention, None for no middle block.
    added: width of the size conditioning (`add_embedding`), 0 without.
    """

    name: str
    context: int
    linear: bool
    channels: tuple[int, ...]
    down: tuple[tuple[int, ...], ...]
    up: tuple[tuple[int, ...], ...]
    middle: int | None
    added: int = 0

    @property
    def res_blocks(self) -> int:
        return len(self.down[0])

    @cached_property
    def modules(self) -> Mapping[str, Shape]:
        """Diffusers name -> shape of the weight (out, in, *kernel), of every module that is no norm."""
        return dict(self._modules())

    @cached_property
    def ldm_modules(self) -> Mapping[str, Shape]:
        """`modules` under ldm names, which are ComfyUI's."""
        slots = {level: 2 if blocks[-1] else 1 for level, blocks in enumerate(self.up)}
        layout = Layout(self.res_blocks, len(self.channels), slots)
        return {unet.to_ldm(name, layout) or name: shape for name, shape in self.modules.items()}

    def shape(self, module: str) -> Shape | None:
        """Shape of the module's weight, None if this base has no such module. Either naming."""
        found = self.modules.get(module)
        return found if found or unet.is_diffusers(module) else self.ldm_modules.get(module)

    def _modules(self) -> Iterable[tuple[str, Shape]]:
        first, time = self.channels[0], 4 * self.channels[0]
        yield "conv_in", (first, 4, 3, 3)
        yield "conv_out", (4, first, 3, 3)
        for name, width in (("time", first), ("add", self.added)):
            if width:
                yield f"{name}_embedding_linear_1", (time, width)
                yield f"{name}_embedding_linear_2", (time, time)
        last = len(self.channels) - 1
        skips, into = [first], first
        for level, (out, depths) in enumerate(zip(self.channels, self.down, strict=True)):
            for block, depth in enumerate(depths):
                place = f"down_blocks_{level}"
                yield from self._block(place, block, depth, into, out)
                skips.append(into := out)
            if level < last:
                yield f"down_blocks_{level}_downsamplers_0_conv", (out, out, 3, 3)
                skips.append(out)
        if self.middle is not None:
            yield from self._block("mid_block", 0, self.middle, into, into)
            if self.middle:
                yield from self._block("mid_block", 1, 0, into, into)
        for level, (out, depths) in enumerate(zip(reversed(self.channels), self.up, strict=True)):
            for block, depth in enumerate(depths):
                yield from self._block(f"up_blocks_{level}", block, depth, into + skips.pop(), out)
                into = out
            if level < last:
                yield f"up_blocks_{level}_upsamplers_0_conv", (out, out, 3, 3)

    def _block(self, place: str, block: int, depth: int, into: int, out: int) -> Iterable[tuple[str, Shape]]:
        resnet = f"{place}_resnets_{block}"
        yield f"{resnet}_conv1", (out, into, 3, 3)
        yield f"{resnet}_conv2", (out, out, 3, 3)
        yield f"{resnet}_time_emb_proj", (out, 4 * self.channels[0])
        if into != out:
            yield f"{resnet}_conv_shortcut", (out, into, 1, 1)
        if not depth:
            return
        attention = f"{place}_attentions_{block}"
        projection: Shape = (out, out) if self.linear else (out, out, 1, 1)
        yield f"{attention}_proj_in", projection
        yield f"{attention}_proj_out", projection
        for layer in range(depth):
            name = f"{attention}_transformer_blocks_{layer}"
            for reader, width in (("attn1", out), ("attn2", self.context)):
                yield f"{name}_{reader}_to_q", (out, out)
                yield f"{name}_{reader}_to_k", (out, width)
                yield f"{name}_{reader}_to_v", (out, width)
                yield f"{name}_{reader}_to_out_0", (out, out)
            yield f"{name}_ff_net_0_proj", (8 * out, out)
            yield f"{name}_ff_net_2", (out, 4 * out)


_THREE = (320, 640, 1280)
_FOUR = (320, 640, 1280, 1280)
_DOWN = ((1, 1), (1, 1), (1, 1), (0, 0))
_UP = ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1))


def _of_sdxl(
    name: str, *, down: tuple[tuple[int, ...], ...], up: tuple[tuple[int, ...], ...], middle: int | None
) -> Base:
    """SDXL or one that was pruned from it."""
    return Base(name, context=2048, linear=True, channels=_THREE, down=down, up=up, middle=middle, added=2816)


# Depths as in the models' own configurations, which ComfyUI repeats in comfy/model_detection.py (0.30.0).
BASES: tuple[Base, ...] = (
    Base("SD1.5", context=768, linear=False, channels=_FOUR, down=_DOWN, up=_UP, middle=1),
    Base("SD2", context=1024, linear=True, channels=_FOUR, down=_DOWN, up=_UP, middle=1),
    _of_sdxl("SDXL", down=((0, 0), (2, 2), (10, 10)), up=((10, 10, 10), (2, 2, 2), (0, 0, 0)), middle=10),
    _of_sdxl("SSD-1B", down=((0, 0), (2, 2), (4, 4)), up=((4, 4, 10), (2, 1, 1), (0, 0, 0)), middle=0),
    _of_sdxl("Segmind-Vega", down=((0, 0), (1, 1), (2, 2)), up=((2, 2, 2), (1, 1, 1), (0, 0, 0)), middle=0),
    _of_sdxl("KOALA-1B", down=((0,), (2,), (6,)), up=((6, 6), (2, 2), (0, 0)), middle=6),
    _of_sdxl("KOALA-700M", down=((0,), (2,), (5,)), up=((5, 5), (2, 2), (0, 0)), middle=None),
)
BY_NAME: Mapping[str, Base] = {base.name: base for base in BASES}


@dataclass(frozen=True)
class Recognised:
    """What a LoRA's modules say about its base.

    bases: names of every base they can be for, () if they fit none of BASES.
    complete: whether they cover that base in the kinds of modules that they touch, so that it is no larger one.
    kinds: the kinds of modules they touch, as `kind_of` names them.
    branches: of a transformer, the parts they touch that only some models of that base have.
    """

    bases: tuple[str, ...]
    complete: bool
    kinds: frozenset[str]
    branches: tuple[str, ...] = ()


@lru_cache(maxsize=1 << 14)
def kind_of(module: str) -> str | None:
    """Which of the fourteen kinds a module is (`attn2_to_k`, `conv1`, `time_emb_proj`, ...); None for any other."""
    if _DOWNSAMPLER.fullmatch(module):
        return "downsamplers_0_conv"
    if _UPSAMPLER.fullmatch(module):
        return "upsamplers_0_conv"
    match = _KINDS.fullmatch(module)
    return _KIND_OF_LDM.get(match[1], match[1]) if match else None


def recognise(modules: Mapping[str, Shape]) -> Recognised:
    """The bases that a LoRA with these UNet modules (name in either naming -> shape of the updated weight) can be for.

    A LoRA that touches some modules only, such as one of a few blocks, may leave several. One that covers a base whole,
    in the kinds it touches, is for that base, even where a larger base has all these modules too.
    """
    kinds = frozenset(filter(None, map(kind_of, modules)))
    if not modules:
        return Recognised((), False, kinds)
    possible: list[str] = []
    complete: list[str] = []
    for base in BASES:
        others = (name for name, shape in modules.items() if not _same_weight(base.shape(name), shape))
        # No more than it takes to rule a base out.
        hits = len(modules) - len(list(islice(others, 1 + int((1 - _COMPLETE) * len(modules)))))
        if hits < _COMPLETE * len(modules):
            continue
        possible.append(base.name)
        expected = sum(kind_of(name) in kinds for name in base.modules)
        if expected and hits >= _COMPLETE * expected:
            complete.append(base.name)
    return Recognised(tuple(complete or possible), bool(complete), kinds)


def base_of(modules: Mapping[str, Shape]) -> str | None:
    """The base of a whole UNet with these modules, in either naming; None if it is none of BASES.

    Fine-tunes have the same modules. Pruned and inpainting models are recognised while nine of ten modules are the same.
    """
    shares: dict[str, float] = {}
    for base in BASES:
        few, many = sorted((len(base.modules), len(modules)))
        if few / max(many, 1) < _SAME:
            continue  # whatever they are called
        same = sum(_same_weight(base.shape(name), shape) for name, shape in modules.items())
        shares[base.name] = same / max(len(base.modules) + len(modules) - same, 1)
    best = max(shares, key=lambda name: shares[name], default=None)
    return best if best is not None and shares[best] >= _SAME else None


def _same_weight(expected: Shape | None, shape: Shape) -> bool:
    """Some tools write a convolution's update as a matrix; none writes a matrix as a convolution."""
    if expected is None or not 1 < len(shape) <= len(expected):
        return False
    return expected[0] == shape[0] and prod(expected[1:]) == prod(shape[1:])
