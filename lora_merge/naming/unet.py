"""The family of Stable Diffusion UNets: its two naming schemes, and the way from one to the other.

Names here are underscored and without prefix: `down_blocks_0_attentions_0_proj_in` (diffusers) is
`input_blocks_1_1_proj_in` (ldm, the checkpoints' own and ComfyUI's). With R residual blocks a level,

    input_blocks index  = 1 + level * (R + 1) + block      (block R is the downsampler)
    output_blocks index = level * (R + 1) + block          (block 0..R; the upsampler sits in block R)

SD1.5, SD2, SDXL and SSD-1B have R = 2. Names tell R nearly always; `infer_layout` says how.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from .family import Family, Place, block_of, kind_of, underscored, with_dots, without_prefix

DEFAULT_RES_BLOCKS = 2
MAX_RES_BLOCKS = 8
_EVERY = frozenset(range(1, MAX_RES_BLOCKS + 1))

# diffusers -> ldm
_BASIC = {
    "conv_in": "input_blocks_0_0",
    "conv_norm_out": "out_0",
    "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
}
# One model never has both embeddings, and ldm has one name for either.
_BASIC_ALIASES = {"class_embedding_linear_1": "label_emb_0_0", "class_embedding_linear_2": "label_emb_0_2"}
_RESNET = {
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}
_BASIC_BACK = {ldm: name for name, ldm in _BASIC.items()}
_RESNET_BACK = {ldm: name for name, ldm in _RESNET.items()}
_RESNET_LDM = "|".join(_RESNET_BACK)
# What follows an attention block's name is the same in both schemes.
_ATTENTION = r"norm|proj_in|proj_out|transformer_blocks_\d+_.+"

# Of three digits at most: nothing is counted up to a number that a file may make up.
_N = r"(\d{1,3})"
_DOWN = re.compile(rf"down_blocks_{_N}_(?:attentions_{_N}_({_ATTENTION})|resnets_{_N}_(.+))")
_UP = re.compile(rf"up_blocks_{_N}_(?:attentions_{_N}_({_ATTENTION})|resnets_{_N}_(.+))")
_MID_ATTENTION = re.compile(rf"mid_block_attentions_0_({_ATTENTION})")
_MID_RESNET = re.compile(r"mid_block_resnets_([01])_(.+)")
_DOWNSAMPLER = re.compile(rf"down_blocks_{_N}_downsamplers_0_conv")
_UPSAMPLER = re.compile(rf"up_blocks_{_N}_upsamplers_0_conv")

_DIFFUSERS_BLOCKS = ("down_blocks_", "up_blocks_", "mid_block_")
LDM_BLOCKS = ("input_blocks_", "output_blocks_", "middle_block_")

_OF_LEVEL, _OF_LDM_BLOCK = re.compile(rf"(?:down|up)_blocks_{_N}_"), re.compile(rf"(?:input|output)_blocks_{_N}_")

_INPUT_OP = re.compile(rf"input_blocks_{_N}_0_op")
_INPUT_RESNET = re.compile(rf"input_blocks_{_N}_0_({_RESNET_LDM})")
_INPUT_ATTENTION = re.compile(rf"input_blocks_{_N}_1_({_ATTENTION})")
_OUTPUT_CONV = re.compile(rf"output_blocks_{_N}_([12])_conv")
_OUTPUT_RESNET = re.compile(rf"output_blocks_{_N}_0_({_RESNET_LDM})")
_OUTPUT_ATTENTION = re.compile(rf"output_blocks_{_N}_1_({_ATTENTION})")
_MIDDLE_RESNET = re.compile(rf"middle_block_([02])_({_RESNET_LDM})")
_MIDDLE_ATTENTION = re.compile(rf"middle_block_1_({_ATTENTION})")

_WIDE = re.compile(
    r"(?:(?:input|output)_blocks_\d+_0|middle_block_[02])_(?:in_layers_2|out_layers_3)"
    r"|input_blocks_\d+_0_op|output_blocks_\d+_[12]_conv"
)


@dataclass(frozen=True)
class Layout:
    """What the names of one UNet need to be translated.

    res_blocks: R, residual blocks a level.
    upsampler_slots: up level -> 1 or 2, the place of its upsampler in `output_blocks_N_SLOT_conv`: 2 after an
        attention, 1 without. Levels that are not in it have 2, except level 0 of a four-level UNet (SD1.5, SD2).
    levels: number of levels as far as the names tell.
    """

    res_blocks: int = DEFAULT_RES_BLOCKS
    levels: int = 0
    upsampler_slots: Mapping[int, int] = field(default_factory=dict)

    def upsampler_slot(self, level: int) -> int:
        default = 1 if level == 0 and self.levels > 3 else 2
        return self.upsampler_slots.get(level, default)


_ANY = Layout()


@lru_cache(maxsize=8192)
def is_diffusers(name: str) -> bool:
    """Whether the name can only be a diffusers UNet's."""
    return name == "time_embedding_cond_proj" or to_ldm(name, _ANY) is not None


@lru_cache(maxsize=8192)
def is_ldm(name: str) -> bool:
    """Whether the name can only be an ldm UNet's."""
    return name in _BASIC_BACK or to_diffusers(name, _ANY) is not None


def is_wide_convolution(name: str) -> bool:
    """Whether the ldm name is that of a 3x3 convolution."""
    return name in ("input_blocks_0_0", "out_2") or _WIDE.fullmatch(name) is not None


def to_ldm(name: str, layout: Layout) -> str | None:
    """The ldm name of a diffusers name; None if it is not the name of such a module."""
    size = layout.res_blocks + 1
    if name in _BASIC or name in _BASIC_ALIASES:
        return _BASIC.get(name) or _BASIC_ALIASES[name]
    if not name.startswith(_DIFFUSERS_BLOCKS):
        return None
    if match := _DOWNSAMPLER.fullmatch(name):
        return f"input_blocks_{size * (int(match[1]) + 1)}_0_op"
    if match := _UPSAMPLER.fullmatch(name):
        level = int(match[1])
        return f"output_blocks_{size * (level + 1) - 1}_{layout.upsampler_slot(level)}_conv"
    if match := _MID_ATTENTION.fullmatch(name):
        return f"middle_block_1_{match[1]}"
    if (match := _MID_RESNET.fullmatch(name)) and match[2] in _RESNET:
        return f"middle_block_{2 * int(match[1])}_{_RESNET[match[2]]}"
    for pattern, folder, first in ((_DOWN, "input_blocks", 1), (_UP, "output_blocks", 0)):
        if match := pattern.fullmatch(name):
            index = first + size * int(match[1]) + _block(match)
            if match[3]:
                return f"{folder}_{index}_1_{match[3]}"
            return f"{folder}_{index}_0_{_RESNET[match[5]]}" if match[5] in _RESNET else None
    return None


def to_diffusers(name: str, layout: Layout) -> str | None:
    """The diffusers name of an ldm name; None if it is not the name of such a module. Undoes `to_ldm`."""
    size = layout.res_blocks + 1
    if name in _BASIC_BACK:
        return _BASIC_BACK[name]
    if not name.startswith(LDM_BLOCKS):
        return None
    if match := _INPUT_OP.fullmatch(name):
        return f"down_blocks_{int(match[1]) // size - 1}_downsamplers_0_conv"
    if match := _OUTPUT_CONV.fullmatch(name):
        return f"up_blocks_{int(match[1]) // size}_upsamplers_0_conv"
    if match := _MIDDLE_RESNET.fullmatch(name):
        return f"mid_block_resnets_{int(match[1]) // 2}_{_RESNET_BACK[match[2]]}"
    if match := _MIDDLE_ATTENTION.fullmatch(name):
        return f"mid_block_attentions_0_{match[1]}"
    for resnet, attention, folder, first in (
        (_INPUT_RESNET, _INPUT_ATTENTION, "down_blocks", 1),
        (_OUTPUT_RESNET, _OUTPUT_ATTENTION, "up_blocks", 0),
    ):
        if match := resnet.fullmatch(name):
            level, block = divmod(int(match[1]) - first, size)
            return f"{folder}_{level}_resnets_{block}_{_RESNET_BACK[match[2]]}"
        if match := attention.fullmatch(name):
            level, block = divmod(int(match[1]) - first, size)
            return f"{folder}_{level}_attentions_{block}_{match[2]}"
    return None


def twin_outside_blocks(name: str) -> str | None:
    """The other name of a module that has one without any layout; other models have modules of these names, too."""
    return _BASIC.get(name) or _BASIC_ALIASES.get(name) or _BASIC_BACK.get(name)


@lru_cache(maxsize=8192)
def _sizes(name: str) -> frozenset[int]:
    """Every R, up to MAX_RES_BLOCKS, with which a UNet can have a module of this name."""
    if not name.startswith((*_DIFFUSERS_BLOCKS, *LDM_BLOCKS)):
        return _EVERY
    if match := _DOWN.fullmatch(name):
        return _more_than(_block(match))
    if match := _UP.fullmatch(name):
        return _more_than(_block(match) - 1)
    if match := _INPUT_OP.fullmatch(name):
        return frozenset(size for size in _EVERY if int(match[1]) and int(match[1]) % (size + 1) == 0)
    if match := (_INPUT_RESNET.fullmatch(name) or _INPUT_ATTENTION.fullmatch(name)):
        return frozenset(size for size in _EVERY if int(match[1]) % (size + 1) != 0)
    if match := _OUTPUT_CONV.fullmatch(name):
        return frozenset(size for size in _EVERY if (int(match[1]) + 1) % (size + 1) == 0)
    return _EVERY


@lru_cache(maxsize=1024)
def _more_than(block: int) -> frozenset[int]:
    return frozenset(size for size in _EVERY if block < size)


def _block(match: re.Match[str]) -> int:
    """The number of the attention or residual block in a match of _DOWN or _UP."""
    return int(match[2] or match[4])


def possible_res_blocks(names: Iterable[str]) -> list[int]:
    """Every R that the names allow, the likeliest first.

    A LoRA that reaches all blocks of a diffusers-named UNet shows blocks 0..R-1 on every way down and 0..R on every
    way up; when both agree, that R comes first. Else R = 2 comes first, which all published UNets of
    this family share, then the others in ascending order.
    """
    names = set(names)
    allowed = _EVERY.intersection(*map(_sizes, names))
    ways: dict[tuple[str, int], int] = {}
    for name in names:
        for way, pattern in (("down", _DOWN), ("up", _UP)):
            if name.startswith(way) and (match := pattern.fullmatch(name)):
                key = (way, int(match[1]))
                ways[key] = max(ways.get(key, 0), _block(match))
    seen = {top + 1 if way == "down" else top for (way, _), top in ways.items()}
    complete = {way for way, _ in ways} == {"down", "up"} and len(seen) == 1
    likeliest = seen.pop() if complete else DEFAULT_RES_BLOCKS
    return sorted(allowed, key=lambda size: (size != likeliest, size != DEFAULT_RES_BLOCKS, size))


def infer_layout(names: Iterable[str], res_blocks: int | None = None) -> Layout:
    """The layout that names of either scheme point to; R as in `possible_res_blocks` unless it is given."""
    names = set(names)
    if res_blocks is None:
        res_blocks = next(iter(possible_res_blocks(names)), DEFAULT_RES_BLOCKS)
    size = res_blocks + 1
    slots: dict[int, int] = {}
    attention_levels: set[int] = set()
    levels = 0
    for name in names:
        if match := _OF_LEVEL.match(name):
            levels = max(levels, int(match[1]) + 1)
        elif match := _OF_LDM_BLOCK.match(name):
            levels = max(levels, int(match[1]) // size + 1)
        if name.startswith(("input", "down")):
            continue  # has nothing of the way up
        if match := _OUTPUT_CONV.fullmatch(name):
            slots[int(match[1]) // size] = int(match[2])
        elif (match := _UP.fullmatch(name)) and match[3]:
            attention_levels.add(int(match[1]))
        elif match := _OUTPUT_ATTENTION.fullmatch(name):
            attention_levels.add(int(match[1]) // size)
    if attention_levels:
        for level in range(levels):
            slots.setdefault(level, 2 if level in attention_levels else 1)
    return Layout(res_blocks, levels, slots)


_KOHYA = "lora_unet_"
_LEVEL = re.compile(r"(down|up)_blocks_(\d+)_")
_IN, _OUT = ("conv_in", "time_embedding", "add_embedding", "class_embedding"), ("conv_out", "conv_norm_out")
# Wan Fun's trainer writes two underscores; ComfyUI replaces them only if one particular key is there. Any number of
# them counts as one, so that the kohya name of a kohya name is itself.
_WRITTEN = re.compile(r"^(?:unet\.|diffusion_model\.|lora_unet_[_.]*|lycoris_)")


def body_as_written(name: str) -> str:
    """A file's module, underscored and without the usual words for the diffusion model."""
    return underscored(_WRITTEN.sub("", name))


def bodies(spellings: Iterable[str]) -> list[str]:
    """The UNet names among spellings, without prefix: what `infer_layout` works on."""
    return [name.removeprefix(_KOHYA) for name in spellings if name.startswith(_KOHYA)]


def _recognises(names: Collection[str]) -> bool:
    found = bodies(names)
    return any(is_diffusers(body) or is_ldm(body) for body in found)


def _kohya_name(name: str) -> str | None:
    body = _without_processor(body_as_written(name))
    return f"{_KOHYA}{body}" if is_diffusers(body) or is_ldm(body) else None


def _without_processor(body: str) -> str:
    """diffusers' processors have to_out, all others to_out.0."""
    return re.sub(r"(attn[12])_to_out$", r"\1_to_out_0", body.replace("_processor_to_", "_to_"))


def _canonical(name: str, layout: Layout) -> str | None:
    if not name.startswith(_KOHYA):
        return None
    ldm = to_ldm(name.removeprefix(_KOHYA), layout)
    return f"{_KOHYA}{ldm}" if ldm else None


def _dotted(name: str, layout: Layout) -> str | None:
    if not name.startswith(_KOHYA):
        return None
    body = name.removeprefix(_KOHYA)
    dotted = with_dots(to_diffusers(body, layout) or body)
    return f"unet.{dotted}" if dotted else None


def _tidy(spellings: Mapping[str, str]) -> dict[str, str]:
    """A mix of diffusers and ldm blocks becomes ldm, ComfyUI's own."""
    found = bodies(spellings.values())
    mixed = any(map(is_diffusers, found)) and any(map(is_ldm, found))
    return {module: module if mixed and name.startswith(_KOHYA) else name for module, name in spellings.items()}


def _kernel(canonical: str) -> tuple[int, ...] | None:
    body = canonical.removeprefix(_KOHYA)
    return (3, 3) if body != canonical and is_wide_convolution(body) else None


def _place(module: str, layout: Layout) -> Place | None:
    body = without_prefix(module)
    name = to_diffusers(body, layout) or body
    if match := _LEVEL.match(name):
        block = f"{match[1]}.{match[2]}"
    elif name.startswith("mid_block_"):
        block = "mid"
    elif name.startswith(_IN):
        block = "in"
    elif name.startswith(_OUT):
        block = "out"
    elif name != body:
        block = block_of(name)
    else:
        return None
    return Place("unet", block, kind_of(name))


FAMILY = Family(
    name="Stable Diffusion UNet",
    recognises=_recognises,
    kohya_name=_kohya_name,
    canonical=_canonical,
    dotted=_dotted,
    tidy=_tidy,
    kernel=_kernel,
    place=_place,
    twin=to_diffusers,
)
