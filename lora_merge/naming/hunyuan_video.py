"""The family of HunyuanVideo 1 and 1.5: Flux's blocks, more of them, behind a refiner of the text.

Its own names come in two writings, ComfyUI's (`img_attn.qkv`, `img_mlp.0`) and Tencent's (`img_attn_qkv`, `img_mlp.fc1`),
and ComfyUI reads both. diffusers' names it does not read.
"""

from __future__ import annotations

import re
from dataclasses import replace

from . import flux
from .tables import Fused, Stack
from .transformer import transformer


def _unread(names: str) -> str:
    return " ".join(f"~{name}" for name in names.split())


def _of_flux(stack: Stack, depth: int, also: dict[str, str]) -> Stack:
    return replace(
        stack,
        depth=depth,
        whole={own: _unread(theirs) for own, theirs in stack.whole.items()},
        fused={
            own: replace(fused, slices=tuple(map(_unread, fused.slices)), share=4) for own, fused in stack.fused.items()
        },
        also=also,
    )


_DOUBLE_ALSO = {
    f"{stream}_{own}": f"{stream}_{tencent}"
    for stream in ("img", "txt")
    for own, tencent in (
        ("attn.qkv", "attn_qkv"),
        ("attn.proj", "attn_proj"),
        ("mlp.0", "mlp.fc1"),
        ("mlp.2", "mlp.fc2"),
        ("mod.lin", "mod.linear"),
    )
}
_DOUBLE_ALSO |= {
    f"{stream}_attn.norm.{own}_norm": f"{stream}_attn.norm.{own}_norm ~{stream}_attn_{tencent}_norm"
    for stream in ("img", "txt")
    for own, tencent in (("query", "q"), ("key", "k"))
}
_SINGLE_ALSO = {
    "modulation.lin": "modulation.linear",
    "linear1": "linear1",
    "linear2": "linear2",
    "norm.query_norm": "norm.query_norm ~q_norm",
    "norm.key_norm": "norm.key_norm ~k_norm",
}
_REFINER = Stack(
    own="txt_in.individual_token_refiner.blocks",
    theirs="context_embedder.token_refiner.refiner_blocks",
    depth=2,
    whole={
        "self_attn.proj": "~attn.to_out.0",
        "adaLN_modulation.1": "~norm_out.linear",
        "norm1": "~norm1",
        "norm2": "~norm2",
        "mlp.0": "~ff.net.0.proj",
        "mlp.2": "~ff.net.2",
    },
    fused={"self_attn.qkv": Fused(("~attn.to_q ~attn.to_k ~attn.to_v",), "www")},
    also={
        "self_attn.proj": "self_attn_proj",
        "self_attn.qkv": "self_attn_qkv",
        "mlp.0": "mlp.fc1",
        "mlp.2": "mlp.fc2",
        **{name: name for name in ("adaLN_modulation.1", "norm1", "norm2")},
    },
)
_EMBEDDERS = {
    f"txt_in.{own}_embedder.{end}": f"context_embedder.time_text_embed.{theirs}.{linear}"
    for own, theirs in (("t", "timestep_embedder"), ("c", "text_embedder"))
    for end, linear in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
}
_OF_1_5 = [
    *(f"vision_in.proj.{number}" for number in (0, 1, 3, 4)),
    *(f"byt5_in.{name}" for name in ("layernorm", "fc1", "fc2", "fc3")),
    *("time_r_in.in_layer", "time_r_in.out_layer", "cond_type_embedding"),
]
_OUTSIDE = {
    "img_in.proj": "x_embedder.proj",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "final_layer.linear": "proj_out",
    **flux.TIME,
    **_EMBEDDERS,
    **dict.fromkeys((*_OF_1_5, *flux.TURNED), ""),
}

# diffusers knows Tencent's names by this one. What it makes of the refiner's qkv and of the layers outside of blocks is wrong
# (both factors are cut in three), so those are written as ComfyUI has them.
_KNOWN_BY = ".img_attn_qkv"
_IN_COMMON = {
    own: tencent.split()[0] for own, tencent in (*_DOUBLE_ALSO.items(), *_SINGLE_ALSO.items()) if "norm" not in own
}
_OWN = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.(.+)")


def _common(own: str) -> str | None:
    match = _OWN.fullmatch(_TABLES.dots(own) or "")
    name = _IN_COMMON.get(match[3]) if match else None
    return f"{match[1]}.{match[2]}.{name}" if match and name else None


_TABLES = transformer(
    "HunyuanVideo",
    stacks=(_of_flux(flux.DOUBLE, 54, _DOUBLE_ALSO), _of_flux(flux.SINGLE, 40, _SINGLE_ALSO), _REFINER),
    outside={own: f"{_unread(theirs)} {own}" for own, theirs in _OUTSIDE.items()},
    turned={own: _unread(theirs) for own, theirs in flux.TURNED.items()},
    theirs_read_as=("transformer.", "diffusion_model."),
    ratios=flux.RATIOS,
    sure=True,
)
FAMILY = replace(_TABLES, common=_common, tells_diffusers=lambda name: name.endswith(_KNOWN_BY))
