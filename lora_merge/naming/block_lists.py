"""Lists of numbers for the blocks of a model, as people paste them: one number a block, in a fixed order.

The lists of 12, 17, 20, 26, 30 and 61 numbers are those of sd-webui-lora-block-weight and the mergers that follow it
(BASE, IN00 ..., M00, OUT00 ...; CLIP, T5, IN, D00 ..., S00 ..., OUT for Flux); 57 are Flux's blocks alone. Any other
number is that of the blocks of a model that has one kind of block (Wan 14B 40, Qwen-Image 60, ...), or two, the double
ones first (Klein 9B 8 + 24, HunyuanVideo 20 + 40, ...); a number that fits both is told by the names of the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

MIN_VALUES, MAX_VALUES = 8, 128


def _unet(inputs: Sequence[int], outputs: Sequence[int]) -> list[tuple[str, ...]]:
    # BASE is the text encoders.
    return [
        ("te",),
        *((f"input_blocks_{number}",) for number in inputs),
        ("mid",),
        *((f"output_blocks_{number}",) for number in outputs),
    ]


_DOUBLE = [(f"double_blocks_{number}", f"transformer_blocks_{number}") for number in range(19)]
_SINGLE = [(f"single_blocks_{number}", f"single_transformer_blocks_{number}") for number in range(38)]
_FLUX_IN = (
    "img_in",
    "txt_in",
    "time_in",
    "vector_in",
    "guidance_in",
    "x_embedder",
    "context_embedder",
    "time_text_embed",
)
_FLUX_OUT = ("final_layer", "norm_out", "proj_out")
_LISTS: dict[int, list[tuple[str, ...]]] = {
    12: _unet((4, 5, 7, 8), range(6)),
    17: _unet((1, 2, 4, 5, 7, 8), range(3, 12)),
    20: _unet(range(9), range(9)),
    26: _unet(range(12), range(12)),
    57: [*_DOUBLE, *_SINGLE],
    61: [("te1",), ("te2", "te3"), _FLUX_IN, *_DOUBLE, *_SINGLE, _FLUX_OUT],
}
_ONE_KIND = ("layers", "blocks", "transformer_blocks", "joint_blocks")
# Number of blocks -> (kind, how many) of the models that have two: Flux.2 and Klein, HunyuanVideo, HiDream.
_TWO_KINDS: dict[int, tuple[tuple[str, int], tuple[str, int]]] = {
    25: (("double_blocks", 5), ("single_blocks", 20)),
    32: (("double_blocks", 8), ("single_blocks", 24)),
    48: (("double_stream_blocks", 16), ("single_stream_blocks", 32)),
    56: (("double_blocks", 8), ("single_blocks", 48)),
    60: (("double_blocks", 20), ("single_blocks", 40)),
}


def names_of_list(values: int) -> list[tuple[str, ...]]:
    """For each number of a list of `values` numbers the names (blocks.names_for) that it is for.

    Raises ValueError for a length that no list has.
    """
    if values in _LISTS:
        return _LISTS[values]
    if not MIN_VALUES <= values <= MAX_VALUES:
        raise ValueError(
            f"block strengths: a list of {values} numbers is for no model. Known are 12 (SDXL), 17 (SD 1.5), 20 and 26 (the "
            f"same with convolutions), 57 and 61 (Flux), and one number a block ({MIN_VALUES} to {MAX_VALUES}); or write "
            "NAME=NUMBER, for example down=0.5."
        )
    two = [f"{kind}_{number}" for kind, many in _TWO_KINDS.get(values, ()) for number in range(many)]
    each = [tuple(f"{kind}_{number}" for kind in _ONE_KIND) for number in range(values)]
    return [(*names, *two[index : index + 1]) for index, names in enumerate(each)]


def is_complete(values: int, blocks: set[str]) -> bool:
    """Whether a list of one number a block has a number for each of these blocks ("layers.29")."""
    if values in _LISTS:
        return True
    depths = dict.fromkeys(_ONE_KIND, values) | dict(_TWO_KINDS.get(values, ()))
    # Of a model with two kinds a list for another of its kind has too few numbers, or counts on where this one ends.
    depths |= {kind: 0 for two in _TWO_KINDS.values() for kind, _ in two if kind not in depths}
    numbered = [block.rpartition(".") for block in blocks]
    return all(int(number) < depths[side] for side, _, number in numbered if side in depths)
