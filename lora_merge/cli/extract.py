"""The command extract of `python -m lora_merge`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from ..extracting.checkpoints import Pairs, is_told_guidance, pairs
from ..extracting.extract import Weights, extract
from ..extracting.report import describe
from ..files.dtypes import DTYPES
from ..files.load_save import check_output, save
from ..words import many
from .shared import Answer, add_meta, meta, overwriting

_EXAMPLES = """examples:
  python -m lora_merge extract lcm-dreamshaper.safetensors dreamshaper.safetensors -o lcm.safetensors --rank 64
    what made the first model out of the second, as a LoRA: here the acceleration.
  python -m lora_merge extract tuned.safetensors base.safetensors -o style.safetensors --rank 128 --keep 0.95
    each module as small as holds 95 % of its difference, at most rank 128.
  python -m lora_merge extract turbo.safetensors base.safetensors -o turbo-lora.safetensors
    the steps that a turbo model saves, for every fine-tune of its base and for merges with styles."""


def add_extract(add: argparse.ArgumentParser) -> None:
    """Sets `run`: parsed arguments -> (exit status, what to print)."""
    add.epilog = _EXAMPLES
    add.add_argument("tuned", type=Path, metavar="TUNED", help="a .safetensors checkpoint or diffusion model")
    add.add_argument(
        "base",
        type=Path,
        metavar="BASE",
        help="the model that it was made from, in the same format; of a UNet diffusers' and ldm's names meet",
    )
    add.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="a .safetensors file to write")
    add.add_argument("--rank", type=int, default=64, help="the largest of any module; default: 64")
    add.add_argument(
        "--keep",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="stop at the smallest rank that holds this share of a module's energy, 0 to 1; default: 1",
    )
    add.add_argument("--matrices-only", action="store_true", help="leave out biases and norms, which few tools read")
    add.add_argument("--dtype", choices=sorted(DTYPES), default="fp16", help="default: fp16")
    add.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute; default: cpu")
    overwriting(add)
    add_meta(add)
    add.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> Answer:
    # Before the work, so that a name already taken costs no time.
    check_output(options.output, options.overwrite)
    metadata = meta(options.meta)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device. Leave it out to compute on the CPU.")
    files = pairs(options.tuned, options.base)
    lora, found = extract(
        _told(files),
        rank=options.rank,
        keep=options.keep,
        source=options.output.stem,
        device=options.device,
        vectors=not options.matrices_only,
    )
    if not lora.spellings:
        raise ValueError(f"{options.tuned} and {options.base} do not differ: there is nothing to extract.")
    save(lora, options.output, dtype=DTYPES[options.dtype], overwrite=options.overwrite, metadata=metadata)
    lines = [describe(found)]
    if files.only_one:
        lines.append(
            f"{many(len(files.only_one), 'weights are', 'weight is')} in one file only and left out (first: {files.only_one[0]})."
        )
    if told := [key for key in files.only_one if is_told_guidance(key)]:
        lines.append(f"Among these is {told[0]}, by which a model is told its guidance and which no LoRA can hold.")
    lines.append(f"Written: {options.output} ({options.output.stat().st_size / 1e6:.1f} MB)")
    return 0, "\n".join(lines)


def _told(files: Pairs) -> Iterator[Weights]:
    yield from tqdm(files, desc="extract", unit="weight", disable=None, leave=False)
