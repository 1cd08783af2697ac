"""What a merge did to each of its inputs, in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from ..disk.hashes import stated
from ..files.twice import Pair
from ..metadata.adapter_config import OfPeft, of_peft
from ..metadata.inherit import Note
from ..one_module.tally import Tally
from ..settings.options import MergeOptions
from .by_target import ModelNames
from .plan import Plan


@dataclass(frozen=True, kw_only=True)
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
        nearest to it (least squares over all modules). 1 for the linear sum, and of its share in a mean; None if it had no
        energy.
    stepped_aside: share of its energy left after it made room for the protected LoRA, 1 if it did not.
    protected: the others stepped aside for it.   block_strengths: what was asked for, "" for none.
    sha256: of its file, None where there is no file or nobody said.   weights: sha256 of all behind its file's header, as
        the file states it, None where it does not.
    unread: keys of its file that have no effect in ComfyUI.   peft: what is known of how PEFT made it.
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
    unread: tuple[str, ...] = ()
    peft: OfPeft = field(default_factory=OfPeft)


@dataclass(frozen=True, kw_only=True)
class Account:
    """What a merge did, in numbers and names; report.py says it in sentences.

    relative_error: of the cut, all updates together, Frobenius norm against what the method made; 0 for an exact merge.
    options: all that was asked for, defaults filled in.   ranks: smallest, median and largest rank of the result.
    rebalanced: modules whose factors were balanced for float16.
    model: what a connected model said of the inputs' names, where these do not tell by themselves.
    notes: what of the inputs' metadata is not kept as it was.
    fused: modules of two inputs, by their numbers, of which one is a slice of the other's weight and which never met.
    protects_nobody: whether someone was to be protected, and none of the inputs is such a LoRA.
    too_small: module -> relative error of its update, where the result's dtype has no numbers small enough for it.
    """

    sources: tuple[Source, ...]
    method: str
    rank: int
    modules: int
    cut_modules: int
    relative_error: float
    options: MergeOptions = field(default_factory=MergeOptions)
    ranks: tuple[int, float, int] | None = None
    rebalanced: int = 0
    model: ModelNames | None = None
    notes: tuple[Note, ...] = ()
    fused: tuple[Pair, ...] = ()
    protects_nobody: bool = False
    too_small: Mapping[str, float] = field(default_factory=dict, hash=False)


def account_of(plan: Plan, tally: Tally, sha256: Sequence[str | None]) -> Account:
    """The account of a merge from its sums. sha256: of each input's file."""
    options = plan.options
    effects = [1.0] * len(plan.loras) if _is_sum(options) else tally.effects()
    sources = [_source(plan, tally, index, effects[index], sha256[index]) for index in range(len(plan.loras))]
    return Account(
        sources=tuple(sources),
        method=options.method,
        rank=options.rank,
        modules=len(plan.modules),
        cut_modules=tally.cut,
        relative_error=math.sqrt(tally.lost_energy / tally.energy) if tally.energy > 0 else 0.0,
        options=options,
        ranks=(min(tally.ranks), median(tally.ranks), max(tally.ranks)) if tally.ranks else None,
        rebalanced=tally.rebalanced,
        model=plan.model,
        notes=tuple(plan.notes),
        fused=tuple(plan.fused),
        protects_nobody=plan.protects_nobody,
        too_small=dict(tally.too_small),
    )


def _source(plan: Plan, tally: Tally, index: int, effect: float | None, sha256: str | None) -> Source:
    lora, blocks, passthrough = plan.loras[index], plan.strengths.blocks[index], plan.passthrough
    others = {module for other in [*plan.loras[:index], *plan.loras[index + 1 :]] for module in other.spellings}
    ranks = [layer.rank for layer in lora.modules.values()]
    alphas = [layer.written_alpha for layer in lora.modules.values()]
    before = tally.before[index]
    return Source(
        name=lora.source,
        strength=plan.strengths.base[index],
        modules=len(lora.spellings),
        only_here=len(set(lora.spellings) - others),
        diffs=len(lora.diffs),
        ranks=(min(ranks), max(ranks)) if ranks else None,
        alphas=(min(alphas), max(alphas)) if alphas else None,
        retention=_retention(plan.options, tally, index),
        merged=len(lora.spellings) - passthrough.passed_from(index) - passthrough.refused_from(index),
        passed_through=passthrough.passed_from(index),
        refused=passthrough.refused_from(index),
        effect=effect,
        stepped_aside=tally.after[index] / before if before > 0 else 1.0,
        protected=plan.options.protect == index,
        block_strengths=blocks.text if blocks else "",
        sha256=sha256,
        weights=stated(lora.metadata),
        unread=lora.keys.unread,
        peft=of_peft(lora.metadata),
    )


def _retention(options: MergeOptions, tally: Tally, index: int) -> float | None:
    if options.cuts:
        whole = tally.source_energy[index]
        return min(1.0, tally.kept_energy[index] / whole) if whole > 0 else None
    return 1.0 if _is_sum(options) else None


def _is_sum(options: MergeOptions) -> bool:
    return options.the_method.combine is None
