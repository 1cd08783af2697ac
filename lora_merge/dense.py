"""Sums of whole-weight and bias differences in a merge."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from .arithmetic import dense_sum
from .keys import BIAS_PARTS
from .lora import Lora

Diffs = dict[tuple[str, str], Tensor]


def dense_modules(loras: Sequence[Lora]) -> dict[str, None]:
    """Modules whose whole weight one of the LoRAs changes by a dense difference, each once, in order."""
    return dict.fromkeys(module for lora in loras for module, part in lora.diffs if part not in BIAS_PARTS)


def weight_sum(module: str, loras: Sequence[Lora], strengths: Sequence[float]) -> tuple[str, Tensor]:
    """(part, sum) of all updates of one weight, at least one of which is dense; a low-rank one is added as its delta."""
    weighted = list(zip(loras, strengths, strict=True))
    terms = [(lora.modules[module], strength) for lora, strength in weighted if module in lora.modules]
    found = [
        (part, (lora.diffs[module, part], strength))
        for lora, strength in weighted
        for part in ("diff", "w_norm")
        if (module, part) in lora.diffs
    ]
    is_norm = not terms and all(part == "w_norm" for part, _ in found)
    return "w_norm" if is_norm else "diff", dense_sum(terms, [term for _, term in found])


def bias_sums(loras: Sequence[Lora], strengths: Sequence[float], norms: Collection[str]) -> Diffs:
    """Sums of all bias differences. norms: modules with a w_norm in the result.

    Beside a w_norm a sum of b_norms stays a b_norm; elsewhere ComfyUI reads no b_norm, and diff_b means the same.
    """
    found: dict[str, list[tuple[str, tuple[Tensor, float]]]] = {}
    for lora, strength in zip(loras, strengths, strict=True):
        for (module, part), diff in lora.diffs.items():
            if part in BIAS_PARTS:
                found.setdefault(module, []).append((part, (diff, strength)))
    result: Diffs = {}
    for module, terms in found.items():
        is_norm = module in norms and all(part == "b_norm" for part, _ in terms)
        result[module, "b_norm" if is_norm else "diff_b"] = dense_sum([], [term for _, term in terms])
    return result
