"""Weights of a MODEL or CLIP as they are stored, whatever is loaded at the moment, and those that ComfyUI never patches."""

import uuid
from collections.abc import Callable, Mapping, Sequence

import comfy.lora
import comfy.model_patcher
import torch

# Parts of a quantised weight that ComfyUI's own conversion has used up already.
SCALES = ("scale_weight", "scale_input", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "scaled_fp8",
          "comfy_quant")  # fmt: skip


def weight_keys(patcher, prefix: str = "") -> list[str]:
    """Names of all weights and buffers. A state dict names parts of quantised weights too, which are no weights."""
    model = patcher.model
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    there |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return [key for key in model.state_dict() if key.startswith(prefix) and key in there and not key.endswith(SCALES)]


def stored_weight(patcher, key: str) -> tuple[torch.Tensor, Callable | None]:
    """(the weight without this patcher's patches, what makes plain numbers of it, None where it is plain).

    As ModelPatcher.get_key_patches, but for one key: that one goes by the names of the state dict, and stops at
    quantised layers.
    """
    weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    if key in patcher.object_patches:
        return patcher.object_patches[key], convert
    if key in patcher.object_patches_backup:
        weight = patcher.object_patches_backup[key]
    if key in patcher.backup:
        weight = patcher.backup[key].weight
    if key in patcher.hook_backup:
        weight = patcher.hook_backup[key][0]
    return weight, convert


def is_readable(weight: torch.Tensor, convert: Callable | None) -> bool:
    """Whether its numbers can be known: a packed weight tells nothing without the conversion that goes with it."""
    return weight.is_floating_point() or convert is not None


def never_patched(model: torch.nn.Module) -> Callable[[str], bool]:
    """key -> whether ComfyUI leaves this weight alone, whatever patches there are for it.

    ModelPatcher loads and patches parameters of modules without parts that have parameters of their own: not Z-Image's
    pad tokens, Wan's modulation, nor buffers.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    outer = {""}  # modules that stand around others with parameters
    for name in names:
        module = name.rpartition(".")[0].rpartition(".")[0]
        while module not in outer:
            outer.add(module)
            module = module.rpartition(".")[0]
    return lambda key: key not in names or key.rpartition(".")[0] in outer


def change_objects(patcher, terms: Sequence[Mapping], strength: float) -> None:
    """Puts changed weights in the place of those that are never patched, as object patches. terms: patches as add_patches',
    which add up.

    Exact, and like any patch there while this patcher is in use.
    """
    targets = {target: [patches[target] for patches in terms if target in patches] for one in terms for target in one}
    for target, patches in targets.items():
        key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
        weight, _ = stored_weight(patcher, key)
        value = weight.detach().to(torch.float32, copy=True)
        entries = [(strength, patch, 1.0, offset, function) for patch in patches]
        value = comfy.lora.calculate_weight(entries, value, key).to(weight.dtype)
        is_parameter = isinstance(weight, torch.nn.Parameter)
        patcher.add_object_patch(key, torch.nn.Parameter(value, requires_grad=False) if is_parameter else value)
    if targets:
        patcher.patches_uuid = uuid.uuid4()  # it tells one state of the weights from another
