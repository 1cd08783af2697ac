"""What a merge did to each of its inputs, in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from ..algebra.lowrank import Truncated
from ..algebra.precision import COARSE
from ..files.hashes import stated
from ..files.lora import Lora, too_small
from ..updates.layer import Layer
from .options import MergeOptions
from .passthrough import Passing
from .strengths import Strengths

# An effect below these is worth a warning: for the protected LoRA, and for any other.
_AS_IT_IS, _HALF = 0.99, 0.5


@dataclass(frozen=True)
class Source:
    """One input's part in a merge.

    modules, only_here: modules it has, and modules no other input has. diffs: its dense differences.
    ranks, alphas: smallest and largest of its modules, None where it has none; alpha None counts as the rank.
    retention: share 0..1 of its energy (squared Frobenius norm, over all modules) left after the cut to a smaller
        rank; 1 for an exact merge, None if it had no energy, or if a method other than linear made the sum and nothing
        was cut.
    merged, passed_through, refused: what became of its modules; they add up to `modules`. Refused ones are left out of
        the result, which happens on request only.
    effect: how strong it is in what the method made, before any cut: the coefficients of strength * update that come
        nearest to it (least squares over all modules). 1 for the linear sum; None if it had no energy.
    stepped_aside: share of its energy left after it made room for the protected LoRA, 1 if it did not.
    protected: the others stepped aside for it.   block_strengths: what was asked for, "" for none.
    sha256: of its file, None where there is no file or nobody said.   weights: sha256 of all behind its file's header, as
        the file states it, None where it does not.
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
    effect: float | None = 1.0
    stepped_aside: float = 1.0
    protected: bool = False
    block_strengths: str = ""
    sha256: str | None = None
    weights: str | None = None


@dataclass(frozen=True)
class Account:
    """What a merge did.

    relative_error: of the cut, all updates together, Frobenius norm against what the method made; 0 for an exact merge.
    options: all that was asked for, defaults filled in.   ranks: smallest, median and largest rank of the result.
    warnings: what the user should know, in sentences.   rebalanced: modules whose factors were balanced for float16.
    """

    sources: tuple[Source, ...]
    method: str
    rank: int
    modules: int
    cut_modules: int
    relative_error: float
    options: MergeOptions = field(default_factory=MergeOptions)
    ranks: tuple[int, float, int] | None = None
    warnings: tuple[str, ...] = ()
    rebalanced: int = 0


@dataclass(frozen=True, eq=False)
class Finished:
    """One module of the result: a layer, or a whole-weight difference under its part name, and how it came about.

    owners: numbers of the inputs it was made of.   cut: None where nothing was to be cut.
    products: (owners, owners) and (owners,) float64, of the updates with one another and with what the method made of
        them; None where that is their sum.
    aside: input -> its energy here before and after it stepped aside.   rebalanced: factors balanced for float16.
    rounding: relative error of an update too small for the result's dtype, 0 for one that is not.
    """

    module: str
    owners: tuple[int, ...]
    layer: Layer | None = None
    diff: tuple[str, Tensor] | None = None
    cut: Truncated | None = None
    products: tuple[Tensor, Tensor] | None = None
    aside: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    rebalanced: bool = False
    rounding: float = 0.0


class Tally:
    """Sums over the modules of a merge."""

    def __init__(self, inputs: int):
        self.source_energy = [0.0] * inputs
        self.kept_energy = [0.0] * inputs
        self.energy = self.lost_energy = 0.0
        self.cut = self.rebalanced = 0
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.along = torch.zeros(inputs, dtype=torch.float64)
        self.before = [0.0] * inputs
        self.after = [0.0] * inputs
        self.ranks: list[int] = []
        self.too_small: dict[str, float] = {}

    def add(self, done: Finished, rank: int | None) -> None:
        self.rebalanced += done.rebalanced
        self.add_rounding(done.module, done.rounding)
        if rank is not None:
            self.ranks.append(rank)
        if done.cut is not None:
            self.energy += done.cut.energy
            self.lost_energy += done.cut.lost_energy
            self.cut += done.cut.lost_energy > 0
            for index, whole, kept in zip(done.owners, done.cut.source_energy, done.cut.kept_energy, strict=True):
                self.source_energy[index] += whole
                self.kept_energy[index] += kept
        if done.products is not None:
            at = torch.tensor(done.owners)
            self.gram[at[:, None], at] += done.products[0]
            self.along[at] += done.products[1]
        for index, (before, after) in done.aside.items():
            self.before[index] += before
            self.after[index] += after

    def add_rounding(self, module: str, error: float) -> None:
        if error > COARSE:
            self.too_small[module] = max(error, self.too_small.get(module, 0.0))

    def effects(self) -> list[float | None]:
        """Coefficient of each input in what the method made, None for an input without energy."""
        solved = (torch.linalg.pinv(self.gram, hermitian=True) @ self.along).tolist()
        return [c if float(self.gram[index, index]) > 0 else None for index, c in enumerate(solved)]


def account_of(
    loras: Sequence[Lora],
    strengths: Strengths,
    options: MergeOptions,
    tally: Tally,
    modules: int,
    passing: Passing,
    sha256: Sequence[str | None],
    warnings: Sequence[str],
) -> Account:
    """The account of a merge from its sums. options: with `protect` a number or None."""
    linear = options.the_method.combine is None
    effects: list[float | None] = [1.0] * len(loras) if linear else tally.effects()
    sources = []
    for index, lora in enumerate(loras):
        others = {module for other in [*loras[:index], *loras[index + 1 :]] for module in other.spellings}
        ranks = [layer.rank for layer in lora.modules.values()]
        alphas = [layer.written_alpha for layer in lora.modules.values()]
        retention: float | None = 1.0 if linear else None
        if options.cuts:
            whole = tally.source_energy[index]
            retention = min(1.0, tally.kept_energy[index] / whole) if whole > 0 else None
        blocks = strengths.blocks[index]
        before = tally.before[index]
        sources.append(
            Source(
                name=lora.source,
                strength=strengths.base[index],
                modules=len(lora.spellings),
                only_here=len(set(lora.spellings) - others),
                diffs=len(lora.diffs),
                ranks=(min(ranks), max(ranks)) if ranks else None,
                alphas=(min(alphas), max(alphas)) if alphas else None,
                retention=retention,
                merged=len(lora.spellings) - passing.passed_from(index) - passing.refused_from(index),
                passed_through=passing.passed_from(index),
                refused=passing.refused_from(index),
                effect=effects[index],
                stepped_aside=tally.after[index] / before if before > 0 else 1.0,
                protected=options.protect == index,
                block_strengths=blocks.text if blocks else "",
                sha256=sha256[index],
                weights=stated(lora.metadata),
            )
        )
    error = math.sqrt(tally.lost_energy / tally.energy) if tally.energy > 0 else 0.0
    spread = (min(tally.ranks), median(tally.ranks), max(tally.ranks)) if tally.ranks else None
    if tally.too_small:
        warnings = [*warnings, too_small(tally.too_small, options.out_dtype)]
    notes = [*warnings, *_idle(options), *_scaled_protection(sources, options), *_lost(sources, options)]
    return Account(
        tuple(sources),
        options.method,
        options.rank,
        modules,
        tally.cut,
        error,
        options,
        spread,
        tuple(notes),
        tally.rebalanced,
    )


def _scaled_protection(sources: Sequence[Source], options: MergeOptions) -> list[str]:
    return [
        f"method {options.method} scales down what it merges: about {100 * (source.effect or 0):.0f} % is left of "
        f"{source.name}, which is protected. linear, dare, slerp and tsv keep it."
        for source in sources
        if source.protected and options.the_method.scales_down and (source.effect or 0) < _AS_IT_IS
    ]


def _idle(options: MergeOptions) -> list[str]:
    if options.the_method.combine is None or not options.the_method.is_sum(options.values):
        return []
    return [
        f"density is 1, at which method {options.method} prunes nothing: this is the plain sum. Choose a lower density."
    ]


def _lost(sources: Sequence[Source], options: MergeOptions) -> list[str]:
    """Inputs of which the method or the cut has left less than half."""
    result = []
    for source in sources:
        warned = source.protected and options.the_method.scales_down
        if source.effect is not None and source.effect < _HALF and not warned:
            result.append(
                f"method {options.method} leaves about {100 * max(0.0, source.effect):.0f} % of {source.name}. Choose a "
                "higher density, or another method such as linear."
            )
        if options.cuts and source.retention is not None and source.retention < _HALF:
            result.append(
                f"the cut leaves {100 * source.retention:.0f} % of the energy of {source.name}. Choose a higher rank, or "
                "retain or balanced, which look after the weaker LoRA."
            )
    return result
