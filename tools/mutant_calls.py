"""Which unit test calls which function: seen once per file of tests and kept in build/mutants until that file changes.

Every function of the folders under test gets a first line that says its name while a test runs, threads included.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib.machinery
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

from mutations import ROOT, inside

FOLDERS = ("samplers", "lora_merge", "distillation")
# Of processes that they start, which import what is in the files and not what is changed in memory; and of code that is
# compiled, with the line that says its name or not.
SLOW_TESTS = [
    "tests/distillation/test_two_processes.py",
    "tests/lora_merge/test_kills.py",
    "tests/distillation/test_compiling.py",
]
BUILD = ROOT / "build" / "mutants"
IMPORTED = ""  # in place of a test: while the tests were collected
_SAYS = "_mutants_called"


def tests_by_function(paths: list[str]) -> dict[str, list[str]]:
    """Function -> the tests of these files that call it, the quickest and least far-reaching first. "file.py name" is a function."""
    files = sorted(
        file
        for path in paths
        for file in ([ROOT / path] if path.endswith(".py") else (ROOT / path).rglob("test_*.py"))
        if file.relative_to(ROOT).as_posix() not in SLOW_TESTS
    )
    support = hashlib.sha256()
    for file in sorted((ROOT / "tests").rglob("*.py")):
        if (
            not file.name.startswith("test_")
            and file.is_relative_to(ROOT / "tests")
            and "with_comfyui" not in file.parts
        ):
            support.update(file.read_bytes())
    kept = {file: BUILD / f"{_digest(file, support.digest())}.json" for file in files}
    unseen = [file for file in files if not kept[file].is_file()]
    if unseen:
        print(f"seeing what the tests of {len(unseen)} files call ...", flush=True)
        BUILD.mkdir(parents=True, exist_ok=True)
        child = os.fork()
        if child == 0:
            os._exit(_see(unseen, kept))
        if os.waitpid(child, 0)[1] != 0:
            raise SystemExit("mutants: the unit tests fail as they are; mend them first")
    effort: dict[str, float] = {}
    tests: dict[str, list[str]] = {}
    for file in files:
        for test, (seconds, functions) in json.loads(kept[file].read_text()).items():
            effort[test] = (seconds + 0.005) * (len(functions) + 10)
            for function in functions:
                tests.setdefault(function, []).append(test)
    return {function: sorted(names, key=effort.__getitem__) for function, names in tests.items()}


def _digest(file: Path, support: bytes) -> str:
    digest = hashlib.sha256(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    digest.update(support)
    return digest.hexdigest()[:16]


def _see(files: list[Path], kept: dict[Path, Path]) -> int:
    import pytest

    called: set[str] = set()
    setattr(builtins, _SAYS, called.add)
    plain = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, name: str) -> CodeType | None:
        file = inside(self.path, FOLDERS)
        return _saying(file) if file else plain(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[assignment,method-assign]
    options = ["-q", "-x", "-p", "no:cacheprovider", "--no-header", *map(str, files)]
    return int(pytest.main(options, plugins=[_Calls(called, kept)]))


def _saying(file: str) -> CodeType:
    """The code of this file, where each function says that it is called."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for name, function in functions_of(tree):
        says = ast.Call(ast.Name(_SAYS, ast.Load()), [ast.Constant(f"{file} {name}")], [])
        line = ast.copy_location(ast.Expr(says), function.body[0])
        function.body.insert(1 if ast.get_docstring(function, clean=False) is not None else 0, line)
    return compile(ast.fix_missing_locations(tree), str(ROOT / file), "exec", dont_inherit=True)


def functions_of(node: ast.AST, within: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """(qualified name, function) of every function of a module, those inside others too."""
    for child in ast.iter_child_nodes(node):
        name = within
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            name = f"{within}{child.name}"
            if isinstance(child, ast.FunctionDef):
                yield name, child
                name += ".<locals>"
            name += "."
        yield from functions_of(child, name)


class _Calls:
    """A pytest plugin that writes {test: [seconds, functions]} whenever a file of tests is at its end."""

    def __init__(self, called: set[str], kept: dict[Path, Path]) -> None:
        self.called, self.kept = called, kept
        self.imported: list[str] = []
        self.file: Path | None = None
        self.tests: dict[str, tuple[float, list[str]]] = {}
        self.seconds = 0.0

    def pytest_collection_finish(self) -> None:
        self.imported = sorted(self.called)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        file = ROOT / nodeid.split("::")[0]
        if file != self.file:
            self.write()
            self.file, self.tests = file, {IMPORTED: (1e6, self.imported)}
        self.called.clear()
        self.seconds = 0.0

    def pytest_runtest_logreport(self, report: object) -> None:
        self.seconds += report.duration  # type: ignore[attr-defined]

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.tests[nodeid] = (self.seconds, sorted(self.called))

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus == 0:
            self.write()

    def write(self) -> None:
        if self.file is not None:
            self.kept[self.file].write_text(json.dumps(self.tests))
