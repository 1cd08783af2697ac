"""Names that are written as they are, everywhere, and names that are refused in words."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm_kit.lora_merge.disk.file_names import MAX_BYTES, MAX_PATH_BYTES, name_trouble, path_trouble, shown, visible

GOOD = [
    "merged", "LCMKit", "fast style", "v1.2", "a.b.c", ".hidden", "..a", "-x", "~x", "a'b", "a&b", "100%", "x (1)",
    "é", "한글", "日本語", "ελληνικά", "кот", "👩\u200d🔬", "می\u200cخواهم", "contact", "console.log", "com10", "COM", "lpt",
    "auxiliary", "nullify", "n" * MAX_BYTES, "é" * 127, "x.SAFETENSORS", "$HOME", "a;b", "`a`", "%year%",
    "\ue000", "\ufdcf", "\ufdf0", "\ufffd",
]  # fmt: skip
BAD = {
    "nothing": ["", ".", ".."],
    "nobody sees": [
        *(f"a{chr(number)}b" for number in (*range(32), *range(127, 160))),
        *(f"a{letter}b" for letter in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"),
        *(f"a{letter}b" for letter in "\u2028\u2029\u200b\u2060\ufeff\u00ad\ufff9\ufffe\uffff\ufdd0\ufdef\U000e0041\U0001fffe\U0010ffff"),
        "\x00", "a\n", "\ta", "a\x1b[31mb",
    ],
    "not every system": [f"a{letter}b" for letter in '<>:"/\\|?*'] + ["C:\\x", "a:b", "\\\\server\\share", "%date:yyyy%"],
    "Windows drops": ["a.", "a ", "a. ", "a .", "...", " a", " ", "a.."],
    "device": [
        "CON", "con", "Con.txt", "PRN", "aux.safetensors", "NUL", "nul.tar.gz", "COM0", "com1", "COM9.x", "LPT1", "lpt³",
        "com¹", "CONIN$", "conout$", "con .txt",
    ],
    "surrogate": ["\ud800", "a\udfffb", "\udc80"],
    "in pieces": ["e\u0301", unicodedata.normalize("NFD", "한글"), "\u212b"],
    "shorter": ["n" * (MAX_BYTES + 1), "é" * 128, "👩" * 64],
}  # fmt: skip
MESSAGES = {"nothing": "write a name"}


@pytest.mark.parametrize("name", GOOD)
def test_an_ordinary_name_is_fine(name, tmp_path):
    assert name_trouble(name) is None
    (tmp_path / name).touch()
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("why", "name"), [(why, name) for why, names in BAD.items() for name in names])
def test_a_name_that_means_another_thing_elsewhere_is_refused_in_words(why, name):
    trouble = name_trouble(name)
    assert MESSAGES.get(why, why) in trouble
    assert trouble.isprintable()
    trouble.encode()


@settings(deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_a_name_that_can_be_written_and_read_back_or_a_sentence(name):
    trouble = name_trouble(name)
    if trouble is None:
        assert len(name.encode()) <= MAX_BYTES
        assert name == unicodedata.normalize("NFC", name)
        assert not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)
    else:
        assert trouble.isprintable()
    assert shown(name).isprintable()
    shown(name).encode()
    assert len(shown(name)) < 700


@pytest.mark.parametrize(
    ("name", "where"),
    [("a.", "ends with a dot"), ("a ", "ends with a space"), (" a", "begins with a space"), (" a.", "ends with a dot"),
     (". ", "ends with a space"), (" .a", "begins with a space")],
)  # fmt: skip
def test_what_windows_drops_is_told_with_its_place(name, where):
    assert name_trouble(name) == f"{where}, which Windows drops; write it without"


def test_folders_are_names_too():
    assert path_trouble("a/b/c") is None
    assert path_trouble("/".join("a" * 33)) is None
    assert path_trouble("/".join("a" * 2001)) == "goes 2000 folders deep; write at most 32"
    assert "'CON' is the name of a device" in path_trouble("a/CON/b")
    assert "'' is empty" in path_trouble("a//b")
    assert "'b' * 300" not in path_trouble("a/" + "b" * 300)
    assert "800" in path_trouble("/".join(["b" * 200] * 5))
    assert path_trouble("a:b").startswith("has : in it")


def test_a_path_may_be_as_long_as_is_said_and_no_longer():
    folders = "/".join(["b" * 99] * 7)
    assert path_trouble(f"{folders}/{'c' * (MAX_PATH_BYTES - len(folders) - 1)}") is None
    assert path_trouble(f"{folders}/{'é' * ((MAX_PATH_BYTES - len(folders) - 1) // 2)}c") == (
        f"has {MAX_PATH_BYTES + 1} bytes with its folders; write at most {MAX_PATH_BYTES}"
    )


@pytest.mark.parametrize("length", [1, 59, 60, 61, 200])
def test_a_name_of_up_to_60_letters_is_shown_whole_and_of_a_longer_one_both_ends(length):
    name = "".join(chr(ord("a") + at % 26) for at in range(length))
    assert shown(name) == (repr(name) if length <= 60 else f"{name[:40]!r}...{name[-15:]!r}")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain", "plain"),
        ("Zoë\n\tin lines", "Zoë\n\tin lines"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("\x1b", r"\x1b"),
        ("é\x7f", r"é\x7f"),
        ("a\u202eb\u200d", "a\\u202eb\u200d"),
        ("\ud7ff\ud800\udfff\ue000", "\ud7ff\\ud800\\udfff\ue000"),
        ("\ufdcf\ufdd0\ufdef\ufdf0", "\ufdcf\\ufdd0\\ufdef\ufdf0"),
        ("\ufffd\ufffe\U0001ffff", "\ufffd\\ufffe\\U0001ffff"),
    ],
)
def test_what_a_terminal_would_obey_and_not_show_is_written_out(text, seen):
    assert visible(text) == seen
