"""The command compare of `python -m lora_merge`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from ..comparing.compare import compare
from ..comparing.picture import draw
from ..comparing.report import CSV_BEGINS, JSON_BEGINS, as_csv, as_json, as_text
from ..disk.overwriting import Overwrite, guard
from ..disk.pictures import check_picture, write_picture
from ..disk.whole import check_place, write_whole
from ..files.load_save import load
from .shared import PATTERNS, Answer, overwriting, paths_and_strengths, progress_bar

_EXAMPLES = """examples:
  python -m lora_merge compare style.safetensors:0.8 lcm.safetensors
    how strong each is and where, whether they fight, and what a smaller rank of their sum would lose.
  python -m lora_merge compare style.safetensors lcm.safetensors --rank 64 --picture both.png --csv modules.csv"""


def add_compare(add: argparse.ArgumentParser) -> None:
    """Sets `run`: parsed arguments -> (exit status, what to print)."""
    add.epilog = _EXAMPLES
    add.add_argument(
        "loras", nargs="+", metavar="FILE[:STRENGTH]", help=f"strength is 1 if not given, may be negative. {PATTERNS}"
    )
    add.add_argument("--rank", type=int, default=0, help="of a cut to look at, marked in the picture; default: none")
    add.add_argument("--csv", type=Path, metavar="FILE", help="figures of every module, a row each")
    add.add_argument("--json", type=Path, metavar="FILE", help="all figures: whole, blocks, modules, cuts")
    add.add_argument("--picture", type=Path, metavar="FILE", help="a .png or .jpg: blocks, spectrum, strength sweep")
    overwriting(add)
    add.add_argument("--workers", type=int, help="threads; default: as many as torch uses. The result is the same")
    add.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> Answer:
    if options.rank < 0:
        raise ValueError(f"--rank is {options.rank}, but it has to be 0 (none) or more")
    # Before the work, so that a wrong name costs no time.
    texts = {
        path: begins for path, begins in ((options.csv, CSV_BEGINS), (options.json, JSON_BEGINS)) if path is not None
    }
    wanted = [path for path in (options.csv, options.json, options.picture) if path is not None]
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"{', '.join(map(str, wanted))}: two of these are one file; give each a name of its own.")
    for path, begins in texts.items():
        check_place(path, guard(options.overwrite, partial(_begins, begins)))
    if options.picture is not None:
        check_picture(options.picture, options.overwrite)
    named = paths_and_strengths(options.loras)
    with progress_bar("compare") as progress:
        found = compare(
            [(load(path), strength) for path, strength in named], workers=options.workers, progress=progress
        )
    if options.csv is not None:
        _write(as_csv(found), options.csv, options.overwrite, CSV_BEGINS)
    if options.json is not None:
        _write(as_json(found, options.rank), options.json, options.overwrite, JSON_BEGINS)
    if options.picture is not None:
        write_picture(draw(found, options.rank), options.picture, options.overwrite)
    return 0, "\n".join([as_text(found, options.rank), *(f"Written: {path}" for path in wanted)])


def _write(text: str, path: Path, overwrite: Overwrite, begins: str) -> None:
    content = text.encode()
    write_whole(path, lambda file: file.write(content), guard(overwrite, partial(_begins, begins)))


def _begins(begins: str, path: Path) -> bool:
    """Whether a file is of those that this command writes."""
    with open(path, "rb") as file:
        return file.read(len(begins)) == begins.encode()
