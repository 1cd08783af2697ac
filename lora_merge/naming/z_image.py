"""The families of Z-Image and of Lumina 2: one set of own names, two of diffusers'.

Trainers write Z-Image's slices (`attention.to_q`) behind every prefix, musubi-tuner's `lora_unet_` among them, which
ComfyUI does not read there. Lumina 2's attention is grouped, 2304 rows for q and 768 each for k and v; ComfyUI has no names
for its slices.
"""

from __future__ import annotations

from .tables import Fused, Stack
from .transformer import transformer

_SAME = (
    "attention_norm1 attention_norm2 ffn_norm1 ffn_norm2 feed_forward.w1 feed_forward.w2 feed_forward.w3 "
    "adaLN_modulation.0"
)
_STACKS = {"layers": 32, "context_refiner": 4, "noise_refiner": 4}
_READ_AS = ("diffusion_model.", "transformer.", "lycoris_", "")
_OUTSIDE = "cap_embedder.0 cap_embedder.1 t_embedder.mlp.0 t_embedder.mlp.2"

Z_IMAGE = transformer(
    "Z-Image",
    saved="diffusers",
    stacks=[
        Stack(
            own=name,
            depth=depth,
            same=_SAME,
            whole={
                "attention.out": "attention.to_out.0",
                "attention.q_norm": "attention.norm_q",
                "attention.k_norm": "attention.norm_k",
            },
            fused={"attention.qkv": Fused(("attention.to_q attention.to_k attention.to_v",), "wrr")},
        )
        for name, depth in _STACKS.items()
    ],
    outside={
        **{name: name for name in _OUTSIDE.split()},
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        "x_pad_token": "x_pad_token",
        "cap_pad_token": "cap_pad_token",
    },
    parameters=("x_pad_token", "cap_pad_token"),
    theirs_read_as=_READ_AS,
    theirs_behind_kohya=True,
)

_LUMINA = {
    # The second names are Z-Image's, which ComfyUI reads here, too.
    "attention.out": "~attn.to_out.0 attention.to_out.0",
    "attention.q_norm": "~attn.norm_q attention.norm_q",
    "attention.k_norm": "~attn.norm_k attention.norm_k",
    "feed_forward.w1": "~feed_forward.linear_1",
    "feed_forward.w2": "~feed_forward.linear_2",
    "feed_forward.w3": "~feed_forward.linear_3",
    "attention_norm2": "~norm2",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
}
_MODULATED = {"adaLN_modulation.1": "~norm1.linear", "attention_norm1": "~norm1.norm"}
LUMINA_2 = transformer(
    "Lumina 2",
    stacks=[
        Stack(
            own=name,
            depth=depth,
            whole=_LUMINA | (_MODULATED if name != "context_refiner" else {"attention_norm1": "~norm1"}),
            fused={"attention.qkv": Fused(("~attn.to_q ~attn.to_k ~attn.to_v",), "wrr")},
        )
        for name, depth in _STACKS.items()
    ],
    outside={
        "x_embedder": "x_embedder",
        "cap_embedder.0": "~time_caption_embed.caption_embedder.0",
        "cap_embedder.1": "~time_caption_embed.caption_embedder.1",
        "t_embedder.mlp.0": "~time_caption_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "~time_caption_embed.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "~norm_out.linear_1",
        "final_layer.linear": "~norm_out.linear_2",
    },
    theirs_read_as=_READ_AS,
    width=2304,
)
