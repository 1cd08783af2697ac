"""The family of OmniGen 2, whose own names are diffusers'."""

from __future__ import annotations

from .tables import Stack
from .transformer import transformer

_BLOCK = (
    "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.norm_q attn.norm_k feed_forward.linear_1 feed_forward.linear_2 "
    "feed_forward.linear_3 ffn_norm1 norm2 ffn_norm2"
)
_DEPTHS = {"layers": 32, "noise_refiner": 2, "ref_image_refiner": 2, "context_refiner": 2}
_OUTSIDE = (
    "x_embedder ref_image_patch_embedder time_caption_embed.timestep_embedder.linear_1 "
    "time_caption_embed.timestep_embedder.linear_2 time_caption_embed.caption_embedder.0 "
    "time_caption_embed.caption_embedder.1 norm_out.linear_1 norm_out.linear_2 image_index_embedding"
)

FAMILY = transformer(
    "OmniGen 2",
    stacks=[
        Stack(
            own=name,
            depth=depth,
            same=f"{_BLOCK} {'norm1' if name == 'context_refiner' else 'norm1.linear norm1.norm'}",
        )
        for name, depth in _DEPTHS.items()
    ],
    outside={name: name for name in _OUTSIDE.split()},
    parameters=("image_index_embedding",),
    own_read_as=("",),
    width=2520,
)
