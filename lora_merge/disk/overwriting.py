"""Which existing files may be replaced: none, those that this pack wrote, or any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from .whole import Guard, is_plain_file, refuse

Overwrite = bool | Literal["any"]
"""False: replace nothing. True: what this pack wrote, as far as the file itself says so. "any": whatever is there."""


def guard(overwrite: Overwrite, is_ours: Callable[[Path], bool]) -> Guard:
    """is_ours: whether a plain file that exists says that this pack wrote it."""
    if overwrite == "any":
        return _anything
    if not overwrite:
        return refuse

    def only_ours(path: Path) -> None:
        if not (is_plain_file(path) and is_ours(path)):
            raise FileExistsError(
                f"{path}: exists already and does not say that LCM Kit wrote it, so it is not replaced. Choose another "
                "name, or allow overwriting any file (overwrite_any; on the command line --overwrite-any)."
            )

    return only_ours


def _anything(path: Path) -> None:
    """The user said so."""
