"""Sums of whole-weight and bias differences in a merge."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra.precision import cast, cast_part, rounding
from ..algebra.sums import dense_sum, weighted_sum
from ..files.keys import BIAS_PARTS, WEIGHT_PARTS
from ..files.lora import Lora
from ..settings.strengths import Strengths
from ..updates.layer import Term
from .fault import Attempt, in_words

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


def sums_of_one(
    module: str, loras: Sequence[Lora], strengths: Sequence[float], dtype: torch.dtype | None
) -> list[Attempt]:
    """For each LoRA that changes the weight by more than nothing: strength times all its updates of it, in the dtype."""

    def attempt(terms: WeightTerms) -> Callable[[], object]:
        if terms.dense:
            return partial(_sum_in, terms.low_rank, terms.dense, dtype)
        return lambda: cast(weighted_sum(terms.low_rank), dtype or torch.float32)

    found = weight_terms(module, loras, strengths)[1]
    return [(loras[index], attempt(terms)) for index, terms in found.items() if strengths[index]]


def bias_sums(
    loras: Sequence[Lora], strengths: Strengths, norms: Collection[str], dtype: torch.dtype | None
) -> dict[tuple[str, str], tuple[Tensor, float]]:
    """(sum in the dtype, relative error of rounding it) of all bias differences, in every method.

    norms: modules with a w_norm in the result.   dtype: None for float32.

    Beside a w_norm a sum of b_norms stays a b_norm; elsewhere ComfyUI reads no b_norm, and diff_b means the same.
    """
    found: dict[str, list[_Bias]] = {}
    for index, lora in enumerate(loras):
        for (module, part), diff in lora.diffs.items():
            if part in BIAS_PARTS:
                found.setdefault(module, []).append(_Bias(lora, part, (diff, strengths.at(module)[index])))
    result = {}
    for module, biases in found.items():
        is_norm = module in norms and all(bias.part == "b_norm" for bias in biases)
        with in_words(module, partial(_biases_of_one, biases, dtype), ", its bias"):
            total = dense_sum([], [bias.term for bias in biases])
            rounded = cast_part(total, dtype, copy=False)
        result[module, "b_norm" if is_norm else "diff_b"] = rounded, rounding(total, rounded)
    return result


def _sum_in(terms: Sequence[Term], diffs: Sequence[tuple[Tensor, float]], dtype: torch.dtype | None) -> Tensor:
    return cast_part(dense_sum(terms, diffs), dtype, copy=False)


class _Bias(NamedTuple):
    lora: Lora
    part: str
    term: tuple[Tensor, float]


def _biases_of_one(biases: Sequence[_Bias], dtype: torch.dtype | None) -> list[Attempt]:
    return [(bias.lora, partial(_sum_in, [], [bias.term], dtype)) for bias in biases if bias.term[1]]
