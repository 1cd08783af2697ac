"""The family of Stable Diffusion 3 and 3.5: joint blocks, with a second attention of the picture in 3.5 medium."""

from __future__ import annotations

from .tables import Fused, Stack
from .transformer import transformer

_BLOCKS = Stack(
    own="joint_blocks",
    theirs="transformer_blocks",
    depth=38,
    whole={
        "x_block.attn.proj": "attn.to_out.0",
        "x_block.attn.ln_q": "attn.norm_q",
        "x_block.attn.ln_k": "attn.norm_k",
        "x_block.attn2.proj": "attn2.to_out.0",
        "x_block.attn2.ln_q": "attn2.norm_q",
        "x_block.attn2.ln_k": "attn2.norm_k",
        "x_block.mlp.fc1": "ff.net.0.proj",
        "x_block.mlp.fc2": "ff.net.2",
        "x_block.adaLN_modulation.1": "norm1.linear",
        "context_block.attn.proj": "attn.to_add_out",
        "context_block.attn.ln_q": "attn.norm_added_q",
        "context_block.attn.ln_k": "attn.norm_added_k",
        "context_block.mlp.fc1": "ff_context.net.0.proj",
        "context_block.mlp.fc2": "ff_context.net.2",
        "context_block.adaLN_modulation.1": "norm1_context.linear",
    },
    fused={
        "x_block.attn.qkv": Fused(("attn.to_q attn.to_k attn.to_v",), "www"),
        "context_block.attn.qkv": Fused(("attn.add_q_proj attn.add_k_proj attn.add_v_proj",), "www"),
        "x_block.attn2.qkv": Fused(("attn2.to_q attn2.to_k attn2.to_v",), "www"),
    },
    turned_last="context_block.adaLN_modulation.1",
)

FAMILY = transformer(
    "Stable Diffusion 3",
    widths=(1536, 2432),
    saved="diffusers",
    stacks=(_BLOCKS,),
    outside={
        "context_embedder": "context_embedder",
        "x_embedder.proj": "pos_embed.proj",
        "pos_embed": "pos_embed.pos_embed",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
    },
    turned={"final_layer.adaLN_modulation.1": "norm_out.linear"},
    parameters=("pos_embed",),
    theirs_read_as=("transformer.", "base_model.model.", "lora_transformer_", "lycoris_"),
)
