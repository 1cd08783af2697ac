"""Where in a model a module sits, and strengths that depend on it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import unet
from .unet import Layout

KINDS = ("attention", "ff", "conv", "embedding", "norm", "other")
_TEXT = re.compile(r"lora_te([123]?)_(.+)")
_LEVEL = re.compile(r"(down|up)_blocks_(\d+)_")
# What other models number their blocks with: Flux, SD3, Wan, text encoders.
_NUMBERED = re.compile(
    r"(?:^|_)(double_blocks|single_blocks|joint_blocks|transformer_blocks|blocks|layers|encoder_layers)_(\d+)_"
)
_KIND_WORDS = (
    ("norm", re.compile(r"norm|_ln_|layer_norm")),
    ("embedding", re.compile(r"emb(edding|_layers)?_|time_emb|_embed|token_embedding|position_embedding|label_emb")),
    ("attention", re.compile(r"attn|attention(?!s_)|to_[qkv]\b|qkv|proj_in$|proj_out$|self_attn")),
    ("ff", re.compile(r"(?:^|_)ff_|mlp|fc[12]$|feed_forward")),
    ("conv", re.compile(r"conv|resnets|in_layers_2|out_layers_3|skip_connection|_op$")),
)


@dataclass(frozen=True)
class Place:
    """part: "unet", "te1", "te2", "te3" or "other".  block: "in", "down.0", "mid", "up.2", "out", "layers.11", "" if
    the name has none.  kind: one of KINDS."""

    part: str
    block: str
    kind: str

    @property
    def side(self) -> str:
        """The block without its number: "down", "mid", "up", ..."""
        return self.block.split(".")[0]


def place(module: str, layout: Layout = Layout()) -> Place:  # noqa: B008, it is frozen
    """The place of a module by its canonical name (names.py); unknown names have an empty block and kind "other"."""
    if match := _TEXT.fullmatch(module):
        numbered = _NUMBERED.search(match[2])
        return Place(f"te{match[1] or '1'}", f"layers.{numbered[2]}" if numbered else "", _kind(match[2]))
    if not module.startswith(("lora_unet_", "lora_transformer_")):
        return Place("other", "", _kind(module))
    body = module.removeprefix("lora_unet_").removeprefix("lora_transformer_")
    name = unet.to_diffusers(body, layout) or body
    if match := _LEVEL.match(name):
        block = f"{match[1]}.{match[2]}"
    elif name.startswith("mid_block_"):
        block = "mid"
    elif name.startswith(("conv_in", "time_embedding", "add_embedding", "class_embedding")):
        block = "in"
    elif name.startswith(("conv_out", "conv_norm_out")):
        block = "out"
    elif numbered := _NUMBERED.search(name):
        block = f"{numbered[1]}.{numbered[2]}"
    else:
        block = ""
    return Place("unet", block, _kind(name))


def _kind(name: str) -> str:
    return next((kind for kind, words in _KIND_WORDS if words.search(name)), "other")


@dataclass(frozen=True)
class BlockStrengths:
    """Factors on one LoRA's strength by block, by kind of layer and by regular expression.

    by_block: "unet", "te", "te1", "down", "mid", "up.1", ... -> factor; of several that match the most exact one holds.
    by_kind: one of KINDS -> factor.
    by_pattern: (regular expression, factor) pairs, searched for in the canonical module name.
    The factor of a module is the product over the three; what nothing names has 1.
    """

    by_block: Mapping[str, float]
    by_kind: Mapping[str, float]
    by_pattern: Sequence[tuple[re.Pattern[str], float]]

    def factor(self, module: str, layout: Layout = Layout()) -> float:  # noqa: B008, it is frozen
        where = place(module, layout)
        part = where.part.rstrip("123")
        names = (where.block, where.side, where.part, part)
        by_block = next((self.by_block[name] for name in names if name in self.by_block), 1.0)
        by_pattern = math.prod(factor for pattern, factor in self.by_pattern if pattern.search(module))
        return by_block * self.by_kind.get(where.kind, 1.0) * by_pattern

    @property
    def text(self) -> str:
        """As `parse_block_strengths` reads it."""
        entries = [f"{name}={factor!r}" for name, factor in (*self.by_block.items(), *self.by_kind.items())]
        # A slash ends the expression unless a backslash stands before it.
        patterns = [(re.sub(r"(?<!\\)/", r"\\/", pattern.pattern), factor) for pattern, factor in self.by_pattern]
        return ", ".join(entries + [f"/{pattern}/={factor!r}" for pattern, factor in patterns])


def parse_block_strengths(text: str) -> BlockStrengths | None:
    """Factors from a text such as "down=0.5, mid=1, up.1=0.3, attention=1.2, te=0, /attn2_to_k/=0"; None if blank.

    Commas, semicolons and line ends separate. Raises ValueError for what is no NAME=NUMBER, an unknown name, a name
    given twice, a number that is not finite, or a broken regular expression.
    """
    by_block: dict[str, float] = {}
    by_kind: dict[str, float] = {}
    by_pattern: list[tuple[re.Pattern[str], float]] = []
    for entry in re.findall(r"/(?:\\/|[^/])*/\s*=[^,;\n]*|[^,;\n]+", text):
        if not entry.strip():
            continue
        name, equals, number = (part.strip() for part in entry.rpartition("="))
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not equals or not math.isfinite(factor):
            raise ValueError(
                f"block strengths: {entry.strip()!r} is no NAME=NUMBER. Write for example down=0.5, mid=1, attention=1.2"
            )
        if len(name) > 1 and name.startswith("/") and name.endswith("/"):
            try:
                by_pattern.append((re.compile(name[1:-1].replace(r"\/", "/")), factor))
            except re.error as error:
                raise ValueError(f"block strengths: {name} is no regular expression ({error}).") from None
            continue
        table = by_kind if name in KINDS else by_block
        if table is by_block and not _BLOCK.fullmatch(name):
            raise ValueError(
                f"block strengths: {name!r} is no block or kind of layer. Known: unet, te, te1, te2, in, down, down.0, "
                f"mid, up, up.0, out, layers.0, {', '.join(KINDS)}, or a /regular expression/."
            )
        if name in table:
            raise ValueError(f"block strengths: {name} is given twice.")
        table[name] = factor
    return BlockStrengths(by_block, by_kind, by_pattern) if by_block or by_kind or by_pattern else None


_BLOCK = re.compile(
    r"unet|te[123]?|other|in|mid|out|(?:down|up|layers|double_blocks|single_blocks|joint_blocks|transformer_blocks|blocks)"
    r"(?:\.\d+)?"
)
