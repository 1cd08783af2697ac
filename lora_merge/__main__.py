"""LoRA arithmetic on the command line: `python -m lora_merge`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .cli import compare as compare_command
from .cli import convert as convert_command
from .cli import extract as extract_command
from .cli import merge as commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input, with one line on standard error that says what and why. Commands that compare
    return 1 for "not the same"."""
    options = _parser().parse_args(arguments)
    try:
        status, text = options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return int(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_merge", description="Exact arithmetic on LoRA files.")
    # Each adds its own; COMMAND --help explains it with examples.
    found = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_commands(found)
    compare_command.add_command(found)
    extract_command.add_command(found)
    convert_command.add_command(found)
    return parser


if __name__ == "__main__":
    sys.exit(main())
