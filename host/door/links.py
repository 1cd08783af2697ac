"""What may come through a link: for each kind of link, how its values are known, and what to connect in place of others.

Kinds are known by what they can do and not by their class, for other packs bring their own (quantised models and the
like). Nothing is computed: a look at what is there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...lora_merge.updates.unmade import Unmade
from ...samplers.preset import Preset


@dataclass(frozen=True)
class Kind:
    """fits: whether a value is of this kind.   words: "it has to be ...".   source: where such values come from."""

    fits: Callable[[Any], bool]
    words: str
    source: str


def _can(*names: str) -> Callable[[Any], bool]:
    return lambda value: all(hasattr(value, name) for name in names)


def _is_vae(value: Any) -> bool:
    """A CLIP has encode and decode as well."""
    return _can("encode", "decode")(value) and not hasattr(value, "cond_stage_model")


def _is_tensor(value: Any, dimensions: int | None = None) -> bool:
    return isinstance(value, torch.Tensor) and (dimensions is None or value.ndim == dimensions)


def _is_conditioning(value: Any) -> bool:
    """Prompts: pairs of an encoded text, which some models lack, and a dict of options."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_prompt, value))


def _is_prompt(entry: Any) -> bool:
    if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], Mapping):
        return False
    return entry[0] is None or _is_tensor(entry[0])


def _is_latent(value: Any) -> bool:
    """Pictures (b, channels, h, w) and the like in a dict; also several such at once, ComfyUI's nested tensors."""
    if not isinstance(value, Mapping):
        return False
    masks, samples = _parts(value.get("noise_mask", torch.empty(0))), _parts(value.get("samples"))
    return all(map(_is_tensor, masks)) and all(map(_is_batch, samples))


def _parts(value: Any) -> Sequence[Any]:
    """Each of a nested tensor's tensors; anything else alone."""
    return value.unbind() if getattr(value, "is_nested", False) and hasattr(value, "unbind") else (value,)


def _is_batch(samples: Any) -> bool:
    return _is_tensor(samples) and samples.ndim >= 3 and 0 not in samples.shape


def _is_lora(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value or "samples" in value:  # a LATENT is a dict of tensors too
        return False
    # What lies in a file stays there.
    pieces = getattr(value, "pieces", value)
    return all(isinstance(key, str) and isinstance(piece, torch.Tensor | Unmade) for key, piece in pieces.items())


def _is_table(value: Any) -> bool:
    return _is_tensor(value, 1) and value.is_floating_point()


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


MODEL = Kind(_can("clone", "get_model_object", "add_patches"), "a MODEL", "Load Checkpoint or a LoRA loader")
CLIP = Kind(_can("clone", "cond_stage_model"), "a CLIP", "Load Checkpoint or Load CLIP")
KINDS = {
    "MODEL": MODEL,
    "CLIP": CLIP,
    "VAE": Kind(_is_vae, "a VAE", "Load Checkpoint or Load VAE"),
    "CONDITIONING": Kind(_is_conditioning, "a CONDITIONING with at least one prompt", "CLIP Text Encode"),
    "LATENT": Kind(_is_latent, "a LATENT with at least one picture", "Empty Latent Image or VAE Encode"),
    "IMAGE": Kind(lambda value: _is_tensor(value, 4), "an IMAGE", "VAE Decode or Load Image"),
    "MASK": Kind(_is_tensor, "a MASK", "Load Image (as Mask)"),
    "SIGMAS": Kind(_is_table, "SIGMAS", "LCM Scheduler"),
    "SAMPLER": Kind(_can("sample"), "a SAMPLER", "LCM Multistep Sampler or KSamplerSelect"),
    "GUIDER": Kind(_can("sample", "set_conds"), "a GUIDER", "BasicGuider or CFGGuider"),
    "NOISE": Kind(_can("generate_noise", "seed"), "a NOISE", "RandomNoise"),
    "LORA_MODEL": Kind(_is_lora, "a LORA_MODEL, the tensors of a LoRA by their names", "Load LoRA (weights)"),
    "LORA_STACK": Kind(
        _is_sequence,
        "a LORA_STACK, a list of (file name in the loras folder, model strength, text encoder strength)",
        "a stacker node",
    ),
    "LCM_PRESET": Kind(lambda value: isinstance(value, Preset), "a preset of LCM Kit", "LCM Preset or LCM-LoRA Loader"),
}
