"""The class that every node of the pack is made from."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from comfy_api.latest import io

from ..reports import tell
from .check import check, name_in_words
from .choices import in_full, is_dynamic_choice, with_all_inside
from .paths import without_folders
from .replaced import replaced

LONGEST = 4000  # of an error, in characters


class Node(io.ComfyNode):
    """A node that looks at what it is given, by its own schema, before it runs, and whose errors begin with its name.

    ComfyUI checks what it can before anything runs, but no NaN, no value that comes through a link, no choice with
    inputs of its own, and up to 0.3.75 no choice at all.
    A node may define validate_inputs for some of its inputs, as ComfyUI knows it: what it has to say of a value is said
    here too.
    An input with a default may be left out, as API clients do; a page always sends it. A choice with inputs of its own
    may not: ComfyUI leaves it out where it is misspelt, which would pass for the default.
    """

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        # ComfyUI makes copies of the class for every run, which find the checked function in place.
        execute = vars(cls).get("execute")
        if isinstance(execute, classmethod) and not hasattr(execute.__func__, "checked"):
            cls.execute = classmethod(_checked(execute.__func__))
        define_schema = vars(cls).get("define_schema")
        if isinstance(define_schema, classmethod) and not hasattr(define_schema.__func__, "forgiving"):
            cls.define_schema = classmethod(_forgiving(define_schema.__func__))


def _forgiving(define_schema: Callable) -> Callable:
    @functools.wraps(define_schema)
    def define(cls):
        schema = define_schema(cls)
        for entry in with_all_inside(schema.inputs):
            # Pages put optional widgets after the others, so a choice with inputs of its own keeps its place as one.
            entry.optional = entry.optional or getattr(entry, "default", None) is not None or is_dynamic_choice(entry)
        return schema

    define.forgiving = True
    return define


def _checked(execute: Callable) -> Callable:
    @functools.wraps(execute)
    def run(cls, *values, **inputs):
        schema = cls.define_schema()
        with in_the_name_of(name_in_words(schema)):
            named = inspect.getfullargspec(execute).args[1:]
            given, own = dict(zip(named, values, strict=False)) | inputs, _own_rules(cls)
            check(schema, given, own.keys())
            for line in replaced(schema, given):
                tell(line)
            try:
                return execute(cls, **given | _left_out(schema, given) | _in_full(schema, given))
            except FileNotFoundError:
                # The node's own rule for the name knows which input it is, and which files are near.
                told = [answer for name in own.keys() & given.keys() if (answer := own[name](given[name])) is not True]
                if told:
                    raise ValueError(" ".join(map(str, told))) from None
                raise

    run.checked = True
    return run


def _left_out(schema, given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of inputs that are not given, or are null."""
    absent = [None] if schema.is_input_list else None
    return {
        entry.id: [entry.default] if schema.is_input_list else entry.default
        for entry in schema.inputs
        if getattr(entry, "default", None) is not None and (entry.id not in given or given[entry.id] == absent)
    }


def _in_full(schema, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The choices with inputs of their own, with the defaults of what is left out of these."""
    return {
        entry.id: in_full(entry, given[entry.id])
        for entry in schema.inputs
        if entry.id in given and is_dynamic_choice(entry)
    }


def _own_rules(cls: type) -> dict[str, Callable]:
    """Input -> what the node's validate_inputs says of a value for it."""
    own = inspect.getfullargspec(cls.validate_inputs).args[1:]
    return {name: lambda value, name=name: cls.validate_inputs(**{name: value}) for name in own}


@contextmanager
def in_the_name_of(node: str) -> Iterator[None]:
    """Errors in words get the node's name before them; none is endless, and none names a folder of the machine."""
    try:
        yield
    except Exception as error:
        error.args = tuple(_fit_to_show(part) if isinstance(part, str) else part for part in error.args)
        if isinstance(error, OSError) and error.errno is not None:  # the system's words: "Permission denied"
            error.strerror = f"{node}: {error.strerror}"
            error.filename = None if error.filename is None else _fit_to_show(str(error.filename))
        elif isinstance(error, ValueError | OSError) and len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (f"{node}: {error.args[0].removeprefix(f'{node}: ')}",)
        raise


def _fit_to_show(words: str) -> str:
    words = without_folders(words)
    return words if len(words) <= LONGEST else f"{words[: LONGEST // 2]} ... {words[-LONGEST // 2 :]}"
