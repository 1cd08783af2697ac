"""Headers that nobody wrote on purpose: what safetensors refuses is refused, and what it takes is taken or refused by a rule."""

import json
import random
import re
import struct

import pytest
from safetensors import SafetensorError, safe_open

from lcm_kit.lora_merge.disk.header import check_header

TENSOR = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
WHOLE = '{"__metadata__":{"format":"pt","é":"a \\"word\\" \\u00e9"},"a":' + TENSOR + "}"
EXTRA = '{"a":' + TENSOR[:-1] + ',"z":%s}}'

# Why we refuse what safetensors takes; header.py and json_text.py say so in their first lines.
RULES = re.compile(
    r"twice in its header|nested deeper than 100|a number of \d+ digits|printable ones|has no dtype, shape and data_offsets"
    r"|no values at all|holds no weights here|has shape .* in the header|is not a safetensors file; choose"
    r"|more than \d+ (lists|characters)"
)

ODD_VALUES = [
    "[]", "false", "true", "0", '""', '"x"', "1.5", "null", '[["a","b"]]', "{}", '{"a":1}', '{"a":null}', '{"a":["x"]}',
    '{"a":"\\ud800"}', '{"\\ud800":"a"}', '{"a":"\\udc00\\ud800"}', '{"a":"\\ud83d\\ude00"}', '{"a":"b","a":"c"}', '{"":""}',
    '{"a":NaN}', '{"a":"\\u0000"}', '{"a":"x\ty"}', '{"a":"\\x"}', '{"a":"b",}', "NaN", "-Infinity", "1e400", "-0", "-1",
    "1e-400", "9" * 30, "9" * 400, "9" * 5000, "[" * 90 + "]" * 90, "[" * 110 + "]" * 110, "[" * 140 + "]" * 140,
    "[" * 100_000, '{"q":1,"q":2}', "02", "+2", "2.0", "[2,1,1,1,1,1,1,1,1]", "[0]", "[-0,8]", "[0,8.0]", "[0,8,9]", '"F64"',
    '"f32"', '"C64"', '"F4"', '"BOOL"', '"\\u004632"',
]  # fmt: skip


def verdicts(folder, header: str | bytes, data=8):
    """(keys and metadata as safetensors sees them, or None; the same for check_header, or the message)."""
    text = header if isinstance(header, bytes) else header.encode()
    path = folder / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    try:
        with safe_open(path, "pt") as file:
            theirs = (set(file.keys()), file.metadata() or {})
    except SafetensorError:
        theirs = None
    try:
        header = check_header(path)
        ours = (set(header.entries), dict(header.metadata))
    except ValueError as error:
        ours = str(error)
    return theirs, ours


def agree(folder, header, data=8):
    theirs, ours = verdicts(folder, header, data)
    if isinstance(ours, str):
        assert "\n" not in ours
        assert len(ours) < 600
        assert theirs is None or RULES.search(ours), (header[:300], ours)
    else:
        assert theirs == ours, header[:300]


def test_an_ordinary_header_is_taken_by_both(tmp_path):
    theirs, ours = verdicts(tmp_path, WHOLE)
    assert theirs == ours == ({"a"}, {"format": "pt", "é": 'a "word" é'})


@pytest.mark.parametrize("value", ODD_VALUES, ids=range(len(ODD_VALUES)))
def test_odd_values_at_every_place(tmp_path, value):
    agree(tmp_path, '{"__metadata__":' + value + ',"a":' + TENSOR + "}")
    agree(tmp_path, EXTRA % value)
    for whole in ('"F32"', "[2]", "[0,8]"):
        agree(tmp_path, '{"a":' + TENSOR.replace(whole, value) + "}")
    agree(tmp_path, '{"a":' + value + "}")
    agree(tmp_path, value)


@pytest.mark.parametrize(
    "name", ["", "a\\n", "\\ud800", "\\ud83d\\ude00", "x" * 501, "\\u0000", "__metadata__", "a\\/b"]
)
def test_odd_names(tmp_path, name):
    agree(tmp_path, '{"' + name + '":' + TENSOR + "}")
    agree(tmp_path, '{"a":' + TENSOR + ',"' + name + '":' + TENSOR + "}")


@pytest.mark.parametrize("seed", range(10))
def test_headers_with_a_few_wrong_characters(tmp_path, seed):
    draw = random.Random(seed)
    letters = '{}[]":,\\0123456789.-eEuUd nultrafsNaIiyF "\t\n\x00é\x7f'
    for _ in range(100):
        text = list(draw.choice([WHOLE, EXTRA % "[1,2,{}]", EXTRA % '"\\ud83d\\ude00"']))
        for _ in range(draw.choice([1, 1, 2, 5])):
            at = draw.randrange(len(text))
            text[at : at + draw.randrange(3)] = draw.choices(letters, k=draw.randrange(3))
        agree(tmp_path, "".join(text))


@pytest.mark.parametrize("seed", range(5))
def test_headers_with_a_few_wrong_bytes(tmp_path, seed):
    draw = random.Random(seed)
    for _ in range(100):
        text = bytearray(WHOLE.encode())
        for _ in range(draw.choice([1, 2])):
            text[draw.randrange(len(text))] = draw.randrange(256)
        agree(tmp_path, bytes(text))


@pytest.mark.parametrize("seed", range(5))
def test_headers_whose_layout_is_wrong(tmp_path, seed):
    draw = random.Random(seed)
    for _ in range(60):
        entries = {
            name: {
                "dtype": draw.choice(["F32", "F16", "U8", "I64"]),
                "shape": draw.choices([0, 1, 2, 4], k=draw.randrange(3)),
                "data_offsets": sorted(draw.choices([0, 1, 2, 4, 8, 12, 16], k=2)),
            }
            for name in "abc"[: draw.randrange(1, 4)]
        }
        agree(tmp_path, json.dumps(entries), data=draw.choice([0, 4, 8, 16]))
