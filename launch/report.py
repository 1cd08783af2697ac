"""What people read of a run of the command line beside what is said of its training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from .data import Picture, listed, plain

NAMED = 5  # of broken pictures


def broken_words(broken: Mapping[Picture, str], count: int) -> str:
    """All of them in one sentence; the first few by name. broken: with why each cannot be read.   count: of all."""
    named = "; ".join(f"{plain(picture.name)} ({reason})" for picture, reason in [*broken.items()][:NAMED])
    more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    return f"{len(broken)} of {count} pictures cannot be read: {named}{more}."


def data_words(broken: Mapping[Picture, str], given: int, enlarged: Collection[Picture], left: int) -> list[str]:
    """What was left out of the `given` pictures, and what was scaled up of those that are left."""
    found = [f"{broken_words(broken, given)} They were left out."] if broken else []
    if enlarged:
        found.append(
            f"{len(enlarged)} of {left} pictures are smaller than what is learnt of them "
            f"({listed(sorted(picture.name for picture in enlarged))}) and were scaled up: the LoRA learns their softness."
        )
    return found


def end_words(processes: int, images_per_step: int, output: Path, folder: Path) -> list[str]:
    """The last lines. folder: of what the run has kept."""
    together = f"On {processes} processes, {images_per_step} images to a step together."
    return [*([together] if processes > 1 else []), f"Written: {output}. {folder} can be removed.", ""]
