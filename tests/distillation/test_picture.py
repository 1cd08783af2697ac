"""The picture of a training: what is drawn where."""

import numpy as np
import pytest
from PIL import Image

from lcm_kit.host.training.picture import (
    HEIGHT,
    INK,
    LABEL,
    MARGIN,
    RED,
    WIDTH,
    loss_curve,
    named,
    row,
    smooth,
    stacked,
)


def dark_rows(image, column):
    """Heights at which the curve is drawn in a column, without the frame."""
    pixels = np.asarray(image)[MARGIN + 1 : HEIGHT - MARGIN, column]
    return MARGIN + 1 + np.flatnonzero((pixels == INK).all(-1))


def test_a_falling_loss_falls_from_left_to_right_on_a_logarithmic_scale():
    image = loss_curve([10.0 ** -(step / 100) for step in range(201)])
    left, middle, right = (dark_rows(image, x).mean() for x in (MARGIN + 20, WIDTH // 2, WIDTH - MARGIN - 20))
    assert left < middle < right
    assert abs(middle - HEIGHT / 2) < 8


@pytest.mark.parametrize("losses", [[], [0.5], [0.0, 0.0], [0.3] * 5])
def test_the_shortest_and_flattest_runs_are_drawn_too(losses):
    assert loss_curve(losses).size == (WIDTH, HEIGHT)


def test_validation_losses_lie_where_their_steps_are():
    image = np.asarray(loss_curve([1.0] * 101, [(1, 10.0), (51, 1.0), (101, 0.1)]))
    red = (image[MARGIN + 1 : HEIGHT - MARGIN] == RED).all(-1)
    heights = [np.flatnonzero(red[:, x]).mean() for x in (MARGIN + 4, WIDTH // 2, WIDTH - MARGIN - 4)]
    assert heights == pytest.approx([0, (HEIGHT - 2 * MARGIN) / 2, HEIGHT - 2 * MARGIN], abs=6)


def test_the_running_mean_of_a_constant_is_that_constant():
    assert smooth([2.0] * 300) == pytest.approx([2.0] * 300)
    assert smooth([1.0, 3.0], share=1.0) == pytest.approx([1.0, (1.0 * 0.5 + 3.0) / 1.5])


def test_a_row_shows_its_images_in_order_over_the_whole_width():
    images = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9))]
    picture = row(images, "samples")
    assert picture.size == (WIDTH, LABEL + WIDTH // 4)
    assert [picture.getpixel((WIDTH // 8 + place * WIDTH // 4, LABEL + 5)) for place in range(4)] == [
        image.getpixel((0, 0)) for image in images
    ]


def test_names_stand_over_their_columns_and_are_cut_where_the_next_begins():
    picture = np.asarray(named(["cat", "", "x" * 500, "\u732b\n"]))
    assert picture.shape == (LABEL, WIDTH, 3)
    side = WIDTH // 4
    inked = [(picture[:, place * side : (place + 1) * side] < 128).any() for place in range(4)]
    assert inked == [True, False, True, True]
    assert (picture[:, 3 * side : 3 * side + 3] > 128).all()


def test_pictures_are_stacked_from_top_to_bottom():
    both = stacked([Image.new("RGB", (4, 2), (1, 1, 1)), Image.new("RGB", (4, 3), (2, 2, 2))])
    assert both.size == (4, 5)
    assert [both.getpixel((0, y))[0] for y in range(5)] == [1, 1, 2, 2, 2]
