"""Which rank each module gets when a whole LoRA has to become smaller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..words import many
from .lowrank import Prospect


def allocate(
    prospects: Mapping[str, Prospect],
    *,
    keep: float | None = None,
    retain: float | None = None,
    parameters: int | None = None,
) -> dict[str, int]:
    """Rank of each module, at least 1: the smallest LoRA that reaches the aim, or the best within a size.

    Ranks are handed out one by one, each to the module where it is worth most per number stored. For the sum's own
    directions that is the best choice for any size (up to the last rank handed out), since what a further rank of a
    module is worth never rises. At the size of one common rank the error is therefore never larger.
    Exactly one of
    keep: (0, 1], share of the sum's energy (squared Frobenius norm over all modules) to keep.
    retain: (0, 1], share of its own energy that every input has to keep.
    parameters: numbers that the result may hold, 2 bytes each in float16.
    Raises ValueError for another count or range of aims, and if one rank in each module is too large already.
    """
    aims = {"keep": keep, "retain": retain, "parameters": parameters}
    given = [name for name, value in aims.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of keep, retain and parameters; there are {len(given)}")
    for name in ("keep", "retain"):
        share = aims[name]
        if share is not None and not 0 < share <= 1:
            raise ValueError(
                f"{name} is {share}; it is a share of the energy, above 0 and at most 1 (1 loses nothing)."
            )
    if not prospects:
        return {}
    order = _order(prospects)
    if parameters is not None:
        least = sum(prospect.cost for prospect in prospects.values())
        if least > parameters:
            raise ValueError(
                f"the size allows {parameters} numbers, but one rank in each of the {many(len(prospects), 'modules')} takes "
                f"{least} ({2 * least / 1e6:.1f} MB in float16). Allow at least that."
            )
        return _within(prospects, order, parameters)
    share = retain if keep is None else keep
    assert share is not None
    # The sum is the first row, the inputs are the others.
    reached = _reaches(prospects, share, slice(1, None) if keep is None else slice(1))
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(_counts(prospects, order[:middle])) else (middle + 1, high)
    return dict(zip(prospects, _counts(prospects, order[:low]).tolist(), strict=True))


def alike(prospects: Mapping[str, Prospect]) -> dict[str, Prospect]:
    """The prospects with each rank's priority the retention it adds, summed over inputs.

    Each input is normalised by its energy over all modules: a weak one counts as much as a strong one, and one of many
    modules as one of few.
    """
    if not prospects:
        return {}
    whole = torch.stack([prospect.kept[1:, -1] for prospect in prospects.values()]).sum(0)
    result = {}
    for name, prospect in prospects.items():
        shares = prospect.kept[1:].diff() / whole.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        result[name] = replace(prospect, priority=shares.sum(0))
    return result


def _order(prospects: Mapping[str, Prospect]) -> Tensor:
    """Numbers of modules in the order in which they get their second and further ranks."""
    worth, owner = [], []
    for index, prospect in enumerate(prospects.values()):
        # Rounding must not hand out a later rank of a module before an earlier one.
        worth.append(prospect.priority[1:].cummin(0).values / prospect.cost)
        owner.append(torch.full((max(prospect.ranks - 1, 0),), index))
    return torch.cat(owner)[torch.cat(worth).argsort(descending=True, stable=True)]


def _counts(prospects: Mapping[str, Prospect], handed_out: Tensor) -> Tensor:
    """(modules,) the rank of each."""
    return 1 + torch.bincount(handed_out, minlength=len(prospects))


def _within(prospects: Mapping[str, Prospect], order: Tensor, parameters: int) -> dict[str, int]:
    names, costs = list(prospects), [prospect.cost for prospect in prospects.values()]
    ranks = [1] * len(names)
    left = parameters - sum(costs)
    full = set()
    for module in order.tolist():
        # A module that no longer fits gets no later rank either: ranks are taken in order.
        if module not in full and costs[module] <= left:
            ranks[module] += 1
            left -= costs[module]
        else:
            full.add(module)
    return dict(zip(names, ranks, strict=True))


def _reaches(prospects: Mapping[str, Prospect], share: float, rows: slice) -> Callable[[Tensor], bool]:
    """Whether modules of these ranks keep that share of the energy of each of the rows."""
    kept = torch.cat([prospect.kept[rows] for prospect in prospects.values()], dim=1)
    ends = torch.tensor([prospect.kept.shape[1] for prospect in prospects.values()]).cumsum(0)
    starts = torch.nn.functional.pad(ends[:-1], (1, 0))
    enough = share * (1 - 1e-9) * kept[:, ends - 1].sum(1)

    def reached(ranks: Tensor) -> bool:
        return bool((kept[:, starts + ranks].sum(1) >= enough).all())

    return reached
