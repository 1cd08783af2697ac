"""A sheet of labelled pictures in rows and columns, filled one after the other."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

PAPER, EMPTY, INK, GREY = (24, 24, 27), (38, 38, 42), (235, 235, 235), (165, 165, 170)
GAP, SIZE, LEAST = 4, 18, 128  # pixels: between cells, of letters, of the smallest cell
LONGEST = 16384  # side of a sheet


class Sheet:
    """rows, columns: labels, "" for none.   cell: (width, height) of a picture on the sheet, in pixels."""

    def __init__(self, rows: Sequence[str], columns: Sequence[str], cell: tuple[int, int]) -> None:
        self.cell, self._font = cell, ImageFont.load_default(SIZE)
        widest = cell[0] + 60
        self.left = max(self._font.getlength(label[:widest]) for label in rows)
        self.left = min(int(self.left) + 2 * GAP + 4, widest) if any(rows) else 0
        self.top = SIZE + 3 * GAP if any(columns) else 0
        size = (self.left + len(columns) * (cell[0] + GAP), self.top + len(rows) * (cell[1] + GAP))
        self.image = Image.new("RGB", size, PAPER)
        self._draw = ImageDraw.Draw(self.image)
        for column, label in enumerate(columns):
            self._text((self._place(0, column)[0] + cell[0] / 2, self.top / 2), label, cell[0], "mm")
        for row, label in enumerate(rows):
            self._text((self.left - 2 * GAP, self._place(row, 0)[1] + cell[1] / 2), label, self.left - 2 * GAP, "rm")
            for column in range(len(columns)):
                x, y = self._place(row, column)
                self._draw.rectangle((x, y, x + cell[0] - 1, y + cell[1] - 1), fill=EMPTY)

    def paste(self, row: int, column: int, picture: Image.Image) -> None:
        """A picture in its place, scaled to the cell."""
        self.image.paste(picture.resize(self.cell, Image.Resampling.LANCZOS), self._place(row, column))

    def note(self, row: int, column: int, words: str) -> None:
        """Words in place of a picture."""
        x, y = self._place(row, column)
        self._text((x + self.cell[0] / 2, y + self.cell[1] / 2), words, self.cell[0] - 2 * GAP, "mm", GREY)

    def small(self, side: int = 1024) -> Image.Image:
        """A copy for previews, no side longer than that."""
        copy = self.image.copy()
        copy.thumbnail((side, side))
        return copy

    def tensor(self) -> torch.Tensor:
        """IMAGE (1, height, width, 3), float32 in 0..1."""
        return torch.from_numpy(np.asarray(self.image).astype(np.float32) / 255)[None]

    def _place(self, row: int, column: int) -> tuple[int, int]:
        return self.left + column * (self.cell[0] + GAP), self.top + row * (self.cell[1] + GAP)

    def _text(self, spot, text: str, width: float, anchor: str, colour=INK) -> None:
        """On one line; a longer text loses its end."""
        self._draw.text(spot, self._cut(text, width), fill=colour, font=self._font, anchor=anchor)

    def _cut(self, text: str, width: float) -> str:
        """As much of it as fits, and what says that there is more."""
        # No more letters than pixels: a label may have millions, and some letters have no width of their own.
        most = max(1, int(width))
        if len(text) <= 1 or (len(text) <= most and self._font.getlength(text) <= width):
            return text

        def cut(length: int) -> str:
            return text[:length].rstrip() + "\u2026"

        lengths = range(1, min(len(text) - 2, most) + 1)
        return cut(bisect_right(lengths, width, key=lambda length: self._font.getlength(cut(length))))


def cell_size(picture: tuple[int, int], longest: int, rows: int, columns: int) -> tuple[int, int]:
    """(width, height) of a cell for pictures of that size.

    longest: side that it has at most. Small pictures are enlarged to LEAST, and a sheet is never longer than LONGEST.
    """
    room = min((LONGEST - 200) // rows, (LONGEST - 200) // columns) - GAP
    side = max(8, min(max(max(picture), LEAST), longest, room))
    scale = side / max(picture)
    return max(1, round(picture[0] * scale)), max(1, round(picture[1] * scale))


def as_picture(image: torch.Tensor) -> Image.Image:
    """An IMAGE's (height, width, channels) as Pillow has it."""
    return Image.fromarray((image[..., :3].float().clamp(0, 1) * 255).round().byte().cpu().numpy())
