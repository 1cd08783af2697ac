"""The header of a safetensors file, checked before anything is loaded: a file may come from anybody.

A file is 8 bytes (the header's length, little-endian), the header (JSON: name -> dtype, shape, data_offsets), the data.
safetensors itself allows 10**8 bytes of header, tensors without values and names that stand there twice.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

# The largest LoRAs known have some 10,000 tensors; a million costs seconds, and gigabytes, before anything is looked at.
MAX_TENSORS = 100_000
MAX_HEADER = 64_000_000
MAX_NAME = 500
MAX_DIMENSIONS = 8

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
_BYTES |= {f"{sign}{bits}": bits // 8 for sign in "IU" for bits in (8, 16, 32, 64)}


def check_header(path: Path) -> None:
    """Raises ValueError, saying what is wrong, for a file that is no whole safetensors file of a sane size."""
    problem = _problem(path)
    if problem is not None:
        raise ValueError(f"{path}: {problem}")


def _problem(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(512)
            length = int.from_bytes(head[:8], "little")
            file.seek(8)
            text = file.read(length) if length <= min(MAX_HEADER, size) else b""
    except OSError as error:
        return f"cannot be read ({error})."
    if (other := _something_else(head)) is not None:
        return other
    if head[8:9] != b"{":
        return "is not a safetensors file; choose a LoRA saved as .safetensors."
    if length > MAX_HEADER and (length > 100_000_000 or length <= size):
        return f"claims a header of {length} bytes, and no LoRA has more than {MAX_HEADER}; it is damaged."
    if 8 + length > size:
        return f"is cut off within its first {length} bytes, at {size}; download it again."
    if text.count(b'"data_offsets"') > MAX_TENSORS:
        return _too_many(text.count(b'"data_offsets"'))
    try:
        entries = _parse(text)
    except _Refused as error:
        return str(error)
    except (ValueError, RecursionError) as error:
        return f"is not a safetensors file ({str(error) or 'too deep'}); choose a LoRA saved as .safetensors."
    return _wrong_entry(entries) or _wrong_layout(entries, size - 8 - length, size)


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
        return "is a web page and not a LoRA; the download needs a login or another link."
    return None


class _Refused(Exception):
    """What stops the parser early."""


def _parse(text: bytes) -> dict[str, Any]:
    """Name -> entry. Stops at a name that stands there twice and at too many objects."""
    objects = 0

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        if objects > MAX_TENSORS + 2:
            raise _Refused(_too_many(objects))
        result = dict(found)
        if len(result) < len(found):
            twice = next(name for name, count in Counter(name for name, _ in found).items() if count > 1)
            raise _Refused(f"has {twice[:MAX_NAME]!r} twice in its header; it is damaged or made to deceive.")
        return result

    header = json.loads(text.decode("utf-8"), object_pairs_hook=pairs)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)  # safetensors sees to it
    return header


def _wrong_entry(entries: Mapping[str, Any]) -> str | None:
    for name, entry in entries.items():
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            return (
                f"has a tensor named {name[:60]!r}, {len(name)} characters; names have 1 to {MAX_NAME} printable ones."
            )
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            return f"is not a safetensors file: {name} has no dtype, shape and data_offsets in the header."
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
            return f"is damaged: {name} has shape {str(shape)[:60]} and data_offsets {str(offsets)[:60]} in the header."
        if not isinstance(dtype, str) or dtype not in _BYTES:
            return f"has {name} in dtype {str(dtype)[:60]}, which holds no weights here; save it as F16 or F32 first."
        if prod(shape) == 0:
            return f"is damaged: {name} has shape {tuple(shape)}, so no values at all."
        if prod(shape) * _BYTES[dtype] != offsets[1] - offsets[0]:
            return (
                f"is damaged: {name} is {dtype} of shape {tuple(shape)}, {prod(shape) * _BYTES[dtype]} bytes, but has "
                f"{offsets[1] - offsets[0]}."
            )
    return None


def _counts(value: Any) -> bool:
    few = isinstance(value, list) and len(value) <= MAX_DIMENSIONS
    return few and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def _wrong_layout(entries: Mapping[str, Any], available: int, size: int) -> str | None:
    end, before = 0, ""
    for (start, stop), name in sorted((tuple(entry["data_offsets"]), name) for name, entry in entries.items()):
        if start < end:
            return f"is damaged: {before} and {name} share bytes {start} to {min(end, stop)}."
        if start > end:
            return f"is damaged: bytes {end} to {start}, before {name}, belong to no tensor."
        end, before = stop, name
    if end > available:
        return f"is cut off: {size} of {size - available + end} bytes are there; download it again."
    if end < available:
        return f"is damaged: {available - end} bytes at its end belong to no tensor; download it again."
    return None


def _too_many(count: int) -> str:
    return f"has {count} tensors or more, and no LoRA has more than {MAX_TENSORS}; it is damaged or no LoRA."
