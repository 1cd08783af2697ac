"""Which names may be of one weight, in models whose namings are not translated into one another.

Transformers have a naming of their own and one of diffusers', and each appears behind several prefixes. A module is
known here by its sites: the underscored names, without prefix, that it may have in its model's own naming. Modules that
have a site in common may be one weight. A fused weight and its slices (qkv beside q) are patched one after the other by
ComfyUI and are no such case; `slices_of` tells them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from . import flux, unet

# What stands before a module's name in a canonical name, and what some trainers put there besides.
_PREFIX = re.compile(r"(?:lora_prior_unet_|lora_unet_|lora_transformer_|model_diffusion_model_)?(?:model_|decoder_)?")

# Endings that differ from tool to tool within one naming.
_ENDINGS = (
    (re.compile(r"mlp_fc1$"), "mlp_0"),
    (re.compile(r"mlp_fc2$"), "mlp_2"),
    (re.compile(r"(mod|modulation)_linear$"), r"\1_lin"),
    (re.compile(r"to_out_0$"), "to_out"),
    (re.compile(r"(query|key)_norm_scale$"), r"\1_norm"),
    (re.compile(r"(?<!text_)attention_to_out$"), "attention_out"),
    (re.compile(r"attention_norm_([qk])$"), r"attention_\1_norm"),
    (re.compile(r"^all_(final_layer|x_embedder)_2-1"), r"\1"),
)

# Own name of the blocks, diffusers' name of the blocks, own module -> diffusers' modules, fused module -> its slices.
_Stack = tuple[str, str, Mapping[str, str], Mapping[str, str]]
_IMAGE_QKV, _TEXT_QKV = "attn_to_q attn_to_k attn_to_v", "attn_add_q_proj attn_add_k_proj attn_add_v_proj"
_FUSION = {f"attn_w{x}": f"attn_to_{x}" for x in "qkv"} | {"attn_wo": "attn_to_out", "attn_gate": "attn_to_gate"}
_FUSION |= {f"mlp_{x}": f"ff_{x}" for x in ("gate", "up", "down")}
_LUMINA = {"attention_out": "attn_to_out", "attention_q_norm": "attn_norm_q", "attention_k_norm": "attn_norm_k"}
_LUMINA |= {f"feed_forward_w{n}": f"feed_forward_linear_{n}" for n in (1, 2, 3)}
_LUMINA |= {"adaLN_modulation_1": "norm1_linear", "attention_norm1": "norm1_norm"}
_LUMINA_QKV = {"attention_qkv": "attention_to_q attention_to_k attention_to_v attn_to_q attn_to_k attn_to_v"}


def _alike(name: str) -> str:
    for pattern, ending in _ENDINGS:
        name = pattern.sub(ending, name)
    return name


def _flux_stacks() -> list[_Stack]:
    found: list[_Stack] = []
    for stack, whole in flux.WHOLE.items():
        modules = {**whole, **flux.NORMS[stack]}
        found.append((*stack, {own: _alike(names) for own, names in modules.items()}, flux.FUSED[stack]))
    return found


_STACKS: tuple[_Stack, ...] = (
    *_flux_stacks(),  # and HunyuanVideo
    (  # SD3
        "joint_blocks",
        "transformer_blocks",
        {
            "x_block_attn_proj": "attn_to_out",
            "x_block_attn_ln_q": "attn_norm_q",
            "x_block_attn_ln_k": "attn_norm_k",
            "x_block_attn2_proj": "attn2_to_out",
            "x_block_attn2_ln_q": "attn2_norm_q",
            "x_block_attn2_ln_k": "attn2_norm_k",
            "x_block_mlp_0": "ff_net_0_proj",
            "x_block_mlp_2": "ff_net_2",
            "x_block_adaLN_modulation_1": "norm1_linear",
            "context_block_attn_proj": "attn_to_add_out",
            "context_block_attn_ln_q": "attn_norm_added_q",
            "context_block_attn_ln_k": "attn_norm_added_k",
            "context_block_mlp_0": "ff_context_net_0_proj",
            "context_block_mlp_2": "ff_context_net_2",
            "context_block_adaLN_modulation_1": "norm1_context_linear",
        },
        {
            "x_block_attn_qkv": _IMAGE_QKV,
            "context_block_attn_qkv": _TEXT_QKV,
            "x_block_attn2_qkv": "attn2_to_q attn2_to_k attn2_to_v",
        },
    ),
    (  # AuraFlow
        "double_layers",
        "joint_transformer_blocks",
        {
            "attn_w2q": "attn_to_q",
            "attn_w2k": "attn_to_k",
            "attn_w2v": "attn_to_v",
            "attn_w2o": "attn_to_out",
            "attn_w1q": "attn_add_q_proj",
            "attn_w1k": "attn_add_k_proj",
            "attn_w1v": "attn_add_v_proj",
            "attn_w1o": "attn_to_add_out",
            "mlpX_c_fc1": "ff_linear_1",
            "mlpX_c_fc2": "ff_linear_2",
            "mlpX_c_proj": "ff_out_projection",
            "mlpC_c_fc1": "ff_context_linear_1",
            "mlpC_c_fc2": "ff_context_linear_2",
            "mlpC_c_proj": "ff_context_out_projection",
            "modX_1": "norm1_linear",
            "modC_1": "norm1_context_linear",
        },
        {},
    ),
    (
        "single_layers",
        "single_transformer_blocks",
        {
            "attn_w1q": "attn_to_q",
            "attn_w1k": "attn_to_k",
            "attn_w1v": "attn_to_v",
            "attn_w1o": "attn_to_out",
            "modCX_1": "norm1_linear",
            "mlp_c_fc1": "ff_linear_1",
            "mlp_c_fc2": "ff_linear_2",
            "mlp_c_proj": "ff_out_projection",
        },
        {},
    ),
    (  # PixArt
        "blocks",
        "transformer_blocks",
        {
            "attn_proj": "attn1_to_out",
            "mlp_0": "ff_net_0_proj",
            "mlp_2": "ff_net_2",
            "cross_attn_proj": "attn2_to_out",
            "cross_attn_q_linear": "attn2_to_q",
        },
        {"attn_qkv": "attn1_to_q attn1_to_k attn1_to_v", "cross_attn_kv_linear": "attn2_to_k attn2_to_v"},
    ),
    ("blocks", "transformer_blocks", _FUSION, {}),  # Krea 2
    (  # Cosmos Predict 2, Anima
        "blocks",
        "transformer_blocks",
        {f"self_attn_{x}_proj": f"attn1_to_{x}" for x in "qkv"}
        | {f"cross_attn_{x}_proj": f"attn2_to_{x}" for x in "qkv"}
        | {"self_attn_output_proj": "attn1_to_out", "cross_attn_output_proj": "attn2_to_out"}
        | {"mlp_layer1": "ff_net_0_proj", "mlp_layer2": "ff_net_2"},
        {},
    ),
    (  # Wan
        "blocks",
        "blocks",
        {f"self_attn_{x}": f"attn1_to_{x}" for x in "qkv"}
        | {f"cross_attn_{x}": f"attn2_to_{x}" for x in "qkv"}
        | {"self_attn_o": "attn1_to_out", "cross_attn_o": "attn2_to_out"}
        | {"cross_attn_k_img": "attn2_add_k_proj", "cross_attn_v_img": "attn2_add_v_proj"}
        | {"ffn_0": "ffn_net_0_proj", "ffn_2": "ffn_net_2"},
        {},
    ),
    ("layers", "layers", _LUMINA, _LUMINA_QKV),  # Lumina 2, Z-Image
    ("context_refiner", "context_refiner", _LUMINA, _LUMINA_QKV),
    ("noise_refiner", "noise_refiner", _LUMINA, _LUMINA_QKV),
    ("txtfusion_layerwise_blocks", "text_fusion_layerwise_blocks", _FUSION, {}),  # Krea 2
    ("txtfusion_refiner_blocks", "text_fusion_refiner_blocks", _FUSION, {}),
    ("transformer_blocks", "transformer_blocks", {f"attn{n}_{x}_norm": f"attn{n}_norm_{x}" for n in "12" for x in "qk"}, {}),  # LTX
)  # fmt: skip
_LINEARS = ("linear_1", "linear_2")
# Own module -> diffusers' modules, outside of blocks.
_SINGLE: Mapping[str, str] = {
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out_linear",
    "final_layer_scale_shift_table": "scale_shift_table",
    "final_linear": "proj_out",
    "modF_1": "norm_out_linear",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "x_embedder_proj": "pos_embed_proj",
    "pos_embed": "pos_embed_pos_embed",
    "positional_encoding": "pos_embed_pos_embed",
    "pos_embed_input": "controlnet_x_embedder",
    "cond_seq_linear": "context_embedder",
    "init_x_linear": "pos_embed_proj",
    "t_block_1": "adaln_single_linear",
    "y_embedder_y_embedding": "caption_projection_y_embedding",
    "y_embedder_y_proj_fc1": "caption_projection_linear_1",
    "y_embedder_y_proj_fc2": "caption_projection_linear_2",
    "patchify_proj": "proj_in",
    "adaln_single_linear": "time_embed_linear",
    "first": "img_in",
    "last_linear": "final_layer_linear",
    "tproj_1": "time_mod_proj",
    "txtmlp_1": "txt_in_linear_1",
    "txtmlp_3": "txt_in_linear_2",
    "txtfusion_projector": "text_fusion_projector",
} | {
    f"{own}_{end}": " ".join(f"{name}_{linear}" for name in theirs.split())
    for own, theirs, ends in (
        ("time_in", "time_text_embed_timestep_embedder", ("in_layer", "out_layer")),
        ("vector_in", "time_text_embed_text_embedder", ("in_layer", "out_layer")),
        ("guidance_in", "time_text_embed_guidance_embedder", ("in_layer", "out_layer")),
        (
            "t_embedder_mlp",
            "time_text_embed_timestep_embedder adaln_single_emb_timestep_embedder time_step_proj",
            ("0", "2"),
        ),
        ("y_embedder_mlp", "time_text_embed_text_embedder", ("0", "2")),
        ("csize_embedder_mlp", "adaln_single_emb_resolution_embedder", ("0", "2")),
        ("ar_embedder_mlp", "adaln_single_emb_aspect_ratio_embedder", ("0", "2")),
        ("tmlp", "time_embed", ("0", "2")),
    )
    for end, linear in zip(ends, _LINEARS, strict=True)
}
# Modules that are the same in all namings of their families, so that a name of theirs is a known one.
_ALIKE: Mapping[str, str] = {
    "transformer_blocks": "attn_to_q attn_to_k attn_to_v attn_to_out attn_add_q_proj attn_add_k_proj attn_add_v_proj "
    "attn_to_add_out attn_norm_q attn_norm_k attn_norm_added_q attn_norm_added_k img_mlp_net_0_proj img_mlp_net_2 "
    "txt_mlp_net_0_proj txt_mlp_net_2 img_mod_1 txt_mod_1 attn1_to_q attn1_to_k attn1_to_v attn1_to_out attn2_to_q "
    "attn2_to_k attn2_to_v attn2_to_out ff_net_0_proj ff_net_2",
    "txt_in_individual_token_refiner_blocks": "self_attn_qkv self_attn_proj adaLN_modulation_1 mlp_0 mlp_2 norm1 norm2",
}

_BLOCK = re.compile(r"(.*?)_(\d+)_(.+)")
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
_TEXT = re.compile(
    r"lora_(te[123]?|prior_te)_(.+)|text_encoders\.(?:(\w+)\.)?transformer\.(.+)|text_encoders\.(\w+)\.(.+)"
)
_CLIP = re.compile(r"text_model_|text_projection")
_FIRST, _SECOND = {"te", "te1", "clip_l", "clip_h"}, {"te2", "clip_g"}


@cache
def _tables() -> tuple[dict[tuple[str, str], tuple[str, ...]], dict[tuple[str, str], tuple[str, ...]]]:
    """(diffusers' block, module) -> own names with a {} for the number; the same for slices -> the fused weights."""
    whole: dict[tuple[str, str], list[str]] = {}
    slices: dict[tuple[str, str], list[str]] = {}
    for own, theirs, modules, fused in _STACKS:
        for table, entries in ((whole, modules), (slices, fused)):
            for module, names in entries.items():
                for name in names.split():
                    table.setdefault((theirs, name), []).append(f"{own}_{{}}_{module}")
    for own, theirs in (("linear1_qkv", "single_blocks"),):  # a slice under a name of its own
        slices.setdefault((theirs, own), []).append("single_blocks_{}_linear1")
    return tuple({key: tuple(value) for key, value in table.items()} for table in (whole, slices))  # type: ignore[return-value]


@cache
def _singles() -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for own, names in _SINGLE.items():
        for name in names.split():
            found.setdefault(name, []).append(own)
    return {name: tuple(own) for name, own in found.items()}


def body(canonical: str) -> str:
    """A model's module without prefix, endings that differ from tool to tool made alike."""
    return _alike(_PREFIX.sub("", canonical, count=1))


def sites(canonical: str) -> frozenset[str]:
    """Every name that this module of a model may have in its own naming, its own body among them."""
    name = body(canonical)
    found = {name, *_singles().get(name, ())}
    if twin := unet.twin_outside_blocks(name):
        found.add(twin)
    if match := _BLOCK.fullmatch(name):
        found |= {own.format(match[2]) for own in _tables()[0].get((match[1], match[3]), ())}
    return frozenset(found)


def slices_of(canonical: str) -> frozenset[str]:
    """Bodies of the fused weights that this module may be a slice of; empty for a whole weight."""
    if match := _BLOCK.fullmatch(body(canonical)):
        return frozenset(own.format(match[2]) for own in _tables()[1].get((match[1], match[3]), ()))
    return frozenset()


def is_foreign(canonical: str) -> bool:
    """Whether the name may be one of diffusers', or a slice's, rather than the model's own."""
    return bool(slices_of(canonical)) or len(sites(canonical)) > 1 or canonical.endswith("_to_out_0")


def pattern(canonical: str) -> str:
    """The body with every number as #."""
    return _NUMBER.sub("#", body(canonical).replace("_", " ")).replace(" ", "_")


@cache
def _known() -> frozenset[str]:
    found = set(_SINGLE) | set(_singles())
    for own, theirs, modules, fused in _STACKS:
        found |= {f"{own}_#_{module}" for module in (*modules, *fused)}
        found |= {f"{theirs}_#_{name}" for names in (*modules.values(), *fused.values()) for name in names.split()}
    found |= {f"{stack}_#_{name}" for stack, names in _ALIKE.items() for name in names.split()}
    return frozenset(pattern(name) for name in found)


def is_known(canonical: str) -> bool:
    """Whether the module is one whose names in other namings are known here; those of Stable Diffusion UNets are."""
    name = canonical.removeprefix("lora_unet_")
    return pattern(canonical).removesuffix("_bias") in _known() or unet.is_ldm(name) or unet.is_diffusers(name)


def prefix_class(canonical: str) -> str:
    """What the module's prefix was, as far as canonical names tell: names of one class are compared letter by letter."""
    return next((p for p in ("lora_unet_", "lora_transformer_") if canonical.startswith(p)), "")


def text_encoder(spelling: str) -> tuple[str, str] | None:
    """(encoder, body) of a text encoder's module: te, te1, te2, te3, prior_te, or ComfyUI's word; None for a model's."""
    match = _TEXT.fullmatch(spelling)
    if match is None:
        return None
    encoder = match[1] or match[3] or match[5] or ""
    name = (match[2] or match[4] or match[6]).replace(".", "_")
    return encoder, re.sub(r"^(?:bert|model)_", "", name)


def one_encoder(first: str, second: str, body: str, encoders: frozenset[str]) -> bool:
    """Whether two names of text encoders, of modules with the same body, may be one encoder.

    encoders: all that are named anywhere; with two of kohya's numbers in it `te` is the first one.
    """
    pair = {first, second}
    if len(pair) == 1:
        return True
    numbered = {"te", "te1", "te2", "te3"}
    if _CLIP.match(body):
        if pair <= _FIRST or pair <= _SECOND:
            return True
        if "prior_te" in pair:  # Stable Cascade's one
            return not pair & {"te1", "clip_l", "clip_h"}
        if pair == {"te", "clip_g"}:
            return encoders.isdisjoint({"te1", "te2"})
        if pair <= _FIRST | _SECOND | numbered:
            return False
    # ComfyUI's words are names of different encoders; kohya's numbers depend on the model.
    return bool(pair & numbered) or "" in pair
