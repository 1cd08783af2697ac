"""Numbers in a text, as people write them into a node: "0, 0.4, 0.8", "0:1.2:0.4"."""

import math
import re

_NUMBER = r"[+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})"
_RANGE = re.compile(rf"({_NUMBER}):({_NUMBER}):({_NUMBER})")
_WHOLE = r"[+-]?[0-9]{1,20}"


def numbers(text: str, name: str, *, low: float, high: float, most: int, whole: bool = False) -> tuple[float, ...]:
    """The numbers of a text, in their order; commas and white space separate. first:last:step is a range with both ends.

    name: of the input, for messages.   low, high: what each has to lie between.   whole: they are ints, of any size.
    Raises ValueError naming the entry that is no such number, or for more than `most` of them.
    """
    values: list[float] = []
    for entry in text.replace(",", " ").split():
        values += _of_entry(entry, name, most, whole)
        if len(values) > most:
            raise ValueError(f"{name}: there are more than {most} values. Give fewer.")
    for value in values:
        if not low <= value <= high:
            raise ValueError(f"{name}: {value:g} is not from {low:g} to {high:g}. Leave it out or change it.")
    return tuple(values)


def _of_entry(entry: str, name: str, most: int, whole: bool) -> list[float]:
    # Stricter than float(), which also reads "1_0", "nan" and digits of other scripts; and a float has no room for a seed.
    if whole and re.fullmatch(_WHOLE, entry):
        return [int(entry)]
    if found := _RANGE.fullmatch(entry):
        values = _range(*map(float, found.groups()), entry=entry, name=name, most=most)
    elif re.fullmatch(_NUMBER, entry):
        values = [float(entry)]
    else:
        raise ValueError(
            f"{name}: {entry[:40]!r} is no number. Write numbers between commas, such as 0, 1, 2, or a range, 0:2:1."
        )
    if not whole:
        return values
    for value in values:
        if value != int(value):
            raise ValueError(f"{name}: {value:g} is no whole number. Write numbers such as 1, 2, 4, 8.")
    return list(map(int, values))


def _range(first: float, last: float, step: float, *, entry: str, name: str, most: int) -> list[float]:
    if step == 0 or (last - first) / step < 0:
        raise ValueError(f"{name}: {entry} never gets from {first:g} to {last:g}. Write first:last:step, 0:1.2:0.4.")
    count = math.floor((last - first) / step + 1e-9) + 1
    if count > most:
        raise ValueError(f"{name}: {entry} is {count:,} values, but there may be {most}. Widen the step.")
    # Rounded, or 0:1.2:0.4 ends in 1.2000000000000002.
    return [round(first + number * step, 10) for number in range(count)]
