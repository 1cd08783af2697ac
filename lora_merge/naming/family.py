"""What is known of the module names of one family of models, and what all families share: words, dots and places."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

KINDS = ("attention", "ff", "conv", "embedding", "norm", "other")
_KIND_WORDS = (
    ("norm", re.compile(r"norm|_ln_|layer_norm")),
    ("embedding", re.compile(r"emb(edding|_layers)?_|time_emb|_embed|token_embedding|position_embedding|label_emb")),
    ("attention", re.compile(r"attn|attention(?!s_)|to_[qkv]\b|qkv|proj_in$|proj_out$|self_attn")),
    ("ff", re.compile(r"(?:^|_)ffn?_|mlp|fc[12]$|feed_forward")),
    ("conv", re.compile(r"conv|resnets|in_layers_2|out_layers_3|skip_connection|_op$")),
)
# All that stands before the first number of a path: `vace_blocks_0_` is no `blocks_0_`.
_NUMBERED = re.compile(r"(.+?)_(\d+)_")
_PREFIX = re.compile(r"^(?:lora_unet__?|lora_transformer_|lycoris_|diffusion_model_)")

# The words that names of UNets and CLIP text encoders consist of, for turning underscores back into dots.
_WORDS = """
    down_blocks up_blocks mid_block attentions resnets transformer_blocks downsamplers upsamplers attn1 attn2 to_q to_k
    to_v to_out proj_in proj_out ff net proj norm norm1 norm2 norm3 conv conv1 conv2 conv_shortcut time_emb_proj conv_in
    conv_out conv_norm_out time_embedding add_embedding class_embedding linear_1 linear_2 cond_proj
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 layer_norm1 layer_norm2
    final_layer_norm embeddings token_embedding position_embedding text_projection
""".split()
_WORD = "|".join(sorted(_WORDS, key=len, reverse=True))
_DOTTABLE = re.compile(rf"(?:{_WORD}|\d+)(?:_(?:{_WORD}|\d+))*")
_DOT = re.compile(rf"({_WORD}|\d+)(?:_|$)")


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


@dataclass(frozen=True)
class Rows:
    """Where a slice lies in a fused weight: `length` rows from `start` on."""

    start: int
    length: int


# A module of diffusers' (dotted name) and the rows of the model's own weight that it consists of, one after the other.
Part = tuple[str, tuple[Rows, ...]]


def _none(*_: Any) -> None:
    return None


def _as_they_are(spellings: Mapping[str, str]) -> dict[str, str]:
    return dict(spellings)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Functions of module names. What is not of the family is None to each of them, so that the next one is asked.

    A *spelling* is how a module is written in kohya's format (names.kohya_name), a *canonical* name is the same for all
    spellings of a weight. layout: what translates between the block namings of a model (unet.Layout).

    name: for people.
    recognises: (canonical names of a whole LoRA) -> whether it may be for such a model, as far as names can tell; other
        families may know the same names (families.family_of).
    width: columns of the weights that its blocks' attention reads with; of a family whose names another one has, too.
    widths: columns of its blocks' queries in all models that there are; () where that is not known here.
    sure: every LoRA has to tell that it is of this family, since another one has names and sizes like it.
    kohya_name: (a file's module, wrappers taken off) -> its spelling.
    canonical: (spelling, layout) -> canonical name.
    dotted: (spelling, layout) -> diffusers' spelling with dots.
    tidy: {canonical name: spelling} -> the same in one naming, where readers know no mix of two.
    kernel: canonical name -> kernel size of a module that is a convolution wider than 1x1.
    place: (canonical name, layout) -> where in the model it is.
    path: canonical name -> the name without what says which part of the model it is.
    twin: (path, layout) -> the path in the family's other naming.
    own: canonical name -> the one canonical name of that weight, in the model's own naming if it is a whole weight.
        Only for names of a LoRA that is of the family: elsewhere the same names stand for other weights.
    fused: canonical name of a slice -> canonical names of the weights that hold it, in the model's own naming.
    rows: (canonical name of a slice, of the fused weight, the latter's shape) -> the slice's rows.
    whole_shape: (canonical name of a fused weight, {canonical name of a slice: its shape}) -> shape of the fused weight.
    turn: (canonical name, shape) -> canonical own name, of a weight that diffusers holds with its two halves the other
        way about; None of any other.
    dots: canonical own name -> the own name with dots, without prefix (`double_blocks.0.img_attn.qkv`).
    parts: (canonical own name, shape) -> what diffusers has for the weight; () where nothing is known.
    slice_name: canonical name of a slice -> a spelling that every ComfyUI reads; None if there is none.
    common: canonical own name -> a dotted name, without prefix, that both ComfyUI and diffusers read, where that is neither
        the own name nor diffusers'.   tells_diffusers: such a name -> whether diffusers knows by it what the file is.
    saved: the format that both ComfyUI and diffusers read, as far as there is one: "comfy" or "diffusers".
    saved_fused: the same for fused weights, which in diffusers' slices would be larger: "comfy" or "kohya".
    reads: spelling -> whether every ComfyUI, as far as it has the model, reads it.
    suits: (canonical own name, shape) -> whether a weight of the family may have that shape.
    reads_lately: spelling -> whether newer versions of ComfyUI read it, besides those that every one reads.
    templates: () -> ((stack, module), own name, fused weights) of every name known, with {} for the block's number.
    """

    name: str
    recognises: Callable[[Collection[str]], bool] = lambda names: False
    kohya_name: Callable[[str], str | None] = _none
    canonical: Callable[[str, Any], str | None] = _none
    dotted: Callable[[str, Any], str | None] = _none
    tidy: Callable[[Mapping[str, str]], dict[str, str]] = _as_they_are
    kernel: Callable[[str], tuple[int, ...] | None] = _none
    place: Callable[[str, Any], Place | None] = _none
    path: Callable[[str], str | None] = _none
    twin: Callable[[str, Any], str | None] = _none
    own: Callable[[str], str | None] = _none
    fused: Callable[[str], frozenset[str]] = lambda name: frozenset()
    rows: Callable[[str, str, tuple[int, ...]], Rows | None] = _none
    whole_shape: Callable[[str, Mapping[str, tuple[int, ...]]], tuple[int, ...] | None] = _none
    turn: Callable[[str, tuple[int, ...]], str | None] = _none
    dots: Callable[[str], str | None] = _none
    parts: Callable[[str, tuple[int, ...]], tuple[Part, ...]] = lambda own, shape: ()
    slice_name: Callable[[str], str | None] = _none
    reads: Callable[[str], bool] = lambda spelling: True
    reads_lately: Callable[[str], bool] = lambda spelling: False
    templates: Callable[[], Iterable[tuple[tuple[str, str], str, tuple[str, ...]]]] = lambda: ()
    suits: Callable[[str, tuple[int, ...]], bool] = lambda own, shape: True
    saved: Literal["comfy", "diffusers"] = "comfy"
    saved_fused: Literal["comfy", "kohya"] = "comfy"
    common: Callable[[str], str | None] = _none
    tells_diffusers: Callable[[str], bool] = lambda name: False
    width: int = 0
    widths: tuple[int, ...] = ()
    sure: bool = False

    @property
    def translates(self) -> bool:
        return self.own is not _none


def underscored(name: str) -> str:
    return name.replace(".", "_")


def with_dots(body: str) -> str | None:
    """The underscored name of a UNet's or CLIP's module with dots; None where a word is unknown."""
    return ".".join(_DOT.findall(body)) if _DOTTABLE.fullmatch(body) else None


def without_prefix(canonical: str) -> str:
    """A diffusion model's module without the word for the model."""
    return _PREFIX.sub("", canonical)


def numbered(path: str) -> tuple[str, str]:
    """(what stands before the first number in a path, that number); two empty texts without any."""
    match = _NUMBERED.match(path)
    return (match[1], match[2]) if match else ("", "")


def block_of(path: str) -> str:
    """The numbered block that a path begins with, "layers.11"; "" if it has none."""
    side, number = numbered(path)
    return f"{side}.{number}" if side else ""


def kind_of(path: str) -> str:
    return next((kind for kind, words in _KIND_WORDS if words.search(path)), "other")
