"""What people read beside a grid."""

from collections.abc import Sequence

from ...lora_merge.words import many

MANY = 64  # cells: from here on it is said that this takes long
SHOWN = 6


def describe(
    *, axes: Sequence[str], sampled: int, known: int, seconds: float, failed: Sequence[tuple[str, str]]
) -> str:
    """axes: the settings that vary.   sampled: cells that were made now.   known: cells that were there already.
    failed: (settings of a cell in words, why it was not possible)."""
    count = sampled + known + len(failed)
    names = " by ".join(axes)
    lines = [
        f"{many(count, 'cells')}{f', {names}' if names else ''}: {sampled} made in {seconds:.1f} s, {known} known from before, "
        f"{len(failed)} not possible."
    ]
    reasons: dict[str, list[str]] = {}
    for cell, reason in failed:
        reasons.setdefault(reason, []).append(cell)
    for reason, places in reasons.items():
        lines.append(f"Not made: {'; '.join(places[:SHOWN])}{' ...' if len(places) > SHOWN else ''}. {reason}")
    if count > MANY:
        lines.append(f"More than {MANY} cells take their time; Cancel keeps those that are done for the next run.")
    return "\n".join(lines)
