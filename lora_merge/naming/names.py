"""Module names: many spellings in files, one canonical name here.

Canonical is `lora_unet_` + the ldm name for Stable Diffusion UNets (`lora_unet_input_blocks_1_1_proj_in`), `lora_te1_`
and `lora_te2_` for the CLIP text encoders, `lora_unet_` + the underscored name for modules that a file spells
`diffusion_model.`, `lora_transformer_` for those it spells `transformer.`; anything else is its own name, underscored.
Canonical names decide which modules meet. What is written is the spelling that was read, so a model whose names mean
nothing here (Flux, Wan, ...) is written as it came.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from . import unet
from .unet import Layout

_WRAPPED = re.compile(r"(?:(unet|transformer|text_encoder(?:_[23])?)\.)?base_model\.model\.(.+)")
_TEXT_ENCODER = re.compile(r"text_encoder(_[23])?\.(.+)")
_COMFY_CLIP = re.compile(r"text_encoders\.clip_([lhg])\.transformer\.(.+)")

# The words that names of UNets and CLIP text encoders consist of, for turning underscores back into dots.
_WORDS = """
    down_blocks up_blocks mid_block attentions resnets transformer_blocks downsamplers upsamplers attn1 attn2 to_q to_k
    to_v to_out proj_in proj_out ff net proj norm norm1 norm2 norm3 conv conv1 conv2 conv_shortcut time_emb_proj conv_in
    conv_out conv_norm_out time_embedding add_embedding class_embedding linear_1 linear_2 cond_proj
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 layer_norm1 layer_norm2
    final_layer_norm embeddings token_embedding position_embedding text_projection
""".split()
_WORD = "|".join(sorted(_WORDS, key=len, reverse=True))
_DOTTABLE = re.compile(rf"(?:{_WORD}|\d+)(?:_(?:{_WORD}|\d+))*")
_DOT = re.compile(rf"({_WORD}|\d+)(?:_|$)")


def spelling(module: str) -> str:
    """How a module of a file is written in kohya format, in a form that ComfyUI's key maps know.

    UNet and CLIP modules get kohya's prefix and underscores, their block naming (diffusers or ldm) stays;
    any other module stays as it is, and so does a parameter that is named whole (`diffusion_model.x.bias`): kohya's
    format names modules only.
    """
    name = module
    if match := _WRAPPED.fullmatch(module):
        name = f"{match[1]}.{match[2]}" if match[1] else match[2]
    if match := _TEXT_ENCODER.fullmatch(name):
        return f"lora_te{(match[1] or '')[1:]}_{_underscored(match[2])}"
    if name.startswith("text_model."):
        return f"lora_te_{_underscored(name)}"
    if name.startswith("diffusion_model.") and name.endswith(".bias"):
        return module
    # Wan Fun's trainer writes two underscores; ComfyUI replaces them only if one particular key is there. Any number of
    # them counts as one, so that a spelling's spelling is itself.
    body = _underscored(re.sub(r"^(?:unet\.|diffusion_model\.|lora_unet_[_.]*|lycoris_)", "", name))
    of_unet = _without_processor(body)
    if unet.is_diffusers(of_unet) or unet.is_ldm(of_unet):
        return f"lora_unet_{of_unet}"
    return f"lora_unet_{body}" if name.startswith("lora_unet_") else module


def canonical(name: str, layout: Layout) -> str:
    """The canonical name of a `spelling`; `layout` translates between the block namings of its UNet."""
    if name.startswith("lora_unet_"):
        body = name.removeprefix("lora_unet_")
        return f"lora_unet_{unet.to_ldm(body, layout) or body}"
    if name.startswith("lora_te_"):
        return f"lora_te1_{name.removeprefix('lora_te_')}"
    if match := _COMFY_CLIP.fullmatch(name):
        return f"lora_te{'2' if match[1] == 'g' else '1'}_{_underscored(match[2])}"
    if name.startswith("diffusion_model."):
        return f"lora_unet_{_underscored(name.removeprefix('diffusion_model.'))}"
    if match := re.fullmatch(r"(?:transformer\.|lycoris_|(?:unet\.|transformer\.)?base_model\.model\.)(.+)", name):
        return f"lora_transformer_{_underscored(match[1])}"
    return _underscored(name)


def kernel(canonical: str) -> tuple[int, ...]:
    """Kernel size of a module of a Stable Diffusion UNet that is a convolution wider than 1x1; () for all others."""
    body = canonical.removeprefix("lora_unet_")
    return (3, 3) if body != canonical and unet.is_wide_convolution(body) else ()


def unet_bodies(spellings: Iterable[str]) -> list[str]:
    """The UNet names among spellings, without prefix: what `unet.infer_layout` works on."""
    return [name.removeprefix("lora_unet_") for name in spellings if name.startswith("lora_unet_")]


def tidy(names: dict[str, str]) -> dict[str, str]:
    """Canonical name -> spelling to write, in one naming: files that mix two are read by ComfyUI but not by all.

    A mix of diffusers and ldm blocks becomes ldm, ComfyUI's own; `lora_te_` beside `lora_te1_` or `lora_te2_` becomes
    `lora_te1_`.
    """
    bodies = unet_bodies(names.values())
    mixed = any(map(unet.is_diffusers, bodies)) and any(map(unet.is_ldm, bodies))
    two_encoders = any(name.startswith(("lora_te1_", "lora_te2_")) for name in names.values())
    result = {}
    for module, name in names.items():
        if (mixed and name.startswith("lora_unet_")) or (two_encoders and name.startswith("lora_te_")):
            name = module
        result[module] = name
    return result


def dotted(name: str, layout: Layout) -> str | None:
    """The diffusers spelling of a `spelling`, with dots (`unet.down_blocks.0...`); None if there is no safe one."""
    if name.startswith("transformer."):
        return name
    if match := re.fullmatch(r"lora_te([123]?)_(.+)", name):
        prefix, body = f"text_encoder_{match[1]}" if match[1] in ("2", "3") else "text_encoder", match[2]
    elif name.startswith("lora_unet_"):
        prefix, body = "unet", name.removeprefix("lora_unet_")
        body = unet.to_diffusers(body, layout) or body
    else:
        return None
    if not _DOTTABLE.fullmatch(body):
        return None
    return f"{prefix}.{'.'.join(_DOT.findall(body))}"


def _underscored(name: str) -> str:
    return name.replace(".", "_")


def _without_processor(body: str) -> str:
    """The name of a Stable Diffusion UNet's module, if it is one: diffusers' processors have to_out, all others to_out.0."""
    return re.sub(r"(attn[12])_to_out$", r"\1_to_out_0", body.replace("_processor_to_", "_to_"))
