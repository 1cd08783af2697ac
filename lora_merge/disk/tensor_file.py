"""The tensors of a safetensors file, read into memory, and written from where they lie.

The format is in header.py. Other than with safetensors' own functions all tensors of a file lie in one memory, so that
their values can be checked together, and a new file keeps the ordinary permissions.

A file that is mapped into memory costs nothing until its pages are looked at, but whoever cuts it off meanwhile (a
trainer that saves to that name, rsync --inplace) ends this process with a SIGBUS that nothing can catch. Reading takes
0.4 ms of CPU for each MB, 0.05 s for a LoRA of 130 MB, as much memory as the pages that would have been looked at
anyway, and nothing that happens to the file later matters. Beyond MAPPED_ABOVE the memory would hurt more: the system
can take back pages of a file, not those of a copy. A server, which has other people's work to lose and keeps its files for
long, reads up to SERVER_MAPPED_ABOVE; a command that ends so has written its result whole or not at all.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from .hashes import BLANK, Hashes, training
from .header import DTYPES, Header, check_written, opened

SERVER_MAPPED_ABOVE = 1 << 30
# Windows replaces no file that is mapped, and a result may take its input's place.
MAPPED_ABOVE = 1 << 28 if os.name == "posix" else SERVER_MAPPED_ABOVE
# Bytes of what is made at once on its way into a file.
_BATCH = 1 << 20
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Wide numbers first, so that all are aligned, and otherwise as safetensors sorts them: then who loads a file and lets
# safetensors write it again, as kohya's tools do for a hash, has the same bytes.
_ORDER = "U64 I64 F64 F32 U32 I32 BF16 F16 U16 I16 F8_E4M3 F8_E5M2 I8 U8 BOOL".split()


def read(
    path: Path, *, mapping: bool = True, mapped_above: int | None = None
) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """(tensors in the order of the file, metadata). Writing into a tensor changes this copy only, never the file.

    mapping: whether a file of more than `mapped_above` bytes, MAPPED_ABOVE if None, may be mapped instead.
    Raises ValueError for a file that check_header refuses, that cannot be read, or that changes meanwhile.
    """
    with opened(path) as (file, header):
        if mapping and header.size > (MAPPED_ABOVE if mapped_above is None else mapped_above):
            whole = torch.frombuffer(mmap.mmap(file.fileno(), header.size, access=mmap.ACCESS_COPY), dtype=torch.uint8)
            memory = whole[header.begin :]
        else:
            memory = _bytes_at(file, header.begin, header.size - header.begin, path)
            _check_unchanged(file, header, path)
    return {name: _tensor(memory, *entry) for name, entry in header.entries.items()}, header.metadata


class TensorFile:
    """A safetensors file whose tensors are read one at a time.   header: what it holds, checked."""

    def __init__(self, path: Path, file: BinaryIO, header: Header) -> None:
        self.path, self.file, self.header = path, file, header

    def tensor(self, name: str) -> Tensor:
        """Raises ValueError if the file was changed since it was opened."""
        dtype, shape, start, stop = self.header.entries[name]
        memory = _bytes_at(self.file, self.header.begin + start, stop - start, self.path)
        _check_unchanged(self.file, self.header, self.path)
        return memory.view(dtype).view(shape)


@contextmanager
def tensor_file(path: Path) -> Iterator[TensorFile]:
    """Raises ValueError for a file that check_header refuses."""
    with opened(path) as (file, header):
        yield TensorFile(path, file, header)


def _bytes_at(file: BinaryIO, begin: int, size: int, path: Path) -> Tensor:
    memory = torch.empty(size, dtype=torch.uint8)
    view, done = memory.numpy().data, 0
    try:
        file.seek(begin)
        while done < size and (more := file.readinto(view[done:])):  # type: ignore[attr-defined]
            done += more
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    if done < size:
        raise ValueError(_changed(path))
    return memory


def _check_unchanged(file: BinaryIO, header: Header, path: Path) -> None:
    """Half of one file and half of another are numbers, too."""
    state = os.fstat(file.fileno())
    if (state.st_size, state.st_mtime_ns) != (header.size, header.changed):
        raise ValueError(_changed(path))


def _changed(path: Path) -> str:
    return f"{path}: was changed by another program while it was read; try again when that has finished."


def _tensor(memory: Tensor, dtype: torch.dtype, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    data = memory[start:stop]
    # Nothing obliges a file to begin its tensors at multiples of their numbers' size.
    aligned = data if (memory.storage_offset() + start) % dtype.itemsize == 0 else data.clone()
    return aligned.view(dtype).view(shape)


class Content(Protocol):
    """A tensor, or what says how large one will be."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> torch.Size: ...

    @property
    def nbytes(self) -> int: ...


class ToFill(Content, Protocol):
    """A tensor that is made on its way into the file. fill: writes it into memory of that dtype and shape."""

    @property
    def fill(self) -> Callable[[Tensor], None]: ...


def write(
    file: BinaryIO,
    tensors: Mapping[str, Tensor | ToFill],
    metadata: Mapping[str, str],
    *,
    hashed: bool = False,
    ahead: Callable[..., Iterable[Any]] = map,
) -> None:
    """A whole safetensors file, by kind of number and then by name.

    ahead: as `map`, and free to make the next pieces while one is written.
    hashed: adds the file's hashes (hashes.py) to the metadata, made in the one pass over the tensors, for which one has to
        be able to go back in the file. Raises ValueError, before anything is written, where `read` would refuse it.
    Raises OSError where the disk is full.
    """
    names = sorted(tensors, key=lambda name: (_ORDER.index(NAMES[tensors[name].dtype]), name))
    entries = _entries(names, tensors)
    metadata = {**metadata, **BLANK} if hashed else metadata
    head = _head(entries, metadata)
    if hashed:
        size = len(head) + sum(tensor.nbytes for tensor in tensors.values())
        check_written(head, {"__metadata__": metadata, **entries}, size)
    hashes = Hashes(_head(entries, training(metadata))) if hashed else None
    start = file.tell() if hashes else 0
    file.write(head)
    # Many small writes: in pieces of megabytes Linux looks for as large pages, at five times the cost when memory is full.
    for batch in ahead(_all_bytes, _batches([tensors[name] for name in names])):
        for data in batch:
            file.write(data)
            if hashes:
                hashes.add(data)
    if hashes:
        file.seek(start)
        file.write(_head(entries, {**metadata, **hashes.found()}))
        file.seek(0, 2)


def _entries(names: Sequence[str], tensors: Mapping[str, Content]) -> dict[str, object]:
    entries: dict[str, object] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    return entries


def _head(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """The header with its length before it."""
    whole = {"__metadata__": dict(metadata), **entries} if metadata else entries
    header = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _batches(tensors: Sequence[Tensor | ToFill]) -> Iterator[list[Tensor | ToFill]]:
    """Neighbours, as many as are worth handing over at once."""
    batch: list[Tensor | ToFill] = []
    size = 0
    for tensor in tensors:
        batch.append(tensor)
        size += tensor.nbytes
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _all_bytes(tensors: Sequence[Tensor | ToFill]) -> list[memoryview]:
    return [_bytes(tensor) for tensor in tensors]


def _bytes(tensor: Tensor | ToFill) -> memoryview:
    if not isinstance(tensor, Tensor):
        memory = torch.empty(tensor.shape, dtype=tensor.dtype)
        tensor.fill(memory)
        tensor = memory
    # By way of numpy, which has no bfloat16 but has bytes.
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return data.data
