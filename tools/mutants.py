"""Changes the code in small ways, one at a time, and sees whether a unit test notices.

    python tools/mutants.py --sample 300            300 of all changes there are, drawn by --seed
    python tools/mutants.py --only samplers         all changes of one folder or file
    python tools/mutants.py --show                  lists them

A change that no test notices is a fact that no test states. Those that make no difference, or none that matters, stand
in mutants_known.json with the reason. Exit status 1 if fewer than 95 % of the others were noticed.

Only tests that call the changed function are run, the quickest first, and 80 of them where there are more. Which these are is seen once, by a run of the unit
tests that is kept in build/mutants. A change is made in memory, in a process of its own that is forked after torch is
imported, so one takes about a second.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.machinery
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("samplers", "lora_merge", "distillation")
# A new process for each test, or a command line around the functions; and where things lie in a picture, which is looked at.
LEFT_OUT = (
    "distillation/__main__.py",
    "lora_merge/__main__.py",
    "lora_merge/cli/",
    "lora_merge/comparing/picture.py",
)
TESTS = [f"tests/{folder}" for folder in FOLDERS]
SLOW_TESTS = ["tests/distillation/test_two_processes.py"]
KNOWN = Path(__file__).with_name("mutants_known.json")
BUILD = ROOT / "build" / "mutants"
WANTED = 0.95
SECONDS = 120  # longer is an endless loop
MOST_TESTS = 80

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
            if keyword.arg not in (None, "strict"):
                yield ast.Call(node.func, node.args, node.keywords[:index] + node.keywords[index + 1 :])


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


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
            if isinstance(child, ast.keyword) and child.arg == "strict":  # of zip: a check of lengths, no more
                continue
            inside = function
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inside = f"{child.name}:{child.decorator_list[0].lineno if child.decorator_list else child.lineno}"
            if function or inside:
                yield inside, node, field, index, child
            yield from _places(child, inside)


def _is_field(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("field", "dataclass")


def all_mutants(only: str | None) -> list[Mutant]:
    files = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    names = [file for file in files if not file.relative_to(ROOT).as_posix().startswith(LEFT_OUT)]
    return [
        one
        for file in names
        if only is None or file.relative_to(ROOT).as_posix().startswith(only)
        for one in mutants_of(file)
    ]


# ---- which tests call which function


class Calls:
    """A pytest plugin: test -> functions of ours that it calls, and its seconds."""

    def __init__(self) -> None:
        self.functions: dict[str, set[str]] = {}
        self.seconds: dict[str, float] = {}
        self.files: dict[str, str | None] = {}

    def pytest_runtest_protocol(self, item: object) -> None:
        found = self.functions[item.nodeid] = set()  # type: ignore[attr-defined]

        def called(frame: object, event: str, _: object) -> None:
            if event == "call":
                code = frame.f_code  # type: ignore[attr-defined]
                path = code.co_filename
                if path not in self.files:
                    inside = path.startswith(str(ROOT) + os.sep)
                    self.files[path] = Path(path).relative_to(ROOT).as_posix() if inside else None
                if self.files[path] is not None:
                    found.add(f"{self.files[path]} {code.co_name}:{code.co_firstlineno}")

        sys.setprofile(called)

    def pytest_runtest_logreport(self, report: object) -> None:
        name = report.nodeid  # type: ignore[attr-defined]
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration  # type: ignore[attr-defined]

    def pytest_runtest_logfinish(self) -> None:
        sys.setprofile(None)


def tests_by_function() -> dict[str, list[str]]:
    """Function -> tests that call it, the quickest first. One run of all unit tests where nothing is kept of this state."""
    state = subprocess.run(
        ["git", "-C", str(ROOT), "stash", "create"], capture_output=True, text=True, check=False
    ).stdout.strip()
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    tree = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", f"{state or head.strip()}^{{tree}}"],
        capture_output=True,
        text=True,
        check=True,
    )
    kept = BUILD / f"calls-{tree.stdout.strip()[:16]}.json"
    if not kept.is_file():
        print("seeing which tests call which function (one run of the unit tests) ...", flush=True)
        child = os.fork()
        if child == 0:
            os._exit(_see_calls(kept))
        if os.waitpid(child, 0)[1] != 0:
            raise SystemExit("mutants: the unit tests fail as they are; mend them first")
    return json.loads(kept.read_text())


def _see_calls(kept: Path) -> int:
    import pytest

    calls = Calls()
    ignored = [f"--ignore={ROOT / name}" for name in SLOW_TESTS]
    status = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", *ignored, *TESTS], plugins=[calls]))
    tests: dict[str, list[str]] = {}
    for test in sorted(calls.functions, key=lambda one: calls.seconds.get(one, 0.0)):
        for function in calls.functions[test]:
            tests.setdefault(function, []).append(test)
    if status == 0:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(tests))
    return status


def some_of(tests: list[str]) -> list[str]:
    """At most MOST_TESTS of them, in their order: half are the quickest, half are spread over the others."""
    if len(tests) <= MOST_TESTS:
        return tests
    half = MOST_TESTS // 2
    others = tests[half:]
    return tests[:half] + [others[index * len(others) // half] for index in range(half)]


# ---- one change


def noticed(mutant: Mutant, tests: list[str]) -> bool:
    """Whether one of the tests fails, or takes for ever, with the change."""
    child = os.fork()
    if child == 0:
        os.setsid()
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        status = 1
        try:
            status = _run_changed(mutant, tests)
        finally:
            os._exit(status)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _run_changed(mutant: Mutant, tests: list[str]) -> int:
    import pytest

    path = str(ROOT / mutant.file)
    code = compile(mutant.source, path, "exec", dont_inherit=True)
    plain = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, name: str) -> object:
        return code if self.path == path else plain(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[assignment,method-assign]
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", *tests]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="folder or file, such as samplers or lora_merge/algebra")
    parser.add_argument("--sample", type=int, default=0, help="so many of them, drawn at random; 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="list the changes and run nothing")
    parser.add_argument("--json", type=Path, help="write the outcome of each there")
    options = parser.parse_args()
    mutants = all_mutants(options.only)
    if options.sample and options.sample < len(mutants):
        mutants = sorted(
            random.Random(options.seed).sample(mutants, options.sample), key=lambda one: (one.file, one.line)
        )
    if options.show:
        print("\n".join(mutant.name for mutant in mutants))
        return 0
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ.pop("COMFYUI_PATH", None)
    # Imported before the forks, none of it ours. Threads of torch would not survive one.
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    known = json.loads(KNOWN.read_text()) if KNOWN.is_file() else {}
    tests = tests_by_function()
    survivors, uncalled, counted = [], [], 0
    outcome = {}
    for number, mutant in enumerate(mutants, 1):
        if mutant.name in known:
            continue
        counted += 1
        callers = tests.get(f"{mutant.file} {mutant.function}", [])
        result = (
            "noticed" if callers and noticed(mutant, some_of(callers)) else "survives" if callers else "never called"
        )
        outcome[mutant.name] = result
        if result != "noticed":
            (survivors if callers else uncalled).append(mutant)
            print(f"[{number}/{len(mutants)}] {result}: {mutant.name}  (line {mutant.line})", flush=True)
    if options.json:
        options.json.write_text(json.dumps(outcome, indent=1))
    left = len(survivors) + len(uncalled)
    share = 1 - left / counted if counted else 1.0
    print(
        f"mutants: {counted - left} of {counted} noticed ({100 * share:.1f} %), {left} not, {len(mutants) - counted} known"
    )
    return int(share < WANTED)


if __name__ == "__main__":
    sys.exit(main())
