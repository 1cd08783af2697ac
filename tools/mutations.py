"""The small changes that mutants.py makes: which there are in a file, and which are none by construction."""

from __future__ import annotations

import ast
import copy
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
    "cancel_futures",
    "disable",
    "desc",
    "unit",
    "help",
    "metavar",
}
ROUNDING = 1e-6  # 1 - 1e-9 is room for rounding, and 1 + 1e-9, or dividing by it, is as much of it


@dataclass(frozen=True)
class Mutant:
    """file: from the root.   function: its name and first line, as code objects have them.   name: what is changed, in
    words that stay the same when other lines move.   source: the whole changed file."""

    file: str
    function: str
    line: int
    name: str
    source: str


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
        yield ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield node.orelse
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in NAMES:
            yield ast.Call(ast.Name(NAMES[node.func.id], ast.Load()), node.args, node.keywords)
        for index, keyword in enumerate(node.keywords):
            if keyword.arg is not None and keyword.arg not in UNSEEN:
                yield ast.Call(node.func, node.args, node.keywords[:index] + node.keywords[index + 1 :])


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
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    name = file.relative_to(ROOT).as_posix()
    seen: dict[str, int] = {}
    for function, parent, field, index, node in list(_places(tree)):
        for other in changes(node):
            words = f"{name} {function.split(':')[0]}: {_short(node)} -> {_short(other)}"
            seen[words] = seen.get(words, 0) + 1
            _put(parent, field, index, ast.copy_location(copy.deepcopy(other), node))
            changed = ast.unparse(ast.fix_missing_locations(tree))
            _put(parent, field, index, node)
            number = f" ({seen[words]})" if seen[words] > 1 else ""
            yield Mutant(name, function, getattr(node, "lineno", 0), words + number, changed)


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 70 else f"{text[:67]}..."


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _places(node: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST, str, int | None, ast.AST]]:
    """(innermost function, parent, its field, place in it, node) of all that is no message, type or default text."""
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
            if isinstance(child, ast.keyword) and child.arg in UNSEEN:
                continue
            inside = function
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inside = f"{child.name}:{child.decorator_list[0].lineno if child.decorator_list else child.lineno}"
            if function or inside:
                yield inside, node, field, index, child
            yield from _places(child, inside)


def _is_field(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("field", "dataclass")
