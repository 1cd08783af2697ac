"""A LORA_MODEL out of two MODELs: their weights as ComfyUI would use them, one at a time, without loading a model."""

from collections.abc import Iterator, Mapping

import comfy.lora
import comfy.model_management
import torch

from ...lora_merge.extracting.checkpoints import is_told_guidance
from ...lora_merge.extracting.extract import NAMELESS, Weights, extract
from ...lora_merge.extracting.report import describe
from ...lora_merge.naming import names
from ...lora_merge.words import many
from ..progress import Progress
from .stored import is_readable, stored_weight, weight_keys
from .weights import LoraWeights, from_lora

# Two models of one family share nearly all weights; a few come and go with training extras.
FAMILY = 0.9
MODEL_PREFIX = "diffusion_model."
LLAMA = ".transformer.model."


def extract_lora(
    model_tuned, model_base, rank: int, keep: float, clip_tuned=None, clip_base=None
) -> tuple[LoraWeights, str]:
    """(LORA_MODEL, report). Patches of both MODELs count; nothing of them is changed or loaded.

    Raises ValueError for models that are not of one family, or do not differ.
    """
    if (clip_tuned is None) != (clip_base is None):
        raise ValueError("Only one CLIP is connected. Connect clip_tuned and clip_base, or neither.")
    sides = [(model_tuned, model_base, MODEL_PREFIX, _unet_names(model_base))]
    if clip_base is not None:
        sides.append((clip_tuned.patcher, clip_base.patcher, "", _clip_names(clip_base)))
    # Everything is checked before anything is computed.
    plans = [_plan(tuned, base, prefix) for tuned, base, prefix, _ in sides]
    device = comfy.model_management.get_torch_device()
    if not comfy.model_management.is_device_cpu(device):
        largest = max(entry[0].numel() for plan in plans for entry, _ in plan.values())
        comfy.model_management.free_memory(_need(largest), device)
    progress, done, total = Progress(), 0, sum(map(len, plans))

    def weights() -> Iterator[Weights]:
        nonlocal done
        for plan, (_, _, prefix, homes) in zip(plans, sides, strict=True):
            for key, (tuned, base) in plan.items():
                progress(done, total)
                # ComfyUI spells weights of the model with its prefix, those of text encoders as they are.
                yield _pair(key, _name(key, homes, prefix), tuned, base, device)
                done += 1
        progress(done, total)

    lora, found = extract(weights(), rank=rank, keep=keep, source="Extracted LoRA", device=_place)
    if not lora.spellings:
        raise ValueError(
            "model_tuned and model_base do not differ, so there is nothing to extract. Connect a fine-tuned model, or one "
            "with a LoRA on it, to model_tuned, and the model it was made from to model_base."
        )
    return from_lora(lora), describe(found)


def _plan(tuned, base, prefix: str) -> dict[str, tuple[list, list]]:
    """Weight -> (what ComfyUI makes it from in the one, and in the other): the stored weight, then its patches."""
    ours, theirs = _entries(tuned, prefix), _entries(base, prefix)
    common, every = ours.keys() & theirs.keys(), ours.keys() | theirs.keys()
    if not common or len(common) < FAMILY * sum(not is_told_guidance(key) for key in every):
        other = sorted(every - common)
        raise ValueError(
            f"model_tuned ({_kind(tuned)}) and model_base ({_kind(base)}) are not of one family: {len(common)} of "
            f"{many(len(every), 'weights')} have the same name{f' (first other: {other[0]})' if other else ''}. Connect a "
            "fine-tuned model and the model it was made from."
        )
    shapes = [(key, _shape(ours[key]), _shape(theirs[key])) for key in ours if key in theirs]
    differing = [entry for entry in shapes if None not in entry and entry[1] != entry[2]]
    if differing:
        key, one, other = differing[0]
        raise ValueError(
            f"model_tuned ({_kind(tuned)}) and model_base ({_kind(base)}) are not of one family: {many(len(differing), 'weights have', 'weight has')} "
            f"another shape (first: {key}, {one} and {other}). Connect a fine-tuned model and the model it was "
            "made from."
        )
    return {key: (ours[key], theirs[key]) for key in ours if key in theirs}


def _entries(patcher, prefix: str) -> dict[str, list]:
    """Weight -> [(as it is stored, what makes plain numbers of it), *its patches]. Raises ValueError for packed ones."""
    entries = {
        key: [stored_weight(patcher, key), *patcher.patches.get(key, [])] for key in weight_keys(patcher, prefix)
    }
    packed = [key for key, entry in entries.items() if key.endswith(".weight") and not is_readable(*entry[0])]
    if packed:
        raise ValueError(
            f"{len(packed)} of the {many(len(entries), 'weights')} of one model ({_kind(patcher)}) are packed in a form that cannot "
            f"be read here (the first: {packed[0]}, {entries[packed[0]][0][0].dtype}); load this model unquantised, or in "
            "a format of ComfyUI's own."
        )
    return entries


def _kind(patcher) -> str:
    """What kind of model, in ComfyUI's word."""
    model = patcher.model
    return type(getattr(model, "model_config", model)).__name__


def _shape(entry: list) -> tuple[int, ...] | None:
    """None for a packed weight, whose stored shape says nothing."""
    weight = entry[0][0]
    return tuple(weight.shape) if weight.is_floating_point() else None


def _pair(key: str, name: str, tuned: list, base: list, device: torch.device) -> Weights:
    if tuned[0][0] is base[0][0] and len(tuned) == len(base) and all(map(_same, tuned[1:], base[1:])):
        return name, base[0][0], base[0][0]
    where = device if _fits(base[0][0].numel(), device) else torch.device("cpu")
    return name, _weight(key, tuned, where), _weight(key, base, where)


def _same(first: tuple, second: tuple) -> bool:
    """Whether two patches are one: the same strengths and the same tensors."""
    return all(a is b or (isinstance(a, float) and a == b) for a, b in zip(first, second, strict=True))


def _weight(key: str, entry: list, device: torch.device) -> torch.Tensor:
    """As it is when the model runs, in float32: what ModelPatcher.patch_weight_to_device does, on a copy."""
    (weight, convert), *patches = entry
    value = comfy.model_management.cast_to_device(weight, device, torch.float32, copy=True)
    value = convert(value, inplace=True) if convert else value
    return comfy.lora.calculate_weight(patches, value, key) if patches else value


def _need(numbers: int) -> int:
    """Bytes for one weight: two copies and what a patch makes in float32, the difference and its square in float64."""
    return numbers * (3 * 4 + 3 * 8)


def _fits(numbers: int, device: torch.device) -> bool:
    if comfy.model_management.is_device_cpu(device):
        return True
    return comfy.model_management.get_free_memory(device) > 1.2 * _need(numbers)


def _place(weight: torch.Tensor) -> torch.device:
    """Where a weight already is: it went to the device only if there was room."""
    return weight.device


def _name(key: str, homes: Mapping[str, str], prefix: str) -> str:
    module, _, part = key.rpartition(".")
    name = homes.get(f"{module}.weight")
    return f"{name}.{part}" if name and part in ("weight", "bias") else f"{key}{NAMELESS}"


def _unet_names(patcher) -> dict[str, str]:
    """Weight -> how LoRA files spell its module, checked against what ComfyUI knows."""
    known = comfy.lora.model_lora_keys_unet(patcher.model, {})
    result = {}
    for key in patcher.model_state_dict(MODEL_PREFIX):
        module = key.removesuffix(".weight")
        if module != key and known.get(spelled := names.kohya_name(module)) == key:
            result[key] = spelled
    return result


def _clip_names(clip) -> dict[str, str]:
    """{weight of the text encoder: its name}: kohya's name where there is one that every ComfyUI reads, else ComfyUI's own.

    Of a Llama-like encoder neither kohya's name nor ComfyUI's own without the wrapper is known to ComfyUI 0.16.
    """
    known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    two = any(name.startswith("lora_te2_") for name in known)
    first = "lora_te1_" if two else "lora_te_"
    result: dict[str, str] = {}
    for name, key in known.items():
        if isinstance(key, str) and name == f"text_encoders.{key.removesuffix('.weight')}":
            result[key] = name
    for prefix in ("lora_te3_", "lora_te2_", first):
        result |= {
            key: name
            for name, key in known.items()
            if name.startswith(prefix) and isinstance(key, str) and LLAMA not in key
        }
    return result
