"""The family of Krea 2: one stream of blocks, and a small transformer that puts layers of the text together."""

from __future__ import annotations

from .tables import Stack
from .transformer import transformer

_BLOCK = {
    **{f"attn.w{x}": f"attn.to_{x}" for x in "qkv"},
    "attn.wo": "attn.to_out.0 attn.to_out",
    "attn.gate": "attn.to_gate",
    **{f"mlp.{x}": f"ff.{x}" for x in ("gate", "up", "down")},
}
_PARAMETERS = {
    name: "" for name in ("prenorm.scale", "postnorm.scale", "attn.qknorm.qnorm.scale", "attn.qknorm.knorm.scale")
}
_FUSION = ("layerwise_blocks", "refiner_blocks")

FAMILY = transformer(
    "Krea 2",
    stacks=(
        Stack(own="blocks", theirs="transformer_blocks", whole=_BLOCK, parameters={**_PARAMETERS, "mod.lin": ""}),
        *(
            Stack(own=f"txtfusion.{name}", theirs=f"text_fusion.{name}", depth=2, whole=_BLOCK, parameters=_PARAMETERS)
            for name in _FUSION
        ),
    ),
    outside={
        "first": "img_in",
        "tmlp.0": "time_embed.linear_1",
        "tmlp.2": "time_embed.linear_2",
        "tproj.1": "time_mod_proj",
        "txtmlp.1": "txt_in.linear_1",
        "txtmlp.3": "txt_in.linear_2",
        "txtfusion.projector": "text_fusion.projector",
        "last.linear": "final_layer.linear",
        "txtmlp.0.scale": "",
        "last.norm.scale": "",
        "last.modulation.lin": "",
    },
    parameters=("txtmlp.0.scale", "last.norm.scale", "last.modulation.lin"),
    theirs_read_as=("diffusion_model.", "transformer.", "lycoris_", ""),
    theirs_behind_kohya=True,
)
