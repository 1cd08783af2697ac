"""The table of merge methods: what each does to the updates of one weight before they are added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .arithmetic import Term


@dataclass(frozen=True)
class Method:
    """A way to combine updates of one weight.

    stage: (layer, strength) terms of one weight -> the terms to add up, one for each that came in.
    summary: what comes out. source: where the formula stands.
    """

    stage: Callable[[Sequence[Term]], Sequence[Term]]
    summary: str
    source: str


def _as_they_are(terms: Sequence[Term]) -> Sequence[Term]:
    return terms


METHODS: dict[str, Method] = {
    "linear": Method(
        _as_they_are,
        "the sum of strength * delta, exact; strengths count as they are and are never averaged",
        "Luo et al. 2023, LCM-LoRA, arXiv 2311.05556, equation 3",
    ),
}


def find_method(name: str) -> Method:
    """The method of that name. Raises ValueError, listing all names, if there is none."""
    if name not in METHODS:
        raise ValueError(f"method is {name!r}, but it has to be one of: {', '.join(METHODS)}")
    return METHODS[name]
