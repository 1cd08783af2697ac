"""The family of Flux 1 and Flux 2: double and single blocks, in the model's own names and in diffusers'.

Own names are those of Black Forest Labs and ComfyUI (`double_blocks.0.img_attn.qkv`), which kohya's trainer underscores;
diffusers' (`transformer_blocks.0.attn.to_q`) are used by PEFT, OneTrainer, SimpleTuner, ai-toolkit. Where the model has
one fused weight (qkv; linear1 of q, k, v and the MLP) diffusers has its slices; Flux 2 has linear1 whole there.
"""

from __future__ import annotations

from .tables import Fused, Stack
from .transformer import transformer

_IMAGE = "attn.to_q attn.to_k attn.to_v"
_TEXT = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
# The second name is Flux 2's, where there are two.
DOUBLE = Stack(
    own="double_blocks",
    theirs="transformer_blocks",
    depth=19,
    whole={
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        "img_mlp.0": "ff.net.0.proj ff.linear_in",
        "img_mlp.2": "ff.net.2 ff.linear_out",
        "txt_mlp.0": "ff_context.net.0.proj ff_context.linear_in",
        "txt_mlp.2": "ff_context.net.2 ff_context.linear_out",
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
    },
    fused={"img_attn.qkv": Fused((_IMAGE,), "www"), "txt_attn.qkv": Fused((_TEXT,), "www")},
)
SINGLE = Stack(
    own="single_blocks",
    theirs="single_transformer_blocks",
    depth=48,
    whole={
        "modulation.lin": "norm.linear",
        "linear1": "attn.to_qkv_mlp_proj",
        "linear2": "proj_out attn.to_out",
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
    },
    fused={
        "linear1_qkv": Fused((_IMAGE,), "www"),
        "linear1": Fused((f"{_IMAGE} proj_mlp",), "wwwr", pieces={"linear1_qkv": (0, 3)}),
    },
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

FAMILY = transformer(
    "Flux",
    stacks=(DOUBLE, SINGLE),
    outside={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "proj_out",
        "pos_embed_input": "controlnet_x_embedder",
        **TIME,
        **{f"{name}_stream_modulation{which}.lin": f"~{name}_stream_modulation{which}.linear"
           for name, which in (("double", "_img"), ("double", "_txt"), ("single", ""))},
    },
    turned=TURNED,
    theirs_read_as=("transformer.", "lycoris_", "lora_transformer_", ""),
    sure=True,
)  # fmt: skip
