"""LoRA files: read with every doubt named, written whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..algebra.threads import Item, Result, in_order, on_one_core
from ..disk import json_text
from ..disk.garbage import uncollected
from ..disk.header import check_header
from ..disk.overwriting import Overwrite, guard
from ..disk.tensor_file import IN_PLACE, TensorFile, count_open, read, tensor_file, write
from ..disk.whole import check_place, write_whole
from ..keywords import named
from ..metadata import fields
from ..metadata.adapter_config import CONFIG_KEY, Misfit, misfit, of_config, unused
from ..updates.unmade import CPU, Unmade
from .dtypes import DTYPES
from .formats import SAVE_FORMATS, SaveFormat, named_for
from .keys import parse
from .lora import Lora
from .new_metadata import for_file
from .readable import check_readable

# As PEFT itself names them; the scale is nowhere in such a file.
_PEFT = re.compile(r"base_model\.model\.(.+)\.lora_A(?:\.[^.]+)?\.weight")

# Values of a scale or a shape, which say how the rest is meant.
_FEW = 8
# Bytes from which on a file is not kept in memory, and files that are held open for it: systems allow 256 and more.
_STREAMED = 1 << 21
_OPEN = 128
# Elsewhere whoever cuts a mapped file off ends this process.
_MAPS = os.name != "posix"


@named
@uncollected()
def load(path: str | os.PathLike[str], *, mapping: bool = True) -> Lora:
    """The LoRA in a safetensors file, in any spelling that naming/names.py and keys.py know.

    The LoRA factors of a large file are read whenever they are needed, into memory that is used again, and looked at the
    first time: the file stays open as long as the LoRA is known, may be replaced and deleted, and is refused from then on if
    it was written to. All other values are looked at now. Windows replaces no open file, so that there all is in memory.
    mapping: whether a very large one may be mapped where all is in memory.
    For a PEFT folder's `adapter_model.safetensors` the scale is taken from `adapter_config.json` beside it, also for a
    renamed one if ranks and modules are the same.
    Raises FileNotFoundError if there is no such file, ValueError if it is no whole safetensors file of a LoRA, with at
    most header.MAX_TENSORS tensors. Nothing in the file is run, and nothing is loaded before its header is checked.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; check the name and the folder.")
    if path.is_dir():
        raise ValueError(f"{path}: this is a folder; give the .safetensors file in it.")
    tensors, notes = _contents(path, mapping)
    return Lora.from_state_dict(tensors, metadata=_notes(path, tensors, notes), source=path.name)


def _contents(path: Path, mapping: bool) -> tuple[Mapping[str, Tensor | Unmade], Mapping[str, str]]:
    """tensor_file.read, but for large files, whose LoRA factors stay where they are."""
    if not IN_PLACE or path.stat().st_size < _STREAMED or count_open() >= _OPEN:
        return read(path, mapping=mapping and _MAPS)
    file = TensorFile(path)
    return _streamed(file), file.header.metadata


def _streamed(file: TensorFile) -> dict[str, Tensor | Unmade]:
    """The tensors, factors of LoRAs unmade."""
    entries = file.header.entries
    later = {name for name, (dtype, shape, *_) in entries.items() if _is_factor(name, dtype, shape)}
    now = file.tensors(lambda name: name not in later)
    return {name: _unmade(file, name) if name in later else now[name] for name in entries}


def _is_factor(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether it may be a factor of a LoRA. 8-bit floats have no arithmetic."""
    known = parse(name)
    return known is not None and known[1] in ("up", "down") and dtype.itemsize > 1 and len(shape) > 1 and 0 not in shape


def _unmade(file: TensorFile, name: str) -> Unmade:
    dtype, shape, *_ = file.header.entries[name]
    write = partial(file.fill, name)
    return Unmade(
        dtype=dtype, shape=torch.Size(shape), write=write, device=CPU, of_file=True, called=(file.path.name, name)
    )


def outline(path: str | os.PathLike[str]) -> Lora:
    """The LoRA in a file with its names, shapes, alphas and metadata; its other tensors are on the device "meta". For
    choosing among many files in the time that one takes to read.

    Of the file only the header and the tensors of up to 8 values are read. Raises what `load` raises, but for values that
    are not finite.
    """
    path = Path(path)
    with tensor_file(path) as file:
        tensors = {name: _outlined(file, name) for name in file.header.entries}
        metadata = file.header.metadata
    return Lora.from_state_dict(tensors, metadata=_notes(path, tensors, metadata), source=path.name)


def _outlined(file: TensorFile, name: str) -> Tensor:
    dtype, shape, *_ = file.header.entries[name]
    hollow = torch.empty(shape, dtype=dtype, device="meta")
    return hollow if hollow.numel() > _FEW else file.tensor(name)


def _notes(path: Path, tensors: Mapping[str, Tensor | Unmade], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file with what a PEFT configuration beside it says of its scale."""
    return {key: value for key, value in metadata.items() if key != CONFIG_KEY} | _peft_config(path, tensors)


@named
@uncollected()
def save(
    lora: Lora,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = torch.float16,
    format: SaveFormat = "auto",
    overwrite: Overwrite = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the LoRA to a .safetensors file with metadata that kohya's tools, diffusers and `load` read.

    dtype: float16, bfloat16 or float32; None keeps each tensor's.   format: whose names it gets, see formats.named_for:
    "auto" is read by ComfyUI and, as far as there is such a format, by diffusers.
    metadata: before the LoRA's own; an empty value takes a key away. Hashes, dimensions and the date are the new file's.
    overwrite: True replaces a file that `save` wrote, "any" replaces any file.
    The file appears complete or not at all, with the usual permissions of a new file. What is written is what `load` reads:
    that is checked before a byte is written.
    Raises ValueError for what cannot be written or would not be read back, FileNotFoundError for a missing folder,
    FileExistsError for an existing file that is not to be replaced, and OSError if the disk takes no more; an old file is
    as it was then.
    """
    path = Path(path)
    if dtype not in (None, *DTYPES.values()):
        raise ValueError(f"dtype is {dtype}, but it has to be one of {', '.join(map(str, DTYPES.values()))}")
    if format not in SAVE_FORMATS:
        raise ValueError(f"format is {format!r}, but it has to be one of {', '.join(SAVE_FORMATS)}")
    check_output(path, overwrite)
    wanted = fields.given(metadata)
    lora = replace(lora, metadata=fields.changed(lora.metadata, wanted))
    lora, written_in = named_for(lora, format)
    # Nobody else sees these tensors, so what needs no conversion needs no copy.
    pieces = on_one_core(lambda: lora.pieces(dtype, format=written_in, copy=False))
    notes = for_file(lora, path.stem, written_in)
    check_readable(lora, pieces, notes, _peft_config(path, pieces))
    try:
        fields.check(notes)
        write_whole(
            path, lambda file: write(file, pieces, notes, hashed=True, ahead=_ahead), guard(overwrite, _is_ours)
        )
    except ValueError as error:
        raise ValueError(f"{lora.source}: {error}") from None


def _ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The pieces are made while those before them are hashed and written."""
    return in_order(work, items, 1)


def check_output(path: Path, overwrite: Overwrite) -> None:
    """Raises ValueError, FileNotFoundError or FileExistsError if `save` would not write a file of that name."""
    check_place(path, guard(overwrite, _is_ours))
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name has to end in .safetensors, or loaders would not list the file.")


def _is_ours(path: Path) -> bool:
    try:
        return fields.is_ours(check_header(path).metadata)
    except ValueError:
        return False


def _peft_config(path: Path, tensors: Mapping[str, Tensor | Unmade]) -> dict[str, str]:
    """What an adapter_config.json beside the file says of its scale; for a renamed file only where all of it fits."""
    beside = path.with_name("adapter_config.json")
    own_name = path.name.startswith("adapter_model")
    ranks = {
        match[1]: tensors[key].shape[0] for key in tensors if (match := _PEFT.fullmatch(key)) and tensors[key].ndim
    }
    if not beside.is_file() or not (own_name or ranks):
        return {}
    try:
        config = json_text.parse_object(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        if own_name:
            raise ValueError(f"{beside}: not JSON ({error}), so the scale of {path.name} is unknown.") from None
        return unused(Misfit())
    if own_name:
        return of_config(config)
    reason = misfit(config, ranks)
    return unused(reason) if reason else {**of_config(config), CONFIG_KEY: "used"}
