"""What is made at import out of a file's functions, such as a table, and which functions use it.

A function that runs at import alone is called by no test: what notices a change of it are the tests of those that look into
the table it made. Names are followed through the imports of our modules and the assignments outside of functions.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from mutant_calls import FOLDERS, functions_of
from mutations import ROOT


class Made:
    """The modules of the folders under test, read once. "file.py name" is a global name of one of them."""

    def __init__(self) -> None:
        self._assigned: list[tuple[set[str], set[str]]] = []
        self._used: dict[str, set[str]] = {}
        self._users: dict[str, list[str]] = {}
        for folder in FOLDERS:
            for path in sorted((ROOT / folder).rglob("*.py")):
                file, tree = _name(path), ast.parse(path.read_text(encoding="utf-8"))
                imported = dict(_imports(path, tree))
                for targets, used in _assignments(tree):
                    self._assigned.append((_globals(file, targets, imported), _globals(file, used, imported)))
                for name, function in functions_of(tree):
                    self._used[f"{file} {name}"] = _globals(file, [function], imported)

    def users(self, file: str) -> list[str]:
        """The functions, "file.py name" each, that use what was made at import with this file's functions: those of the
        file itself, since what it made may be objects with methods, and all that name it."""
        if file not in self._users:
            made = self.made_with(file)
            own = [function for function in self._used if function.startswith(f"{file} ")]
            others = [function for function, names in self._used.items() if not made.isdisjoint(names)]
            self._users[file] = list(dict.fromkeys(own + others))
        return self._users[file]

    def made_with(self, file: str) -> set[str]:
        """The global names that were bound at import to what these functions, or something made of them, returned."""
        functions = {f"{file} {one.split(' ')[1].split('.')[0]}" for one in self._used if one.startswith(f"{file} ")}
        made, before = set[str](), -1
        while len(made) > before:
            before = len(made)
            for targets, used in self._assigned:
                if not used.isdisjoint(made | functions):
                    made |= targets
        return made


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(path: Path, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name in this module -> "file.py name" of what it is, "file.py" of a module of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for one in node.names:
                inner, own = folder / f"{one.name}.py", folder.with_suffix(".py")
                if inner.is_file():
                    yield one.asname or one.name, _name(inner)
                elif own.is_file():
                    yield one.asname or one.name, f"{_name(own)} {one.name}"


def _assignments(tree: ast.Module) -> Iterator[tuple[list[ast.AST], list[ast.AST]]]:
    """(what is assigned, what is used for it) of every statement of a module that makes something."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
            yield [*node.targets] if isinstance(node, ast.Assign) else [node.target], [node.value]
        elif isinstance(node, ast.For | ast.If | ast.With | ast.Expr):
            yield [node], [node]


def _globals(file: str, nodes: list[ast.AST], imported: dict[str, str]) -> set[str]:
    found = set[str]()
    for node in (inner for one in nodes for inner in ast.walk(one)):
        if isinstance(node, ast.Name):
            found.add(imported.get(node.id, f"{file} {node.id}"))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{imported.get(node.value.id)} {node.attr}")
    return found
