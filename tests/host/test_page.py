"""Texts that leave a node: whatever is in them, they read as they are and make nothing, also where they pass for HTML."""

import re
import string
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lcm_kit.host.page import WORD_JOINER, in_lines, plain
from lcm_kit.tests.helpers import as_read, lines_in_markdown

ALPHABET = st.text(st.sampled_from("<>/!?-&#;[]()|:=\"' \nab1x" + WORD_JOINER), max_size=60)


class Drawn(HTMLParser):
    """What a page would make of a text: everything but letters, and the letters."""

    def __init__(self, text):
        super().__init__(convert_charrefs=False)
        self.made, self.letters = [], ""
        self.feed(text)
        self.close()

    def handle_data(self, data):
        self.letters += data

    def handle_starttag(self, tag, attrs):
        self.made.append(tag)

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        self.made.append(tag)

    handle_comment = handle_decl = handle_pi = unknown_decl = handle_charref = handle_endtag


@given(ALPHABET)
@example('<img src=x onerror="planted=1">')
@example("</textarea><script>planted()</script>")
@example("<!--<svg/onload=x>-->")
@example("&#60;img src=x&#62;")
@example("<")
def test_nothing_is_made_of_a_plain_text_and_every_letter_is_there(text):
    drawn = Drawn(plain(text))
    assert drawn.made == []
    assert plain(text).replace(WORD_JOINER, "") == text.replace(WORD_JOINER, "")
    assert plain(plain(text)) == plain(text)


@given(ALPHABET, ALPHABET)
def test_two_plain_texts_together_are_plain(one, other):
    assert Drawn(plain(one) + plain(other)).made == []


@pytest.mark.parametrize(
    ("text", "not_in_it"),
    [
        ("![x](//example.org/x.png)", ("![", "](")),
        ("[words](javascript:planted)", ("](",)),
        ("[[words|javascript:planted]]", ("[[",)),
        ("see [1]\n[1]: //example.org", ("\n[1]:",)),
    ],
)
def test_markdown_makes_no_link_and_no_picture(text, not_in_it):
    assert [part for part in not_in_it if part in plain(text)] == []
    assert plain(text).replace(WORD_JOINER, "") == text


@pytest.mark.parametrize("letter", ["\x00", "\x1b", "\r", "\x7f", "\x9b", "\u202e", "\u2066", "\u2028", "\ud800"])
def test_what_nobody_sees_is_written_out(letter):
    told = plain(f"a{letter}b")
    assert told == f"a{ascii(letter)[1:-1]}b"
    assert told.isprintable()
    told.encode()


@pytest.mark.parametrize(
    "text",
    [
        "Merged 2 LoRAs, method linear:\n  style.safetensors * 0.8: 177 modules\n\tnone < 3, 4 <= 5, a & b, R&D",
        "Use LCM-LoRA SDXL (https://huggingface.co/latent-consistency/lcm-lora-sdxl, a.safetensors), or [1, 2] (!).",
        "C:\\loras\\ink_[v2].safetensors",
        "größe 犬 🐕 é",
        string.ascii_letters + string.digits,
    ],
)
def test_ordinary_text_is_unchanged(text):
    assert plain(text) == text


@given(st.text(st.sampled_from("#>-+*=_|~:1.) \nab"), max_size=60))
@example("a\n===")
@example("a | b\n--- | ---\nc | d")
@example("1. ink.safetensors\n# paint\n* pastel\n> chalk")
def test_each_line_of_a_report_is_a_line_in_markdown_too(text):
    """By its letters: what stands in a line, `*so*`, is Markdown's to draw."""
    drawn = lines_in_markdown(in_lines(text))
    assert list(map(letters, drawn)) == [letters(line) for line in text.split("\n") if line.strip(" ")]
    assert [line.rstrip(" ") for line in as_read(in_lines(text)).split("\n")] == [
        line.rstrip(" ") for line in text.split("\n")
    ]
    assert in_lines(in_lines(text)) == in_lines(text)


def letters(text):
    return re.sub(r"[^ab1]", "", text)


def test_gaps_are_as_wide_in_markdown():
    text = "Merged:\n    norm 1   norm 2\n  unet     9.375"
    assert list(map(as_read, lines_in_markdown(in_lines(text)))) == text.split("\n")
    assert all(" " * 2 not in line for line in lines_in_markdown(in_lines(text)))
