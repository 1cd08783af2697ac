"""The tensors of a safetensors file, read into memory or when they are needed, and written from where they lie.

The format is in header.py. Other than with safetensors' own functions all tensors of a file lie in one memory, so that
their values can be checked together, and a new file keeps the ordinary permissions.

TensorFile stays open and reads single tensors into memory that the caller has: memory that is used again costs neither page
faults nor room. A file that is cut off or written to meanwhile (a trainer that saves to that name, rsync --inplace) is an
error in words. One that is mapped into memory would end the process with a SIGBUS that nothing can catch; `read` maps only
what is larger than MAPPED_ABOVE.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from .hashes import BLANK, Hashes, training
from .header import DTYPES, Header, check_written, opened

# Windows replaces no file that is mapped, and a result may take its input's place.
MAPPED_ABOVE = 1 << (28 if os.name == "posix" else 30)
# Whether a file can be read anywhere without a place of its own, which threads and forked processes would share.
IN_PLACE = hasattr(os, "preadv")
_one_at_a_time = threading.Lock()
# Bytes of what is made at once on its way into a file, for the processor's cache to hold them until they are written; and
# how many such memories there are, for whoever makes them ahead.
_BATCH = 1 << 19
_MEMORIES = 4
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Wide numbers first, so that all are aligned, and otherwise as safetensors sorts them: then who loads a file and lets
# safetensors write it again, as kohya's tools do for a hash, has the same bytes.
_ORDER = "U64 I64 F64 F32 U32 I32 BF16 F16 U16 I16 F8_E4M3 F8_E5M2 I8 U8 BOOL".split()


def read(path: Path, *, mapping: bool = True) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """(tensors in the order of the file, metadata). Writing into a tensor changes this copy only, never the file.

    mapping: whether a file of more than MAPPED_ABOVE bytes may be mapped instead.
    Raises ValueError for a file that check_header refuses, that cannot be read, or that changes meanwhile.
    """
    with opened(path) as (file, header):
        if mapping and header.size > MAPPED_ABOVE:
            whole = torch.frombuffer(mmap.mmap(file.fileno(), header.size, access=mmap.ACCESS_COPY), dtype=torch.uint8)
            memory = whole[header.begin :]
        else:
            memory = _bytes_at(file, header.begin, header.size - header.begin, path)
            _check_unchanged(file, header, path)
    return {name: _tensor(memory, *entry) for name, entry in header.entries.items()}, header.metadata


class TensorFile:
    """A safetensors file whose tensors are read one at a time; from several threads, too.

    header: what it holds, checked. It is open until `close`, or until nobody knows it any more.
    Raises ValueError for a file that check_header refuses; all methods but `close`, if it was changed since it was opened.
    """

    def __init__(self, path: Path) -> None:
        with ExitStack() as stack:
            self.path, (self.file, self.header) = path, stack.enter_context(opened(path))
            self.close = weakref.finalize(self, stack.pop_all().close)
        _open.add(self)

    def fill(self, name: str, place: Tensor) -> None:
        """Reads a tensor into contiguous memory of its dtype and size."""
        # By way of numpy, which has no bfloat16 but has bytes.
        data = place.view(-1).view(torch.uint8).numpy().data
        _fill(self.file, self.header.begin + self.header.entries[name][2], data, self.path)
        _check_unchanged(self.file, self.header, self.path)

    def tensor(self, name: str) -> Tensor:
        dtype, shape, *_ = self.header.entries[name]
        memory = torch.empty(shape, dtype=dtype)
        self.fill(name, memory)
        return memory

    def tensors(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Those of these names, in one memory."""
        found = [(name, entry) for name, entry in self.header.entries.items() if wanted(name)]
        # Wide numbers first, so that all are aligned.
        entries = dict(sorted(found, key=lambda one: -one[1][0].itemsize))
        memory = torch.empty(sum(stop - start for *_, start, stop in entries.values()), dtype=torch.uint8)
        data, end, runs = memory.numpy().data, 0, _neighbours(entries.values())
        for start, stop in runs:
            before, end = end, end + stop - start
            _fill(self.file, self.header.begin + start, data[before:end], self.path)
        _check_unchanged(self.file, self.header, self.path)
        places = torch.split(memory, [stop - start for *_, start, stop in entries.values()])
        return {
            name: _typed(place, dtype, shape)
            for (name, (dtype, shape, *_)), place in zip(entries.items(), places, strict=True)
        }


_open: weakref.WeakSet[TensorFile] = weakref.WeakSet()


def count_open() -> int:
    """How many TensorFiles there are in this process, which may have some hundred files open."""
    return sum(file.close.alive for file in list(_open))


@contextmanager
def tensor_file(path: Path) -> Iterator[TensorFile]:
    """Open until the end of the block."""
    file = TensorFile(path)
    try:
        yield file
    finally:
        file.close()


def _bytes_at(file: BinaryIO, begin: int, size: int, path: Path) -> Tensor:
    memory = torch.empty(size, dtype=torch.uint8)
    _fill(file, begin, memory.numpy().data, path)
    return memory


def _neighbours(entries: Iterable[tuple[torch.dtype, tuple[int, ...], int, int]]) -> list[tuple[int, int]]:
    """(first byte, byte behind the last) of tensors without others between them. entries: of a header, in its order."""
    runs: list[tuple[int, int]] = []
    for *_, start, stop in entries:
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, stop))
    return runs


def _fill(file: BinaryIO, begin: int, place: memoryview, path: Path) -> None:
    done, size = 0, place.nbytes
    try:
        while done < size and (more := _read_at(file, place[done:], begin + done)):
            done += more
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    if done < size:
        raise ValueError(_changed(path))


def _read_at(file: BinaryIO, place: memoryview, begin: int) -> int:
    if IN_PLACE:
        return os.preadv(file.fileno(), [place], begin)
    with _one_at_a_time:
        file.seek(begin)
        return int(file.readinto(place))  # type: ignore[attr-defined]


def _check_unchanged(file: BinaryIO, header: Header, path: Path) -> None:
    """Half of one file and half of another are numbers, too."""
    state = os.fstat(file.fileno())
    if (state.st_size, state.st_mtime_ns) != (header.size, header.changed):
        raise ValueError(_changed(path))


def _changed(path: Path) -> str:
    return f"{path}: was changed by another program while it was read; try again when that has finished."


def _tensor(memory: Tensor, dtype: torch.dtype, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    return _typed(memory[start:stop], dtype, shape)


def _typed(data: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    # Nothing obliges a file to begin its tensors at multiples of their numbers' size.
    aligned = data if data.storage_offset() % dtype.itemsize == 0 else data.clone()
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
    """A tensor that is made on its way into the file. fill: writes it into contiguous memory of that dtype and shape."""

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

    ahead: as `map`, and free to make the next two pieces while one is written.
    hashed: adds the file's hashes (hashes.py) to the metadata, made in the one pass over the tensors, for which one has to
        be able to go back in the file. Raises ValueError, before anything is written, where `read` would refuse it.
    Raises OSError where the disk is full.
    """
    names = sorted(tensors, key=lambda name: (_ORDER.index(NAMES[tensors[name].dtype]), name))
    entries = _entries(names, tensors)
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    data = _data([tensors[name] for name in names], ahead)
    if not hashed:
        file.write(_head(text, metadata))
        for piece in data:
            file.write(piece)
        return
    metadata = {**metadata, **BLANK}
    head = _head(text, metadata)
    size = len(head) + sum(tensor.nbytes for tensor in tensors.values())
    check_written(head, {"__metadata__": metadata, **entries}, size)
    hashes, start = Hashes(_head(text, training(metadata))), file.tell()
    file.write(head)
    for piece in data:
        file.write(piece)
        hashes.add(piece)
    file.seek(start)
    file.write(_head(text, {**metadata, **hashes.found()}))
    file.seek(0, 2)


def _data(tensors: Sequence[Tensor | ToFill], ahead: Callable[..., Iterable[Any]]) -> Iterator[memoryview]:
    """All that stands behind the header, in many small pieces: for those of megabytes Linux looks for as large pages, at five
    times the cost when memory is full."""
    memories = cycle([_Memory() for _ in range(_MEMORIES)])
    for batch in ahead(_all_bytes, zip(_batches(tensors), memories, strict=False)):
        yield from batch


def _entries(names: Sequence[str], tensors: Mapping[str, Content]) -> dict[str, object]:
    entries: dict[str, object] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    return entries


def _head(entries: str, metadata: Mapping[str, str]) -> bytes:
    """The header with its length before it. entries: of the tensors, as JSON."""
    notes = json.dumps({"__metadata__": dict(metadata)} if metadata else {}, separators=(",", ":"), ensure_ascii=False)
    header = f"{{{','.join(filter(None, (notes[1:-1], entries[1:-1])))}}}".encode()
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


class _Memory:
    """Memory for the pieces of one batch, used again for a later one."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def __call__(self, size: int) -> Tensor:
        if self.bytes.numel() < size:
            self.bytes = torch.empty(size, dtype=torch.uint8)
        return self.bytes[:size]


def _all_bytes(work: tuple[Sequence[Tensor | ToFill], _Memory]) -> list[memoryview]:
    """Of the tensors as they stand in the file. What is unmade is made in the memory."""
    tensors, memory = work
    unmade = [tensor for tensor in tensors if not isinstance(tensor, Tensor)]
    places = iter(torch.split(memory(sum(t.nbytes for t in unmade)), [t.nbytes for t in unmade]))
    return [_bytes(tensor) if isinstance(tensor, Tensor) else _filled(tensor, next(places)) for tensor in tensors]


def _filled(tensor: ToFill, memory: Tensor) -> memoryview:
    tensor.fill(memory.view(tensor.dtype).view(tensor.shape))
    return memory.numpy().data


def _bytes(tensor: Tensor) -> memoryview:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return data.data
