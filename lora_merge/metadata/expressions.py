"""The regular expressions that PEFT patterns are made of, matched in bounded time.

Python's own matcher tries alternatives one after the other and can take longer than anybody waits; such an expression
comes with a file. Here all alternatives advance together (Thompson, Regular Expression Search Algorithm, 1968), so that
a match takes at most states * letters steps, and the steps are counted.

Read are letters, `.`, `\\d \\w \\s`, classes, groups, `|`, `* + ? {m,n}`, `^` and `$`; what needs memory of the past or a
look ahead is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_LENGTH, MAX_STATES, MAX_REPEATS = 200, 2_000, 100
# Within braces. Python takes anything else there for letters.
_NUMBERS = re.compile(r"\d+|\d*,\d*", re.ASCII)

Test = Callable[[str], bool]


@dataclass(eq=False)
class _State:
    """after: states reached without a letter.   test, then: the letter it takes and where that leads.
    edge: "^" or "$" if it can be passed there only.
    """

    after: list[_State] = field(default_factory=list)
    test: Test | None = None
    then: _State | None = None
    edge: str = ""


class Budget:
    """Steps that all matches of one file may take together."""

    def __init__(self, steps: int):
        self.left = steps

    def spend(self, steps: int) -> None:
        """Raises ValueError when nothing is left."""
        self.left -= steps
        if self.left < 0:
            raise ValueError("the patterns take too long on this many names")


class Expression:
    """Raises ValueError for what is no expression or needs more than is read here."""

    def __init__(self, text: str):
        if len(text) > MAX_LENGTH:
            raise ValueError(f"is longer than {MAX_LENGTH} letters")
        parser = _Parser(text)
        self._first, self._last = parser.parsed()
        self.states = parser.states

    def ends(self, name: str, budget: Budget) -> bool:
        """Whether it matches the whole name, or all of it after a dot: as PEFT applies a pattern to a module."""
        current: set[_State] = set()
        for at in range(len(name) + 1):
            if at == 0 or name[at - 1] == ".":
                current.add(self._first)
            current = _closure(current, at == 0, at == len(name))
            budget.spend(len(current) + 1)
            if at < len(name):
                letter = name[at]
                current = {s.then for s in current if s.test is not None and s.test(letter) and s.then is not None}
        return self._last in current


def _closure(states: set[_State], at_start: bool, at_end: bool) -> set[_State]:
    found: set[_State] = set()
    waiting = list(states)
    while waiting:
        state = waiting.pop()
        if state in found or (state.edge == "^" and not at_start) or (state.edge == "$" and not at_end):
            continue
        found.add(state)
        waiting += state.after
    return found


Part = tuple[_State, _State]


class _Parser:
    """Recursive descent: alternatives of sequences of repeated atoms. Each part is a first and a last state."""

    def __init__(self, text: str):
        self.text = text
        self.at = 0
        self.depth = 0
        self.states = 0

    def parsed(self) -> Part:
        part = self._alternatives()
        if self.at < len(self.text):
            raise ValueError(f"has {self.text[self.at]!r} without its counterpart")
        return part

    def _state(self) -> _State:
        self.states += 1
        if self.states > MAX_STATES:
            raise ValueError("is too involved to be tried")
        return _State()

    def _alternatives(self) -> Part:
        first, last = self._state(), self._state()
        while True:
            begin, end = self._sequence()
            first.after.append(begin)
            end.after.append(last)
            if not self._take("|"):
                return first, last

    def _sequence(self) -> Part:
        first = last = self._state()
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            begin, end = self._repeated()
            last.after.append(begin)
            last = end
        return first, last

    def _repeated(self) -> Part:
        start = self.at
        part = self._atom()
        stop = self.at
        times = self._times()
        if times is None:
            return part
        low, high = times
        self._take("?")  # which match is found first makes no difference here
        if self.at < len(self.text) and self.text[self.at] in "*+?{":
            raise ValueError("repeats a repeat")
        first = last = self._state()
        # Copies: a state knows no number of times. Where there is no end the last of them begins anew.
        copies = (low or 1) if high is None else high
        for number in range(copies):
            begin, end = self._again(start, stop)
            skip = self._state()
            last.after.append(begin)
            if number >= low:
                last.after.append(skip)
            end.after.append(skip)
            if high is None and number == copies - 1:
                end.after.append(begin)
            last = skip
        return first, last

    def _again(self, start: int, stop: int) -> Part:
        place, self.at = self.at, start
        part = self._atom()
        assert self.at == stop
        self.at = place
        return part

    def _times(self) -> tuple[int, int | None] | None:
        """The least and the most, None where there is no end; None where nothing is repeated."""
        for sign, times in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return times
        if not self._take("{"):
            return None
        within = self._until("}")
        if not _NUMBERS.fullmatch(within):
            raise ValueError("has braces that hold no numbers")
        low, comma, high = within.partition(",")
        least = int(low or 0)
        most = (int(high) if high else None) if comma else least
        if least > MAX_REPEATS or (most is not None and not least <= most <= MAX_REPEATS):
            raise ValueError(f"repeats by {low}{comma}{high}, but numbers have to rise and be at most {MAX_REPEATS}")
        return least, most

    def _atom(self) -> Part:
        letter = self._next()
        if letter == "(":
            return self._group()
        if letter in "*+?{":
            raise ValueError(f"has nothing to repeat before {letter!r}")
        if letter in "^$":
            state = self._state()
            state.edge = letter
            return state, state
        if letter == "[":
            return self._taking(self._class())
        if letter == "\\":
            return self._taking(_escaped(self._next()))
        return self._taking((lambda other: True) if letter == "." else letter.__eq__)

    def _group(self) -> Part:
        if self._take("?") and not self._take(":"):
            raise ValueError("looks ahead or behind, which is not read")
        self.depth += 1
        if self.depth > 20:
            raise ValueError("nests more than 20 groups")
        part = self._alternatives()
        self.depth -= 1
        if not self._take(")"):
            raise ValueError("has '(' without its counterpart")
        return part

    def _class(self) -> Test:
        denied = self._take("^")
        tests: list[Test] = []
        while (letter := self._next()) != "]" or not tests:
            if letter == "\\":
                tests.append(_escaped(self._next()))
            elif self.text[self.at : self.at + 1] == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                tests.append(_between(letter, self._next()))
            else:
                tests.append(letter.__eq__)
        return lambda other: any(test(other) for test in tests) != denied

    def _taking(self, test: Test) -> Part:
        state, then = self._state(), self._state()
        state.test, state.then = test, then
        return state, then

    def _next(self) -> str:
        if self.at >= len(self.text):
            raise ValueError("ends too early")
        self.at += 1
        return self.text[self.at - 1]

    def _take(self, letter: str) -> bool:
        found = self.text[self.at : self.at + 1] == letter
        self.at += found
        return found

    def _until(self, letter: str) -> str:
        text, found, _ = self.text[self.at :].partition(letter)
        if not found:
            raise ValueError(f"has no {letter!r}")
        self.at += len(text) + len(found)
        return text


def _escaped(letter: str) -> Test:
    tests: dict[str, Test] = {"d": str.isdecimal, "s": str.isspace, "w": lambda other: other.isalnum() or other == "_"}
    if letter in tests:
        return tests[letter]
    if letter.lower() in tests:
        test = tests[letter.lower()]
        return lambda other: not test(other)
    if letter.isalnum():
        raise ValueError(f"has \\{letter}, which is not read")
    return letter.__eq__


def _between(low: str, high: str) -> Test:
    if low > high:
        raise ValueError(f"has the range {low}-{high} the wrong way round")
    return lambda other: low <= other <= high
