"""The family of LTX-Video and LTX-2: diffusers' names are the model's own but for norms and what is outside of blocks."""

from __future__ import annotations

from .tables import Stack
from .transformer import transformer

_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_BLOCKS = Stack(
    own="transformer_blocks",
    depth=48,
    whole={
        **{f"{attn}.{name}": f"~{attn}.{name}"
           for attn in _ATTENTIONS for name in ("to_q", "to_k", "to_v", "to_out.0", "to_gate_logits")},
        **{f"{attn}.{x}_norm": f"~{attn}.norm_{x}" for attn in _ATTENTIONS for x in "qk"},
        **{f"{ff}.{name}": f"~{ff}.{name}" for ff in ("ff", "audio_ff") for name in ("net.0.proj", "net.2")},
    },
    parameters={
        **{name: f"~{name}" for name in ("scale_shift_table", "audio_scale_shift_table",
                                         "prompt_scale_shift_table", "audio_prompt_scale_shift_table")},
        "scale_shift_table_a2v_ca_video": "~video_a2v_cross_attn_scale_shift_table",
        "scale_shift_table_a2v_ca_audio": "~audio_a2v_cross_attn_scale_shift_table",
    },
)  # fmt: skip
# Own name -> diffusers' name of what makes scales and shifts out of the timestep.
_ADALN = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
_CONNECTORS = [
    Stack(
        own=f"{kind}_embeddings_connector.transformer_1d_blocks",
        depth=16,
        whole={name: "" for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn1.q_norm", "attn1.k_norm",
                                     "attn1.to_gate_logits", "ff.net.0.proj", "ff.net.2")},
    )
    for kind in ("audio", "video")
]  # fmt: skip

FAMILY = transformer(
    "LTX",
    stacks=(_BLOCKS, *_CONNECTORS),
    outside={
        "patchify_proj": "~proj_in",
        "audio_patchify_proj": "~audio_proj_in",
        **{name: f"~{name}" for name in (
            "proj_out", "audio_proj_out",
            *(f"{prefix}caption_projection.linear_{number}" for prefix in ("", "audio_") for number in (1, 2)),
        )},
        **{f"{own}.{end}": f"~{theirs}.{end}" for own, theirs in _ADALN.items()
           for end in ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")},
        "scale_shift_table": "~scale_shift_table",
        "audio_scale_shift_table": "~audio_scale_shift_table",
        "audio_embeddings_connector.learnable_registers": "",
        "video_embeddings_connector.learnable_registers": "",
    },
    parameters=("scale_shift_table", "audio_scale_shift_table", "audio_embeddings_connector.learnable_registers",
                "video_embeddings_connector.learnable_registers"),
    own_read_lately=("",),
)  # fmt: skip
