"""The family of Qwen-Image and its edit models: the model's own names are diffusers', and only prefixes differ."""

from __future__ import annotations

from .tables import Stack
from .transformer import transformer

_BLOCKS = Stack(
    own="transformer_blocks",
    depth=60,
    same="attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj attn.add_v_proj attn.to_add_out "
    "attn.norm_q attn.norm_k attn.norm_added_q attn.norm_added_k "
    "img_mod.1 img_mlp.net.0.proj img_mlp.net.2 txt_mod.1 txt_mlp.net.0.proj txt_mlp.net.2",
)
_OUTSIDE = (
    "img_in txt_in txt_norm norm_out.linear proj_out "
    "time_text_embed.timestep_embedder.linear_1 time_text_embed.timestep_embedder.linear_2 "
    "time_text_embed.addition_t_embedding"
)

FAMILY = transformer(
    "Qwen-Image",
    widths=(3072,),
    stacks=(_BLOCKS,),
    outside={name: name for name in _OUTSIDE.split()},
    own_read_as=("", "transformer.", "lycoris_"),
)
