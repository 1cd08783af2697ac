"""Changes the code in small ways, one at a time, and sees whether a unit test notices.

    python tools/mutants.py --sample 300            300 of all changes there are, drawn by --seed, of each wing its share
    python tools/mutants.py --only samplers         all changes of one folder or file
    python tools/mutants.py --only lora_merge/algebra --tests tests/lora_merge/test_ranks.py tests/lora_merge/test_sums.py
                                                    with these tests alone, which is quicker and stricter
    python tools/mutants.py --again outcome.json    what was not noticed when --json outcome.json was given
    python tools/mutants.py --show                  lists them

A change that no test notices is a fact that no test states. Those that make no difference, or none that matters, stand
in mutants_known.json with the reason. Exit status 1 if fewer than 95 % of the others were noticed.

What is no change by construction is not made (mutations.py): keywords that cost or save time and memory alone, such as
full_matrices of torch.linalg.svd (a caller that slices gets the same, another one an error), what torch takes by default,
texts for a person, checks such as strict of zip, and the sign of room for rounding (1 - 1e-9).

Only tests that call the changed function are run: those that noticed another change of it first, then those of the file that
is named as its module is and of others about it, the quickest and most particular first, --most of them where there are more. What calls what is seen once (mutant_calls.py). The tests are
collected once: each change is put into the functions in memory, in a process forked from there. Where that cannot show a
change, in default values and in what runs at import, the survivors are tried again with the changed file imported afresh,
by the tests of all that uses what was made then (mutant_made.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from statistics import median

from mutant_calls import FOLDERS, IMPORTED, tests_by_function
from mutant_made import Made
from mutant_rounds import noticed_afresh, outcome_of_rounds
from mutations import ROOT, Mutant, mutants_of

# A new process for each test, or a command line around the functions; and where things lie in a picture, which is looked at.
LEFT_OUT = (
    "distillation/__main__.py",
    "lora_merge/__main__.py",
    "lora_merge/cli/",
    "lora_merge/comparing/picture.py",
)
TESTS = [f"tests/{folder}" for folder in FOLDERS]
KNOWN = Path(__file__).with_name("mutants_known.json")
WANTED = 0.95
FILES = 4  # of tests, which are imported anew for each change of what is made at import
FEW = 40  # tests: fewer may not be all that use a function's results


def all_mutants(only: str | None) -> list[Mutant]:
    files = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    names = [file for file in files if not file.relative_to(ROOT).as_posix().startswith(LEFT_OUT)]
    return [
        one
        for file in names
        if only is None or file.relative_to(ROOT).as_posix().startswith(only)
        for one in mutants_of(file)
    ]


def drawn(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """So many of them, of each wing its share, in random order: the largest remainders are rounded up."""
    wings: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        parts = mutant.file.split("/")
        wings.setdefault("/".join(parts[:-1] or parts), []).append(mutant)
    exact = {wing: count * len(ones) / len(mutants) for wing, ones in wings.items()}
    shares = {wing: math.floor(share) for wing, share in exact.items()}
    for wing in sorted(exact, key=lambda one: shares[one] - exact[one])[: count - sum(shares.values())]:
        shares[wing] += 1
    draw = random.Random(seed)
    found = [one for wing, ones in wings.items() for one in draw.sample(ones, shares[wing])]
    draw.shuffle(found)  # so that the first of them, where it was broken off, are a sample too
    return found


def interval(seen: int, counted: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (J. Am. Stat. Assoc. 22, 1927)."""
    z, share = 1.959964, seen / counted
    middle = (share + z * z / (2 * counted)) / (1 + z * z / counted)
    half = z / (1 + z * z / counted) * math.sqrt(share * (1 - share) / counted + z * z / (4 * counted**2))
    return middle - half, middle + half


def some_of(tests: list[str], most: int) -> list[str]:
    """At most so many of them, in their order: most are the first, a sixth is spread over the others."""
    if len(tests) <= most:
        return tests
    spread = most // 6
    first, others = tests[: most - spread], tests[most - spread :]
    return first + [others[index * len(others) // spread] for index in range(spread)]


@cache
def files_about(file: str) -> frozenset[str]:
    """The files of tests that are named as this file is, or import something from it."""
    folder, _, name = file.removesuffix(".py").replace("/", ".").rpartition(".")
    imports = re.compile(
        rf"from lcm_kit\.(?:{re.escape(folder)}\.{name} import |{re.escape(folder)} import .*\b{name}\b)"
    )
    every = {test: test.read_text(encoding="utf-8") for folder in TESTS for test in (ROOT / folder).rglob("test_*.py")}
    about = {test for test, text in every.items() if test.stem == f"test_{name}" or imports.search(text)}
    return frozenset(test.relative_to(ROOT).as_posix() for test in about)


def distance(test: str, file: str) -> int:
    """0 for the file of tests that is named as this file is, 1 for another one that is about it, 2 for all others."""
    return (Path(test).stem != f"test_{Path(file).stem}") + (test not in files_about(file))


def callers_of(mutant: Mutant, tests: dict[str, list[str]], most: int, made: Made) -> list[str]:
    """The tests that call its function, [] if nothing does. Where it is called at import, those that use what was made
    there follow; where these are few, some that call others of its file, which may use what another test has kept."""
    direct = tests.get(f"{mutant.file} {mutant.function}", [])
    direct = sorted(direct, key=lambda name: distance(name.split("::")[0], mutant.file))
    found = dict.fromkeys(some_of([name for name in direct if name != IMPORTED], most))
    if IMPORTED in direct:
        turns = itertools.zip_longest(*(tests.get(user, []) for user in made.users(mutant.file)))
        used = dict.fromkeys(name for turn in turns for name in turn if name not in (None, IMPORTED))
        found |= dict.fromkeys([*used][:most])
    for near in (f"{mutant.file} ", f"{mutant.file.rpartition('/')[0]}/") if direct else ():
        if len(found) < FEW:
            names = {name for function, ones in tests.items() if function.startswith(near) for name in ones} - {
                IMPORTED
            }
            found |= dict.fromkeys(some_of(sorted(names), FEW))
    return [*found]


def files_on(mutant: Mutant, tests: dict[str, list[str]], made: Made) -> list[str]:
    """The files of tests that are about what was made at import with a function: of its users' tests those of files that are
    about its module, then those that call the fewest functions."""
    called = Counter(name for names in tests.values() for name in names)
    calls: dict[str, list[int]] = {}
    for name in {name for user in made.users(mutant.file) for name in tests.get(user, [])} - {IMPORTED}:
        calls.setdefault(name.split("::")[0], []).append(called[name])
    return sorted(calls, key=lambda file: (distance(file, mutant.file), median(calls[file]), file))[:FILES]


def outcomes(mutants: list[Mutant], paths: list[str], most: int) -> Iterable[tuple[Mutant, str]]:
    tests = tests_by_function(paths)
    imported = {function for function, names in tests.items() if IMPORTED in names}
    made = Made()
    callers = {one: callers_of(one, tests, most, made) for one in mutants}
    used = sorted({name.split("::")[0] for names in callers.values() for name in names})
    for one, killer in outcome_of_rounds(mutants, callers, used):
        at_import = one.default or f"{one.file} {one.function}" in imported
        if killer is None and at_import and callers[one] and noticed_afresh(one, files_on(one, tests, made)):
            killer = "imported afresh"
        yield one, f"noticed: {killer}" if killer else "survives" if callers[one] else "never called"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="folder or file, such as samplers or lora_merge/algebra")
    parser.add_argument("--sample", type=int, default=0, help="so many of them, drawn at random; 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=400, help="most tests tried for one change")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="folders or files; all unit tests unless told")
    parser.add_argument("--show", action="store_true", help="list the changes and run nothing")
    parser.add_argument("--json", type=Path, help="write the outcome of each there")
    parser.add_argument("--again", type=Path, help="only what was not noticed in this outcome of --json")
    return parser.parse_args()


def main() -> int:
    options = _options()
    known = json.loads(KNOWN.read_text()) if KNOWN.is_file() else {}
    every = all_mutants(options.only)
    mutants = [one for one in every if one.name not in known]
    if options.again:
        before = json.loads(options.again.read_text())
        mutants = [one for one in mutants if not before.get(one.name, "noticed").startswith("noticed")]
    if options.sample and options.sample < len(mutants):
        mutants = drawn(mutants, options.sample, options.seed)
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
    results = {}
    for mutant, result in outcomes(mutants, options.tests, options.most):
        results[mutant.name] = result
        if not result.startswith("noticed"):
            print(f"{result}: {mutant.name}  (line {mutant.line})", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    return _sum_up(results, len(every) - sum(one.name not in known for one in every))


def _sum_up(results: dict[str, str], known: int) -> int:
    counted = len(results)
    seen = sum(result.startswith("noticed") for result in results.values())
    if counted == 0:
        print("mutants: none")
        return 0
    low, high = interval(seen, counted)
    print(
        f"mutants: {seen} of {counted} noticed ({100 * seen / counted:.1f} %; a sample's 95 % interval is "
        f"{100 * low:.1f} to {100 * high:.1f} %), {counted - seen} not; {known} are known to make no difference"
    )
    return int(seen / counted < WANTED)


if __name__ == "__main__":
    sys.exit(main())
