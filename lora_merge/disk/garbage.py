"""Work that makes thousands of objects, none of them in a circle, without Python looking for circles meanwhile.

A full collection takes 0.1 to 0.2 s where torch is loaded, as long as reading a LoRA does, and finds nothing. So it must not
happen at the end of such work either: who leaves looks through what was made inside, in a few milliseconds, since Python
would look through everything otherwise as soon as it may.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_inside = 0
_was_on = False


@contextmanager
def uncollected() -> Iterator[None]:
    """No automatic collection in this process until the last of those who are inside has left; then as it was."""
    global _inside, _was_on
    with _lock:
        if not _inside:
            _was_on = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _was_on:
                gc.collect(0)
                gc.enable()
