"""LoHa and LoKr that only one input changes: they stay what they are, times a number, instead of many ranks of LoRA.

A LoKr of 16 x 16 and 64 x 64 numbers is a matrix of rank 1024: as LoRA factors it takes 460 times the space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch

from ..algebra.lowrank import Prospect, Truncated, energy_of
from ..algebra.precision import ALPHA
from ..algebra.ranks import allocate
from ..files.lora import Lora
from ..settings.strengths import Strengths
from ..updates.layer import Layer, LoraLayer, Term, exponent
from ..updates.lokr import LokrLayer


def times(layer: Layer, strength: float) -> Layer | None:
    """strength * update as a layer of the same kind; None where float32 has no alpha for it.

    The strength goes into alpha, which rounds no weight. Where alpha has no effect (a LoKr of two whole matrices) the
    smaller matrix is multiplied, in float32.
    """
    if isinstance(layer, LokrLayer):
        # ComfyUI's product with a Tucker core is transposed, and torch.kron stops at that (torch 2.11).
        layer = layer.without_core()
    if strength == 1:
        return layer
    if layer.dim is not None:
        alpha = layer.written_alpha * strength
        return replace(layer, alpha=alpha) if not alpha or abs(exponent(alpha)) <= ALPHA else None  # type: ignore[type-var]
    name, part = min(layer.parts().items(), key=lambda item: item[1].numel())
    return layer.with_parts({name: part.detach().to(torch.float32) * strength})


def unshared(loras: Sequence[Lora], strengths: Strengths, module: str) -> Layer | None:
    """The module's LoHa or LoKr with its strength, if one input alone changes it by more than nothing; None else."""
    at = strengths.at(module)
    owners = [index for index, lora in enumerate(loras) if module in lora.modules and at[index]]
    if len(owners) != 1:
        return None
    layer = loras[owners[0]].modules[module]
    return None if isinstance(layer, LoraLayer) else times(layer, at[owners[0]])


def smaller_whole(layer: Layer, rank: int) -> bool:
    """Whether the layer takes no more numbers than LoRA factors of that rank."""
    return layer.parameters <= rank * (layer.shape[0] + prod(layer.shape[1:]))


def uncut(layer: Layer, terms: Sequence[Term]) -> Truncated:
    """What a cut that cuts nothing says of the layer, made of the (layer, strength) terms."""
    energies = tuple(energy_of(term) if term[1] else 0.0 for term in terms)
    return Truncated(layer=layer, energy=sum(energies), lost_energy=0.0, source_energy=energies, kept_energy=energies)


def allocate_around(
    whole: Mapping[str, Layer],
    prospects: Mapping[str, Prospect],
    *,
    keep: float | None,
    retain: float | None,
    parameters: int | None,
) -> dict[str, int]:
    """`allocate`, with modules of `whole` left at their whole rank where they are no larger so than what they would be
    cut to. What they leave free of a given size goes to the others."""
    left = dict(prospects)
    ranks: dict[str, int] = {}
    while True:
        found = allocate(left, keep=keep, retain=retain, parameters=parameters)
        staying = [module for module in left if module in whole and smaller_whole(whole[module], found[module])]
        if not staying or parameters is None:
            return ranks | found | {module: whole[module].rank for module in staying}
        for module in staying:
            ranks[module] = whole[module].rank
            parameters -= whole[module].parameters
            del left[module]
