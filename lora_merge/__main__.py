"""LoRA arithmetic on the command line: `python -m lora_merge`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .disk.garbage import uncollected

# Command -> (what it does, the file of cli/ with a function `add_COMMAND` that adds its options and how to run it). Only
# that of the command that was asked for is imported: with torch it takes seconds.
_COMMANDS = {
    "merge": ("add LoRAs into one file", "merge"),
    "resize": ("make a LoRA smaller", "merge"),
    "reproduce": ("make a merged file again and compare", "merge"),
    "info": ("say what is in a LoRA file", "merge"),
    "compare": ("say whether LoRAs will fight, and where", "compare"),
    "extract": ("make a LoRA out of two models", "extract"),
    "convert": ("give a LoRA the names of other programs, without loss", "convert"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input, with one line on standard error that says what and why. Commands that compare
    return 1 for "not the same"."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser(arguments).parse_args(arguments)
    try:
        with uncollected():
            status, text = options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return int(status)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_merge", description="Exact arithmetic on LoRA files.")
    # COMMAND --help explains it with examples.
    found = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (what, file) in _COMMANDS.items():
        add = found.add_parser(name, help=what, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in arguments:
            getattr(import_module(f"{__package__}.cli.{file}"), f"add_{name}")(add)
    return parser


if __name__ == "__main__":
    sys.exit(main())
