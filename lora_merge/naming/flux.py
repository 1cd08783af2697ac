"""The family of Flux 1, Flux 2 and Chroma: double and single blocks, in the model's own names and in diffusers'.

Own names are those of Black Forest Labs and ComfyUI (`double_blocks.0.img_attn.qkv`), which kohya's trainer underscores;
diffusers' (`transformer_blocks.0.attn.to_q`) are used by PEFT, OneTrainer, SimpleTuner, ai-toolkit. Where the model has
one fused weight (qkv; linear1 of q, k, v and the MLP) diffusers has its slices.
Other models have blocks of the same names, so a name alone tells nothing: `recognises` looks at a whole LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from .family import Family, Rows

_IMAGE = "attn_to_q attn_to_k attn_to_v"
_TEXT = "attn_add_q_proj attn_add_k_proj attn_add_v_proj"
DOUBLE, SINGLE = ("double_blocks", "transformer_blocks"), ("single_blocks", "single_transformer_blocks")
# (Own stack, diffusers' stack) -> own module -> diffusers' modules for the same weight; the second ones are Flux 2's.
WHOLE: Mapping[tuple[str, str], Mapping[str, str]] = {
    DOUBLE: {
        "img_attn_proj": "attn_to_out_0",
        "txt_attn_proj": "attn_to_add_out",
        "img_mod_lin": "norm1_linear",
        "txt_mod_lin": "norm1_context_linear",
        "img_mlp_0": "ff_net_0_proj ff_linear_in",
        "img_mlp_2": "ff_net_2 ff_linear_out",
        "txt_mlp_0": "ff_context_net_0_proj ff_context_linear_in",
        "txt_mlp_2": "ff_context_net_2 ff_context_linear_out",
    },
    SINGLE: {
        "modulation_lin": "norm_linear",
        "linear1": "attn_to_qkv_mlp_proj",
        "linear2": "proj_out attn_to_out",
    },
}
# The same for norms, whose own names differ from version to version.
NORMS: Mapping[tuple[str, str], Mapping[str, str]] = {
    DOUBLE: {
        "img_attn_norm_query_norm": "attn_norm_q",
        "img_attn_norm_key_norm": "attn_norm_k",
        "txt_attn_norm_query_norm": "attn_norm_added_q",
        "txt_attn_norm_key_norm": "attn_norm_added_k",
    },
    SINGLE: {"norm_query_norm": "attn_norm_q", "norm_key_norm": "attn_norm_k"},
}
# Fused module -> its slices, in the order of their rows.
FUSED: Mapping[tuple[str, str], Mapping[str, str]] = {
    DOUBLE: {"img_attn_qkv": _IMAGE, "txt_attn_qkv": _TEXT},
    SINGLE: {"linear1": f"{_IMAGE} proj_mlp", "linear1_qkv": _IMAGE},
}
_LINEARS = (("in_layer", "linear_1"), ("out_layer", "linear_2"))
_TIME = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
_OUTSIDE = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer_linear": "proj_out"}
_OUTSIDE |= {f"{own}_{a}": f"time_text_embed_{theirs}_{b}" for own, theirs in _TIME.items() for a, b in _LINEARS}
# One weight, but diffusers has its two halves the other way about: an update of one is none of the other.
_SWAPPED = {"final_layer_adaLN_modulation_1", "norm_out_linear"}

_MODEL = re.compile(r"(?!lora_te|text_encoders?_|text_model_)(lora_unet_|lora_transformer_|)(.+)", re.DOTALL)
_BLOCK = re.compile(r"(\w+?)_(\d{1,3})_(\w+)")
# Blocks of the deepest model of the family. HunyuanVideo, whose blocks have the same names, has 20 double ones.
_DEPTH = {stack: depth for pair, depth in ((DOUBLE, 19), (SINGLE, 48)) for stack in pair}


def _tables() -> tuple[dict[tuple[str, str], str], dict[tuple[str, str], tuple[str, ...]], set[tuple[str, str]]]:
    """(stack, module) -> own name with {} for the number; the same for slices; and every (stack, module) there is."""
    own_of: dict[tuple[str, str], str] = {}
    slices: dict[tuple[str, str], tuple[str, ...]] = {}
    known: set[tuple[str, str]] = set()
    for (own, theirs), modules in WHOLE.items():
        for module, names in modules.items():
            for place in [(own, module), *((theirs, name) for name in names.split())]:
                own_of[place] = f"{own}_{{}}_{module}"
    for (own, theirs), modules in FUSED.items():
        for module, names in modules.items():
            if module != "linear1_qkv":
                own_of[own, module] = f"{own}_{{}}_{module}"
            for name in names.split():
                slices[theirs, name] = (*slices.get((theirs, name), ()), f"{own}_{{}}_{module}")
    slices["single_blocks", "linear1_qkv"] = ("single_blocks_{}_linear1",)
    for (own, theirs), modules in NORMS.items():
        known |= {(own, module) for module in modules} | {(theirs, name) for name in modules.values()}
    return own_of, slices, known | own_of.keys() | slices.keys()


_OWN_OF, _SLICES, _KNOWN = _tables()
_OUTSIDE_OWN = {name: own for own, theirs in _OUTSIDE.items() for name in (own, theirs)}


def _split(canonical: str) -> tuple[str, str, str] | None:
    """(stack, number, module) of a module in a block."""
    match = _MODEL.fullmatch(canonical)
    block = _BLOCK.fullmatch(match[2]) if match else None
    return (block[1], block[2], block[3]) if block else None


def _recognises(names: Collection[str]) -> bool:
    """All names are known, none is of a block that no such model has, and there is a block of the model's own names
    or one of both kinds of diffusers': its `transformer_blocks` alone are those of many models."""
    stacks = set()
    for name in names:
        if (match := _MODEL.fullmatch(name)) is None or match[2] in _OUTSIDE_OWN or match[2] in _SWAPPED:
            continue
        block = _split(name)
        if block is None or (block[0], block[2]) not in _KNOWN or int(block[1]) >= _DEPTH[block[0]]:
            return False
        stacks.add(block[0])
    return bool(stacks & {DOUBLE[0], SINGLE[0]}) or stacks == {DOUBLE[1], SINGLE[1]}


def _own(canonical: str) -> str | None:
    match = _MODEL.fullmatch(canonical)
    if match is None:
        return None
    if match[2] in _OUTSIDE_OWN:
        return f"lora_unet_{_OUTSIDE_OWN[match[2]]}"
    if (block := _split(canonical)) is None:
        return None
    stack, number, module = block
    if match[1] == "lora_transformer_" and stack in (DOUBLE[0], SINGLE[0]):
        return None  # HunyuanVideo's own names are written so, never Flux's
    if (stack, module) in _OWN_OF:
        return f"lora_unet_{_OWN_OF[stack, module].format(number)}"
    # One prefix for the slices, which stay diffusers'.
    return f"lora_transformer_{match[2]}" if (stack, module) in _SLICES and stack != SINGLE[0] else None


def _fused(canonical: str) -> frozenset[str]:
    block = _split(canonical)
    found = _SLICES.get((block[0], block[2]), ()) if block else ()
    return frozenset(f"lora_unet_{name.format(block[1])}" for name in found) if block else frozenset()


def _rows(canonical: str, fused: str, shape: tuple[int, ...]) -> Rows | None:
    part, whole = _split(canonical), _split(fused)
    if part is None or whole is None or fused not in _fused(canonical) or len(shape) != 2:
        return None
    # q, k and v have as many rows each as the stream is wide, the MLP has the rest.
    rows, width = shape
    if part[2] == "linear1_qkv":
        return Rows(0, 3 * width) if rows >= 3 * width else None
    stack = DOUBLE if whole[0] == DOUBLE[0] else SINGLE
    at = FUSED[stack][whole[2]].split().index(part[2])
    last = whole[2] == "linear1" and at == 3
    if rows < 3 * width or (whole[2] != "linear1" and rows != 3 * width):
        return None
    return Rows(at * width, rows - 3 * width if last else width)


FAMILY = Family(name="Flux", recognises=_recognises, own=_own, fused=_fused, rows=_rows)
