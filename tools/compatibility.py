"""Tries LCM Kit on the ComfyUI that COMFYUI_PATH names and writes what came out into docs/compatibility.md.

    make compatibility                                        on .comfyui
    make compatibility COMFYUI=floor                          on .comfyui-floor
    make compatibility COMFYUI_PATH=/their/ComfyUI PYTHON=... on any other

Runs all tests of tests/with_comfyui there, also the slow and the rare ones, and makes one row of the table out of them. The status is
0 if all passed, 1 if some failed (they are named in the row), 2 if nothing could be run.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "compatibility.md"
COLUMNS = ("ComfyUI", "page", "Python, torch", "tried on", "starts", "nodes", "in the page", "distils", "what fails")
FILES = {  # column -> names of the test files that it counts; all others are "nodes"
    "starts": re.compile("test_startup|test_archive_starts"),
    "in the page": re.compile("test_browser|test_locales|test_frozen|test_.*_in_page"),
    "distils": re.compile("test_distill.*|test_soak_trainings|test_phased|test_beginning"),
}


class CannotTry(Exception):
    """One line for the user: what is wrong and its remedy."""


@dataclass
class Outcome:
    """How the tests of one column ended."""

    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        count = self.passed + len(self.failed)
        share = f"all {count}" if self.passed and not self.failed else f"{self.passed} of {count}"
        return share + (f", {self.skipped} skipped" if self.skipped else "")


def outcomes(report: Path) -> dict[str, Outcome]:
    """Column -> Outcome, from pytest's JUnit file."""
    found = {column: Outcome() for column in ("starts", "nodes", "in the page", "distils")}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        # A file that could not be collected is a case of its own, without a class.
        file = (case.get("classname") or case.get("name") or "").rsplit(".", 1)[-1]
        outcome = found[next((column for column, files in FILES.items() if files.fullmatch(file)), "nodes")]
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed.append(f"{file}::{case.get('name')}")
        elif case.find("skipped") is not None:
            outcome.skipped += 1
        else:
            outcome.passed += 1
    return found


def run_tests(tree: Path, report: Path) -> None:
    """All integration tests on `tree`, with pytest's words on the terminal."""
    spread = ["-n", os.environ.get("WORKERS", "2"), "--dist", "loadfile"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", *spread, "tests/with_comfyui", f"--junit-xml={report}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "COMFYUI_PATH": str(tree)})
    if done.returncode not in (0, 1) or not report.is_file():
        raise CannotTry(f"pytest ended with status {done.returncode} and tried nothing: see its words above")


def version_of(tree: Path) -> str:
    file = tree / "comfyui_version.py"
    found = re.search(r"""__version__ = ["']([\d.]+)""", file.read_text()) if file.is_file() else None
    if found is None:
        raise CannotTry(f"COMFYUI_PATH={tree} is not a ComfyUI: give the folder that holds its main.py")
    return found.group(1)


def page_of(tree: Path) -> str:
    """Version of the page that the tests use on `tree`: its own if `make setup` fetched it, else the installed one."""
    file = tree / "requirements.txt"
    wanted = re.search(r"^comfyui-frontend-package==(\S+)", file.read_text() if file.exists() else "", re.MULTILINE)
    if wanted and (ROOT / ".frontends" / wanted.group(1)).is_dir():
        return wanted.group(1)
    return importlib.metadata.version("comfyui-frontend-package")


def row_of(tree: Path, found: Mapping[str, Outcome]) -> list[str]:
    python = ".".join(map(str, sys.version_info[:2]))
    torch = importlib.metadata.version("torch").split("+")[0]
    failed = sorted(f"`{name}`" for outcome in found.values() for name in outcome.failed)
    start = [version_of(tree), page_of(tree), f"{python}, {torch}", datetime.date.today().isoformat()]
    return [*start, *map(str, found.values()), "; ".join(failed).replace("|", "\\|") or "nothing"]


def with_row(text: str, row: list[str]) -> str:
    """The page's text with `row` in its table, in the order of versions, in place of an older row of that version."""
    head = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"
    before, found, rest = text.partition(head)
    if not found:
        raise CannotTry(f"{TABLE} has no table with the columns {', '.join(COLUMNS)}: restore it from git")
    rows = re.match(r"(?:\|.*\n)*", rest)
    assert rows is not None
    kept = [line for line in rows.group().splitlines() if first_cell(line) != row[0]]
    lines = sorted([*kept, f"| {' | '.join(row)} |"], key=lambda line: [int(n) for n in first_cell(line).split(".")])
    return before + head + "".join(f"{line}\n" for line in lines) + rest[rows.end() :]


def first_cell(line: str) -> str:
    return line.split("|")[1].strip()


def main() -> int:
    tree = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".comfyui").expanduser().resolve()
    try:
        version = version_of(tree)
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            run_tests(tree, report)
            found = outcomes(report)
        TABLE.write_text(with_row(TABLE.read_text(encoding="utf-8"), row_of(tree, found)), encoding="utf-8")
    except CannotTry as error:
        print(f"compatibility: {error}", file=sys.stderr)
        return 2
    failed = sum(len(outcome.failed) for outcome in found.values())
    print(f"compatibility: ComfyUI {version}, {failed} failed; the row is in {TABLE.relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
