"""The family of Kandinsky 5, whose own names are diffusers'."""

from __future__ import annotations

from .tables import Stack
from .transformer import transformer

_ATTENTION = "to_query to_key to_value query_norm key_norm out_layer".split()
_FEED_FORWARD = ["feed_forward.in_layer", "feed_forward.out_layer"]
_SELF = [f"self_attention.{name}" for name in _ATTENTION]
_CROSS = [f"cross_attention.{name}" for name in _ATTENTION]
_OUTSIDE = (
    "time_embeddings.in_layer time_embeddings.out_layer text_embeddings.in_layer text_embeddings.norm "
    "pooled_text_embeddings.in_layer pooled_text_embeddings.norm visual_embeddings.in_layer "
    "out_layer.modulation.out_layer out_layer.out_layer"
)

FAMILY = transformer(
    "Kandinsky 5",
    saved="diffusers",
    stacks=(
        Stack(own="text_transformer_blocks", same=" ".join(["text_modulation.out_layer", *_SELF, *_FEED_FORWARD])),
        Stack(
            own="visual_transformer_blocks",
            same=" ".join(["visual_modulation.out_layer", *_SELF, *_CROSS, *_FEED_FORWARD]),
        ),
    ),
    outside={name: name for name in _OUTSIDE.split()},
    own_read_as=("", "transformer."),
)
