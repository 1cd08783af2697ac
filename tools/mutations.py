"""The small changes that mutants.py makes: which there are in a file, and which are none by construction."""

from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "max"}

# Keywords whose value cannot be seen in a result: they cost or save time and memory, or say something to a person.
# full_matrices: a caller that slices gets the same, one that does not gets an error of shapes.   strict: of zip, a check.
# stable: torch sorts stably on the CPU, where the tests run, whether it is told to or not.
UNSEEN = {
    "strict",
    "full_matrices",
    "stable",
    "set_to_none",
    "non_blocking",
    "pin_memory",
    "foreach",
    "buffering",
    "maxsize",
    "cancel_futures",
    "disable",
    "desc",
    "unit",
    "help",
    "metavar",
}
# What torch takes where nothing is said: to say it makes no difference.
TORCHS = {("cat", "dim"): 0, ("stack", "dim"): 0, ("split", "dim"): 0, ("sort", "dim"): -1, ("kthvalue", "dim"): -1}
ROUNDING = 1e-6  # 1 - 1e-9 is room for rounding, and 1 + 1e-9, or dividing by it, is as much of it


@dataclass(frozen=True)
class Mutant:
    """file: from the root.   function: its qualified name.   name: what is changed, in words that stay the same when other
    lines move.   number: which of the file's changes it is.   default: a default value, which is made at import."""

    file: str
    function: str
    line: int
    name: str
    number: int
    default: bool

    def source(self) -> str:
        """The whole changed file."""
        tree = ast.parse((ROOT / self.file).read_text(encoding="utf-8"))
        place, other = next(itertools.islice(_changes_in(tree), self.number, None))
        _put(place.parent, place.field, place.index, ast.copy_location(copy.deepcopy(other), place.node))
        return ast.unparse(ast.fix_missing_locations(tree))


@dataclass(frozen=True)
class _Place:
    function: str
    parent: ast.AST
    field: str
    index: int | None
    node: ast.AST
    default: bool


def inside(path: str, folders: tuple[str, ...]) -> str | None:
    """The path from the root of a file of these folders, None for any other."""
    file = Path(path)
    name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else ""
    return name if name.startswith(tuple(f"{folder}/" for folder in folders)) else None


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that can stand in the place of this one."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        yield ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
    elif (
        isinstance(node, ast.BinOp)
        and type(node.op) in OPERATORS
        and not _is_text(node.left)
        and not _is_text(node.right)
        and not any(_is_room(side) for side in (node, node.left, node.right))
    ):
        yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        # One more than a large float would be a change of rounding only.
        large = isinstance(node.value, float) and abs(node.value) >= 1 / ROUNDING
        more = node.value * 2 if large else node.value + 1
        yield ast.Constant(not node.value if isinstance(node.value, bool) else more)
    elif isinstance(node, ast.IfExp) and not _is_converted(node.orelse, node.body):
        yield node.orelse
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in NAMES:
            yield ast.Call(ast.Name(NAMES[node.func.id], ast.Load()), node.args, node.keywords)
        for index, keyword in enumerate(node.keywords):
            if keyword.arg is not None and not _is_unseen(keyword) and not _is_torchs(node.func, keyword):
                yield ast.Call(node.func, node.args, node.keywords[:index] + node.keywords[index + 1 :])


def _is_unseen(keyword: ast.keyword) -> bool:
    """copy=False allows to share memory: a copy more has the same numbers. copy=True is a promise, and is no such keyword."""
    return keyword.arg in UNSEEN or (keyword.arg == "copy" and ast.unparse(keyword.value) == "False")


def _is_torchs(function: ast.expr, keyword: ast.keyword) -> bool:
    """Whether the keyword says what torch takes anyway."""
    name = function.attr if isinstance(function, ast.Attribute) else ""
    default = TORCHS.get((name, keyword.arg or ""))
    return default is not None and ast.unparse(keyword.value) == str(default)


def _is_converted(node: ast.expr, tensor: ast.expr) -> bool:
    """Whether it is tensor.to(...), which is the tensor itself where there is nothing to do: "x if alike else x.to(like)" asks
    only because that takes time."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "to"
        and ast.dump(node.func.value) == ast.dump(tensor)
    )


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_room(node: ast.AST) -> bool:
    """1 - 1e-9 and the like."""
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Add | ast.Sub)
        and isinstance(node.left, ast.Constant)
        and node.left.value == 1
        and isinstance(node.right, ast.Constant)
        and 0 < abs(node.right.value) <= ROUNDING
    )


def mutants_of(file: Path) -> Iterator[Mutant]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    name = file.relative_to(ROOT).as_posix()
    seen: dict[str, int] = {}
    for number, (place, other) in enumerate(_changes_in(tree)):
        node = place.node
        words = f"{name} {place.function.split('.')[-1]}: {_short(node)} -> {_short(other)}"
        seen[words] = seen.get(words, 0) + 1
        again = f" ({seen[words]})" if seen[words] > 1 else ""
        yield Mutant(name, place.function, getattr(node, "lineno", 0), words + again, number, place.default)


def _changes_in(tree: ast.AST) -> Iterator[tuple[_Place, ast.AST]]:
    for place in list(_places(tree)):
        for other in changes(place.node):
            yield place, other


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 70 else f"{text[:67]}..."


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _places(node: ast.AST, function: str = "", within: str = "", default: bool = False) -> Iterator[_Place]:
    """All that is no message, type or default text.

    function: the innermost one.   within: what the qualified name of a function here begins with."""
    for field, value in ast.iter_fields(node):
        if field in (
            "annotation",
            "returns",
            "decorator_list",
            "msg",
            "type_params",
            "keywords" if _is_field(node) else "",
        ):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(
                child, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom
            ):
                continue
            if isinstance(child, ast.keyword) and _is_unseen(child):
                continue
            innermost, names = function, within
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                innermost = f"{within}{child.name}"
                names = f"{innermost}.<locals>."
            elif isinstance(child, ast.ClassDef):
                names = f"{within}{child.name}."
            made_at_import = default or isinstance(node, ast.arguments)
            if innermost:
                yield _Place(innermost, node, field, index, child, made_at_import)
            yield from _places(child, innermost, names, made_at_import)


def _is_field(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("field", "dataclass")
