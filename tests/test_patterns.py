"""Regular expressions of this package meet names out of strangers' files: none takes longer than a text is long.

Python's matcher tries every way in which a repeat can be split before it gives up. What could be split in many ways is
looked for here: texts that each repeat of each expression matches, over and over, and then a letter that fits nothing.
"""

import importlib
import pkgutil
import random
import re
import time
from itertools import combinations

import pytest

from lcm_kit.tests.helpers import ROOT

try:
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as sre
    import sre_parse as _parser

WINGS = ["samplers", "lora_merge", "distillation", "launch", "host"]
TIMES = (*range(3, 25), 60, 500)
LONGEST = 500  # letters, as of a name in a file
SECONDS = 0.05


def modules():
    for wing in WINGS:
        module = importlib.import_module(f"lcm_kit.{wing}")
        yield module
        for found in pkgutil.walk_packages(module.__path__, f"{module.__name__}.", onerror=lambda name: None):
            if not found.name.endswith("__main__"):
                try:
                    yield importlib.import_module(found.name)
                except ModuleNotFoundError:  # of ComfyUI, without which host/ is read in part
                    assert wing == "host"


def inside(value, depth=0):
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, dict) and depth < 3:
        for one in value.values():
            yield from inside(one, depth + 1)
    elif isinstance(value, (tuple, list)) and depth < 3:
        for one in value[:200]:
            yield from inside(one, depth + 1)


def expressions():
    found = {}
    for module in modules():
        for value in vars(module).values():
            for pattern in inside(value):
                if isinstance(pattern.pattern, str):
                    found.setdefault((pattern.pattern, pattern.flags), pattern)
    return list(found.values())


PATTERNS = expressions()


class Texts:
    """Texts that an expression, or a part of it, matches, drawn at random.

    liked: letters that are taken wherever they fit, for what can be split in several ways has one letter in several places.
    """

    def __init__(self, pattern: re.Pattern, liked: str) -> None:
        self.random, self.liked, self.groups = random.Random(liked), liked, {}
        self.tree = _parser.parse(pattern.pattern, pattern.flags)

    def repeats(self, tree=None, before=""):
        """(what stands before, what is repeated) of every repeat without an end."""
        for kind, value in self.tree if tree is None else tree:
            if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
                if value[1] > 50:
                    yield before, value[2]
                yield from self.repeats(value[2], before)
            elif kind is sre.SUBPATTERN:
                yield from self.repeats(value[3], before)
            elif kind is sre.BRANCH:
                for one in value[1]:
                    yield from self.repeats(one, before)
            elif kind in (sre.ASSERT, sre.ASSERT_NOT):
                yield from self.repeats(value[1], before)
            before += self.of([(kind, value)])

    def of(self, tree) -> str:
        return "".join(self.one(kind, value) for kind, value in tree)

    def one(self, kind, value) -> str:
        draw = self.random
        if kind is sre.LITERAL:
            return chr(value)
        if kind is sre.NOT_LITERAL:
            return "b" if value == ord("a") else "a"
        if kind is sre.ANY:
            return draw.choice(self.liked)
        if kind is sre.IN:
            return self.of_class(value)
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            return "".join(self.of(value[2]) for _ in range(draw.randint(value[0], min(value[1], value[0] + 2))))
        if kind is sre.SUBPATTERN:
            self.groups[value[0]] = text = self.of(value[3])
            return text
        if kind is sre.BRANCH:
            return self.of(draw.choice(value[1]))
        if kind is sre.GROUPREF:
            return self.groups.get(value, "")
        return ""  # edges, and what looks ahead or behind

    def of_class(self, items) -> str:
        letters = [letter for letter in "a1_.- bzq9Q(" if any(fits(letter, item) for item in items)]
        denied = items[0][0] is sre.NEGATE
        if denied:
            letters = [letter for letter in "a1_.- " if not any(fits(letter, item) for item in items)]
        literal = [chr(value) for kind, value in items if kind is sre.LITERAL]
        return self.random.choice([one for one in letters if one in self.liked] or letters or literal or ["a"])


def fits(letter, item):
    kind, value = item
    if kind is sre.LITERAL:
        return ord(letter) == value
    if kind is sre.RANGE:
        return value[0] <= ord(letter) <= value[1]
    if kind is sre.CATEGORY:
        return {
            sre.CATEGORY_DIGIT: letter.isdigit(), sre.CATEGORY_WORD: letter.isalnum() or letter == "_",
            sre.CATEGORY_SPACE: letter.isspace(), sre.CATEGORY_NOT_SPACE: not letter.isspace(),
        }.get(value, False)  # fmt: skip
    return False


def slowest(pattern: re.Pattern) -> tuple[float, str]:
    """(seconds of CPU, the text that took them); stops at the first that takes more than SECONDS."""
    worst = (0.0, "")
    for liked in map("".join, combinations("a1_.-q", 2)):
        texts = Texts(pattern, liked)
        for before, body in list(texts.repeats()):
            unit = texts.of(body) or "a"
            for times in TIMES:
                text = (before + unit * times)[:LONGEST] + "\t!"
                started = time.process_time()
                for way in (pattern.search, pattern.fullmatch):
                    way(text)
                seconds = time.process_time() - started
                worst = max(worst, (seconds, text))
                if seconds > SECONDS:
                    return worst
    return worst


def test_the_expressions_are_found():
    assert len(PATTERNS) > 60
    assert all(compiled.pattern for compiled in PATTERNS)


@pytest.mark.parametrize("text", [r"(?:[-_.](?:v?\d[\d.]*|q\d\w*))+$", r"(a+)+$", r"(\w+_?)*-", r"(?:a|a_|_)*$"])
def test_a_slow_one_would_be_noticed(text):
    assert slowest(re.compile(text))[0] > SECONDS


@pytest.mark.parametrize("pattern", PATTERNS, ids=[str(number) for number in range(len(PATTERNS))])
def test_no_expression_takes_long(pattern):
    seconds, text = slowest(pattern)
    assert seconds <= SECONDS, (pattern.pattern, text[:120], f"{seconds:.2f} s")


def test_expressions_stand_where_they_are_found():
    """Compiled once at the head of a file: those inside functions have no repeat in a repeat."""
    nested = re.compile(r"[*+}]\)[*+{]")
    for file in ROOT.glob("*/**/*.py"):
        if file.relative_to(ROOT).parts[0] in {"samplers", "lora_merge", "distillation", "host", "nodes", "launch"}:
            for line in file.read_text(encoding="utf-8").splitlines():
                if re.search(r"\bre\.(?:match|search|fullmatch|sub|split|findall)\(\s*rf?\"", line):
                    assert not nested.search(line), (file.name, line)
