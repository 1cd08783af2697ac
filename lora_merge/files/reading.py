"""From the keys of a state dict to updates under canonical names, with every key accounted for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..algebra.precision import all_finite, is_finite
from ..metadata.adapter_scales import AdapterScales
from ..naming import names
from ..naming.unet import infer_layout
from ..updates.build import build, idle, ignores_alpha, is_carried, problem
from ..updates.layer import Layer
from ..updates.unmade import Unmade, made, not_finite
from ..updates.weight_dependent import Carried
from ..words import many
from . import dialects, keys
from .keys import DIFF_PARTS
from .twice import named, pairs_text, twice

_NUMBERS = ("alpha", "reshape_weight")
_ANY_DTYPE = tuple(f".{part}" for part in _NUMBERS)
# Pairs of 4-bit numbers, and exponents alone.
_NO_NUMBERS = {getattr(torch, name, None) for name in ("float4_e2m1fn_x2", "float8_e8m0fnu")}


@dataclass(frozen=True)
class KeyAccount:
    """Where each key of a file ended; every key is in one of the three, in the order of the file.

    understood: in an update that adds up. carried: in one that depends on the weight, kept as it came.
    unread: without effect in ComfyUI's loader, which does not know it, or knows nothing that it is the scale of.
    """

    understood: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class Contents:
    """What `read` finds; the fields are those of Lora."""

    modules: dict[str, Layer] = field(default_factory=dict)
    diffs: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    carried: dict[str, Carried] = field(default_factory=dict)
    spellings: dict[str, str] = field(default_factory=dict)
    keys: KeyAccount = field(default_factory=KeyAccount)
    unread: dict[str, Tensor] = field(default_factory=dict)


def account_keys(names_of_keys: Iterable[str]) -> KeyAccount:
    """What becomes of each key, told from the names alone."""
    return _account({key: keys.parse(key) for key in names_of_keys})


def unread_keys(state_dict: Mapping[str, Tensor | Unmade]) -> set[str]:
    """Keys of a LORA_MODEL or file that have no effect."""
    parsed = {key: keys.parse(key) for key in state_dict}
    return {*_account(parsed, _without_effect(parsed, state_dict)).unread}


def _account(parsed: Mapping[str, tuple[str, str] | None], without_effect: Collection[str] = ()) -> KeyAccount:
    """without_effect: keys whose values say so."""
    parts: dict[str, set[str]] = {}
    for module, part in filter(None, parsed.values()):
        parts.setdefault(module, set()).add(part)
    useless = {module: idle(found) for module, found in parts.items()}
    dependent = {module for module, found in parts.items() if is_carried(found - useless[module])}
    ends: dict[str, list[str]] = {"understood": [], "carried": [], "unread": []}
    for key, known in parsed.items():
        if known is None or known[1] in useless[known[0]] or key in without_effect:
            ends["unread"].append(key)
        else:
            module, part = known
            # A bias difference adds up, whatever happens to the weight beside it.
            ends["carried" if module in dependent and part not in DIFF_PARTS else "understood"].append(key)
    return KeyAccount(*map(tuple, ends.values()))


def _without_effect(
    parsed: Mapping[str, tuple[str, str] | None], state_dict: Mapping[str, Tensor | Unmade]
) -> set[str]:
    """Keys of LoRAs of rank 0, and alphas that are no number where no number is needed."""
    modules: dict[str, dict[str, str]] = {}
    for key, known in parsed.items():
        if known is not None:
            modules.setdefault(known[0], {})[known[1]] = key
    found: set[str] = set()
    for parts in modules.values():
        up, down = (state_dict[parts[part]] if part in parts else None for part in ("up", "down"))
        if up is not None and down is not None and _no_rank(up, down):
            found |= {key for part, key in parts.items() if part not in DIFF_PARTS}
        elif "alpha" in parts and ignores_alpha(parts) and not is_finite(made(state_dict[parts["alpha"]])):
            found.add(parts["alpha"])
    return found


def _no_rank(up: Tensor | Unmade, down: Tensor | Unmade) -> bool:
    if up.ndim < 2 or down.ndim < 2 or up.shape[1] or down.shape[0]:
        return False
    return up.shape[0] > 0 and down.shape[1] > 0


def read(state_dict: Mapping[str, Tensor | Unmade], metadata: Mapping[str, str], source: str) -> Contents:
    """What a state dict in any spelling holds, by canonical name.

    Every key ends in it, in an update or as unread, or in the ValueError that names it.
    """
    theirs = {ours: key for key, ours in dialects.renamed(state_dict).items()}
    if lost := sorted(state_dict.keys() - set(theirs.values())):
        raise ValueError(f"{source}: {lost[0]} and another key of it are the same thing. The file may be damaged.")
    state = {ours: state_dict[key] for ours, key in theirs.items()}
    parsed = {key: keys.parse(key) for key in state}
    account = _account(parsed, _without_effect(parsed, state))
    contents = Contents(
        keys=KeyAccount(*(tuple(theirs[key] for key in ends) for ends in vars(account).values())),
        # A scale of nothing is of no use to anybody.
        unread={theirs[key]: made(state[key]).detach() for key in account.unread if parsed[key] is None},
    )
    state |= dialects.added(state_dict)
    parsed |= {key: keys.parse(key) for key in state.keys() - parsed.keys()}
    parts = _by_module({key: known for key, known in parsed.items() if key not in set(account.unread)}, source)
    if not parts:
        raise ValueError(_nothing(source, contents.keys.unread))
    _check_values({key: state[key] for found in parts.values() for key in found.values()}, source)

    raw_of = _canonical(parts, contents, source)
    scales = AdapterScales(metadata)
    for canonical, module in raw_of.items():
        tensors = {part: state[key].detach() for part, key in parts[module].items()}
        try:
            _put(contents, canonical, tensors, _alpha(tensors, scales, module))
        except ValueError as error:
            raise ValueError(f"{source}: {module}: {error}. The file may be damaged.") from None
    if pairs := twice(named(contents.modules, contents.diffs, contents.carried, contents.spellings)):
        raise ValueError(
            f"{source}: {pairs_text(pairs, [source])} are two spellings of one weight, and a loader would use only one of "
            "them. If it was merged from LoRAs of two spellings, merge them again from files of one; else remove one."
        )
    return contents


def _by_module(parsed: Mapping[str, tuple[str, str] | None], source: str) -> dict[str, dict[str, str]]:
    """Module as spelled -> part -> key, complete. Raises ValueError for what is incomplete or there twice."""
    parts: dict[str, dict[str, str]] = {}
    doubled = []
    for key, known in parsed.items():
        if known is None:
            continue
        module, part = known
        if part in parts.setdefault(module, {}):
            doubled.append(f"{parts[module][part]} and {key}")
        parts[module][part] = key
    _check_complete(parts, doubled, source)
    return parts


def _nothing(source: str, unread: Sequence[str]) -> str:
    if all(keys.parse(key) is None and keys.unread_format(key) == keys.UNKNOWN for key in unread):
        first = f" (its first key is {unread[0]})" if unread else ""
        return f"{source}: no LoRA in it{first}; it may be a checkpoint or an empty file. Choose a LoRA file."
    return f"{source}: no LoRA in it that ComfyUI's loader would apply, only {keys.unread_text(unread)}. Choose another file."


def _canonical(parts: Mapping[str, object], contents: Contents, source: str) -> dict[str, str]:
    """Canonical name -> module as spelled; fills the spellings. Raises ValueError if two are one."""
    spelled = {module: names.kohya_name(module) for module in parts}
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
    contents.spellings.update(names.tidy({canonical: spelled[module] for canonical, module in raw_of.items()}))
    return raw_of


def _put(contents: Contents, canonical: str, tensors: dict[str, Tensor | Unmade], alpha: float | None) -> None:
    tensors = {part: tensor if part in _NUMBERS else _floating(tensor) for part, tensor in tensors.items()}
    for part in DIFF_PARTS:
        if part in tensors:
            # ComfyUI reads b_norm beside w_norm only; alone it is the same as diff_b.
            name = "diff_b" if part == "b_norm" and "w_norm" not in tensors else part
            contents.diffs[canonical, name] = made(tensors[part])
    # Only a kind without a factor of the kernel's shape has to be told it.
    kernel = () if "down" in tensors else names.kernel(canonical)
    update = build(tensors, alpha, kernel)
    if isinstance(update, Layer):
        contents.modules[canonical] = update
    elif update is not None:
        contents.carried[canonical] = update


def _alpha(tensors: Mapping[str, Tensor | Unmade], scales: AdapterScales, module: str) -> float | None:
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1:
            raise ValueError(f"alpha has shape {tuple(tensors['alpha'].shape)}, but it has to be one number")
        return float(made(tensors["alpha"]).item())
    # Only PEFT and diffusers write alphas there, and only for LoRA.
    if "down" in tensors:
        return scales.alpha(module, tensors["down"].shape[:1].numel())  # what has no rows is refused later
    return None


def _floating(tensor: Tensor | Unmade) -> Tensor | Unmade:
    # 8-bit floats have no arithmetic in torch; float16 holds all their values.
    return made(tensor).half() if tensor.dtype.itemsize == 1 else tensor


def _check_complete(parts: Mapping[str, Mapping[str, str]], doubled: list[str], source: str) -> None:
    problems = [f"{pair} are the same thing" for pair in doubled]
    for module, found in parts.items():
        if text := problem(found):
            problems.append(f"{module}: {text}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{source}: incomplete or contradictory: {'; '.join(sorted(problems)[:3])}{more}. "
                         "The file may be damaged.")  # fmt: skip


def _check_values(tensors: Mapping[str, Tensor | Unmade], source: str) -> None:
    wrong = sorted(
        f"{key} ({str(tensor.dtype).removeprefix('torch.')})"
        for key, tensor in tensors.items()
        if (not tensor.dtype.is_floating_point or tensor.dtype in _NO_NUMBERS) and not key.endswith(_ANY_DTYPE)
    )
    if wrong:
        raise ValueError(
            f"{source}: {many(len(wrong), 'weights are', 'weight is')} not floating point, {', '.join(wrong[:3])}; a quantized LoRA has to be "
            "saved as float16 first."
        )
    empty = sorted(key for key, tensor in tensors.items() if tensor.numel() == 0)
    if empty:
        raise ValueError(
            f"{source}: {many(len(empty), 'tensors have', 'tensor has')} no values, {', '.join(empty[:3])}; the file is damaged."
        )
    # An outline has no values, and what is unmade is looked at when it is read.
    there = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, Tensor) and not tensor.is_meta}
    if not all_finite(there.values()):
        broken = sorted(key for key, tensor in there.items() if not is_finite(tensor))
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(not_finite(source, f"{', '.join(broken[:3])}{more}"))
