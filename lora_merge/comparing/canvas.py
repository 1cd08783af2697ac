"""A sheet to draw on with Pillow: smooth lines, text that fits, and axes with round numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
INK, GREY, PALE, PAPER = (35, 35, 40), (115, 115, 120), (222, 222, 226), (255, 255, 255)
_FINE = 2  # drawn larger and scaled down, which smooths lines and letters
_DASH = 6


class Canvas:
    """Coordinates and sizes in pixels of the finished image, y downwards."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self._image = Image.new("RGB", (width * _FINE, height * _FINE), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def image(self) -> Image.Image:
        return self._image.resize(self.size, Image.Resampling.LANCZOS)

    def rectangle(self, box: Box, fill: Colour | None = None, outline: Colour | None = None) -> None:
        self._draw.rectangle([value * _FINE for value in box], fill=fill, outline=outline, width=_FINE)

    def line(
        self, points: Sequence[tuple[float, float]], colour: Colour, width: float = 1.0, dashed: bool = False
    ) -> None:
        for piece in _dashes(points) if dashed else [points]:
            if piece:
                scaled = [(x * _FINE, y * _FINE) for x, y in piece]
                self._draw.line(scaled, fill=colour, width=round(width * _FINE), joint="curve")

    def text(
        self, place: tuple[float, float], text: str, size: float = 13, colour: Colour = INK, *, anchor: str = "la",
        width: float = math.inf, behind: Colour | None = None,
    ) -> None:  # fmt: skip
        """anchor: as Pillow has it.   width: pixels it may take; a longer text loses its middle.   behind: what it stands on."""
        font = ImageFont.load_default(size * _FINE)
        fitting, kept = text, len(text)
        while kept > 2 and font.getlength(fitting) > width * _FINE:
            kept -= 1
            fitting = f"{text[: kept - kept // 2]}...{text[len(text) - kept // 2 :]}"
        spot = (place[0] * _FINE, place[1] * _FINE)
        if behind is not None:
            self._draw.rectangle(self._draw.textbbox(spot, fitting, font=font, anchor=anchor), fill=behind)
        self._draw.text(spot, fitting, fill=colour, font=font, anchor=anchor)

    @staticmethod
    def length(text: str, size: float) -> float:
        """Pixels that a text takes."""
        return ImageFont.load_default(size * _FINE).getlength(text) / _FINE


class Axes:
    """A chart's frame with both axes. x, y: (smallest, largest).   log: y in decades; values below them are left out."""

    def __init__(
        self, canvas: Canvas, box: Box, x: tuple[float, float], y: tuple[float, float], *, title: str, across: str,
        up: str, log: bool = False, tell: Callable[[float], str] = "{:g}".format,
    ) -> None:  # fmt: skip
        self.canvas, self.log = canvas, log
        left, top, right, bottom = box
        self.box = (left + 52, top + 44, right - 8, bottom - 40)
        self.x, self.y = x, y
        canvas.text((left, top), title, 15)
        canvas.text((left, top + 22), up, 12, GREY)
        canvas.text(((self.box[0] + self.box[2]) / 2, bottom - 3), across, 12, GREY, anchor="md")
        ticks = [10.0**n for n in range(round(math.log10(y[0])), round(math.log10(y[1])) + 1)] if log else _round(*y)
        for value in ticks:
            height = self._up(value)
            canvas.line([(self.box[0], height), (self.box[2], height)], PALE)
            canvas.text((self.box[0] - 6, height), tell(value), 12, GREY, anchor="rm")
        for value in _round(*x):
            along = self._along(value)
            canvas.line([(along, self.box[3]), (along, self.box[3] + 4)], GREY)
            canvas.text((along, self.box[3] + 7), f"{value:g}", 12, GREY, anchor="ma")
        canvas.line([(self.box[0], self.box[1]), (self.box[0], self.box[3]), (self.box[2], self.box[3])], GREY)

    def curve(
        self, points: Sequence[tuple[float, float]], colour: Colour, width: float = 2.0, dashed: bool = False
    ) -> None:
        inside = [(x, y) for x, y in points if not self.log or y >= self.y[0]]
        self.canvas.line([(self._along(x), self._up(y)) for x, y in inside], colour, width, dashed)

    def mark(self, x: float, text: str, colour: Colour = GREY) -> None:
        """A dashed upright line with its name beside it."""
        along = self._along(x)
        self.canvas.line([(along, self.box[1]), (along, self.box[3])], colour, 1.2, dashed=True)
        near_end = along > self.box[2] - 90
        anchor, gap = ("ra", -5) if near_end else ("la", 5)
        self.canvas.text((along + gap, self.box[1] + 1), text, 12, colour, anchor=anchor, behind=PAPER)

    def _along(self, x: float) -> float:
        return self.box[0] + (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0) * (self.box[2] - self.box[0])

    def _up(self, y: float) -> float:
        low, high = self.y
        if self.log:
            low, high, y = math.log10(low), math.log10(high), math.log10(max(y, 1e-300))
        share = (y - low) / ((high - low) or 1.0)
        return self.box[3] - min(1.0, max(0.0, share)) * (self.box[3] - self.box[1])


def _dashes(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Every second stretch of a line that bends, each _DASH pixels long."""
    pieces: list[list[tuple[float, float]]] = []
    walked = 0.0
    for start, end in pairwise(points):
        length = math.dist(start, end)
        steps = max(1, math.ceil(length))
        for n in range(steps):
            a, b = (tuple(s + t / steps * (e - s) for s, e in zip(start, end, strict=True)) for t in (n, n + 1))
            dash = int((walked + n * length / steps) / _DASH)
            if dash % 2 == 0:
                while len(pieces) <= dash // 2:
                    pieces.append([])
                pieces[dash // 2] += [(a[0], a[1]), (b[0], b[1])]
        walked += length
    return pieces


def _round(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]
