"""Draws rows of pictures with captions and labels on one sheet."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GAP = 8
TEXT = 13  # font size in pixels
LINE = 17
INK = (30, 30, 34)
PAPER = (255, 255, 255)


@dataclass(frozen=True)
class Row:
    """pictures: left to right, all of one size.   label: to their left, lines split by newlines.
    captions: one below each picture, or none.   above: one above each picture, or none.
    """

    pictures: Sequence[Image.Image]
    label: str = ""
    captions: Sequence[str] = ()
    above: Sequence[str] = ()


def enlarge(picture: Image.Image, times: int) -> Image.Image:
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.LANCZOS)


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """One picture of several of the same size, with a thin gap between them."""
    step = pictures[0].width + GAP // 4
    joined = Image.new("RGB", (step * len(pictures) - GAP // 4, pictures[0].height), PAPER)
    for i, picture in enumerate(pictures):
        joined.paste(picture, (i * step, 0))
    return joined


def draw(rows: Sequence[Row], title: str = "") -> Image.Image:
    """The sheet, as small as its content allows. Captions are broken to the width of a picture."""
    font = ImageFont.load_default(TEXT)
    label_width = max((int(font.getlength(line)) + GAP for row in rows for line in row.label.split("\n")), default=0)
    if not any(row.label for row in rows):
        label_width = 0
    width = label_width + max(sum(p.width + GAP for p in row.pictures) for row in rows) + GAP
    wrapped = [[_wrap(text, font, row.pictures[0].width) for text in row.captions] for row in rows]
    heights = [
        row.pictures[0].height
        + GAP
        + (LINE if row.above else 0)
        + LINE * max((len(lines) for lines in captions), default=0)
        for row, captions in zip(rows, wrapped, strict=True)
    ]
    top = GAP + (LINE + GAP if title else 0)
    sheet = Image.new("RGB", (width, top + sum(heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), title, INK, font)
    for row, captions, height in zip(rows, wrapped, heights, strict=True):
        first = top + (LINE if row.above else 0)
        size = row.pictures[0].height
        middle = first + (size - LINE * len(row.label.split("\n"))) // 2
        pen.multiline_text((GAP, middle), row.label, INK, font, spacing=LINE - TEXT)
        left = label_width + GAP
        for i, picture in enumerate(row.pictures):
            centre = left + picture.width / 2
            sheet.paste(picture, (left, first))
            if row.above:
                pen.text((centre, top), row.above[i], INK, font, anchor="ma")
            for n, line in enumerate(captions[i] if captions else ()):
                pen.text((centre, first + size + 2 + n * LINE), line, INK, font, anchor="ma")
            left += picture.width + GAP
        top += height
    return sheet


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    for characters in range(len(text), 0, -1):
        lines = textwrap.wrap(text, characters)
        if all(font.getlength(line) <= width for line in lines):
            return lines
    return [text]
