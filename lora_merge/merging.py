"""The merge of whole LoRAs: which modules meet, their sum, and the account of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import names
from .arithmetic import Term, weighted_sum
from .dense import Diffs, bias_sums, dense_modules, weight_sum
from .layer import Layer
from .lora import Lora
from .lowrank import Truncated, truncated_sum
from .meeting import unify
from .metadata import PROVENANCE_KEY, agreed
from .methods import find_method
from .passing import Passing, refusal, sort_carried

Input = tuple[Lora, float]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Source:
    """One input's part in a merge.

    modules, only_here: modules it has, and modules no other input has. diffs: its dense differences.
    ranks, alphas: smallest and largest of its modules, None where it has none; alpha None counts as the rank.
    retention: share 0..1 of its energy (squared Frobenius norm, over all modules) left after the cut to a smaller
        rank; 1 for an exact merge, None if it had no energy.
    merged, passed_through, refused: what became of its modules; they add up to `modules`. Refused ones are left out of
        the result, which happens on request only.
    """

    name: str
    strength: float
    modules: int
    only_here: int
    diffs: int
    ranks: tuple[int, int] | None
    alphas: tuple[float, float] | None
    retention: float | None
    merged: int = 0
    passed_through: int = 0
    refused: int = 0


@dataclass(frozen=True)
class Account:
    """What a merge did. relative_error: of all updates together, Frobenius norm, 0 for an exact merge."""

    sources: tuple[Source, ...]
    method: str
    rank: int
    modules: int
    cut_modules: int
    relative_error: float

    def to_json(self) -> str:
        """The provenance that goes into the file."""
        inputs = [{"name": s.name, "strength": s.strength, "modules": s.modules, "retention": s.retention,
                   "merged": s.merged, "passed_through": s.passed_through, "refused": s.refused}
                  for s in self.sources]  # fmt: skip
        return json.dumps(
            {
                "version": 1,
                "inputs": inputs,
                "method": self.method,
                "rank": self.rank,
                "relative_error": self.relative_error,
            }
        )


def merge(
    inputs: Sequence[Input],
    *,
    method: str = "linear",
    rank: int = 0,
    progress: Progress | None = None,
    leave_out: bool = False,
) -> Lora:
    """One LoRA whose update of every module is the sum of strength * update over the (lora, strength) inputs.

    Any number of inputs from 1 on, of any rank, alpha and spelling, strengths of any sign; modules that one input has
    alone are in the result too. LoRA, LoHa and LoKr become LoRA factors, float32 with alpha = rank. Where one of the
    inputs changes the whole weight (`.diff`, a norm) the sum is such a difference too.
    Updates that depend on the weight (Lora.carried: DoRA, OFT, ...) do not add up. One is passed through as it is if no
    other input changes the module and its strength is 1, and falls away at strength 0.
    method: a name in methods.METHODS.
    rank: 0 keeps the sum exact, its rank being the sum of ranks; else modules whose ranks add up to more are cut
        to the best approximation of that rank (lowrank.py), and the error stands in the metadata. Differences of whole
        weights stay whole.
    progress: called after each module with (modules done, modules in all); what it raises ends the merge.
    leave_out: leave modules that do not add up out of the result and count them as refused, instead of raising.
    Raises ValueError without inputs, for an unknown method, a rank below 0, a strength that is not finite, for LoRAs
    that were made for different base models, and for modules that do not add up.
    """
    return merge_with_account(inputs, method=method, rank=rank, progress=progress, leave_out=leave_out)[0]


def merge_with_account(
    inputs: Sequence[Input],
    *,
    method: str = "linear",
    rank: int = 0,
    progress: Progress | None = None,
    leave_out: bool = False,
) -> tuple[Lora, Account]:
    """`merge`, and what it did to each input."""
    stage = find_method(method).stage
    if not inputs:
        raise ValueError("there is nothing to merge: give at least one LoRA")
    if rank < 0:
        raise ValueError(f"rank is {rank}, but it has to be 0 (exact) or more")
    for lora, strength in inputs:
        if not math.isfinite(strength):
            raise ValueError(f"{lora.source}: strength is {strength}, but it has to be a finite number")
    loras = unify([lora for lora, _ in inputs])
    strengths = [float(strength) for _, strength in inputs]
    passing = sort_carried(loras, strengths)
    if passing.refused and not leave_out:
        raise ValueError(refusal(loras, passing))

    layers: dict[str, Layer] = {}
    tally = _Tally([0.0] * len(loras), [0.0] * len(loras))
    dense = dense_modules(loras)
    diffs: Diffs = {}
    # What meets an update that is passed through has strength 0.
    in_order = dict.fromkeys([*(module for lora in loras for module in lora.modules), *dense])
    modules = [module for module in in_order if module not in passing.updates]
    for done, module in enumerate(modules, start=1):
        owners = [index for index, lora in enumerate(loras) if module in lora.modules]
        terms: Sequence[Term] = [(loras[index].modules[module], strengths[index]) for index in owners]
        if module in dense:
            part, total = weight_sum(module, loras, strengths)
            diffs[module, part] = total
        elif rank == 0:
            layers[module] = weighted_sum(stage(terms))
        else:
            result = truncated_sum(stage(terms), rank)
            layers[module] = result.layer
            tally.add(result, owners)
        if progress is not None:
            progress(done, len(modules))
    diffs |= bias_sums(loras, strengths, {module for module, part in diffs if part == "w_norm"})
    account = _account(loras, strengths, method, rank, tally, len(modules), passing)
    spellings: dict[str, str] = {}
    for lora in loras:
        for module, spelling in lora.spellings.items():
            spellings.setdefault(module, spelling)
    used = layers.keys() | passing.updates.keys() | {module for module, _ in diffs}
    spellings = {module: spelling for module, spelling in spellings.items() if module in used}
    title = " + ".join(f"{lora.source} * {strength:g}" for lora, strength in zip(loras, strengths, strict=True))
    metadata = agreed([lora.metadata for lora in loras]) | {
        PROVENANCE_KEY: account.to_json(),
        "modelspec.merged_from": ", ".join(lora.source for lora in loras),
    }
    merged = Lora(layers, diffs, names.tidy(spellings), metadata, title, passing.updates)
    return merged, account


@dataclass
class _Tally:
    source_energy: list[float]
    kept_energy: list[float]
    energy: float = 0.0
    lost_energy: float = 0.0
    cut: int = 0

    def add(self, result: Truncated, owners: Sequence[int]) -> None:
        self.energy += result.energy
        self.lost_energy += result.lost_energy
        self.cut += result.lost_energy > 0
        for index, whole, kept in zip(owners, result.source_energy, result.kept_energy, strict=True):
            self.source_energy[index] += whole
            self.kept_energy[index] += kept


def _account(
    loras: Sequence[Lora],
    strengths: Sequence[float],
    method: str,
    rank: int,
    tally: _Tally,
    modules: int,
    passing: Passing,
) -> Account:
    sources = []
    for index, (lora, strength) in enumerate(zip(loras, strengths, strict=True)):
        others = {module for other in [*loras[:index], *loras[index + 1 :]] for module in other.spellings}
        ranks = [layer.rank for layer in lora.modules.values()]
        alphas = [layer.written_alpha for layer in lora.modules.values()]
        retention: float | None = 1.0
        if rank:
            whole = tally.source_energy[index]
            retention = min(1.0, tally.kept_energy[index] / whole) if whole > 0 else None
        sources.append(
            Source(
                name=lora.source,
                strength=strength,
                modules=len(lora.spellings),
                only_here=len(set(lora.spellings) - others),
                diffs=len(lora.diffs),
                ranks=(min(ranks), max(ranks)) if ranks else None,
                alphas=(min(alphas), max(alphas)) if alphas else None,
                retention=retention,
                merged=len(lora.spellings) - passing.passed_from(index) - passing.refused_from(index),
                passed_through=passing.passed_from(index),
                refused=passing.refused_from(index),
            )
        )
    error = math.sqrt(tally.lost_energy / tally.energy) if tally.energy > 0 else 0.0
    return Account(tuple(sources), method, rank, modules, tally.cut, error)
