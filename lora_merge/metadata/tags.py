"""How often each tag stands in the captions of a training set: kohya's `ss_tag_frequency`, folder -> tag -> number."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from heapq import nlargest

from ..disk import json_text

KEY = "ss_tag_frequency"
# Of the text as a header holds it. Much more, from several files, would make a header that is too long.
MAX_BYTES = 16_000_000

Frequencies = dict[str, dict[str, float]]


def read(metadata: Mapping[str, str]) -> Frequencies:
    """{} where the metadata has none. Raises ValueError, whose words follow "cannot be read:", for what is no such thing."""
    if KEY not in metadata:
        return {}
    found = json_text.parse_object(metadata[KEY])
    for folder, tags in found.items():
        if not isinstance(tags, dict):
            raise ValueError(f"{folder[:60]!r} has no tags with numbers")
        for tag, number in tags.items():
            if type(number) not in (int, float) or not abs(number) < 1e15:
                raise ValueError(f"{tag[:60]!r} has no sane number")
    return found


def total(each: Iterable[Frequencies]) -> Frequencies:
    """Summed by folder and tag, in the order of their first appearance."""
    result: Frequencies = {}
    for frequencies in each:
        for folder, tags in frequencies.items():
            sums = result.setdefault(folder, {})
            for tag, number in tags.items():
                sums[tag] = sums.get(tag, 0) + number
    return result


def to_text(frequencies: Frequencies) -> tuple[str, int]:
    """(JSON of at most MAX_BYTES, number of tags in it): of more the most frequent."""
    kept = sum(map(len, frequencies.values()))
    while len(_in_header(text := json.dumps(frequencies, ensure_ascii=False))) > MAX_BYTES:
        kept //= 2
        frequencies = _most_frequent(frequencies, kept)
    return text, kept


def top(frequencies: Frequencies, most: int) -> list[str]:
    """The most frequent tags over all folders."""
    sums: dict[str, float] = {}
    for tags in frequencies.values():
        for tag, number in tags.items():
            sums[tag] = sums.get(tag, 0) + number
    return nlargest(most, sums, key=lambda tag: sums[tag])


def _most_frequent(frequencies: Frequencies, most: int) -> Frequencies:
    entries = ((number, folder, tag) for folder, tags in frequencies.items() for tag, number in tags.items())
    kept = {(folder, tag) for _, folder, tag in nlargest(most, entries, key=lambda entry: entry[0])}
    left = {
        folder: {tag: number for tag, number in tags.items() if (folder, tag) in kept}
        for folder, tags in frequencies.items()
    }
    return {folder: tags for folder, tags in left.items() if tags}


def _in_header(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False).encode()
