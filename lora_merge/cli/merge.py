"""The commands merge, resize, reproduce and info of `python -m lora_merge`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import torch

from ..disk.digests import sha256_of
from ..disk.hashes import stated, weights_sha256
from ..files.dtypes import DTYPES
from ..files.formats import SAVE_FORMATS
from ..files.load_save import check_output, load, save
from ..files.lora import Lora
from ..merging.account import Account
from ..merging.merge import merge_with_account, resize_with_account
from ..merging.report import describe, describe_merge, describe_provenance
from ..merging.reproduce import reproduce
from ..metadata.report import describe_metadata
from ..methods.table import METHODS, all_parameters, methods_with
from ..one_module.protect import protecting
from ..recognise.identity import identify
from ..settings.strengths import for_inputs
from .shared import PATTERNS, Answer, add_meta, meta, overwriting, paths_and_strengths, progress_bar

_MERGE_EXAMPLES = """examples:
  python -m lora_merge merge style.safetensors:0.8 lcm.safetensors -o fast-style.safetensors
    0.8 times the style and 1 times the LCM-LoRA, exactly; the result loads at strength 1.
  python -m lora_merge merge style.safetensors:0.8 lcm.safetensors -o small.safetensors --retain 0.95
    as small as it gets while each of the two keeps 95 % of its energy.
  python -m lora_merge merge style.safetensors lcm.safetensors -o aside.safetensors --mu 1
    the style steps aside where the LCM-LoRA is strong.
  python -m lora_merge merge style.safetensors lcm.safetensors -o blocks.safetensors --block-strengths "1: down=0.5, te=0"
    the first LoRA by half on the way down, and not in the text encoder.
  python -m lora_merge merge "run-0000*.safetensors" -o mean.safetensors --method average --rank 32
    the mean of one training's checkpoints, in their own rank; "run-000010.safetensors:2" counts one twice."""
_RESIZE_EXAMPLES = """examples:
  python -m lora_merge resize big.safetensors -o small.safetensors --rank 32
  python -m lora_merge resize big.safetensors -o small.safetensors --keep 0.98
    98 % of the energy with as few numbers as possible, ranks differ from module to module.
  python -m lora_merge resize big.safetensors -o small.safetensors --max-mb 40"""
_REPRODUCE_EXAMPLE = """example:
  python -m lora_merge reproduce fast-style.safetensors --inputs ~/loras
makes the file again from what it says of itself. Exit status: 0 it is the same, 1 it is not, 2 bad input."""
_INFO_EXAMPLE = """example:
  python -m lora_merge info lcm.safetensors"""


def add_merge(add: argparse.ArgumentParser) -> None:
    """Sets `run`: parsed arguments -> (exit status, what to print)."""
    add.epilog = _merge_help()
    add.add_argument(
        "loras", nargs="+", metavar="FILE[:STRENGTH]", help=f"strength is 1 if not given, may be negative. {PATTERNS}"
    )
    _output(add)
    _cut(add)
    add.add_argument("--retain", type=float, metavar="SHARE", help="share of its energy that each LoRA keeps, 0 to 1")
    add.add_argument("--method", choices=METHODS, default="linear", help="default: linear; see the list below")
    _parameters(add)
    add.add_argument("--seed", type=int, default=0, help="of methods that draw at random; default: 0")
    add.add_argument(
        "--dense",
        action="store_true",
        help="methods work on whole updates, as in their papers; takes more time and makes a larger file",
    )
    add.add_argument(
        "--protect",
        default="auto",
        metavar="N",
        help="which LoRA the others make room for: 1, 2, ..., none, "
        "or auto (default): the one recognised as an acceleration LoRA",
    )
    add.add_argument("--mu", type=float, default=0.0, help="how far the others step aside; 0 (default): not at all")
    add.add_argument(
        "--block-strengths",
        action="append",
        default=[],
        metavar="TEXT",
        help='factors such as "down=0.5, attention=1.2, te=0, *attn2*=0.3" for all LoRAs, or "2: up=0" for the second; '
        "may be repeated",
    )
    add.add_argument("--leave-out", action="store_true", help="leave out what does not add up (DoRA, OFT, ...)")
    _machine(add)
    add.set_defaults(run=_merge)


def add_resize(add: argparse.ArgumentParser) -> None:
    """Sets `run`: parsed arguments -> (exit status, what to print)."""
    add.epilog = _RESIZE_EXAMPLES
    add.add_argument("lora", type=Path, metavar="FILE")
    _output(add)
    _cut(add)
    _machine(add)
    add.set_defaults(run=_resize)


def add_reproduce(add: argparse.ArgumentParser) -> None:
    """Sets `run`: parsed arguments -> (exit status, what to print)."""
    add.epilog = _REPRODUCE_EXAMPLE
    add.add_argument("file", type=Path, metavar="FILE", help="what merge or resize wrote")
    add.add_argument(
        "--inputs",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="where its inputs are, also in folders below; default: the folder of FILE",
    )
    add.add_argument("--workers", type=int, help="threads; default: as many as torch uses")
    add.set_defaults(run=_reproduce)


def add_info(add: argparse.ArgumentParser) -> None:
    """Sets `run`: parsed arguments -> (exit status, what to print)."""
    add.epilog = _INFO_EXAMPLE
    add.add_argument("loras", nargs="+", metavar="FILE")
    add.set_defaults(run=_info)


def _parameters(add: argparse.ArgumentParser) -> None:
    """A flag for each parameter of any method; `_given` reads them."""
    for name, methods in all_parameters().items():
        low, high = min(one.low for one in methods.values()), max(one.high for one in methods.values())
        meaning = _of_all({one.meaning for one in methods.values()})
        default = _of_all({f"{one.default:g}" for one in methods.values()}) or "the method's"
        text = f"of {methods_with(name)}, {low:g} to {high:g}; default: {default}{f'; {meaning}' if meaning else ''}"
        add.add_argument(f"--{name.replace('_', '-')}", dest=name, type=float, help=text.replace("%", "%%"))


def _of_all(texts: set[str]) -> str:
    return next(iter(texts)) if len(texts) == 1 else ""


def _given(options: argparse.Namespace) -> dict[str, float | None]:
    return {name: getattr(options, name) for name in all_parameters()}


def _merge_help() -> str:
    lines = [_MERGE_EXAMPLES, "", "methods:"]
    for name, method in METHODS.items():
        values = ", ".join(f"{parameter} {p.default:g}" for parameter, p in method.parameters.items())
        lines.append(f"  {name:12} {method.summary}{f' (default: {values})' if values else ''}")
    return "\n".join(lines)


def _output(add: argparse.ArgumentParser) -> None:
    add.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="a .safetensors file to write")
    add.add_argument("--dtype", choices=sorted(DTYPES), default="fp16", help="default: fp16")
    add.add_argument(
        "--format", choices=SAVE_FORMATS, default="auto", help="default: auto, what ComfyUI and diffusers read"
    )
    overwriting(add)
    add_meta(add)


def _cut(add: argparse.ArgumentParser) -> None:
    add.add_argument("--rank", type=int, default=0, help="0 (default): exact, ranks add up; else the largest rank")
    add.add_argument("--keep", type=float, metavar="SHARE", help="share of the energy to keep, 0 to 1")
    add.add_argument("--max-mb", type=float, metavar="MB", help="size of the file, in MB of a million bytes")
    add.add_argument("--balanced", action="store_true", help="when cutting, every LoRA counts alike, however weak")


def _machine(add: argparse.ArgumentParser) -> None:
    add.add_argument("--workers", type=int, help="threads; default: as many as torch uses. The result is the same")
    add.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where to compute; cuda pays with --dense"
    )


def _info(options: argparse.Namespace) -> Answer:
    lines = []
    for path in options.loras:
        lora = load(path)
        lines += [describe(lora), *describe_metadata(lora.metadata), *describe_provenance(lora), _weights(lora, path)]
    return 0, "\n".join(lines)


def _weights(lora: Lora, path: str) -> str:
    found, said = weights_sha256(path), stated(lora.metadata)
    beside = (
        "" if said is None else ", as the file says" if said == found else f"; the file says {said}, which is untrue"
    )
    return f"  sha256 of the weights: {found}{beside}"


def _merge(options: argparse.Namespace) -> Answer:
    # Before the work, so that a name already taken costs no time.
    check_output(options.output, options.overwrite)
    metadata = meta(options.meta)
    named = paths_and_strengths(options.loras)
    labels = [str(number) for number in range(1, len(named) + 1)]
    with _hashes([path for path, _ in named]) as hashes, progress_bar("merge") as progress:
        loras = [load(path) for path, _ in named]
        strengths = [strength for _, strength in named]
        merged, account = merge_with_account(
            list(zip(loras, strengths, strict=True)),
            method=options.method,
            parameters=_given(options),
            seed=options.seed,
            dense=options.dense,
            retain=options.retain,
            protect=protecting(
                options.protect,
                labels,
                lambda: [identify(lora, path) for lora, (path, _) in zip(loras, named, strict=True)],
                strengths,
            ),
            mu=options.mu,
            block_strengths=for_inputs("\n".join(options.block_strengths), labels),
            leave_out=options.leave_out,
            sha256=hashes,
            metadata=metadata,
            progress=progress,
            **_common(options),
        )
    return 0, _write(options, merged, account)


def _resize(options: argparse.Namespace) -> Answer:
    check_output(options.output, options.overwrite)
    metadata = meta(options.meta)
    with _hashes([options.lora]) as hashes, progress_bar("resize") as progress:
        small, account = resize_with_account(
            load(options.lora), sha256=hashes, metadata=metadata, progress=progress, **_common(options)
        )
    return 0, _write(options, small, account)


def _reproduce(options: argparse.Namespace) -> Answer:
    with progress_bar("make again") as progress:
        result = reproduce(options.file, options.inputs, workers=options.workers, progress=progress)
    made = f"Made again from {', '.join(map(str, result.inputs))}."
    if result.identical:
        return 0, f"{made}\n{options.file} is the same, bit for bit."
    word = "the same up to rounding" if result.same else "NOT the same"
    return int(not result.same), f"{made}\n{options.file} is {word}: relative difference {result.difference:.3g}."


def _common(options: argparse.Namespace) -> dict[str, Any]:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device. Leave it out to compute on the CPU.")
    return {
        "rank": options.rank,
        "keep": options.keep,
        "max_mb": options.max_mb,
        "balanced": options.balanced,
        "out_dtype": DTYPES[options.dtype],
        "workers": options.workers,
        "device": options.device,
    }


def _write(options: argparse.Namespace, lora: Lora, account: Account) -> str:
    save(lora, options.output, dtype=DTYPES[options.dtype], format=options.format, overwrite=options.overwrite)
    size = options.output.stat().st_size
    return f"{describe_merge(account, lora)}\nWritten: {options.output} ({size / 1e6:.1f} MB)"


@contextmanager
def _hashes(paths: list[Any]) -> Iterator[Any]:
    """A function that gives the files' sha256, computed beside the work."""
    over = Event()
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(sha256_of, path, over.is_set) for path in paths]
        try:
            yield lambda: [one.result() for one in waiting]
        finally:
            over.set()
            pool.shutdown(cancel_futures=True)
