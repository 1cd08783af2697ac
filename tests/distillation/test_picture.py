"""The picture of a training: what is drawn where."""

import math

import numpy as np
import pytest
from PIL import Image

from lcm_kit.host.training.picture import HEIGHT, LABEL, MARGIN, RED, WIDTH, loss_curve, named, row, smooth, stacked
from lcm_kit.lora_merge.comparing.canvas import INK


def height_of_mean(image, across):
    """Where the dark curve is in the columns around `across` of the frame's width, below the words."""
    pixels = np.asarray(image).astype(int)[70 : HEIGHT - 60]
    column = MARGIN + 60 + round(across * (WIDTH - 2 * MARGIN - 70))
    dark = (abs(pixels[:, column - 3 : column + 4] - INK).max(-1) < 12).any(-1)
    return np.flatnonzero(dark).mean()


def test_a_falling_loss_falls_from_left_to_right_on_a_logarithmic_scale():
    image = loss_curve([10.0 ** -(step / 100) for step in range(201)])
    left, middle, right = (height_of_mean(image, across) for across in (0.2, 0.5, 0.8))
    assert right - middle == pytest.approx(middle - left, abs=3)
    assert right - left > 50


@pytest.mark.parametrize("losses", [[], [0.5], [0.0, 0.0], [0.3] * 5, [0.5, math.nan, 0.4], [math.inf]])
def test_the_shortest_flattest_and_broken_runs_are_drawn_too(losses):
    assert loss_curve(losses).size == (WIDTH, HEIGHT)


def test_validation_losses_lie_where_their_steps_are():
    """A falling line of three points on a log scale is straight."""
    image = np.asarray(loss_curve([1.0] * 101, [(1, 10.0), (51, 1.0), (101, 0.1)])).astype(int)
    red = (abs(image - RED).max(-1) < 40)[60 : HEIGHT - 40]
    columns = [MARGIN + 60 + round(across * (WIDTH - 2 * MARGIN - 70)) for across in (0.2, 0.5, 0.8)]
    left, middle, right = (np.flatnonzero(red[:, x]).mean() for x in columns)
    assert right - middle == pytest.approx(middle - left, abs=3)
    assert right - left > 50


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
