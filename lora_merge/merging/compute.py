"""The second stage of a merge: its numbers, module by module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from ..algebra.ranks import alike
from ..algebra.threads import in_order
from ..files.keys import WEIGHT_PARTS
from ..files.lora import Lora
from ..metadata.inherit import size_of
from ..one_module.differences import Diffs, bias_sums
from ..one_module.module import ModuleMerger
from ..one_module.tally import Finished, Tally
from ..one_module.unshared import allocate_around
from ..updates.layer import Layer, LoraLayer
from .budget import numbers_within
from .plan import Plan

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Computed:
    """layers: of the modules of the result.   diffs: its whole-weight and bias differences.   tally: sums for the account."""

    layers: Mapping[str, Layer]
    diffs: Mapping[tuple[str, str], Tensor]
    tally: Tally


def compute(plan: Plan, *, threads: int | None, device: torch.device, progress: Progress | None = None) -> Computed:
    """What the plan makes of every module, on the CPU, the same for any number of threads (algebra/threads.py)."""
    steps = _Steps(progress, len(plan.modules))
    merger = ModuleMerger(plan.loras, plan.strengths, plan.options, plan.whole, device, plan.drawn_by)
    tally = Tally(len(plan.loras))
    biases = _biases(plan, tally)
    ranks = _allocated(plan, merger, biases, threads, steps)

    def finish(module: str) -> Finished:
        return merger.finish(module, ranks.get(module, plan.options.rank))

    layers: dict[str, Layer] = {}
    diffs: Diffs = {}
    with closing(in_order(finish, plan.modules, threads)) as results:
        for done in results:
            if done.layer is not None:
                layers[done.module] = done.layer
            elif done.diff is not None:
                part, diff = done.diff
                diffs[done.module, part] = diff
            tally.add(done, done.layer.rank if isinstance(done.layer, LoraLayer) else None)
            steps.done()
    return Computed(layers, diffs | biases, tally)


def _biases(plan: Plan, tally: Tally) -> Diffs:
    """Sums of all bias differences in the result's dtype; what rounding costs them goes to the tally."""
    norms = {module for module in plan.whole if module not in plan.passthrough.updates and _is_norm(plan.loras, module)}
    sums = bias_sums(plan.loras, plan.strengths, norms, plan.options.out_dtype)
    for (module, _), (_, error) in sums.items():
        tally.add_rounding(module, error)
    return {key: diff for key, (diff, _) in sums.items()}


def _is_norm(loras: Sequence[Lora], module: str) -> bool:
    """Whether the weight's difference is a norm's everywhere."""
    parts = {part for lora in loras for part in WEIGHT_PARTS if (module, part) in lora.diffs}
    return parts == {"w_norm"} and not any(module in lora.modules for lora in loras)


def _allocated(plan: Plan, merger: ModuleMerger, biases: Diffs, threads: int | None, steps: _Steps) -> dict[str, int]:
    """The first of two passes, where ranks are shared out: by what each would keep. Of the directions that it finds only
    what has the size of the ranks is kept for the second, a tenth of the inputs in float32 for an LCM-LoRA and a style."""
    options = plan.options
    if options.aim is None:
        return {}
    modules = [module for module in plan.modules if module not in plan.whole]
    parameters = numbers_within(
        options, plan.loras, plan.modules, plan.passthrough.updates, plan.spellings, biases, size_of(plan.metadata)
    )
    steps.more(len(modules))
    prospects = {}
    with closing(in_order(merger.prospect, modules, threads)) as results:
        for module, prospect in zip(modules, results, strict=True):
            prospects[module] = prospect
            steps.done()
    if options.balanced:
        prospects = alike(prospects)
    whole = {module: layer for module in modules if (layer := merger.unshared(module)) is not None}
    return allocate_around(whole, prospects, keep=options.keep, retain=options.retain, parameters=parameters)


class _Steps:
    """Counts steps for whoever watches."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress = progress
        self.total = total
        self.counter = count(1)

    def more(self, steps: int) -> None:
        self.total += steps

    def done(self) -> None:
        number = next(self.counter)
        if self.progress is not None:
            self.progress(number, self.total)
