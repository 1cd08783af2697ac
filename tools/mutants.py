"""Changes the code in small ways, one at a time, and sees whether a unit test notices.

    python tools/mutants.py --sample 300            300 of all changes there are, drawn by --seed
    python tools/mutants.py --only samplers         all changes of one folder or file
    python tools/mutants.py --only lora_merge/algebra --tests tests/lora_merge/test_ranks.py tests/lora_merge/test_sums.py
                                                    with these tests alone, which is quicker and stricter
    python tools/mutants.py --again outcome.json    what was not noticed when --json outcome.json was given
    python tools/mutants.py --show                  lists them

A change that no test notices is a fact that no test states. Those that make no difference, or none that matters, stand
in mutants_known.json with the reason. Exit status 1 if fewer than 95 % of the others were noticed.

What is no change by construction is not made (mutations.py): keywords that cost or save time and memory alone, such as
full_matrices of torch.linalg.svd (a caller that slices gets the same, another one an error), texts for a person, checks
such as strict of zip, and the sign of room for rounding (1 - 1e-9).

Only tests that call the changed function are run, the quickest first, and 80 of them where there are more. Which these
are is seen once, by a run of the tests that is kept in build/mutants. The tests are collected once: each change is put
into the functions in memory, in a process forked from there. What survives that is tried again by up to 400 tests,
with the changed file imported afresh, since defaults and tables are made then.
"""

from __future__ import annotations

import argparse
import ast
import functools
import gc
import hashlib
import importlib.machinery
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import CodeType, FunctionType

from mutations import ROOT, Mutant, mutants_of

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

        threading.setprofile(called)  # of threads that begin from now on
        sys.setprofile(called)

    def pytest_runtest_logreport(self, report: object) -> None:
        name = report.nodeid  # type: ignore[attr-defined]
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration  # type: ignore[attr-defined]

    def pytest_runtest_logfinish(self) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def tests_by_function(paths: list[str]) -> dict[str, list[str]]:
    """Function -> tests of these files that call it, the quickest first. One run of them where nothing is kept of this state."""
    state = hashlib.sha256("\n".join(paths).encode())
    for folder in (*FOLDERS, "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            state.update(file.read_bytes())
    kept = BUILD / f"calls-{state.hexdigest()[:16]}.json"
    if not kept.is_file():
        print("seeing which tests call which function (one run of them) ...", flush=True)
        child = os.fork()
        if child == 0:
            os._exit(_see_calls(kept, paths))
        if os.waitpid(child, 0)[1] != 0:
            raise SystemExit("mutants: the unit tests fail as they are; mend them first")
    return json.loads(kept.read_text())


def _see_calls(kept: Path, paths: list[str]) -> int:
    import pytest

    calls = Calls()
    ignored = [f"--ignore={ROOT / name}" for name in SLOW_TESTS]
    status = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", *ignored, *paths], plugins=[calls]))
    tests: dict[str, list[str]] = {}
    for test in sorted(calls.functions, key=lambda one: calls.seconds.get(one, 0.0)):
        for function in calls.functions[test]:
            tests.setdefault(function, []).append(test)
    if status == 0:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(tests))
    return status


def some_of(tests: list[str], most: int) -> list[str]:
    """At most so many of them, in their order: half are the quickest, half are spread over the others."""
    if len(tests) <= most:
        return tests
    half = most // 2
    others = tests[half:]
    return tests[:half] + [others[index * len(others) // half] for index in range(half)]


# ---- one change


def in_a_fork(work: Callable[[], int]) -> bool:
    """Whether it ends with a status other than 0, or takes for ever."""
    child = os.fork()
    if child == 0:
        os.setsid()
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        status = 1
        try:
            status = work()
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


class Rounds:
    """A pytest plugin: in place of one run of the tests, one for each change, in a fork."""

    def __init__(self, mutants: list[Mutant], tests: dict[str, list[str]], into: Path) -> None:
        self.mutants, self.tests, self.into = mutants, tests, into

    def pytest_runtestloop(self, session: object) -> bool:
        items = {item.nodeid: item for item in session.items}  # type: ignore[attr-defined]
        for same in {mutant.file: mutant for mutant in self.mutants}.values():
            unchanged = replace(same, source=ast.unparse(ast.parse((ROOT / same.file).read_text(encoding="utf-8"))))
            chosen = [items[name] for name in callers_of(same, self.tests)]
            if in_a_fork(lambda: _run_swapped(unchanged, session, chosen)):  # noqa: B023 - called at once
                raise SystemExit(f"mutants: tests of {same.file} fail without a change of it")
        with self.into.open("w") as outcome:
            for mutant in self.mutants:
                chosen = [items[name] for name in callers_of(mutant, self.tests) if name in items]
                seen = in_a_fork(lambda: _run_swapped(mutant, session, chosen))  # noqa: B023 - called at once
                outcome.write(json.dumps([mutant.name, seen]) + "\n")
                outcome.flush()
        return True


def callers_of(mutant: Mutant, tests: dict[str, list[str]], most: int = MOST_TESTS) -> list[str]:
    return some_of(tests.get(f"{mutant.file} {mutant.function}", []), most)


def _run_swapped(mutant: Mutant, session: object, items: list[object]) -> int:
    path = str(ROOT / mutant.file)
    changed = dict(_outermost(compile(mutant.source, path, "exec", dont_inherit=True)))
    for one in gc.get_objects():
        if type(one) is FunctionType and one.__code__.co_filename == path:
            code = changed.get(one.__code__.co_qualname)
            if code is not None and code.co_freevars == one.__code__.co_freevars:
                one.__code__ = code
        elif type(one) is functools._lru_cache_wrapper:
            one.cache_clear()
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)  # type: ignore[attr-defined]
        if session.testsfailed:  # type: ignore[attr-defined]
            return 1
    return 0


def _outermost(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    """The functions and methods of a module or class by qualified name, without those inside functions."""
    for one in code.co_consts:
        if isinstance(one, CodeType) and "<" not in one.co_qualname:
            yield one.co_qualname, one
            yield from _outermost(one)


def noticed_in_rounds(mutants: list[Mutant], tests: dict[str, list[str]], paths: list[str]) -> set[str]:
    """Names of those that a test notices when they are put into functions that are imported."""
    import pytest

    BUILD.mkdir(parents=True, exist_ok=True)
    into = BUILD / f"rounds-{os.getpid()}.txt"
    child = os.fork()
    if child == 0:
        ignored = [f"--ignore={ROOT / name}" for name in SLOW_TESTS]
        options = ["-q", "-s", "-p", "no:cacheprovider", "--no-header", "--no-summary", *ignored, *paths]
        os._exit(int(pytest.main(options, plugins=[Rounds(mutants, tests, into)])))
    os.waitpid(child, 0)
    outcome = dict(json.loads(line) for line in into.read_text().splitlines()) if into.exists() else {}
    into.unlink(missing_ok=True)
    if len(outcome) != len({one.name for one in mutants}):
        raise SystemExit("mutants: the tests did not come to their end")
    return {name for name, seen in outcome.items() if seen}


def noticed(mutant: Mutant, tests: list[str]) -> bool:
    """The same with the changed file imported afresh."""
    return in_a_fork(lambda: _run_changed(mutant, tests))


def _run_changed(mutant: Mutant, tests: list[str]) -> int:
    import pytest

    path = str(ROOT / mutant.file)
    code = compile(mutant.source, path, "exec", dont_inherit=True)
    plain = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, name: str) -> object:
        return code if self.path == path else plain(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[assignment,method-assign]
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", *tests]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="folder or file, such as samplers or lora_merge/algebra")
    parser.add_argument("--sample", type=int, default=0, help="so many of them, drawn at random; 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", nargs="+", default=TESTS, help="folders or files; all unit tests unless told")
    parser.add_argument("--show", action="store_true", help="list the changes and run nothing")
    parser.add_argument("--json", type=Path, help="write the outcome of each there")
    parser.add_argument("--again", type=Path, help="only what was not noticed in this outcome of --json")
    return parser.parse_args()


def main() -> int:
    options = _options()
    mutants = all_mutants(options.only)
    if options.again:
        before = json.loads(options.again.read_text())
        mutants = [one for one in mutants if before.get(one.name, "noticed") != "noticed"]
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
    mutants, listed = [one for one in mutants if one.name not in known], len(mutants)
    tests = tests_by_function(options.tests)
    quickly = noticed_in_rounds([one for one in mutants if callers_of(one, tests)], tests, options.tests)
    outcome = {}
    for mutant in mutants:
        callers = callers_of(mutant, tests, 5 * MOST_TESTS)
        seen = mutant.name in quickly or (callers and noticed(mutant, callers))
        outcome[mutant.name] = result = "noticed" if seen else "survives" if callers else "never called"
        if not seen:
            print(f"{result}: {mutant.name}  (line {mutant.line})", flush=True)
    if options.json:
        options.json.write_text(json.dumps(outcome, indent=1))
    counted, seen = len(mutants), list(outcome.values()).count("noticed")
    share = seen / counted if counted else 1.0
    print(f"mutants: {seen} of {counted} noticed ({100 * share:.1f} %), {counted - seen} not, {listed - counted} known")
    return int(share < WANTED)


if __name__ == "__main__":
    sys.exit(main())
