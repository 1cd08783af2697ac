"""Runs the tests of each change of mutants.py in a process of its own, forked from one that has imported all of them."""

from __future__ import annotations

import ast
import functools
import gc
import importlib.machinery
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType

from mutant_calls import BUILD, FOLDERS
from mutations import ROOT, Mutant, inside

WALL_SECONDS = 600  # what waits for ever takes no processor time
TEST_SECONDS = 12  # of processor time, several times what the slowest takes: longer is an endless loop
MEMORY = 8 << 30  # a changed size may ask for any
ENDLESS = "endless"

# What makes a failure readable costs more than the tests: explained asserts, tracebacks, the smallest failing example.
OPTIONS = ["-q", "-p", "no:cacheprovider", "--no-header", "--no-summary", "--assert=plain", "--tb=native",
           "--hypothesis-profile=mutants"]  # fmt: skip

Callers = dict[Mutant, list[str]]


def outcome_of_rounds(mutants: list[Mutant], callers: Callers, paths: list[str]) -> Iterator[tuple[Mutant, str | None]]:
    """The test that notices each, None where none does, as they come."""
    if not mutants:
        return
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os._exit(_rounds(mutants, callers, paths, write))
    os.close(write)
    named = {one.name: one for one in mutants}
    with os.fdopen(read) as lines:
        for line in lines:
            name, killer = json.loads(line)
            yield named[name], killer
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("mutants: the tests did not come to their end")


def _rounds(mutants: list[Mutant], callers: Callers, paths: list[str], write: int) -> int:
    import pytest

    BUILD.mkdir(parents=True, exist_ok=True)
    log = os.open(BUILD / "rounds.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _without_shrinking()
    options = [*OPTIONS, "-s", *paths]
    with os.fdopen(write, "w") as into:

        def say(mutant: Mutant, killer: str | None) -> None:
            into.write(json.dumps([mutant.name, killer]) + "\n")
            into.flush()

        return int(pytest.main(options, plugins=[_Rounds(mutants, callers, say)]))


class _Rounds:
    """A pytest plugin: in place of one run of the tests, one for each change, in a fork."""

    def __init__(self, mutants: list[Mutant], callers: Callers, say: Callable[[Mutant, str | None], None]) -> None:
        self.mutants, self.callers, self.say = mutants, callers, say

    def pytest_runtestloop(self, session: object) -> bool:
        self.session = session
        self.items = {item.nodeid: item for item in session.items}  # type: ignore[attr-defined]
        self.functions, self.caches = _functions_in_memory()
        gc.collect()
        gc.freeze()  # a fork that need not look at what is there need not copy it either
        best: dict[str, list[str]] = {}
        vouched: set[tuple[str, str]] = set()
        fragile: set[str] = set()
        for mutant in self.mutants:
            first = best.setdefault(f"{mutant.file} {mutant.function}", [])
            names = [*first, *(name for name in self.callers[mutant] if name not in first)]
            while True:
                names = [name for name in names if name not in fragile]
                killer = self.killer(mutant.file, mutant.source(), names) if names else None
                if killer in (None, ENDLESS) or self.vouched(mutant.file, killer, vouched):
                    break
                fragile.add(killer)
            if killer not in (None, ENDLESS):
                if killer in first:
                    first.remove(killer)
                first.insert(0, killer)
            self.say(mutant, killer)
        return True

    def vouched(self, file: str, killer: str, vouched: set[tuple[str, str]]) -> bool:
        """Whether this test passes in the same surroundings when nothing is changed. One that does not, for it measures time
        on a busy machine, says nothing."""
        if (file, killer) not in vouched:
            unchanged = ast.unparse(ast.parse((ROOT / file).read_text(encoding="utf-8")))
            if self.killer(file, unchanged, [killer]) is not None:
                print(f"mutants: {killer} fails without a change of {file}, and is left out")
                return False
            vouched.add((file, killer))
        return True

    def killer(self, file: str, source: str, names: list[str]) -> str | None:
        return in_a_fork(lambda say: self.run(file, source, names, say))

    def run(self, file: str, source: str, names: list[str], say: Callable[[str], None]) -> None:
        gc.disable()
        changed = dict(_outermost(compile(source, str(ROOT / file), "exec", dont_inherit=True)))
        for one in self.functions.get(file, []):
            code = changed.get(one.__code__.co_qualname)
            if code is not None and code.co_freevars == one.__code__.co_freevars:
                one.__code__ = code
        for cache in self.caches:
            cache.cache_clear()
        gc.enable()
        items = [self.items[name] for name in names]
        for item, following in zip(items, [*items[1:], None], strict=True):
            signal.setitimer(signal.ITIMER_PROF, TEST_SECONDS)  # ends the process
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.session.testsfailed:  # type: ignore[attr-defined]
                say(item.nodeid)
                return


def _functions_in_memory() -> tuple[dict[str, list[FunctionType]], list[functools._lru_cache_wrapper[object]]]:
    functions: dict[str, list[FunctionType]] = {}
    caches = []
    files: dict[str, str | None] = {}
    for one in gc.get_objects():
        if type(one) is FunctionType:
            path = one.__code__.co_filename
            file = files[path] if path in files else files.setdefault(path, inside(path, FOLDERS))
            if file is not None:
                functions.setdefault(file, []).append(one)
        elif type(one) is functools._lru_cache_wrapper:
            caches.append(one)
    return functions, caches


def _outermost(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    """The functions and methods of a module or class by qualified name, without those inside functions."""
    for one in code.co_consts:
        if isinstance(one, CodeType) and "<" not in one.co_qualname:
            yield one.co_qualname, one
            yield from _outermost(one)


def in_a_fork(work: Callable[[Callable[[str], None]], None]) -> str | None:
    """What the work says there, None if it says nothing and ends well, ENDLESS if it is killed or breaks off."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            work(lambda word: os.write(write, word.encode()) and None)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    end = time.monotonic() + WALL_SECONDS
    pause = 0.002
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    with os.fdopen(read) as said:
        word = said.read()
    return word or (None if status == 0 else ENDLESS)


def _without_shrinking() -> None:
    from hypothesis import Phase, settings

    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutants", deadline=None, database=None, derandomize=True, phases=phases)


def noticed_afresh(mutant: Mutant, tests: list[str]) -> bool:
    """The same with the changed file imported afresh, by all tests of these files."""
    return in_a_fork(lambda say: _run_afresh(mutant, tests, say)) is not None


def _run_afresh(mutant: Mutant, tests: list[str], say: Callable[[str], None]) -> None:
    import pytest

    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    code = compile(mutant.source(), str(ROOT / mutant.file), "exec", dont_inherit=True)
    plain = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, name: str) -> CodeType | None:
        return code if Path(self.path) == ROOT / mutant.file else plain(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[assignment,method-assign]
    _without_shrinking()
    if pytest.main([*OPTIONS, "-x", *tests]) != 0:
        say("a test")
