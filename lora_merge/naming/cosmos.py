"""The family of Cosmos Predict 2 and Anima, which is the same model with an adapter for its text encoder."""

from __future__ import annotations

from .tables import Stack
from .transformer import transformer

_MODULATED = {"self_attn": "norm1", "cross_attn": "norm2", "mlp": "norm3"}
_BLOCKS = Stack(
    own="blocks",
    theirs="transformer_blocks",
    depth=36,
    whole={
        **{f"{own}.{x}_proj": f"~{theirs}.to_{x}"
           for own, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")) for x in "qkv"},
        **{f"{own}.{x}_norm": f"~{theirs}.norm_{x}"
           for own, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")) for x in "qk"},
        "self_attn.output_proj": "~attn1.to_out.0",
        "cross_attn.output_proj": "~attn2.to_out.0",
        "mlp.layer1": "~ff.net.0.proj",
        "mlp.layer2": "~ff.net.2",
        **{f"adaln_modulation_{own}.{number}": f"~{theirs}.linear_{number}"
           for own, theirs in _MODULATED.items() for number in (1, 2)},
    },
)  # fmt: skip
# diffusers has the adapter as a model of its own, `text_conditioner`, with the same names in it.
_ADAPTER = Stack(
    own="llm_adapter.blocks",
    theirs="text_conditioner.blocks",
    depth=6,
    whole={
        name: f"~{name}"
        for name in (
            *(f"{attn}.{x}" for attn in ("self_attn", "cross_attn")
              for x in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
            *("norm_self_attn", "norm_cross_attn", "norm_mlp", "mlp.0", "mlp.2"),
        )
    },
)  # fmt: skip

FAMILY = transformer(
    "Cosmos Predict 2",
    stacks=(_BLOCKS, _ADAPTER),
    outside={
        "x_embedder.proj.1": "~patch_embed.proj",
        "t_embedder.1.linear_1": "~time_embed.t_embedder.linear_1",
        "t_embedder.1.linear_2": "~time_embed.t_embedder.linear_2",
        "t_embedding_norm": "~time_embed.norm",
        "final_layer.linear": "~proj_out",
        "final_layer.adaln_modulation.1": "~norm_out.linear_1",
        "final_layer.adaln_modulation.2": "~norm_out.linear_2",
        **{f"llm_adapter.{name}": f"~text_conditioner.{name}" for name in ("embed", "in_proj", "out_proj", "norm")},
    },
)
