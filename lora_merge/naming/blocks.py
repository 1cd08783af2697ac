"""Where in a model a module sits, and by which names people can mean it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from . import unet
from .unet import Layout

KINDS = ("attention", "ff", "conv", "embedding", "norm", "other")
# kohya's and ComfyUI's names of text encoders; clip_l is the first and clip_g the second wherever they are together.
_TEXT = re.compile(r"(?:lora_te([123]?)_|text_encoders_(?:[a-z0-9_]+?)_transformer_|(?=text_model_))(.+)")
_OTHER = re.compile(r"(?:first_stage_model|vae|conditioner|cond_stage_model)_")
_PREFIX = re.compile(r"^(?:lora_unet__?|lora_transformer_|lycoris_|diffusion_model_)")
_LEVEL = re.compile(r"(down|up)_blocks_(\d+)_")
# All that stands before the first number of a path: `vace_blocks_0_` is no `blocks_0_`.
_NUMBERED = re.compile(r"(.+?)_(\d+)_")
# What text encoders wrap their layers in.
_LONGEST = 200
_LAYERS = re.compile(r"(?:\w+_)?layers")
_KIND_WORDS = (
    ("norm", re.compile(r"norm|_ln_|layer_norm")),
    ("embedding", re.compile(r"emb(edding|_layers)?_|time_emb|_embed|token_embedding|position_embedding|label_emb")),
    ("attention", re.compile(r"attn|attention(?!s_)|to_[qkv]\b|qkv|proj_in$|proj_out$|self_attn")),
    ("ff", re.compile(r"(?:^|_)ff_|mlp|fc[12]$|feed_forward")),
    ("conv", re.compile(r"conv|resnets|in_layers_2|out_layers_3|skip_connection|_op$")),
)


@dataclass(frozen=True)
class Place:
    """part: "unet" (the diffusion model, whatever its kind), "te1", "te2", "te3", "te" where no number is known, or
    "other".   kind: one of KINDS.
    block: "in", "down.0", "mid", "up.2", "out" in a Stable Diffusion UNet, elsewhere the path to the first number and that
    number, "double_blocks.7", "vace_blocks.0", "layers.11"; "" if the name has none.
    """

    part: str
    block: str
    kind: str

    @property
    def side(self) -> str:
        """The block without its number: "down", "mid", "up", "double_blocks", ..."""
        return self.block.split(".")[0]


def place(module: str, layout: Layout = Layout()) -> Place:  # noqa: B008, it is frozen
    """The place of a module by its canonical name (names.py)."""
    if match := _TEXT.fullmatch(module):
        side, number = _numbered(match[2])
        if _LAYERS.fullmatch(side):
            side = "layers"
        return Place(f"te{match[1]}" if match[1] else "te", f"{side}.{number}" if side else "", _kind(match[2]))
    if _OTHER.match(module):
        return Place("other", "", _kind(module))
    body = _PREFIX.sub("", module)
    name = unet.to_diffusers(body, layout) or body
    if match := _LEVEL.match(name):
        block = f"{match[1]}.{match[2]}"
    elif name.startswith("mid_block_"):
        block = "mid"
    elif name.startswith(("conv_in", "time_embedding", "add_embedding", "class_embedding")):
        block = "in"
    elif name.startswith(("conv_out", "conv_norm_out")):
        block = "out"
    else:
        side, number = _numbered(name)
        block = f"{side}.{number}" if side else ""
    return Place("unet", block, _kind(name))


def names_for(module: str, layout: Layout = Layout()) -> Iterator[str]:  # noqa: B008, it is frozen
    """All names, underscored, that mean a place with this module in it, the most exact one first.

    Its path and the beginnings of it down to its numbered block ("double_blocks_0_img_attn"), in each naming of its UNet;
    then its block ("up_1"), the block's side ("double_blocks", "up"), its part ("te1", "unet") and the part without number.
    """
    where = place(module, layout)
    for path in _paths(module, layout):
        side, number = _numbered(f"{path}_")
        shortest = len(f"{side}_{number}") if side else 1
        # No name that people write is longer, and beginnings of what a file may make up would be many.
        words = path[:_LONGEST].split("_")
        while words and len(found := "_".join(words)) >= shortest:
            yield found
            words.pop()
    others = (where.block.replace(".", "_"), where.side, where.part, where.part.rstrip("123"))
    yield from dict.fromkeys(name for name in others if name)


def path_of(module: str) -> str:
    """The canonical name without what says which part of the model it is."""
    if match := _TEXT.fullmatch(module):
        return match[2]
    return _PREFIX.sub("", module)


def _paths(module: str, layout: Layout) -> Iterator[str]:
    body = path_of(module)
    yield body
    if not _TEXT.fullmatch(module) and (other := unet.to_diffusers(body, layout)):
        yield other


def _numbered(path: str) -> tuple[str, str]:
    match = _NUMBERED.match(path)
    return (match[1], match[2]) if match else ("", "")


def _kind(name: str) -> str:
    return next((kind for kind, words in _KIND_WORDS if words.search(name)), "other")
