"""The command convert of `python -m lora_merge`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..files.dtypes import DTYPES
from ..files.formats import SAVE_FORMATS, exact_in_peft, named_for
from ..files.load_save import check_output, load, save
from ..files.lora import Lora
from ..files.shared import WHICH, only
from ..words import many
from .shared import Answer, add_meta, meta, overwriting

_EXAMPLES = """examples:
  python -m lora_merge convert style.safetensors -o style-diffusers.safetensors --format diffusers
    the names of diffusers, for Python scripts: fused weights in slices, the scale in the factors.
  python -m lora_merge convert musubi.safetensors -o style.safetensors
    names that ComfyUI and, as far as there are such, diffusers read.
  python -m lora_merge convert t2v.safetensors -o both.safetensors --only shared --against i2v.safetensors
    only the modules that the other LoRA has, too.
The update stays what it is: another name, rows put together or taken apart. Numbers change only where a scale that is no
power of two goes into the factors; these are then written as fp32."""


def add_convert(add: argparse.ArgumentParser) -> None:
    """Sets `run`: parsed arguments -> (exit status, what to print)."""
    add.epilog = _EXAMPLES
    add.add_argument("lora", type=Path, metavar="FILE")
    add.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="a .safetensors file to write")
    add.add_argument(
        "--format",
        choices=SAVE_FORMATS,
        default="auto",
        help="whose names: of kohya's trainers, diffusers, ComfyUI; default: auto, what ComfyUI and diffusers read",
    )
    add.add_argument("--dtype", choices=("keep", *sorted(DTYPES)), default="keep", help="default: keep, as it is")
    add.add_argument("--only", choices=WHICH, help="the modules that another LoRA has, too, or has not")
    add.add_argument("--against", type=Path, metavar="FILE", help="that other LoRA")
    overwriting(add)
    add_meta(add)
    add.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> Answer:
    if (options.only is None) != (options.against is None):
        raise ValueError("--only and --against go together: which modules, and of which other LoRA.")
    check_output(options.output, options.overwrite)
    metadata = meta(options.meta)
    lora = load(options.lora)
    if options.only is not None:
        lora = only(lora, load(options.against), options.only)
    dtype, wider = None if options.dtype == "keep" else DTYPES[options.dtype], 0
    if dtype is None and _is_in_peft(lora, options.format):
        lora, wider = exact_in_peft(lora)
    save(lora, options.output, dtype=dtype, format=options.format, overwrite=options.overwrite, metadata=metadata)
    return 0, _told(options, load(options.output), wider)


def _is_in_peft(lora: Lora, format: str) -> bool:
    return named_for(lora, format)[1] != "kohya"  # type: ignore[arg-type]


def _told(options: argparse.Namespace, written: Lora, wider: int) -> str:
    first = next(iter(written.spellings.values()), "")
    lines = [f"{options.lora.name}: {many(len(written.spellings), 'modules')}, named such as {first}."]
    if wider:
        lines.append(f"{wider} of them as fp32: their scale is no power of two, and has no place of its own.")
    size = options.output.stat().st_size
    return "\n".join([*lines, f"Written: {options.output} ({size / 1e6:.1f} MB)"])
