"""From the keys of a state dict to updates under canonical names, with every key accounted for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..algebra.precision import all_finite, is_finite
from ..naming import names
from ..naming.unet import infer_layout
from ..updates.build import build, is_carried, problem
from ..updates.layer import Layer
from ..updates.weight_dependent import Carried
from . import keys
from .keys import DIFF_PARTS
from .peft import AdapterScales

_NUMBERS = ("alpha", "reshape_weight")
_ANY_DTYPE = tuple(f".{part}" for part in _NUMBERS)
# Pairs of 4-bit numbers, and exponents alone.
_NO_NUMBERS = {getattr(torch, name, None) for name in ("float4_e2m1fn_x2", "float8_e8m0fnu")}


@dataclass(frozen=True)
class KeyAccount:
    """Where each key of a file ended; every key is in one of the three, in the order of the file.

    understood: in an update that adds up. carried: in one that depends on the weight, kept as it came.
    refused: read by no LoRA loader of ComfyUI; a file with such keys is an error.
    """

    understood: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Contents:
    """What `read` finds; the fields are those of Lora."""

    modules: dict[str, Layer] = field(default_factory=dict)
    diffs: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    carried: dict[str, Carried] = field(default_factory=dict)
    spellings: dict[str, str] = field(default_factory=dict)
    keys: KeyAccount = field(default_factory=KeyAccount)


def account_keys(names_of_keys: Iterable[str]) -> KeyAccount:
    """What becomes of each key, told from the names alone."""
    return _account({key: keys.parse(key) for key in names_of_keys})


def _account(parsed: Mapping[str, tuple[str, str] | None]) -> KeyAccount:
    parts: dict[str, set[str]] = {}
    for module, part in filter(None, parsed.values()):
        parts.setdefault(module, set()).add(part)
    dependent = {module for module, found in parts.items() if is_carried(found)}
    ends: dict[str, list[str]] = {"understood": [], "carried": [], "refused": []}
    for key, known in parsed.items():
        if known is None:
            ends["refused"].append(key)
        else:
            module, part = known
            # A bias difference adds up, whatever happens to the weight beside it.
            ends["carried" if module in dependent and part not in DIFF_PARTS else "understood"].append(key)
    return KeyAccount(*map(tuple, ends.values()))


def read(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> Contents:
    """What a state dict in any spelling holds, by canonical name.

    Every key ends in it, or in the ValueError that names it.
    """
    parsed = {key: keys.parse(key) for key in state_dict}
    account = _account(parsed)
    parts: dict[str, dict[str, str]] = {}  # module as spelled -> part -> key
    doubled = []
    for key, known in parsed.items():
        if known is None:
            continue
        module, part = known
        if part in parts.setdefault(module, {}):
            doubled.append(f"{parts[module][part]} and {key}")
        parts[module][part] = key
    if not parts and all(keys.refused_format(key)[0] == keys.UNKNOWN for key in account.refused):
        first = f" (its first key is {account.refused[0]})" if account.refused else ""
        raise ValueError(
            f"{source}: no LoRA in it{first}; it may be a checkpoint or an empty file. Choose a LoRA file."
        )
    if account.refused:
        # Their alphas belong to them and are no trouble of their own.
        raise ValueError(keys.refusal(source, account.refused))
    _check_complete(parts, doubled, source)
    _check_values({key: state_dict[key] for found in parts.values() for key in found.values()}, source)

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
    spellings = names.tidy({canonical: spelled[module] for canonical, module in raw_of.items()})
    contents = Contents(spellings=spellings, keys=account)
    scales = AdapterScales(metadata)
    for canonical, module in raw_of.items():
        tensors = {part: state_dict[key].detach() for part, key in parts[module].items()}
        try:
            _put(contents, canonical, tensors, _alpha(tensors, scales, module))
        except ValueError as error:
            raise ValueError(f"{source}: {module}: {error}. The file may be damaged.") from None
    return contents


def _put(contents: Contents, canonical: str, tensors: dict[str, Tensor], alpha: float | None) -> None:
    tensors = {part: tensor if part in _NUMBERS else _floating(tensor) for part, tensor in tensors.items()}
    for part in DIFF_PARTS:
        if part in tensors:
            # ComfyUI reads b_norm beside w_norm only; alone it is the same as diff_b.
            name = "diff_b" if part == "b_norm" and "w_norm" not in tensors else part
            contents.diffs[canonical, name] = tensors[part]
    update = build(tensors, alpha, names.kernel(canonical))
    if isinstance(update, Layer):
        contents.modules[canonical] = update
    elif update is not None:
        contents.carried[canonical] = update


def _alpha(tensors: Mapping[str, Tensor], scales: AdapterScales, module: str) -> float | None:
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1:
            raise ValueError(f"alpha has shape {tuple(tensors['alpha'].shape)}, but it has to be one number")
        return float(tensors["alpha"].item())
    # Only PEFT and diffusers write alphas there, and only for LoRA.
    if "down" in tensors:
        return scales.alpha(module, int(tensors["down"].shape[0]) if tensors["down"].dim() else 1)
    return None


def _floating(tensor: Tensor) -> Tensor:
    # 8-bit floats have no arithmetic in torch; float16 holds all their values.
    return tensor.half() if tensor.dtype.itemsize == 1 else tensor


def _check_complete(parts: Mapping[str, Mapping[str, str]], doubled: list[str], source: str) -> None:
    problems = [f"{pair} are the same thing" for pair in doubled]
    for module, found in parts.items():
        if text := problem(found):
            problems.append(f"{module}: {text}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{source}: incomplete or contradictory: {'; '.join(sorted(problems)[:3])}{more}. "
                         "The file may be damaged.")  # fmt: skip


def _check_values(tensors: Mapping[str, Tensor], source: str) -> None:
    wrong = sorted(
        f"{key} ({str(tensor.dtype).removeprefix('torch.')})"
        for key, tensor in tensors.items()
        if (not tensor.dtype.is_floating_point or tensor.dtype in _NO_NUMBERS) and not key.endswith(_ANY_DTYPE)
    )
    if wrong:
        raise ValueError(
            f"{source}: {len(wrong)} weights are not floating point, {', '.join(wrong[:3])}; a quantized LoRA has to be "
            "saved as float16 first."
        )
    empty = sorted(key for key, tensor in tensors.items() if tensor.numel() == 0)
    if empty:
        raise ValueError(f"{source}: {len(empty)} tensors have no values, {', '.join(empty[:3])}; the file is damaged.")
    if not all_finite(tensors.values()):
        broken = sorted(key for key, tensor in tensors.items() if not is_finite(tensor))
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(
            f"{source}: NaN or infinite values in {', '.join(broken[:3])}{more}; the training diverged or the file was "
            "saved in too small a dtype, so use another copy."
        )
