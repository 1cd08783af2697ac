"""Expands LoKr Tucker cores, on which ComfyUI 0.30.0 with torch 2.11 fails: torch.kron needs contiguous factors."""

from collections.abc import Mapping

import torch


def without_cores(lora: dict[str, torch.Tensor], modules: Mapping[str, Mapping[str, str]]) -> dict[str, torch.Tensor]:
    """A LORA_MODEL with lokr_w2 whole wherever there was a lokr_t2; others are left as they are.

    modules: module -> part -> key. torch.kron wants its factors contiguous, which the product with a core is not;
    ComfyUI would log an error for every picture and leave the weight as it is.
    """
    with_core = {
        module: parts for module, parts in modules.items() if {"lokr_t2", "lokr_w2_a", "lokr_w2_b"} <= parts.keys()
    }
    if not with_core:
        return lora
    lora = dict(lora)
    for module, parts in with_core.items():
        core, a, b = (lora.pop(parts[part]).to(torch.float32) for part in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
        w2 = torch.einsum("ijkl,io,jn->onkl", core, a, b)
        if "alpha" in parts:
            w2 = w2 * (lora.pop(parts["alpha"]).item() / b.shape[0])
        # Without alpha the scale is 1, whether the first matrix is whole or not.
        lora[f"{module}.lokr_w2"] = w2.contiguous()
    return lora
