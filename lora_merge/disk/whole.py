"""Files that appear complete or not at all, also when two processes write one name or one is killed.

A file is written under a temporary name beside its own, `.NAME.xxxxxxxx.tmp`, flushed to the disk and only then given
its name; until then an old file of that name stays as it is. The temporary file is locked while it is written: one that
nobody has locked belongs to a run that was killed, and the next one that writes that name removes it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where nobody can remove a file that is open
    fcntl = None  # type: ignore[assignment]

from .file_names import MAX_BYTES, name_trouble, shown

Guard = Callable[[Path], None]
"""Raises FileExistsError, saying why, for a file that must not be replaced."""

_TAIL = re.compile(r"\.[0-9a-f]{8}\.tmp")
_TAIL_BYTES = 13
# Where files cannot be locked: nothing is written for so long without a change.
_ABANDONED_SECONDS = 24 * 3600
_FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT") if hasattr(errno, name)}


def refuse(path: Path) -> None:
    """A Guard that lets nothing be replaced."""
    raise FileExistsError(f"{path}: exists already; choose another name or allow overwriting.")


def check_place(path: Path, guard: Guard = refuse) -> None:
    """Raises ValueError, FileNotFoundError or FileExistsError if `write_whole` would not write a file of that name."""
    if os.path.isdir(path):
        raise ValueError(f"{path}: is a folder; give the name of a file in it.")
    if trouble := name_trouble(path.name):
        raise ValueError(f"The file name {shown(path.name)} {trouble}.")
    if not os.path.isdir(path.parent):
        if os.path.lexists(path.parent):
            raise FileNotFoundError(f"{path.parent}: is a file and no folder; choose another place.")
        raise FileNotFoundError(f"{path.parent}: there is no such folder; create it first.")
    if os.path.lexists(path):
        guard(path)


def write_whole(path: Path, write: Callable[[BinaryIO], object], guard: Guard = refuse) -> None:
    """The file that `write` fills, with the ordinary permissions of a new file.

    guard: asked, once the new file is whole, about a file that has the name by then.
    Raises OSError, in words and with the path, if it cannot be written; then, and after whatever `write` or `guard`
    raises, everything is as it was.
    """
    _tidy(path)
    with _temporary(path) as (file, temporary):
        write(file)
        with _in_words(path):
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames nothing that is open
        _give_name(temporary, path, guard)


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Within it no other process gets the name: False if another has it already.

    For files that are written again and again. A process that is killed lets go of it. Where files cannot be locked, or none
    can be made, it is True.
    """
    lock = path.with_name(f"{_beginning(path.name)}.lock")
    try:
        file = _latest(lock)
    except OSError:
        yield True
        return
    with file:
        free = _locked(file) is not False
        try:
            yield free
        finally:
            if free:
                with suppress(OSError):
                    lock.unlink()


def _latest(lock: Path) -> BinaryIO:
    """The lock's file, open, and not one whose holder is just removing it."""
    while True:
        file = open(lock, "ab")
        if _locked(file) is False:
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(lock), os.fstat(file.fileno())):
                return file
        file.close()


def is_plain_file(path: str | os.PathLike[str]) -> bool:
    """Whether it is a file with contents of its own, at which nobody waits as at a pipe. False if it is not there."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def open_plain(path: str | os.PathLike[str]) -> FileIO:
    """The file, to be read, unbuffered. Raises ValueError for what is no plain file, and for what cannot be read."""
    try:
        # To open a pipe is to wait until somebody writes into it.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path}: is no ordinary file; copy what it gives into one first.")
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """(open file, its path), locked; removed at the end unless it was given another name."""
    with _in_words(path):
        file, temporary = _opened(path)
    try:
        with _in_words(path), file:
            try:
                yield file, temporary
            except BaseException:
                # Closing writes what is left, which a full disk refuses once more, and bare; the first reason counts.
                with suppress(OSError):
                    file.close()
                raise
    finally:
        # What went wrong before is what the user has to hear of.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _opened(path: Path) -> tuple[BinaryIO, Path]:
    while True:
        temporary = path.with_name(f"{_beginning(path.name)}.{secrets.token_hex(4)}.tmp")
        try:
            # Of the mode that the umask makes of an ordinary new file.
            file = open(temporary, "xb")
        except FileExistsError:
            continue
        if _locked(file) is not False and os.path.lexists(temporary):
            return file, temporary
        # Somebody tidied up between the two steps, and took it for a leftover.
        file.close()


def _give_name(temporary: Path, path: Path, guard: Guard) -> None:
    try:
        os.link(temporary, path)  # never replaces anything
        return
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        pass
    # A link, even to nowhere, is somebody's too.
    if os.path.lexists(path):
        guard(path)
    os.replace(temporary, path)


def _tidy(path: Path) -> None:
    """Removes what killed runs that wrote this name have left."""
    beginning = _beginning(path.name)
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.name.startswith(beginning) and _TAIL.fullmatch(entry.name, len(beginning)):
                with suppress(OSError):
                    _remove_if_stale(Path(entry.path))


def _remove_if_stale(temporary: Path) -> None:
    if not stat.S_ISREG(os.lstat(temporary).st_mode):
        return
    # Locks need a file that is open for writing on network drives.
    with open(temporary, "r+b") as file:
        free = _locked(file)
        old = time.time() - os.fstat(file.fileno()).st_mtime > _ABANDONED_SECONDS
        if fcntl is not None and (free or (free is None and old)):
            temporary.unlink()
    if fcntl is None and old:
        temporary.unlink()


def _locked(file: BinaryIO) -> bool | None:
    """Locks the file until it is closed: True if that was done, False if another has it, None where files have no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _beginning(name: str) -> str:
    """How the temporary names for a file begin: they are as legal as its own, however long that is."""
    if len(name.encode()) + 1 + _TAIL_BYTES <= MAX_BYTES:
        return f".{name}"
    return f".{name[:40]}.{hashlib.sha256(name.encode()).hexdigest()[:16]}"


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Says which file could not be written instead of the temporary one's name, and what to do about a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise  # in words already, of a Guard for example
        hint = "; is the disk full? Make room, or choose another place" if error.errno in _FULL else ""
        raise OSError(f"{path}: could not be written ({error.strerror}){hint}.") from error
