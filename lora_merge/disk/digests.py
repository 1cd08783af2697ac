"""sha256 of whole files, computed once for each path, size, time and inode; if somebody says where, once for ever.

A file that is replaced by one of the same size, and keeps time and inode, is taken for the old one.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from . import json_text
from .whole import open_plain, write_whole

Key = tuple[str, int, int, int]

_BLOCK = 1 << 22
_MANY = 1024
# A file that was changed so lately may change again within one step of its time.
_SETTLED = 2 * 10**9
_digests: dict[Key, str] = {}
_kept_in: Path | None = None
_lock = threading.Lock()
# Whoever is computing a hash has the lock of it; who asks meanwhile waits.
_turns: dict[Key, threading.Lock] = {}


def sha256_of(path: str | os.PathLike[str], stopped: Callable[[], bool] = lambda: False) -> str:
    """sha256 of a file, lower case hexadecimal.

    stopped: whether nobody waits for it any more, asked now and then; InterruptedError then. Raises what `open_plain` raises.
    """
    path = os.path.abspath(path)
    state = os.stat(path)
    key = (path, state.st_size, state.st_mtime_ns, state.st_ino)
    if (known := _digests.get(key)) is not None:
        return known
    with _lock:
        turn = _turns.setdefault(key, threading.Lock())
    with turn:
        if (known := _digests.get(key)) is not None:
            return known
        try:
            digest = _computed(path, state.st_size, stopped)
            with _lock:
                while len(_digests) >= _MANY:
                    _digests.pop(next(iter(_digests)))
                _digests[key] = digest
                _keep()
        finally:
            with _lock:
                _turns.pop(key, None)
        return digest


def keep_in(file: Path) -> None:
    """What is known already is read from that file, and what is computed from now on is written to it, as far as both can be
    done: nothing but time is lost without."""
    global _kept_in
    with _lock:
        if _kept_in != file:
            _kept_in = file
            for key, digest in _kept(file).items():
                _digests.setdefault(key, digest)


def _computed(path: str, size: int, stopped: Callable[[], bool]) -> str:
    value, memory = hashlib.sha256(), bytearray(_BLOCK)
    view = memoryview(memory)
    with open_plain(path) as file:
        # Not to its end: another program may write faster than this reads.
        while count := file.readinto(view[:size]):
            if stopped():
                raise InterruptedError(f"{path}: nobody waits for its hash.")
            value.update(view[:count])
            size -= count
    return value.hexdigest()


def _kept(file: Path) -> dict[Key, str]:
    try:
        entries = json_text.parse_object(file.read_text(encoding="utf-8"))["files"]
        return {(str(path), int(size), int(t), int(inode)): digest for path, size, t, inode, digest in entries
                if len(bytes.fromhex(digest)) == 32}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _keep() -> None:
    if _kept_in is None:
        return
    now = time.time_ns()
    # Another server may have written meanwhile.
    whole = _kept(_kept_in) | {key: digest for key, digest in _digests.items() if now - key[2] > _SETTLED}
    entries = [[*key, digest] for key, digest in list(whole.items())[-_MANY:]]
    text = json.dumps({"files": entries})
    with suppress(OSError, ValueError):
        _kept_in.parent.mkdir(parents=True, exist_ok=True)
        write_whole(_kept_in, lambda file: file.write(text.encode()), lambda _: None)
