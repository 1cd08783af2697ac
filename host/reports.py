"""Reports on nodes: what a node of ours says of its run, and what we warn of while any node runs.

A node hands out its report as ComfyUI's ui text, which the page script draws. To it comes what is told while the node runs,
by `tell` and by the log: every warning of this pack's loggers, whichever file it is from. Where the node that runs is of
another pack (a KSampler whose model carries LCM for any KSampler), an event brings it there.
"""

import functools
import logging
from contextvars import ContextVar
from typing import Any

from .page import executing, in_lines, plain, report_elsewhere

PACK = __name__.removesuffix(".host.reports")
_of_ours: ContextVar[list[str] | None] = ContextVar("lines told while a node of ours runs", default=None)
_elsewhere: ContextVar[tuple[object, list[str]] | None] = ContextVar("context and lines of another node", default=None)


def tell(line: str) -> None:
    """Adds a line to the report of the node that is executing; outside a run nothing happens."""
    lines = _of_ours.get()
    if lines is not None:
        _add(line, lines)
    elif (context := executing()) is not None:
        before = _elsewhere.get()
        lines = before[1] if before and before[0] == context else []
        _elsewhere.set((context, lines))
        if _add(line, lines):
            report_elsewhere(lines)


def _add(line: str, lines: list[str]) -> bool:
    new = line not in lines
    if new:
        lines.append(line)
    return new


class ToNodes(logging.Handler):
    """Brings what is warned of to the node that is executing."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tell(record.getMessage())
        except Exception:
            self.handleError(record)


def listen() -> None:
    """From here on the warnings of this pack reach the nodes, once, however often this is called."""
    logger = logging.getLogger(PACK)
    if not any(isinstance(handler, ToNodes) for handler in logger.handlers):
        logger.addHandler(ToNodes(logging.WARNING))


def for_pages(node: type) -> type:
    """`node` itself, a ComfyNode: from here on its texts are plain, results and errors too, and its report stays.

    Its output named `report` reads as Markdown too.
    """
    node.execute = classmethod(_reporting(node.execute.__func__))
    node.define_schema = classmethod(_lasting(node.define_schema.__func__))
    return node


def _reporting(execute):
    @functools.wraps(execute)
    def run(cls, *args, **kwargs):
        lines: list[str] = []
        before = _of_ours.set(lines)
        try:
            output = execute(cls, *args, **kwargs)
        except Exception as error:
            if (text := plain(str(error))) == str(error):
                raise
            raise ValueError(text).with_traceback(error.__traceback__) from None
        finally:
            _of_ours.reset(before)
        output.args = tuple(map(_handed_out, cls.RETURN_NAMES, output.args))
        told = {} if output.ui is None else output.ui if isinstance(output.ui, dict) else output.ui.as_dict()
        # Without a line too: a page takes away what it shows of the run before.
        output.ui = {kind: _plain_in(value) for kind, value in told.items()} | {"text": _report(told, lines)}
        return output

    return run


def _report(told: dict[str, Any], lines: list[str]) -> list[str]:
    """[the node's own report and what else was told], [] for nothing."""
    own = "\n".join(told.get("text", ()))
    said = " ".join(own.split())
    new = [line for line in lines if " ".join(line.split()) not in said]
    text = "\n".join(filter(None, [own, *new]))
    return [plain(text)] if text else []


def _handed_out(name: str, value: Any) -> Any:
    """An output as the next node gets it; what shows a text takes it for Markdown or for plain text."""
    value = _plain_in(value)
    return in_lines(value) if name == "report" and isinstance(value, str) else value


def _plain_in(value: Any) -> Any:
    """A text, or a list of texts, made plain; all else is handed on as it is."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value):
        return type(value)(map(plain, value))
    return value


def _lasting(define_schema):
    @functools.wraps(define_schema)
    def define(cls):
        schema = define_schema(cls)
        # A newer ComfyUI then sends the report of a cached node too, as a page needs that was loaded anew.
        if hasattr(schema, "has_intermediate_output"):
            schema.has_intermediate_output = True
        return schema

    return define
