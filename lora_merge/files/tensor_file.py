"""The tensors of a safetensors file, mapped into memory without a copy, and written from where they lie.

The format is in header.py. Other than with safetensors' own functions all tensors of a file lie in one memory, so that
their values can be checked together, and a new file keeps the ordinary permissions.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .hashes import BLANK, Hashes, training
from .header import DTYPES, check_header, check_written

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Wide numbers first, so that all are aligned, and otherwise as safetensors sorts them: then who loads a file and lets
# safetensors write it again, as kohya's tools do for a hash, has the same bytes.
_ORDER = "U64 I64 F64 F32 U32 I32 BF16 F16 U16 I16 F8_E4M3 F8_E5M2 I8 U8 BOOL".split()


def mapped(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """(tensors in the order of the file, metadata). Pages are read when they are looked at, and writing into a tensor
    changes this copy only, never the file.

    Raises ValueError for a file that check_header refuses, OSError for one that cannot be mapped.
    """
    header = check_header(path)
    with open(path, "rb") as file:
        memory = torch.frombuffer(mmap.mmap(file.fileno(), header.size, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    tensors = {}
    for name, (dtype, shape, start, stop) in header.entries.items():
        data = memory[header.begin + start : header.begin + stop]
        # Nothing obliges a file to begin its tensors at multiples of their numbers' size.
        aligned = data if (header.begin + start) % dtype.itemsize == 0 else data.clone()
        tensors[name] = aligned.view(dtype).view(shape)
    return tensors, header.metadata


def write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, hashed: bool = False) -> None:
    """A whole safetensors file, by kind of number and then by name.

    hashed: adds the file's hashes (hashes.py) to the metadata, made in the one pass over the tensors, for which one has to
        be able to go back in the file. Raises ValueError, before anything is written, where `mapped` would refuse it.
    Raises OSError where the disk is full.
    """
    names = sorted(tensors, key=lambda name: (_ORDER.index(_NAMES[tensors[name].dtype]), name))
    metadata = {**metadata, **BLANK} if hashed else metadata
    head = _head(names, tensors, metadata)
    if hashed:
        check_written(head, len(head) + sum(tensor.nbytes for tensor in tensors.values()))
    hashes = Hashes(_head(names, tensors, training(metadata))) if hashed else None
    start = file.tell() if hashes else 0
    file.write(head)
    # Many small writes: in pieces of megabytes Linux looks for as large pages, at five times the cost when memory is full.
    for name in names:
        data = _bytes(tensors[name])
        file.write(data)
        if hashes:
            hashes.add(data)
    if hashes:
        file.seek(start)
        file.write(_head(names, tensors, {**metadata, **hashes.found()}))
        file.seek(0, 2)


def _head(names: Sequence[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The header with its length before it."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = _NAMES[tensors[name].dtype], list(tensors[name].shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _bytes(tensor: Tensor) -> memoryview:
    # By way of numpy, which has no bfloat16 but has bytes.
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return data.data
