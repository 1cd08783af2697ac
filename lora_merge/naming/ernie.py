"""The family of Ernie-Image, whose own names are diffusers'."""

from __future__ import annotations

from .tables import Stack
from .transformer import transformer

_BLOCK = (
    "adaLN_sa_ln adaLN_mlp_ln self_attention.to_q self_attention.to_k self_attention.to_v self_attention.to_out.0 "
    "self_attention.norm_q self_attention.norm_k mlp.gate_proj mlp.up_proj mlp.linear_fc2"
)
_OUTSIDE = "x_embedder.proj text_proj time_embedding.linear_1 time_embedding.linear_2 adaLN_modulation.1 final_norm.linear final_linear"

FAMILY = transformer(
    "Ernie-Image",
    stacks=(Stack(own="layers", same=_BLOCK),),
    outside={
        **{name: name for name in _OUTSIDE.split()},
        # A UNet has modules of these names, too, and calls them otherwise in its other naming.
        **{
            f"time_embedding.linear_{n}": f"time_embedding.linear_{n} ~time_embed.{place}"
            for n, place in ((1, 0), (2, 2))
        },
    },
    own_read_lately=("transformer.",),
    theirs_behind_kohya=True,
)
