"""The family of Wan 2.1 and 2.2: text to video, image to video, VACE and the models built on them.

The image branch (`k_img`, `v_img`, `img_emb`) is in LoRAs of Wan 2.1 for images; Wan 2.2 has none.
"""

from __future__ import annotations

from .tables import Stack
from .transformer import transformer

_BLOCK = {
    **{f"self_attn.{x}": f"~attn1.to_{x}" for x in "qkv"},
    **{f"cross_attn.{x}": f"~attn2.to_{x}" for x in "qkv"},
    "self_attn.o": "~attn1.to_out.0",
    "cross_attn.o": "~attn2.to_out.0",
    "self_attn.norm_q": "~attn1.norm_q",
    "self_attn.norm_k": "~attn1.norm_k",
    "cross_attn.norm_q": "~attn2.norm_q",
    "cross_attn.norm_k": "~attn2.norm_k",
    "cross_attn.k_img": "~attn2.add_k_proj",
    "cross_attn.v_img": "~attn2.add_v_proj",
    "cross_attn.norm_k_img": "~attn2.norm_added_k",
    "ffn.0": "~ffn.net.0.proj",
    "ffn.2": "~ffn.net.2",
    "norm3": "~norm2",
}
_MODULATION = {"modulation": "~scale_shift_table"}

FAMILY = transformer(
    "Wan",
    stacks=(
        Stack(own="blocks", depth=40, whole=_BLOCK, parameters=_MODULATION),
        Stack(
            own="vace_blocks",
            depth=40,
            whole=_BLOCK | {"before_proj": "~proj_in", "after_proj": "~proj_out"},
            parameters=_MODULATION,
        ),
    ),
    outside={
        "patch_embedding": "patch_embedding",
        "vace_patch_embedding": "vace_patch_embedding",
        "text_embedding.0": "~condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "~condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "~condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "~condition_embedder.time_embedder.linear_2",
        "time_projection.1": "~condition_embedder.time_proj",
        "img_emb.proj.0": "~condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "~condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "~condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "~condition_embedder.image_embedder.norm2",
        "head.head": "~proj_out",
        "head.modulation": "~scale_shift_table",
        "ref_conv": "",
    },
    parameters=("head.modulation",),
)
