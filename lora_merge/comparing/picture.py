"""A comparison as one picture: where each LoRA is strong, what a cut costs, and how the sum grows with a strength."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from PIL import Image

from .canvas import GREY, INK, PALE, PAPER, Axes, Canvas, Colour
from .comparison import Comparison, Group
from .report import find
from .verdict import headline

WIDTH = 1024
# Okabe and Ito's palette, told apart with any colour vision.
_COLOURS: tuple[Colour, ...] = (
    (213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233)
)  # fmt: skip
_STRONG, _WITH, _AGAINST = (0, 90, 150), (0, 135, 100), (200, 50, 20)
_TOP, _MAP, _CHART = 88, 470, 300
_LEAST_ROW, _MOST_ROW = 24, 42
_SMALL_ROW = 15  # where there are more than _FEW_ROWS; every block of the deepest models has one of its own
_FEW_ROWS, _MOST_ROWS = 30, 64
_NAME = (110, 178)  # width of the column of names, at least and at most
_NAMED = 2
_LEAST_SHARE = 1e-4  # the spectrum's axis ends there


def draw(comparison: Comparison, rank: int = 0, *, swept: int = 0) -> Image.Image:
    """RGB, WIDTH pixels wide, its height follows the number of blocks.

    rank: of a cut, marked in the spectrum; 0 for none.   swept: number from 0 of the input whose strength is varied.
    """
    rows = _rows(comparison)
    # Room for two charts on the right; few blocks share that height, many take more.
    least = _LEAST_ROW if len(rows) <= _FEW_ROWS else _SMALL_ROW
    each = min(_MOST_ROW, max(least, (2 * _CHART - 94) // max(len(rows), 1)))
    height = _TOP + max(2 * _CHART + 16, 46 + each * len(rows) + 64) + 12
    canvas = Canvas(WIDTH, height)
    _title(canvas, comparison)
    if not rows:
        canvas.text((16, _TOP), "No module can be compared.", 15)
        return canvas.image()
    _heat_map(canvas, comparison, rows, each)
    left, right = _MAP + 40, WIDTH - 12
    _spectrum(canvas, comparison, (left, _TOP, right, _TOP + _CHART), rank)
    _sweep(canvas, comparison, (left, _TOP + _CHART + 16, right, _TOP + 2 * _CHART + 16), swept)
    return canvas.image()


def _title(canvas: Canvas, c: Comparison) -> None:
    """Up to two by name; more by numbers, which are explained here."""
    told = [f"{one.strength:g} x {label}" for one, label in zip(c.inputs, c.labels, strict=True)]
    if len(told) <= _NAMED:
        canvas.text((16, 14), " + ".join(told), 20, width=WIDTH - 32)
        canvas.text((16, 44), headline(c), 15, GREY, width=WIDTH - 32)
        return
    canvas.text((16, 12), headline(c), 18, width=WIDTH - 32)
    wide = (WIDTH - 32) / 3
    for index, text in enumerate(told):
        place = (16 + index % 3 * wide, 40 + index // 3 * 19)
        canvas.text(place, f"{index + 1}: {text}", 13, _COLOURS[index % 6], width=wide - 16)


def _keys(c: Comparison) -> tuple[str, ...]:
    """What the charts call the inputs."""
    return c.labels if len(c.inputs) <= _NAMED else tuple(str(n) for n in range(1, len(c.inputs) + 1))


@dataclass(frozen=True)
class _Row:
    """norms: of each input.   cosine: the largest in size of any two, None where no two meet."""

    name: str
    norms: tuple[float, ...]
    cosine: float | None


def _rows(c: Comparison) -> list[_Row]:
    """The blocks; neighbours of one part of the model share a row where there are too many."""
    every = [[block] for block in c.blocks]
    while len(every) > _MOST_ROWS:
        paired = []
        index = 0
        while index < len(every):
            pair = every[index : index + 2]
            together = len(pair) == 2 and _part(pair[0][0]) == _part(pair[1][0])
            paired.append([*pair[0], *pair[1]] if together else pair[0])
            index += 2 if together else 1
        if len(paired) == len(every):
            break
        every = paired
    rows = [_row(c, blocks) for blocks in every]
    # The rest is the name that block strengths are given by.
    only_unet = all(row.name.startswith("unet ") for row in rows)
    return [replace(row, name=row.name.removeprefix("unet ")) for row in rows] if only_unet else rows


def _part(block: Group) -> str:
    return block.name.split(".")[0]


def _row(c: Comparison, blocks: list[Group]) -> _Row:
    norms = tuple(math.hypot(*(c.norm(index, block) for block in blocks)) for index in range(len(c.inputs)))
    cosines = []
    for whole in c.whole.pairs:
        i, j = whole.which
        dot = sum(pair.dot for block in blocks if (pair := find(block, whole.which)))
        size = math.prod(math.sqrt(sum(block.energies[index] for block in blocks)) for index in (i, j))
        if size > 0 and c.inputs[i].strength and c.inputs[j].strength:
            cosines.append(dot / size)
    last = "" if len(blocks) == 1 else f"-{blocks[-1].name.rpartition('.')[2]}"
    return _Row(blocks[0].name + last, norms, max(cosines, key=abs) if cosines else None)


def _heat_map(canvas: Canvas, c: Comparison, rows: list[_Row], each: int) -> None:
    columns = len(c.inputs) + (len(c.inputs) > 1)
    left, top, size = 16.0, float(_TOP), 12 if each > _SMALL_ROW else 11
    longest = max(canvas.length(row.name, size) for row in rows)
    names = min(max(longest + 14, _NAME[0]), _NAME[1])
    wide = (_MAP - names) / columns
    canvas.text((left, top), "Norm in each block, with alpha and strength", 15)
    heads = [*_keys(c), "cosine"][:columns]
    for index, label in enumerate(heads):
        middle = left + names + (index + 0.5) * wide
        canvas.text((middle, top + 40), label, 12, (*_COLOURS, GREY)[min(index, 6)] if index < len(c.inputs) else GREY,
                    anchor="md", width=wide - 6)  # fmt: skip
    largest = max(max(row.norms) for row in rows) or 1.0
    for number, row in enumerate(rows):
        y = top + 46 + number * each
        canvas.text((left + names - 8, y + each / 2), row.name, size, anchor="rm", width=names - 12)
        for index in range(columns):
            x = left + names + index * wide
            if index < len(c.inputs):
                value, colour = f"{row.norms[index]:.3g}", _mix(_STRONG, row.norms[index] / largest)
                absent = row.norms[index] == 0
            else:
                cosine = row.cosine or 0.0
                value, colour = (
                    f"{cosine:+.2f}" if abs(cosine) >= 0.005 else "0",
                    _mix(_WITH if cosine > 0 else _AGAINST, min(1.0, 2 * abs(cosine))),
                )
                absent = row.cosine is None
            canvas.rectangle((x, y, x + wide - 2, y + each - 2), fill=PAPER if absent else colour, outline=PALE)
            shown, ink = ("-", GREY) if absent else (value, _readable(colour))
            canvas.text((x + wide / 2 - 1, y + each / 2 - 1), shown, size, ink, anchor="mm")
    y = top + 46 + len(rows) * each + 8
    if len(c.inputs) > 1:
        of = "" if len(c.inputs) == 2 else ", the largest of any two"
        canvas.text((left, y), f"cosine{of}: 0 independent, +1 the same, -1 cancels", 12, GREY, width=_MAP)
        canvas.text((left, y + 18), f"norm of the sum: {c.growth():.3f} times that of independent LoRAs", 12, GREY)


def _spectrum(canvas: Canvas, c: Comparison, box: tuple[float, float, float, float], rank: int) -> None:
    axes = Axes(
        canvas, box, (0, max(c.full_rank, 1)), (_LEAST_SHARE, 1.0), log=True, tell=lambda share: f"{100 * share:g} %",
        title="Spectrum: what a cut of the sum takes away", across="rank that is left in each module",
        up="energy lost",
    )  # fmt: skip
    _legend(canvas, c, axes)
    for index, curve in enumerate(c.kept[1:]):
        axes.curve(_lost(curve), _COLOURS[index % 6])
    if len(c.inputs) > 1:
        axes.curve(_lost(c.kept[0]), INK, 2.5)
    if 0 < rank < c.full_rank:
        axes.mark(rank, f"rank {rank}")


def _lost(curve: tuple[float, ...]) -> list[tuple[float, float]]:
    whole = curve[-1]
    return [(rank, 1.0 - kept / whole) for rank, kept in enumerate(curve)] if whole > 0 else []


def _sweep(canvas: Canvas, c: Comparison, box: tuple[float, float, float, float], swept: int) -> None:
    now = c.inputs[swept].strength
    low, high = min(0.0, 1.25 * now), max(1.5, 1.25 * now)
    steps = [low + (high - low) * n / 60 for n in range(61)]
    unit = math.sqrt(max(0.0, c.products[swept][swept]))
    others = c.norm_at(swept, 0.0)
    sums = [(s, c.norm_at(swept, s)) for s in steps]
    top = max([*(value for _, value in sums), *(math.hypot(s * unit, others) for s in steps)]) or 1.0
    keys = _keys(c)
    label = keys[swept]
    axes = Axes(
        canvas, box, (low, high), (0.0, 1.08 * top), title=f"Sweep: how the sum grows with {_short(label)}" if len(c.inputs) <= _NAMED else f"Sweep: how the sum grows with LoRA {label}",
        across=f"strength of {_short(label)}" if len(c.inputs) <= _NAMED else f"strength of LoRA {label}", up="norm",
    )  # fmt: skip
    entries = [(_short(label), _COLOURS[swept % 6], False)]
    axes.curve([(s, abs(s) * unit) for s in steps], _COLOURS[swept % 6])
    if len(c.inputs) > 1:
        one = 1 - swept if len(c.inputs) == 2 else None
        colour = GREY if one is None else _COLOURS[one]
        axes.curve([(low, others), (high, others)], colour)
        axes.curve([(s, math.hypot(s * unit, others)) for s in steps], GREY, 1.5, dashed=True)
        entries += [("the others" if one is None else _short(keys[one]), colour, False), ("if independent", GREY, True)]
        axes.curve(sums, INK, 2.5)
        entries.insert(0, ("sum", INK, False))
    axes.mark(now, f"now {now:g}")
    _entries(canvas, axes, entries)


def _legend(canvas: Canvas, c: Comparison, axes: Axes) -> None:
    own = [(_short(key), _COLOURS[index % 6], False) for index, key in enumerate(_keys(c))]
    _entries(canvas, axes, [("sum", INK, False), *own] if len(own) > 1 else own)


def _entries(canvas: Canvas, axes: Axes, entries: list[tuple[str, Colour, bool]]) -> None:
    """Right-hand, above the chart's frame: colours and whose they are."""
    wanted = [36 + canvas.length(label, 12) for label, _, _ in entries]
    room = axes.box[2] - axes.box[0]
    longest = next((most for most in range(400, 30, -4) if sum(min(one, most) for one in wanted) <= room), 30)
    x, y = axes.box[2] - sum(min(one, longest) for one in wanted) + 14, axes.box[1] - 14
    for (label, colour, dashed), one in zip(entries, wanted, strict=True):
        canvas.line([(x, y), (x + 16, y)], colour, 2.5, dashed)
        canvas.text((x + 20, y), label, 12, INK, anchor="lm", width=min(one, longest) - 34)
        x += min(one, longest)


def _short(label: str) -> str:
    return label if len(label) <= 24 else f"{label[:11]}...{label[-10:]}"


def _mix(colour: Colour, share: float) -> Colour:
    red, green, blue = (round(255 + share * (value - 255)) for value in colour)
    return red, green, blue


def _readable(background: Colour) -> Colour:
    red, green, blue = background
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else PAPER
