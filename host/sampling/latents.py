"""LATENTs in and out, as core's samplers take and give them."""

import inspect

import comfy.model_management
import comfy.sample
import torch

# What an empty latent says of the picture it is meant for, named as the argument that core's function has for it.
# ComfyUI 0.16 knows the first only.
RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")
KNOWN = [name for name in RATIOS if name in inspect.signature(comfy.sample.fix_empty_latent_channels).parameters]


def fitted(model, latent: dict) -> dict:
    """A copy of the LATENT, an empty one with the model's channels, in the size that makes the picture asked for."""
    ratios = {name: latent[name] for name in KNOWN if latent.get(name) is not None}
    kept = {name: value for name, value in latent.items() if name not in KNOWN}
    return kept | {"samples": comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)}


def given_out(latent: dict, samples) -> dict:
    """The LATENT with these samples, where and in what ComfyUI keeps results."""
    samples = samples.to(comfy.model_management.intermediate_device())
    if hasattr(comfy.model_management, "intermediate_dtype"):  # came after 0.16
        samples = samples.to(dtype=comfy.model_management.intermediate_dtype())
    return latent | {"samples": samples}


def has_picture(samples) -> bool:
    """False for an empty latent, which is all zeros; a nested one has a picture if one of its parts has."""
    parts = samples.unbind() if samples.is_nested else [samples]
    return any(bool(torch.count_nonzero(part)) for part in parts)
