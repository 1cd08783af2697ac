"""Patterns for names that no text can make slow: `*` stands for any letters, `?` for one.

Regular expressions are not offered: some take longer than anybody waits, and these texts come out of shared workflows
and files.
"""

from __future__ import annotations

MAX_LENGTH = 200


def is_glob(text: str) -> bool:
    return "*" in text or "?" in text


def matches(glob: str, name: str) -> bool:
    """Whether the whole name fits, in at most len(glob) * len(name) steps.

    After a mismatch only the last star has to take one letter more: what stood before it fits already.
    """
    at = place = 0
    # What follows the last star, and what of the name follows the letters that it stands for.
    last: tuple[int, int] | None = None
    while place < len(name):
        if at < len(glob) and glob[at] == "*":
            at += 1
            last = at, place
        elif at < len(glob) and glob[at] in ("?", name[place]):
            at += 1
            place += 1
        elif last is not None:
            at, place = last[0], last[1] + 1
            last = at, place
        else:
            return False
    return not glob[at:].strip("*")
