"""What is learnt of each picture: shape, part, mirror, label."""

import dataclasses
import math

import pytest
import torch
from PIL import Image

from lcm_kit.distillation.settings import Setup
from lcm_kit.launch.data import find_pictures
from lcm_kit.launch.views import View, buckets_of, size_of, views_of

SMALL = Setup(width=64, height=64)


@pytest.fixture
def pictures(tmp_path):
    """Forty, each with one red pixel row at its left end; of many shapes."""
    for number in range(40):
        image = Image.new("RGB", (40 + 12 * number, 200), "blue")
        image.paste("red", (0, 0, 40 + 12 * number, 100))
        image.save(tmp_path / f"{number:02}.png")
    return find_pictures([tmp_path])


def sizes_of(pictures):
    return {picture: size_of(picture) for picture in pictures}


def test_by_default_it_is_the_middle_in_one_size(pictures):
    assert views_of(pictures, {}, SMALL, 5) == [View(picture, 64, 64) for picture in pictures]


@pytest.mark.parametrize("sides", [(64, 64), (512, 512), (1024, 1024), (768, 512), (832, 1216)])
def test_buckets_have_nearly_as_many_pixels_in_whole_steps(sides):
    buckets = buckets_of(*sides)
    assert buckets[0] == sides
    assert len(set(buckets)) == len(buckets) > 5
    for width, height in buckets:
        assert width % 8 == height % 8 == 0
        assert 0.7 * math.prod(sides) <= width * height <= math.prod(sides)
        assert 0.25 <= width / height <= 4
    assert {(height, width) for width, height in buckets if abs(math.log(width / height)) < 0.5} & set(buckets)


def test_each_picture_gets_the_shape_nearest_to_its_own(pictures):
    setup, buckets = dataclasses.replace(SMALL, buckets=True), buckets_of(64, 64)
    views = views_of(pictures, sizes_of(pictures), setup, 5)
    for view in views:
        width, height = size_of(view.picture)
        losses = {sides: abs(math.log(sides[0] / sides[1]) - math.log(width / height)) for sides in buckets}
        assert losses[view.width, view.height] == min(losses.values())
    assert len({(view.width, view.height) for view in views}) > 4


def test_crops_and_flips_are_drawn_evenly_and_again_the_same(pictures):
    setup = dataclasses.replace(SMALL, random_crop=True, flip=0.25, repeats=10)
    views = views_of(pictures, {}, setup, 5)
    assert len(views) == 400
    assert [view.picture for view in views[:10]] == [pictures[0]] * 10
    assert views == views_of(pictures, {}, setup, 5)
    assert views_of(pictures[3:], {}, setup, 5) == views[30:]  # whatever other pictures there are
    assert views_of(pictures, {}, setup, 6) != views
    assert len({(view.across, view.down) for view in views}) == 400
    # 400 draws: errors of 0.022 and 0.014.
    assert sum(view.mirrored for view in views) / 400 == pytest.approx(0.25, abs=0.09)
    assert sum(view.across for view in views) / 400 == pytest.approx(0.5, abs=0.06)


def test_a_view_is_the_part_it_says(tmp_path):
    """Four colours side by side, twice as wide as high: half of it is kept, anywhere."""
    image = Image.new("L", (80, 40))
    for place in range(4):
        image.paste(60 * place, (20 * place, 0, 20 * place + 20, 40))
    image.save(tmp_path / "a.png")
    (picture,) = find_pictures([tmp_path])

    def columns(**more):
        return (View(picture, 40, 40, **more).pixels()[20, ::20, 0] * 255).round().tolist()

    assert columns() == [60, 120]
    assert columns(across=0.0) == [0, 60]
    assert columns(across=1.0) == [120, 180]
    left, mirrored = (View(picture, 40, 40, across=0.0, mirrored=on).pixels() for on in (False, True))
    assert torch.equal(mirrored, left.flip(1))


def test_labels_are_what_sdxl_was_told(tmp_path):
    """Original size, crop from left and above in the scaled picture, size at which it is learnt (Podell 2023, 2.2)."""
    Image.new("L", (2000, 1000)).save(tmp_path / "a.png")
    (picture,) = find_pictures([tmp_path])
    assert View(picture, 1024, 1024, across=0.25).label(size_of(picture)) == {
        "width": 2000, "height": 1000, "crop_w": 256, "crop_h": 0, "target_width": 1024, "target_height": 1024,
    }  # fmt: skip
    small = View(picture, 512, 512).label((100, 300))
    assert (small["width"], small["height"], small["crop_w"], small["crop_h"]) == (100, 300, 0, 512)


def test_sizes_are_those_of_upright_pictures(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (30, 20)).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "b.png").write_bytes(b"no picture")
    turned, broken = find_pictures([tmp_path])
    assert size_of(turned) == (20, 30)
    assert size_of(broken) is None


@pytest.mark.parametrize("name", ["width", "height"])
def test_a_size_that_is_no_whole_latent_is_refused_with_the_next_ones(name):
    with pytest.raises(ValueError, match=f"{name} is 60; it has to be a multiple of 8, use 56 or 64"):
        Setup(**{name: 60})
    with pytest.raises(ValueError, match=r"use 8\."):
        Setup(**{name: 4})


@pytest.mark.parametrize("wrong", [{"flip": 1.5}, {"flip": math.nan}, {"repeats": 0}, {"rank": 0}, {"save_every": 0}])
def test_setups_that_make_no_sense_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is .*it has to be a (finite|whole) number"):
        Setup(**wrong)
