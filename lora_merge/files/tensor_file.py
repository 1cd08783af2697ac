"""The tensors of a safetensors file, mapped into memory without a copy, and written from where they lie.

The format is in header.py. Other than with safetensors' own functions all tensors of a file lie in one memory, so that
their values can be checked together, and a new file keeps the ordinary permissions.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .header import DTYPES, check_header

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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


def write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A whole safetensors file: wide numbers first, so that all are aligned, then by name.

    Raises OSError where the disk is full.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = _NAMES[tensors[name].dtype], list(tensors[name].shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    # Many small writes: in pieces of megabytes Linux looks for as large pages, at five times the cost when memory is full.
    for name in names:
        file.write(_bytes(tensors[name]))


def _bytes(tensor: Tensor) -> memoryview:
    # By way of numpy, which has no bfloat16 but has bytes.
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return data.data
