"""Where lines and axes lie on a sheet, by hand."""

import math
from itertools import pairwise

import pytest

from lcm_kit.lora_merge.comparing.canvas import GREY, INK, PALE, Axes, Canvas, _dashes, _round

BLACK = (0, 0, 0)


def ink(canvas, box=None, below=128):
    """(left, top, right, bottom) of what is darker than that, in pixels of the finished image."""
    image = canvas.image().convert("L")
    image = image.crop(box) if box else image
    return image.point(lambda value: 255 * (value < below)).getbbox()


def axes(x=(0.0, 10.0), y=(0.0, 100.0), **options):
    """A frame from 52 to 292 and from 44 to 160."""
    canvas = Canvas(300, 200)
    return canvas, Axes(canvas, (0, 0, 300, 200), x, y, title="", across="", up="", **options)


def test_a_rectangle_is_filled_and_outlined():
    canvas = Canvas(40, 30)
    canvas.rectangle((10, 5, 30, 20), fill=(255, 0, 0), outline=BLACK)
    image = canvas.image()
    assert image.getpixel((20, 12)) == (255, 0, 0)
    assert max(image.getpixel((20, 5))) < 90
    assert image.getpixel((5, 12)) == image.getpixel((35, 12)) == image.getpixel((20, 25)) == (255, 255, 255)
    assert ink(canvas) == (10, 5, 31, 21)
    empty = Canvas(40, 30)
    empty.rectangle((10, 5, 30, 20), outline=BLACK)
    assert empty.image().getpixel((20, 12)) == (255, 255, 255)


@pytest.mark.parametrize("width", [1.0, 2.0, 6.0])
def test_a_line_is_as_wide_as_asked_for(width):
    canvas = Canvas(60, 40)
    canvas.line([(10, 20), (50, 20)], BLACK, width)
    left, top, right, bottom = ink(canvas, below=200)
    assert abs((bottom - top) - width) <= 1
    assert abs((top + bottom) / 2 - 20) <= 1
    assert abs(left - 10) <= 1
    assert abs(right - 50) <= 1
    once = Canvas(60, 40)
    once.line([(10, 20)], BLACK)
    assert ink(once) is None


def drawn(draw):
    canvas = Canvas(120, 40)
    draw(canvas)
    return canvas.image().tobytes()


def test_a_line_is_thin_and_whole_and_a_text_of_thirteen_unless_told():
    points = [(5, 5), (60, 30), (110, 5)]
    assert drawn(lambda one: one.line(points, BLACK)) == drawn(lambda one: one.line(points, BLACK, 1.0, False))
    assert drawn(lambda one: one.text((5, 5), "Abc")) == drawn(lambda one: one.text((5, 5), "Abc", 13, INK))


def test_a_thick_line_has_no_notch_where_it_bends():
    canvas = Canvas(80, 80)
    canvas.line([(10, 50), (50, 50), (50, 10)], BLACK, 16)
    assert max(canvas.image().getpixel((54, 54))) < 60


def test_a_text_takes_the_pixels_it_says():
    canvas = Canvas(300, 40)
    canvas.text((10, 5), "HHHHHHHH", 20, BLACK)
    left, _, right, _ = ink(canvas)
    assert abs((right - left) - Canvas.length("HHHHHHHH", 20)) <= 4
    assert Canvas.length("HHHHHHHH", 20) == pytest.approx(2 * Canvas.length("HHHH", 20), rel=0.02)
    assert Canvas.length("HHHH", 20) == pytest.approx(2 * Canvas.length("HHHH", 10), rel=0.05)


@pytest.mark.parametrize("width", [30, 60, 100])
def test_a_text_keeps_as_much_of_both_of_its_ends_as_fits(width):
    canvas = Canvas(300, 40)
    canvas.text((10, 5), "I" * 20 + "H" * 20, 20, BLACK, width=width)
    _, _, right, _ = ink(canvas)
    # One letter more would not have fitted: an H is the widest here.
    assert 10 + width - Canvas.length("HI", 20) - 3 <= right <= 10 + width + 1


def test_a_text_that_fits_is_left_alone():
    short, plain = Canvas(300, 40), Canvas(300, 40)
    plain.text((10, 5), "some text", 20)
    short.text((10, 5), "some text", 20, width=Canvas.length("some text", 20))
    assert short.image().tobytes() == plain.image().tobytes()


def test_one_letter_of_each_end_is_kept_where_nothing_fits():
    assert drawn(lambda one: one.text((5, 5), "abcdefgh", width=0)) == drawn(lambda one: one.text((5, 5), "a...h"))


def test_a_text_covers_what_it_stands_on_if_asked_to():
    """White behind black letters on black: a white box as wide as the text; without it nothing is seen."""
    seen = []
    for behind in (None, (255, 255, 255)):
        canvas = Canvas(300, 40)
        canvas.rectangle((0, 0, 300, 40), fill=BLACK)
        canvas.text((50, 10), "H" * 8, 20, BLACK, behind=behind)
        seen.append(canvas.image().convert("L").point(lambda value: 255 * (value > 128)).getbbox())
    assert seen[0] is None
    left, top, right, bottom = seen[1]
    assert abs(left - 50) <= 3
    assert abs((right - left) - Canvas.length("H" * 8, 20)) <= 6
    assert 10 <= top < bottom <= 40


def test_dashes_are_every_second_six_pixels():
    pieces = _dashes([(0.0, 0.0), (30.0, 0.0)])
    assert [(piece[0][0], piece[-1][0]) for piece in pieces] == [(0, 6), (12, 18), (24, 30)]
    assert all(y == 0 for piece in pieces for _, y in piece)


def test_dashes_go_on_round_a_bend():
    """The place along the line decides, not the stretch."""
    pieces = _dashes([(0.0, 0.0), (3.0, 0.0), (3.0, 40.0), (3.0, 41.0)])
    along = [[x + y for x, y in piece] for piece in pieces]
    assert [(round(one[0], 6), round(one[-1], 6)) for one in along] == [(0, 6), (12, 18), (24, 30), (36, 42)]
    assert sum(math.dist(a, b) for piece in pieces for a, b in pairwise(piece)) == pytest.approx(24)


def test_dashes_of_a_slanted_line_are_as_long():
    pieces = _dashes([(0.0, 0.0), (18.0, 24.0)])
    lengths = [math.dist(piece[0], piece[-1]) for piece in pieces]
    assert lengths == pytest.approx([6, 6, 6])
    assert pieces[1][0] == pytest.approx((12 * 0.6, 12 * 0.8))
    assert _dashes([(1.0, 1.0), (1.0, 1.0)]) == [[(1.0, 1.0), (1.0, 1.0)]]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 6, [0, 1, 2, 3, 4, 5, 6]),
        (0, 7, [0, 2, 4, 6]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (0.1, 0.3, [0.1, 0.15, 0.2, 0.25, 0.3]),
        (3, 47, [10, 20, 30, 40]),
        (5, 3, [5]),
    ],
)
def test_ticks_are_round_and_about_five(low, high, ticks):
    assert _round(low, high) == pytest.approx(ticks)


def test_places_in_the_frame_are_shares_of_it():
    _, one = axes()
    assert one.box == (52, 44, 292, 160)
    assert [one._along(x) for x in (0, 5, 10)] == [52, 172, 292]
    assert [one._up(y) for y in (0, 25, 100)] == [160, 131, 44]
    assert [one._up(y) for y in (-5, 200)] == [160, 44]
    _, point = axes(x=(3.0, 3.0), y=(2.0, 2.0))
    assert (point._along(3.0), point._up(2.0)) == (52, 160)
    assert (point._along(3.5), point._up(2.5)) == (172, 102)  # as if it were 1 wide


def test_decades_are_evenly_spaced():
    _, one = axes(y=(1.0, 1000.0), log=True)
    assert [one._up(y) for y in (0.0, 1.0, 10.0, 100.0, 1000.0)] == pytest.approx([160, 160, 364 / 3, 248 / 3, 44])
    _, low = axes(y=(0.01, 1.0), log=True)
    assert [low._up(y) for y in (0.0, 0.01, 0.1, 1.0)] == pytest.approx([160, 160, 102, 44])


@pytest.mark.parametrize(
    ("y", "log", "told"), [((0.0, 100.0), False, [0, 20, 40, 60, 80, 100]), ((0.01, 10.0), True, [0.01, 0.1, 1, 10])]
)
def test_every_tick_is_told_and_has_its_line(y, log, told):
    values = []
    canvas, one = axes(y=y, log=log, tell=lambda value: values.append(value) or "")
    assert values == pytest.approx(told)
    for value in told:
        assert canvas.image().getpixel((100, min(159, round(one._up(value)))))[0] < 250


def test_a_curve_goes_through_its_points():
    canvas, one = axes()
    one.curve([(0, 0), (10, 100)], BLACK, 4)
    image = canvas.image().convert("L")
    assert [image.getpixel(place) < 60 for place in ((172, 102), (232, 73), (112, 131))] == [True] * 3
    assert image.getpixel((172, 80)) > 200


def test_on_decades_a_curve_leaves_out_what_is_below_them():
    canvas, one = axes(y=(1.0, 100.0), log=True)
    one.curve([(0, 0.5), (5, 1.0), (10, 100.0)], (255, 0, 0), 4)
    red = canvas.image().getchannel("G").point(lambda value: 255 * (value < 60)).getbbox()
    assert abs(red[0] - 172) <= 3
    assert abs(red[2] - 292) <= 3
    plain, other = axes(y=(-10.0, 100.0))
    other.curve([(0, -5), (10, 100)], (255, 0, 0), 4)
    assert plain.image().getchannel("G").point(lambda value: 255 * (value < 60)).getbbox()[0] <= 55


@pytest.mark.parametrize(
    ("x", "column", "right"), [(2.0, 100, True), (6.0, 196, True), (6.5, 208, False), (9.0, 268, False)]
)
def test_a_mark_is_an_upright_dashed_line_with_its_name_on_the_side_that_has_room(x, column, right):
    """90 pixels from the frame's end, at 202, the name changes sides."""
    canvas, one = axes()
    before = canvas.image().convert("L")
    one.mark(x, "LCM", (200, 0, 0))
    image = canvas.image().getchannel("G")
    dark = [image.getpixel((column, row)) < 150 for row in range(46, 159)]
    assert 40 < sum(dark) < 75  # every second stretch
    assert before.getpixel((column, 50)) > 200
    name = image.crop((53, 46, 291, 60)).point(lambda value: 255 * (value < 128)).getbbox()
    assert (name[2] + 53 > column + 5) == right
    assert (name[0] + 53 < column - 5) == (not right)
    # With room between the two.
    gap = image.crop((column + 2, 46, column + 5, 60) if right else (column - 4, 46, column - 1, 60))
    assert gap.getextrema()[0] > 200


class Noted(Canvas):
    """A sheet that notes what is drawn on it, beside drawing it."""

    def __init__(self, width, height):
        super().__init__(width, height)
        self.lines, self.texts = [], []

    def line(self, points, colour, width=1.0, dashed=False):
        self.lines.append((list(points), colour, width, dashed))
        super().line(points, colour, width, dashed)

    def text(self, place, text, size=13, colour=INK, **options):
        self.texts.append((text, place, size, colour, options))
        super().text(place, text, size, colour, **options)


def test_a_frame_is_drawn_line_by_line():
    """Box from (10, 20) to (310, 220): 52 on the left for the ticks, 44 above for two titles, 40 below, 8 on the right."""
    canvas = Noted(330, 240)
    one = Axes(canvas, (10, 20, 310, 220), (1.0, 3.0), (0.0, 2.0), title="T", across="A", up="U", tell="{:.1f}".format)
    assert one.box == (62, 64, 302, 180)
    assert canvas.texts[:3] == [
        ("T", (10, 20), 15, INK, {}),
        ("U", (10, 42), 12, GREY, {}),
        ("A", (182, 217), 12, GREY, {"anchor": "md"}),
    ]
    ticks, steps = [0, 0.5, 1, 1.5, 2], [1, 1.5, 2, 2.5, 3]
    assert canvas.texts[3:8] == [
        (f"{tick:.1f}", (56, pytest.approx(180 - 58 * tick)), 12, GREY, {"anchor": "rm"}) for tick in ticks
    ]
    assert canvas.texts[8:] == [
        (f"{step:g}", (pytest.approx(62 + 120 * (step - 1)), 187), 12, GREY, {"anchor": "ma"}) for step in steps
    ]
    across = [([(62, 180 - 58 * tick), (302, 180 - 58 * tick)], PALE, 1.0, False) for tick in ticks]
    upright = [([(62 + 120 * (step - 1), 180), (62 + 120 * (step - 1), 184)], GREY, 1.0, False) for step in steps]
    frame = [([(62, 64), (62, 180), (302, 180)], GREY, 1.0, False)]
    for found, wanted in zip(canvas.lines, across + upright + frame, strict=True):
        assert [number for place in found[0] for number in place] == pytest.approx(
            [number for place in wanted[0] for number in place]
        )
        assert found[1:] == wanted[1:]


def test_a_curve_and_a_mark_are_drawn_where_their_numbers_are():
    canvas = Noted(330, 240)
    one = Axes(canvas, (10, 20, 310, 220), (0.0, 10.0), (1.0, 100.0), title="", across="", up="", log=True)
    canvas.lines.clear()
    canvas.texts.clear()
    one.curve([(0, 0.99), (0, 1), (5, 10), (10, 100)], BLACK)
    one.curve([(5, 10)], GREY, 3.0, dashed=True)
    assert canvas.lines == [([(62, 180), (182, 122), (302, 64)], BLACK, 2.0, False), ([(182, 122)], GREY, 3.0, True)]
    canvas.lines.clear()
    for x, anchor, gap in ((6.2, "la", 5), (6.25, "la", 5), (6.3, "ra", -5)):
        one.mark(x, "M", BLACK)
        along = 62 + 24 * x
        assert canvas.lines.pop() == ([(pytest.approx(along), 64), (pytest.approx(along), 180)], BLACK, 1.2, True)
        text, (left, top), *rest = canvas.texts.pop()
        assert (text, top, rest) == ("M", 65, [12, BLACK, {"anchor": anchor, "behind": (255, 255, 255)}])
        assert left == pytest.approx(along + gap)
    one.mark(1.0, "grey")
    assert canvas.texts.pop()[3] == GREY
    flat = Axes(canvas, (10, 20, 310, 220), (0.0, 10.0), (-1.0, 1.0), title="", across="", up="")
    canvas.lines.clear()
    flat.curve([(0, -2), (5, -1), (10, 0)], BLACK)  # nothing is below what is no decade
    assert canvas.lines == [([(62, 180), (182, 180), (302, 122)], BLACK, 2.0, False)]
