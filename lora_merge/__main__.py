"""LoRA arithmetic on the command line: `python -m lora_merge`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from . import METHODS, describe, describe_merge, load, merge_with_account, save
from .lora import Format, Lora

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_MERGE_EXAMPLE = """example:
  python -m lora_merge merge style.safetensors:0.8 lcm.safetensors -o fast-style.safetensors
adds 0.8 times the style and 1 times the LCM-LoRA, exactly; the result loads at strength 1."""
_INFO_EXAMPLE = """example:
  python -m lora_merge info lcm.safetensors"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input, with one line on standard error that says what and why."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "info":
            print("\n".join(describe(load(path)) for path in options.loras))
        else:
            _merge(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _merge(options: argparse.Namespace) -> None:
    # Before the work, so that a name already taken costs no time.
    if options.output.exists() and not options.overwrite:
        raise FileExistsError(f"{options.output}: exists already; choose another name or add --overwrite.")
    inputs = [_load_with_strength(text) for text in options.loras]
    merged, account = merge_with_account(inputs, method=options.method, rank=options.rank, leave_out=options.leave_out)
    save(merged, options.output, dtype=_DTYPES[options.dtype], format=options.format, overwrite=options.overwrite)
    print(describe_merge(account, merged))
    print(f"Written: {options.output} ({options.output.stat().st_size / 1e6:.1f} MB)")


def _load_with_strength(text: str) -> tuple[Lora, float]:
    """The LoRA of FILE or FILE:STRENGTH."""
    path, colon, strength = text.rpartition(":")
    # A name with a colon in it, or a Windows drive letter, is a name.
    if not colon or Path(text).exists():
        return load(text), 1.0
    try:
        return load(path), float(strength)
    except ValueError:
        if _is_number(strength):
            raise
        raise ValueError(f"{text}: {strength!r} after the colon is no number; write FILE:STRENGTH.") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_merge", description="Exact arithmetic on LoRA files.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    add = commands.add_parser("merge", help="add LoRAs into one file", epilog=_MERGE_EXAMPLE, formatter_class=raw)
    add.add_argument("loras", nargs="+", metavar="FILE[:STRENGTH]", help="strength is 1 if not given, may be negative")
    add.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="a .safetensors file to write")
    add.add_argument("--rank", type=int, default=0, help="0 (default): exact, ranks add up; else the largest rank")
    add.add_argument("--method", choices=sorted(METHODS), default="linear", help="default: linear")
    add.add_argument("--dtype", choices=sorted(_DTYPES), default="fp16", help="default: fp16")
    add.add_argument("--format", choices=get_args(Format), default="kohya", help="default: kohya, which ComfyUI reads")
    add.add_argument(
        "--leave-out", action="store_true", help="leave out what does not add up (DoRA, OFT, ...) instead of stopping"
    )
    add.add_argument("--overwrite", action="store_true", help="replace an existing output file")

    info = commands.add_parser("info", help="say what is in a LoRA file", epilog=_INFO_EXAMPLE, formatter_class=raw)
    info.add_argument("loras", nargs="+", metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
