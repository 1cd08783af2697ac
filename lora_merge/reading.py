"""From the keys of a state dict to layers under canonical names, with every key accounted for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import keys, names
from .layer import LoraLayer
from .peft import adapter_alpha
from .unet import infer_layout

Parts = tuple[dict[str, LoraLayer], dict[tuple[str, str], Tensor], dict[str, str]]


def read(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> Parts:
    """Layers and differences by canonical name, and the spelling of each name, from a state dict in any spelling.

    Every key ends in a layer or a difference, or in the ValueError that names it.
    """
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {}
    refused, doubled = [], []
    for key, tensor in state_dict.items():
        parsed = keys.parse(key)
        if parsed is None:
            refused.append(key)
            continue
        module, part = parsed
        if part in parts.setdefault(module, {}):
            doubled.append(f"{parts[module][part][0]} and {key}")
        parts[module][part] = (key, tensor)
    if not parts and all(keys.refused_format(key)[0] == keys.UNKNOWN for key in refused):
        first = f" (its first key is {refused[0]})" if refused else ""
        raise ValueError(
            f"{source}: no LoRA in it{first}; it may be a checkpoint or an empty file. Choose a LoRA file."
        )
    if refused:
        # Their alphas belong to them and are no trouble of their own.
        raise ValueError(keys.refusal(source, refused))
    _check_complete(parts, doubled, source)
    _check_values({key: tensor for found in parts.values() for key, tensor in found.values()}, source)

    spelled = {module: names.spelling(module) for module in parts}
    layout = infer_layout(names.unet_bodies(spelled.values()))
    raw_of: dict[str, str] = {}
    for module, name in spelled.items():
        canonical = names.canonical(name, layout)
        if canonical in raw_of:
            raise ValueError(
                f"{source}: {raw_of[canonical]} and {module} are two spellings of one module, and a loader would use "
                "only one of them; remove one."
            )
        raw_of[canonical] = module
    modules, diffs = {}, {}
    for canonical, module in raw_of.items():
        tensors = {part: tensor for part, (_, tensor) in parts[module].items()}
        if "up" in tensors:
            try:
                modules[canonical] = _layer(tensors, metadata, module)
            except ValueError as error:
                raise ValueError(f"{source}: {module}: {error}. The file may be damaged.") from None
        for part in keys.DIFF_PARTS:
            if part in tensors:
                diffs[canonical, part] = tensors[part].detach()
    spellings = names.tidy({canonical: spelled[module] for canonical, module in raw_of.items()})
    return modules, diffs, spellings


def _layer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], module: str) -> LoraLayer:
    up, down = _floating(tensors["up"]), _floating(tensors["down"])
    mid = _floating(tensors["mid"]) if "mid" in tensors else None
    alpha = None
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1:
            raise ValueError(f"alpha has shape {tuple(tensors['alpha'].shape)}, but it has to be one number")
        alpha = float(tensors["alpha"].item())
    elif metadata:
        alpha = adapter_alpha(metadata, module, int(down.shape[0]) if down.dim() else 1)
    return LoraLayer(up, down, alpha, mid)


def _floating(tensor: Tensor) -> Tensor:
    # 8-bit floats have no arithmetic in torch; float16 holds all their values.
    return tensor.detach().to(torch.float16) if tensor.dtype.itemsize == 1 else tensor.detach()


def _check_complete(parts: Mapping[str, Mapping[str, tuple[str, Tensor]]], doubled: list[str], source: str) -> None:
    problems = [f"{pair} are the same thing" for pair in doubled]
    for module, found in parts.items():
        weights = {"up", "down", "mid"} & set(found)
        if weights and not {"up", "down"} <= weights:
            missing = " and ".join(sorted({"up", "down"} - weights))
            problems.append(f"{module} has {', '.join(key for key, _ in found.values())} but no {missing}")
        if not weights and "alpha" in found:
            problems.append(f"{found['alpha'][0]} belongs to no factors")
        if "diff" in found and ("w_norm" in found or weights):
            problems.append(f"{module} has both {found['diff'][0]} and another update of its weight")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{source}: incomplete or contradictory: {'; '.join(sorted(problems)[:3])}{more}. "
                         "The file may be damaged.")  # fmt: skip


def _check_values(tensors: Mapping[str, Tensor], source: str) -> None:
    wrong = sorted(f"{key} ({str(t.dtype).removeprefix('torch.')})" for key, t in tensors.items()
                   if not t.dtype.is_floating_point and not key.endswith(".alpha"))  # fmt: skip
    if wrong:
        raise ValueError(
            f"{source}: {len(wrong)} weights are not floating point, {', '.join(wrong[:3])}; a quantized LoRA has to be "
            "saved as float16 first."
        )
    broken = sorted(key for key, tensor in tensors.items() if not bool(torch.isfinite(_floating(tensor)).all()))
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(
            f"{source}: NaN or infinite values in {', '.join(broken[:3])}{more}; the training diverged or the file was "
            "saved in too small a dtype, so use another copy."
        )
