"""What this pack logs as a warning while a node runs, for the node to show: few people read the log."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# The pack's own logger, under whatever name ComfyUI has loaded it.
PACK = logging.getLogger(__name__.removesuffix(".host.door.told"))


class _Told(logging.Handler):
    """Of this thread alone: other nodes may run in others."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.thread, self.lines = threading.get_ident(), []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if record.thread == self.thread and line not in self.lines:
            self.lines.append(line)


@contextmanager
def warnings_told() -> Iterator[list[str]]:
    """Yields a list that fills with the warnings, each once, in their order. The log has them as ever."""
    told = _Told()
    PACK.addHandler(told)
    try:
        yield told.lines
    finally:
        PACK.removeHandler(told)
