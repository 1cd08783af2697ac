"""The header of a safetensors file, checked before anything is loaded: a file may come from anybody.

A file is 8 bytes (the header's length, little-endian), the header (JSON: name -> dtype, shape, data_offsets), the data.
What safetensors refuses is refused. It allows more than is allowed here: 10**8 bytes of header, tensors without values, more
than MAX_DIMENSIONS dimensions, dtypes without numbers (see DTYPES), names that are empty, too long, not printable or there
twice, entries that are lists, white space before the header, and what json_text.py does not take.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from . import json_text
from .whole import open_plain

# The largest LoRAs known have some 10,000 tensors; a million costs seconds, and gigabytes, before anything is looked at.
MAX_TENSORS = 100_000
MAX_HEADER = 64_000_000
MAX_NAME = 500
MAX_DIMENSIONS = 8
_COUNTS = 1 << 63

_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
_TORCH |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_TORCH |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)} | {
    f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)
}
# Older torch has no uint16, uint32 and uint64.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype) for name, dtype in _TORCH.items() if hasattr(torch, dtype)
}


@dataclass(frozen=True, kw_only=True)
class Header:
    """entries: name -> (dtype, shape, first byte, byte behind the last), counted from `begin`, in the order of the data.
    size: of the whole file in bytes.   changed: when it was, in nanoseconds.
    """

    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...], int, int]]
    metadata: Mapping[str, str]
    begin: int
    size: int
    changed: int


def check_header(path: Path) -> Header:
    """Raises ValueError, saying what is wrong, for a file that is no whole safetensors file of a sane size."""
    with opened(path) as (_, header):
        return header


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, Header]]:
    """The file, unbuffered, and its checked header: of one state of it, whatever has its name meanwhile."""
    with open_plain(path) as file:
        try:
            header = _read(file)
        except _Refused as error:
            raise ValueError(f"{path}: {error}") from None
        yield file, header


def check_written(head: bytes, parsed: Mapping[str, Any], size: int) -> None:
    """The same for a file that is not there yet. head: its first bytes, to the end of the header.   parsed: what a reader
    makes of the header.   size: of the whole.
    """
    try:
        if len(head) - 8 > MAX_HEADER:
            raise _Refused(f"has {len(head)} bytes of header, and the most are {MAX_HEADER}; leave out metadata.")
        _check_text(head[8:])
        _check(dict(parsed), len(head), size)
    except _Refused as error:
        raise ValueError(f"cannot be written, because nobody could read it again: it {error}") from None


class _Refused(Exception):
    """What is wrong, in words."""


def _read(file: BinaryIO) -> Header:
    try:
        state = os.fstat(file.fileno())
        size = state.st_size
        # No more than there is: what the system makes up (/proc) says 0 and may keep a reader waiting.
        head = file.read(min(512, size))
        length = int.from_bytes(head[:8], "little")
        file.seek(8)
        text = file.read(length) if length <= min(MAX_HEADER, size) else b""
    except OSError as error:
        raise _Refused(f"cannot be read ({error.strerror}).") from None
    if (other := _something_else(head)) is not None:
        raise _Refused(other)
    if head[8:9] != b"{":
        raise _Refused("is not a safetensors file; choose one saved as .safetensors.")
    if length > MAX_HEADER and (length > 100_000_000 or length <= size):
        raise _Refused(f"claims a header of {length} bytes, and no LoRA has more than {MAX_HEADER}; it is damaged.")
    if 8 + length > size:
        raise _Refused(f"is cut off within its first {length} bytes, at {size}; download it again.")
    entries, metadata = _check(_parse(text), 8 + length, size)
    return Header(entries=entries, metadata=metadata, begin=8 + length, size=size, changed=state.st_mtime_ns)


def _check(parsed: dict[str, Any], begin: int, size: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries, in the order of the data, and the metadata. parsed: the header.   begin: of the data.   size: of the
    whole file.
    """
    metadata = parsed.pop("__metadata__", None)
    # No metadata may be said as null.
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Refused("is damaged: its metadata is not text by name; download it again.")
    entries = {name: _entry(name, entry) for name, entry in parsed.items()}
    order = sorted((start, stop, name) for name, (_, _, start, stop) in entries.items())
    _check_layout(order, size - begin, size)
    return {name: entries[name] for _, _, name in order}, metadata


def _something_else(head: bytes) -> str | None:
    if not head:
        return "is empty; download it again."
    if head.startswith((b"PK\x03\x04", b"\x80")) and head[8:9] != b"{":
        return (
            "is a pickle (.pt, .ckpt) under another name; pickles can run code and are not opened. Get the safetensors."
        )
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the file itself; fetch it with git lfs pull."
    if head.lstrip().startswith(b"<") and head[8:9] != b"{":
        return "is a web page and not a model; the download needs a login or another link."
    return None


def _check_text(text: bytes) -> str:
    """The header as text, of a size that can be read."""
    if text.count(b'"data_offsets"') > MAX_TENSORS:
        raise _Refused(_too_many(text.count(b'"data_offsets"')))
    with _not_safetensors():
        decoded = text.decode("utf-8")
        json_text.check_size(decoded, MAX_HEADER)
    return decoded


@contextmanager
def _not_safetensors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise _Refused(f"is not a safetensors file ({error}); choose one saved as .safetensors.") from None


def _parse(text: bytes) -> dict[str, Any]:
    """Name -> entry, and the metadata. Stops at a name that stands there twice and at too many objects."""
    objects = 0

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        if objects > MAX_TENSORS + 2:
            raise _Refused(_too_many(objects))
        result = dict(found)
        if len(result) < len(found):
            name = json_text.twice(found)[:MAX_NAME]
            raise _Refused(f"has {name!r} twice in its header; it is damaged or made to deceive.")
        return result

    decoded = _check_text(text)
    with _not_safetensors():
        header = json_text.parse(decoded, characters=MAX_HEADER, pairs=pairs)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
    return header


def _entry(name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise _Refused(
            f"has a tensor named {name[:60]!r}, {len(name)} characters; names have 1 to {MAX_NAME} printable ones."
        )
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _Refused(f"is not a safetensors file: {name} has no dtype, shape and data_offsets in the header.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _Refused(
            f"is damaged: {name} has shape {str(shape)[:60]} and data_offsets {str(offsets)[:60]} in the header."
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Refused(
            f"has {name} in dtype {str(dtype)[:60]}, which holds no weights here; save it as F16 or F32 first."
        )
    numbers, (start, stop) = prod(shape), offsets
    needed = numbers * DTYPES[dtype].itemsize
    if needed != stop - start:
        raise _Refused(
            f"is damaged: {name} is {dtype} of shape {tuple(shape)}, {needed} bytes, but has {stop - start}."
        )
    return DTYPES[dtype], tuple(shape), start, stop


def _counts(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return False
    # Thousands of short lists: a loop takes a third of the time of all() with a generator.
    for number in value:
        if type(number) is not int or not 0 <= number < _COUNTS:
            return False
    return True


def _check_layout(order: Sequence[tuple[int, int, str]], available: int, size: int) -> None:
    """order: first byte, byte behind the last and name of each tensor, sorted."""
    end, before = 0, ""
    for start, stop, name in order:
        if start < end:
            raise _Refused(f"is damaged: {before} and {name} share bytes {start} to {min(end, stop)}.")
        if start > end:
            raise _Refused(f"is damaged: bytes {end} to {start}, before {name}, belong to no tensor.")
        end, before = stop, name
    if end > available:
        raise _Refused(f"is cut off: {size} of {size - available + end} bytes are there; download it again.")
    if end < available:
        raise _Refused(f"is damaged: {available - end} bytes at its end belong to no tensor; download it again.")


def _too_many(count: int) -> str:
    return f"has {count} tensors or more, and no LoRA has more than {MAX_TENSORS}; it is damaged or no LoRA."
