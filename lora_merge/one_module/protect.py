"""One LoRA's effect kept while others are added: they step aside where it is strong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..files.lora import Lora
from ..recognise.identity import Identity, identify
from ..updates.layer import Layer, LoraLayer, Term, whole_factors


def which_protected(text: str, labels: Sequence[str]) -> int | Literal["auto"] | None:
    """The `protect` of MergeOptions for what a user writes: auto, none, or a LoRA by its number.

    labels: number of each input as people see it, "1", "2", ...; "lora_2" is the same as "2".
    Raises ValueError for anything else.
    """
    if text in ("auto", "none"):
        return "auto" if text == "auto" else None
    number = text.removeprefix("lora_")
    try:
        return labels.index(str(int(number)))
    except ValueError:
        raise ValueError(
            f"protect is {text}, but the LoRAs are numbered {', '.join(labels)}. Choose one of these, auto or none."
        ) from None


def protecting(
    text: str, labels: Sequence[str], identities: Callable[[], Sequence[Identity | None]], strengths: Sequence[float]
) -> int | Literal["auto"] | None:
    """As `which_protected`, but `auto` finds the LoRA by all that is known of the inputs, the hashes of their files too.

    identities: asked only where it counts.
    """
    which = which_protected(text, labels)
    if which != "auto":
        return which
    found = protected_of(identities(), strengths)
    return which if found is None else found


def stepping_aside(terms: Sequence[Term], protected: int, mu: float, energy: float = 0.5) -> list[Term]:
    """The terms of one weight, all but the protected one weakened along its leading input directions.

    NP-LoRA's soft projection (arXiv 2511.11051) with roles swapped: it projects the content off the style, here all
    inputs are projected off the protected LoRA, an LCM-LoRA as a rule. With V its leading right singular vectors, each other update D becomes D (I - mu / (1 + mu) V V^T). Ranks stay as they are.
    protected: index of a term. mu: 0 leaves all as it is, exactly; 1 halves the others along V; large removes them there.
    energy: (0, 1], share of the protected update's squared norm that V has to hold; more directions, more room.
    Raises ValueError for mu below 0 or energy outside its range.
    """
    if not mu >= 0:
        raise ValueError(f"mu is {mu}; it must be 0 (exact sum) or more (others step aside, 1 by half).")
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}; it must be above 0 and at most 1, the share of the protected LoRA.")
    layer, strength = terms[protected]
    if mu == 0 or len(terms) == 1 or strength * layer.scale == 0:
        return list(terms)
    directions = leading_inputs(layer.factors(), energy)
    if not len(directions):
        return list(terms)
    return [
        term if index == protected else (_projected(term[0], directions, mu / (1.0 + mu)), term[1])
        for index, term in enumerate(terms)
    ]


def dense_stepping_aside(deltas: Sequence[Tensor], protected: int, mu: float, energy: float = 0.5) -> list[Tensor]:
    """stepping_aside for whole updates (out, in, *kernel) of one weight."""
    if mu == 0 or len(deltas) == 1 or not deltas[protected].any():
        return list(deltas)
    rows = deltas[protected].shape[0]
    directions = leading_inputs(whole_factors(deltas[protected].reshape(rows, -1)), energy)
    result = []
    for index, delta in enumerate(deltas):
        flat = delta.reshape(rows, -1)
        moved = flat - mu / (1.0 + mu) * (flat @ directions.T) @ directions
        result.append(delta if index == protected else moved.reshape(delta.shape))
    return result


def leading_inputs(factors: tuple[Tensor, Tensor], energy: float) -> Tensor:
    """(k, in * kernel) leading right singular vectors of up @ down, as many as hold that share of its energy; none of zeros."""
    up, down = factors
    q, r = torch.linalg.qr(down.T)
    _, s, vh = torch.linalg.svd(torch.linalg.qr(up)[1] @ r.T, full_matrices=False)
    held = s.double().square().cumsum(0)
    # Zeros, as modules have that were never trained, point nowhere, whatever their factors are.
    count = int((held < energy * (1 - 1e-9) * held[-1]).sum()) + 1 if held[-1] else 0
    directions: Tensor = vh[:count] @ q.T
    return directions


def _projected(layer: Layer, directions: Tensor, share: float) -> LoraLayer:
    up, down = layer.factors()
    down = down - share * (down @ directions.T) @ directions
    shape = layer.shape
    ones = (1,) * len(shape[2:])
    return LoraLayer(
        up.reshape(*up.shape, *ones), down.reshape(down.shape[0], *shape[1:]), alpha=layer.scale * down.shape[0]
    )


def protected_input(loras: Sequence[Lora], strengths: Sequence[float]) -> int | None:
    """Number of the input that is recognised as an acceleration LoRA (recognise/identity.py), None if there is none."""
    return protected_of([identify(lora) for lora in loras], strengths)


def protected_of(identities: Sequence[Identity | None], strengths: Sequence[float]) -> int | None:
    """protected_input for inputs of which it is known what they are, also by the hash of a file.

    Of several the first; one that is a published file or covers what acceleration LoRAs cover goes before one that only
    says so.
    """
    found = []
    for index, (identity, strength) in enumerate(zip(identities, strengths, strict=True)):
        if identity is not None and identity.preset is not None and strength != 0:
            found.append((not (identity.published or identity.structure.accelerates), index))
    return min(found)[1] if found else None
