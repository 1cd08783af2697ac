"""The family of HiDream-I1: every name is the same in all namings, and its experts are modules of their own."""

from __future__ import annotations

from .tables import Stack
from .transformer import transformer

_EXPERTS = [
    f"ff_i.{expert}.w{n}" for expert in ("shared_experts", *(f"experts.{i}" for i in range(4))) for n in (1, 2, 3)
]
_PICTURE = ["to_q", "to_k", "to_v", "to_out", "q_rms_norm", "k_rms_norm"]
_SINGLE = [
    f"block.{name}" for name in ("adaLN_modulation.1", *(f"attn1.{x}" for x in _PICTURE), *_EXPERTS, "ff_i.gate")
]
_DOUBLE = [*_SINGLE, *(f"block.attn1.{x}_t" for x in _PICTURE), *(f"block.ff_t.w{n}" for n in (1, 2, 3))]
_OUTSIDE = (
    "t_embedder.timestep_embedder.linear_1 t_embedder.timestep_embedder.linear_2 p_embedder.pooled_embedder.linear_1 "
    "p_embedder.pooled_embedder.linear_2 x_embedder.proj final_layer.linear final_layer.adaLN_modulation.1"
)

FAMILY = transformer(
    "HiDream",
    stacks=(
        Stack(own="double_stream_blocks", depth=16, same=" ".join(_DOUBLE)),
        Stack(own="single_stream_blocks", depth=32, same=" ".join(_SINGLE)),
        Stack(own="caption_projection", same="linear"),
    ),
    outside={name: name for name in _OUTSIDE.split()},
    own_read_as=("transformer.", "lycoris_"),
)
