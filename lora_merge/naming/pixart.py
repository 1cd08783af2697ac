"""The family of PixArt-alpha and PixArt-Sigma: fused self-attention, and k and v of the cross-attention together."""

from __future__ import annotations

from .tables import Fused, Stack
from .transformer import transformer

_BLOCKS = Stack(
    own="blocks",
    theirs="transformer_blocks",
    depth=28,
    whole={
        "attn.proj": "attn1.to_out.0",
        "cross_attn.q_linear": "attn2.to_q",
        "cross_attn.proj": "attn2.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    },
    fused={
        "attn.qkv": Fused(("attn1.to_q attn1.to_k attn1.to_v",), "www"),
        "cross_attn.kv_linear": Fused(("attn2.to_k attn2.to_v",), "ww"),
    },
    parameters={"scale_shift_table": "scale_shift_table"},
)
_EMBEDDERS = {"csize": "resolution", "ar": "aspect_ratio", "t": "timestep"}

FAMILY = transformer(
    "PixArt",
    saved="diffusers",
    stacks=(_BLOCKS,),
    outside={
        **{f"{own}_embedder.mlp.{number}": f"adaln_single.emb.{theirs}_embedder.{linear}"
           for own, theirs in _EMBEDDERS.items() for number, linear in ((0, "linear_1"), (2, "linear_2"))},
        "x_embedder.proj": "pos_embed.proj",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "t_block.1": "adaln_single.linear",
        "final_layer.linear": "proj_out",
        "final_layer.scale_shift_table": "scale_shift_table",
        "y_embedder.y_embedding": "caption_projection.y_embedding",
    },
    parameters=("final_layer.scale_shift_table", "y_embedder.y_embedding"),
    theirs_read_as=("transformer.", "base_model.model.", "unet.base_model.model."),
)  # fmt: skip
