"""Sums of whole-weight and bias differences in a merge."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..algebra.sums import dense_sum
from ..files.keys import BIAS_PARTS, WEIGHT_PARTS
from ..files.lora import Lora
from ..settings.strengths import Strengths
from ..updates.layer import Term

Diffs = dict[tuple[str, str], Tensor]


def dense_modules(loras: Sequence[Lora]) -> dict[str, None]:
    """Modules whose whole weight one of the LoRAs changes by a dense difference, each once, in order."""
    return dict.fromkeys(module for lora in loras for module, part in lora.diffs if part not in BIAS_PARTS)


@dataclass(frozen=True, eq=False)
class WeightTerms:
    """What one input adds to one weight: low-rank terms, and dense differences; each with the input's strength."""

    low_rank: list[Term]
    dense: list[tuple[Tensor, float]]


def weight_terms(module: str, loras: Sequence[Lora], strengths: Sequence[float]) -> tuple[str, dict[int, WeightTerms]]:
    """(part of the sum, input -> its terms) of one weight; inputs that do not change it are not there."""
    result: dict[int, WeightTerms] = {}
    parts = set()
    for index, (lora, strength) in enumerate(zip(loras, strengths, strict=True)):
        terms = [(lora.modules[module], strength)] if module in lora.modules else []
        found = [part for part in WEIGHT_PARTS if (module, part) in lora.diffs]
        parts |= {*found, *("diff" for _ in terms)}
        if terms or found:
            result[index] = WeightTerms(terms, [(lora.diffs[module, part], strength) for part in found])
    return "w_norm" if parts == {"w_norm"} else "diff", result


def weight_sum(module: str, loras: Sequence[Lora], strengths: Sequence[float]) -> tuple[str, Tensor]:
    """(part, sum) of all updates of one weight, at least one of which is dense; a low-rank one is added as its delta."""
    part, found = weight_terms(module, loras, strengths)
    low_rank = [term for terms in found.values() for term in terms.low_rank]
    return part, dense_sum(low_rank, [diff for terms in found.values() for diff in terms.dense])


def bias_sums(loras: Sequence[Lora], strengths: Strengths, norms: Collection[str]) -> Diffs:
    """Sums of all bias differences, in every method. norms: modules with a w_norm in the result.

    Beside a w_norm a sum of b_norms stays a b_norm; elsewhere ComfyUI reads no b_norm, and diff_b means the same.
    """
    found: dict[str, list[tuple[str, tuple[Tensor, float]]]] = {}
    for index, lora in enumerate(loras):
        for (module, part), diff in lora.diffs.items():
            if part in BIAS_PARTS:
                found.setdefault(module, []).append((part, (diff, strengths.at(module)[index])))
    result: Diffs = {}
    for module, terms in found.items():
        is_norm = module in norms and all(part == "b_norm" for part, _ in terms)
        try:
            total = dense_sum([], [term for _, term in terms])
        except ValueError as error:
            raise ValueError(f"{module}, its bias: {error}") from None
        result[module, "b_norm" if is_norm else "diff_b"] = total
    return result
