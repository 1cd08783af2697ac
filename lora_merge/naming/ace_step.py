"""The families of ACE-Step, which makes music: version 1, whose own names are diffusers', and 1.5."""

from __future__ import annotations

from .tables import Stack
from .transformer import transformer

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CROSS = (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_BLOCKS = Stack(
    own="transformer_blocks",
    depth=24,
    same=" ".join([
        *(f"attn.{name}" for name in _ATTENTION),
        *(f"cross_attn.{name}" for name in _CROSS),
        *("ff.inverted_conv.conv", "ff.depth_conv.conv", "ff.point_conv.conv"),
    ]),
    parameters={"scale_shift_table": "scale_shift_table"},
)  # fmt: skip
_ENCODER = Stack(
    own="lyric_encoder.encoders",
    same="self_attn.linear_q self_attn.linear_k self_attn.linear_v self_attn.linear_out self_attn.linear_pos "
    "feed_forward.w_1 feed_forward.w_2 norm_ff norm_mha",
    parameters={f"self_attn.pos_bias_{x}": f"self_attn.pos_bias_{x}" for x in "uv"},
)
_OUTSIDE = (
    "timestep_embedder.linear_1 timestep_embedder.linear_2 t_block.1 speaker_embedder genre_embedder lyric_embs lyric_proj "
    "lyric_encoder.embed.out.0 lyric_encoder.embed.out.1 lyric_encoder.after_norm proj_in.early_conv_layers.0 "
    "proj_in.early_conv_layers.1 proj_in.early_conv_layers.2 final_layer.linear final_layer.scale_shift_table"
)
ACE_STEP = transformer(
    "ACE-Step",
    widths=(2560,),
    stacks=(_BLOCKS, _ENCODER, Stack(own="projectors", same="0 2 4")),
    outside={name: name for name in _OUTSIDE.split()},
    parameters=("final_layer.scale_shift_table",),
    own_read_as=("",),
)

_PROJECTIONS = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "o_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_LAYER = {
    **{f"{attn}.{own}": f"{attn}.{own} ~{attn}.{theirs}"
       for attn in ("self_attn", "cross_attn") for own, theirs in _PROJECTIONS.items()},
    **{name: name for name in (*_MLP, "self_attn_norm", "cross_attn_norm", "mlp_norm")},
}  # fmt: skip
_SMALL = [*(f"self_attn.{name}" for name in _PROJECTIONS), *_MLP, "input_layernorm", "post_attention_layernorm"]
_IN_DECODER = [
    "proj_in.1", "proj_out.1", "condition_embedder", "norm_out",
    *(f"{embed}.{name}" for embed in ("time_embed", "time_embed_r") for name in ("linear_1", "linear_2", "time_proj")),
]  # fmt: skip
_BESIDE = (
    "encoder.text_projector encoder.lyric_encoder.embed_tokens encoder.lyric_encoder.norm encoder.timbre_encoder.embed_tokens "
    "encoder.timbre_encoder.norm tokenizer.audio_acoustic_proj tokenizer.attention_pooler.embed_tokens "
    "tokenizer.attention_pooler.norm tokenizer.quantizer.project_in tokenizer.quantizer.project_out detokenizer.embed_tokens "
    "detokenizer.norm detokenizer.proj_out"
)
_PARAMETERS = (
    "null_condition_emb",
    "encoder.timbre_encoder.special_token",
    "tokenizer.attention_pooler.special_token",
    "detokenizer.special_tokens",
)
# LoRAs of version 1.5 are made for its decoder alone, and name what is in it.
ACE_STEP_15 = transformer(
    "ACE-Step 1.5",
    stacks=(
        Stack(own="decoder.layers", theirs="layers", whole=_LAYER, parameters={"scale_shift_table": "~scale_shift_table"}),
        *(
            Stack(own=name, whole=dict.fromkeys(_SMALL, ""))
            for name in ("encoder.lyric_encoder.layers", "encoder.timbre_encoder.layers", "tokenizer.attention_pooler.layers",
                         "detokenizer.layers")
        ),
    ),
    outside={
        **{f"decoder.{name}": name for name in _IN_DECODER},
        **dict.fromkeys(_BESIDE.split(), ""),
        **dict.fromkeys(_PARAMETERS, ""),
        "decoder.scale_shift_table": "~scale_shift_table",
    },
    parameters=("decoder.scale_shift_table", *_PARAMETERS),
    theirs_read_as=("base_model.model.", "lycoris_"),
)  # fmt: skip
