"""What people read of a run of the command line beside what is said of its training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..lora_merge.words import many
from .data import Picture, listed, plain

NAMED = 5  # of broken pictures


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What became of the pictures that were `given`.

    broken: left out, with why each cannot be read, in the words of who read it.   left: number of the others.
    enlarged: those of them that were scaled up.
    """

    given: int
    broken: Mapping[Picture, str]
    enlarged: Collection[Picture]
    left: int


def broken_words(broken: Mapping[Picture, str], count: int) -> str:
    """All of them in one sentence; the first few by name. broken: with why each cannot be read.   count: of all."""
    named = "; ".join(f"{plain(picture.name)} ({reason})" for picture, reason in [*broken.items()][:NAMED])
    more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    return f"{len(broken)} of {many(count, 'pictures')} cannot be read: {named}{more}."


def data_words(looked: Looked | None) -> list[str]:
    """What was left out of the pictures, and what was scaled up of those that are left."""
    if looked is None:
        return []
    found = [f"{broken_words(looked.broken, looked.given)} They were left out."] if looked.broken else []
    if looked.enlarged:
        found.append(
            f"{len(looked.enlarged)} of {many(looked.left, 'pictures')} are smaller than what is learnt of them "
            f"({listed(sorted(picture.name for picture in looked.enlarged))}) and were scaled up: the LoRA learns their softness."
        )
    return found


def end_words(processes: int, images_per_step: int, output: Path, folder: Path) -> list[str]:
    """The last lines. folder: of what the run has kept."""
    together = f"On {many(processes, 'processes', 'process')}, {many(images_per_step, 'images')} to a step together."
    return [*([together] if processes > 1 else []), f"Written: {output}. {folder} can be removed.", ""]
