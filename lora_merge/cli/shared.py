"""What several commands of `python -m lora_merge` have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from ..merging.merge import Progress
from ..metadata.fields import given

Answer = tuple[int, str]
PATTERNS = "FILE may have * and ? in it, for all files of such names"


def overwriting(add: argparse.ArgumentParser) -> None:
    """Adds the options that set `overwrite`, see disk/overwriting.py."""
    add.add_argument("--overwrite", action="store_true", help="replace an existing file that LCM Kit wrote")
    add.add_argument(
        "--overwrite-any", dest="overwrite", action="store_const", const="any", help="replace any existing file"
    )


def add_meta(add: argparse.ArgumentParser) -> None:
    """The option of every command that writes a LoRA; `meta` reads it."""
    add.add_argument(
        "--meta",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an entry of the file's metadata, such as "
        'modelspec.title="My LoRA", modelspec.author=me, modelspec.trigger_phrase="a word", '
        "modelspec.license=MIT; KEY= takes one away that an input has; may be repeated",
    )


def meta(texts: list[str]) -> dict[str, str]:
    """What --meta asks for. Raises ValueError for what has no name or cannot be given."""
    result: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--meta is {text!r}, but it has to be KEY=VALUE, such as modelspec.author=me.")
        if key in result:
            raise ValueError(f"--meta gives {key} twice; give it once.")
        result[key] = value
    return given(result)


def paths_and_strengths(texts: Sequence[str]) -> list[tuple[str, float]]:
    """The two of each FILE or FILE:STRENGTH; of all files that a pattern means, in the order of their names.

    Raises ValueError for a strength that is no number, and for a pattern that means no file.
    """
    result = []
    for text in texts:
        path, strength = path_and_strength(text)
        files = [path] if Path(path).exists() or not has_magic(path) else sorted(glob(path))
        if not files:
            raise ValueError(f"{path}: there is no file of such a name.")
        result += [(file, strength) for file in files]
    return result


def path_and_strength(text: str) -> tuple[str, float]:
    """The two in FILE or FILE:STRENGTH."""
    path, colon, strength = text.rpartition(":")
    # A name with a colon in it, or a Windows drive letter, is a name.
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return path, float(strength)
    except ValueError:
        raise ValueError(f"{text}: {strength!r} after the colon is no number; write FILE:STRENGTH.") from None


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A function to tell (modules done, modules in all)."""
    # disable=None: a bar for people, nothing in a log.
    with tqdm(desc=what, unit="module", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
