"""The picture sets: how a picture becomes one that the models learn from."""

import torch
from PIL import Image

from lcm_kit.demo.train.data import PACKAGES, SIZE, _premultiplied


def test_a_picture_of_the_right_size_keeps_its_pixels():
    picture = Image.new("RGBA", (SIZE, SIZE), (255, 51, 0, 102))
    one = _premultiplied(picture)
    assert one.shape == (4, SIZE, SIZE)
    torch.testing.assert_close(one[:, 7, 9], torch.tensor([0.4, 0.08, 0.0, 0.4]))


def test_a_transparent_pixel_lends_no_colour_to_a_reduced_picture():
    picture = Image.new("RGBA", (4 * SIZE, 4 * SIZE), (255, 0, 0, 0))  # red that nobody sees
    for x in range(0, 4 * SIZE, 2):
        picture.paste((0, 0, 255, 255), (x, 0, x + 1, 4 * SIZE))  # every other column is opaque blue
    reduced = _premultiplied(picture)
    assert reduced.shape == (4, SIZE, SIZE)
    expected = torch.tensor([0.0, 0.0, 0.5, 0.5])[:, None, None].expand(4, SIZE, SIZE)
    torch.testing.assert_close(reduced, expected)


def test_every_set_is_fetched_at_one_version():
    assert all(package.rsplit("@", 1)[1].replace(".", "").isdigit() for package in PACKAGES.values())
