"""The families of Flux 1, Flux 2 and Chroma: double and single blocks, in the model's own names and in diffusers'.

Own names are those of Black Forest Labs and ComfyUI (`double_blocks.0.img_attn.qkv`), which kohya's trainer underscores;
diffusers' (`transformer_blocks.0.attn.to_q`) are used by PEFT, OneTrainer, SimpleTuner, ai-toolkit. Where the model has
one fused weight (qkv; linear1 of q, k, v and the MLP) diffusers has its slices; Flux 2 has linear1 whole there.
"""

from __future__ import annotations

from dataclasses import replace

from .tables import Fused, Stack
from .transformer import transformer

_IMAGE = "attn.to_q attn.to_k attn.to_v"
_TEXT = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_ATTENTION = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_QKV = {"img_attn.qkv": Fused((_IMAGE,), "www"), "txt_attn.qkv": Fused((_TEXT,), "www")}
_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_STREAMS = (("img", "ff"), ("txt", "ff_context"))
DOUBLE = Stack(
    own="double_blocks",
    theirs="transformer_blocks",
    depth=19,
    whole={
        **_ATTENTION,
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        **{f"{own}_mlp.0": f"{theirs}.net.0.proj {theirs}.linear_in" for own, theirs in _STREAMS},
        **{f"{own}_mlp.2": f"{theirs}.net.2 {theirs}.linear_out" for own, theirs in _STREAMS},
    },
    fused=_QKV,
)
SINGLE = Stack(
    own="single_blocks",
    theirs="single_transformer_blocks",
    depth=48,
    whole={"modulation.lin": "norm.linear", "linear2": "proj_out", **_NORMS},
    fused={
        "linear1_qkv": Fused((_IMAGE,), "www"),
        "linear1": Fused((f"{_IMAGE} proj_mlp",), "wwwr", pieces={"linear1_qkv": (0, 3)}),
    },
)
# Flux 2 has modulation outside of its blocks, and diffusers keeps linear1 whole.
_DOUBLE_2 = Stack(
    own="double_blocks",
    theirs="transformer_blocks",
    depth=8,
    whole={
        **_ATTENTION,
        **{f"{own}_mlp.0": f"{theirs}.linear_in" for own, theirs in _STREAMS},
        **{f"{own}_mlp.2": f"{theirs}.linear_out" for own, theirs in _STREAMS},
    },
    fused=_QKV,
)
_SINGLE_2 = Stack(
    own="single_blocks",
    theirs="single_transformer_blocks",
    depth=48,
    whole={"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out", **_NORMS},
)
TIME = {
    f"{own}.{end}": f"time_text_embed.{theirs}.{linear}"
    for own, theirs in (
        ("time_in", "timestep_embedder"),
        ("vector_in", "text_embedder"),
        ("guidance_in", "guidance_embedder"),
    )
    for end, linear in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
}
TURNED = {"final_layer.adaLN_modulation.1": "norm_out.linear"}

_OUTSIDE = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
_READ_AS = ("transformer.", "lycoris_", "lora_transformer_", "")

# The MLP is four times as wide as the stream, and its input is not doubled for a gate.
RATIOS = {
    "single_blocks.{}.linear1": 7,
    "single_blocks.{}.linear2": 1 / 5,
    **{
        f"double_blocks.{{}}.{stream}_mlp.{number}": ratio
        for stream, _ in _STREAMS
        for number, ratio in ((0, 4), (2, 1 / 4))
    },
}

FAMILY = transformer(
    "Flux",
    widths=(3072,),
    saved="diffusers",
    saved_fused="kohya",
    stacks=(DOUBLE, SINGLE),
    outside={**_OUTSIDE, "pos_embed_input": "controlnet_x_embedder", **TIME},
    turned=TURNED,
    theirs_read_as=_READ_AS,
    ratios=RATIOS,
    sure=True,
)
FLUX_2 = transformer(
    "Flux 2",
    widths=(3072, 4096, 6144),
    stacks=(_DOUBLE_2, _SINGLE_2),
    outside={
        **_OUTSIDE,
        **{own: f"~{theirs.replace('time_text_embed', 'time_guidance_embed')}"
           for own, theirs in TIME.items() if not own.startswith("vector_in")},
        **{f"{name}.lin": f"~{name}.linear"
           for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")},
    },
    turned=TURNED,
    theirs_read_as=_READ_AS,
    ratios={
        "single_blocks.{}.linear1": 9,
        "single_blocks.{}.linear2": 1 / 4,
        **{f"double_blocks.{{}}.{stream}_mlp.{number}": ratio
           for stream, _ in _STREAMS for number, ratio in ((0, 6), (2, 1 / 3))},
    },
    sure=True,
)  # fmt: skip
# Chroma has a network of its own instead of modulation.
CHROMA = transformer(
    "Chroma",
    widths=(3072,),
    saved="diffusers",
    saved_fused="kohya",
    stacks=(
        replace(DOUBLE, whole={own: theirs for own, theirs in DOUBLE.whole.items() if "mod." not in own}),
        replace(SINGLE, whole={own: theirs for own, theirs in SINGLE.whole.items() if "modulation" not in own}, depth=38),
        Stack(
            own="distilled_guidance_layer.layers",
            whole={"in_layer": "~linear_1", "out_layer": "~linear_2"},
        ),
    ),
    outside={
        **_OUTSIDE,
        **{f"distilled_guidance_layer.{name}": f"~distilled_guidance_layer.{name}"
           for name in ("in_proj", "out_proj", *(f"norms.{number}" for number in range(8)))},
    },
    theirs_read_as=_READ_AS,
    ratios=RATIOS,
    sure=True,
)  # fmt: skip
