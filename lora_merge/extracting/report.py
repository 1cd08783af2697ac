"""The sentences about an extraction."""

from __future__ import annotations

from collections.abc import Sequence

from ..words import many
from .extract import Extraction


def describe(found: Extraction) -> str:
    """A few lines for people."""
    if not found.modules and not found.vectors:
        return "The two models do not differ: nothing to extract."
    low, high = found.ranks or (0, 0)
    rank = f"{low}" if low == high else f"{low} to {high}"
    lines = [f"Extracted {many(found.modules, 'modules')}, rank {rank}."]
    if found.modules:
        lines.append(
            f"Relative error {found.error:.3g}: {100 * (1 - found.error**2):.2f} % of the difference's energy is kept, "
            "the most that these ranks can hold."
        )
    if found.vectors:
        lines.append(
            f"{many(found.vectors, 'biases and norms differ and are', 'bias or norm differs and is')} kept whole."
        )
    if found.equal:
        lines.append(f"{many(found.equal, 'weights do not differ and are', 'weight does not differ and is')} left out.")
    if found.unwanted:
        lines.append(f"Left out, as asked: {_counted(found.unwanted, 'biases and norms')}.")
    if found.other:
        lines.append(
            "Left out, since only weights and biases under the names of LoRA files are extracted: "
            f"{_counted(found.other, 'parameters')}."
        )
    return "\n".join(lines)


def _counted(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what} ({names[0]}{', ...' if len(names) > 1 else ''})"
