"""The command compare of `python -m lora_merge`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..comparing.compare import compare
from ..comparing.picture import draw
from ..comparing.report import as_csv, as_json, as_text
from ..files.load_save import load
from .merge import Answer, Commands, _bar, _path_and_strength

_EXAMPLES = """examples:
  python -m lora_merge compare style.safetensors:0.8 lcm.safetensors
    how strong each is and where, whether they fight, and what a smaller rank of their sum would lose.
  python -m lora_merge compare style.safetensors lcm.safetensors --rank 64 --picture both.png --csv modules.csv"""


def add_command(commands: Commands) -> None:
    """Sets `run`: parsed arguments -> (exit status, what to print)."""
    add = commands.add_parser(
        "compare",
        help="say whether LoRAs will fight, and where",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add.add_argument("loras", nargs="+", metavar="FILE[:STRENGTH]", help="strength is 1 if not given, may be negative")
    add.add_argument("--rank", type=int, default=0, help="of a cut to look at, marked in the picture; default: none")
    add.add_argument("--csv", type=Path, metavar="FILE", help="figures of every module, a row each")
    add.add_argument("--json", type=Path, metavar="FILE", help="all figures: whole, blocks, modules, cuts")
    add.add_argument("--picture", type=Path, metavar="FILE", help="a .png or .jpg: blocks, spectrum, strength sweep")
    add.add_argument("--overwrite", action="store_true", help="replace existing files")
    add.add_argument("--workers", type=int, help="threads; default: as many as torch uses. The result is the same")
    add.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> Answer:
    if options.rank < 0:
        raise ValueError(f"--rank is {options.rank}, but it has to be 0 (none) or more")
    # Before the work, so that a wrong name costs no time.
    wanted = [path for path in (options.csv, options.json, options.picture) if path is not None]
    for path in wanted:
        _check_free(path, options.overwrite)
    if options.picture is not None and options.picture.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"{options.picture}: the name of a picture has to end in .png or .jpg.")
    named = [_path_and_strength(text) for text in options.loras]
    with _bar("compare") as progress:
        found = compare(
            [(load(path), strength) for path, strength in named], workers=options.workers, progress=progress
        )
    if options.csv is not None:
        options.csv.write_text(as_csv(found), encoding="utf-8")
    if options.json is not None:
        options.json.write_text(as_json(found, options.rank), encoding="utf-8")
    if options.picture is not None:
        draw(found, options.rank).save(options.picture)
    return 0, "\n".join([as_text(found, options.rank), *(f"Written: {path}" for path in wanted)])


def _check_free(path: Path, overwrite: bool) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: there is no such folder; create it first.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists already; choose another name or add --overwrite.")
