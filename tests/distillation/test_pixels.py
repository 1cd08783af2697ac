"""Pictures of every mode, depth and orientation as numbers from 0 to 1, against arithmetic on the values written."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lcm_kit.launch import pixels as launch_pixels
from lcm_kit.launch.data import find_pictures
from lcm_kit.launch.pixels import pixels

SIDE = 16
RAMP = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)
BYTES = np.random.default_rng(3).integers(0, 256, (4, SIDE, SIDE)).astype(np.uint8)
UNIT = BYTES / 255


def grey(values):
    return np.repeat(values[..., None], 3, -1)


def over_white(colour, alpha):
    return colour * alpha[..., None] + 1 - alpha[..., None]


def rgb(channels):
    return np.stack(list(channels), -1)


def jfif(y, cb, cr):
    """ITU-T T.871, section 7."""
    red, blue = y + 1.402 * (cr - 128), y + 1.772 * (cb - 128)
    green = y - 0.344136286 * (cb - 128) - 0.714136286 * (cr - 128)
    return rgb([red, green, blue]).clip(0, 255) / 255


def palette_image(transparent=None):
    colours = np.random.default_rng(4).integers(0, 256, (256, 3)).astype(np.uint8)
    image = Image.new("P", (SIDE, SIDE))
    image.putdata((BYTES[0] % 7).flatten().tolist())
    image.putpalette(colours.flatten().tolist())
    if transparent is not None:
        image.info["transparency"] = transparent
    return image, colours


def sixteen(image_format, big=False):
    values = (RAMP * 65535).round()
    image = Image.fromarray(values.astype(">u2" if big else "<u2"))
    return image, image_format, grey(values / 65535)


def cases():
    palette, colours = palette_image()
    clear, _ = palette_image(3)
    looked_up = colours[BYTES[0] % 7] / 255
    return {
        "1": (Image.fromarray(BYTES[0] > 127), "png", grey((BYTES[0] > 127).astype(float)), 0),
        "L": (Image.fromarray(BYTES[0]), "png", grey(UNIT[0]), 0),
        "LA": (Image.merge("LA", [*map(Image.fromarray, BYTES[:2])]), "png", over_white(grey(UNIT[0]), UNIT[1]), 1),
        "P": (palette, "png", looked_up, 0),
        "P with a clear colour": (clear, "png", np.where((BYTES[0] % 7 == 3)[..., None], 1, looked_up), 0),
        "RGB": (Image.fromarray(rgb(BYTES[:3])), "png", rgb(UNIT[:3]), 0),
        "RGBA": (Image.fromarray(rgb(BYTES)), "png", over_white(rgb(UNIT[:3]), UNIT[3]), 1),
        "CMYK": (
            Image.merge("CMYK", [*map(Image.fromarray, BYTES)]), "tiff", (1 - rgb(UNIT[:3])) * (1 - UNIT[3][..., None]), 1,
        ),
        "YCbCr": (Image.merge("YCbCr", [*map(Image.fromarray, BYTES[:3])]), "tiff", jfif(*BYTES[:3].astype(float)), 2),
        "I;16 in a PNG": (*sixteen("png"), 0.01),
        "I;16 in a TIFF": (*sixteen("tiff"), 0.01),
        "I;16B in a TIFF": (*sixteen("tiff", big=True), 0.01),
        "I": (Image.fromarray((RAMP * 65535).round().astype(np.int32)), "tiff", grey((RAMP * 65535).round() / 65535), 0.01),
        "F": (Image.fromarray(RAMP.astype(np.float32)), "tiff", grey(RAMP), 0.01),
    }  # fmt: skip


def written(folder, image, image_format, **options):
    image.save(folder / f"a.{image_format}", **options)
    (picture,) = find_pictures([folder])
    return picture


@pytest.mark.parametrize("mode", cases())
def test_every_mode_has_the_values_that_were_written(mode, tmp_path):
    """Tolerance in steps of 8 bits: PIL rounds what it converts, once for a blend, twice for YCbCr."""
    image, image_format, expected, steps = cases()[mode]
    picture = written(tmp_path, image, image_format)
    assert launch_pixels.check(picture) is None
    actual = pixels(picture, SIDE, SIDE).numpy()
    assert actual.dtype == np.float32
    assert np.abs(actual - expected).max() <= (steps + 0.01) / 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("depth", [8, 16])
def test_a_photo_is_turned_as_its_camera_says(orientation, depth, tmp_path):
    """EXIF 2.3, orientation: where row 0 and column 0 of the file are in the picture."""
    values = np.array([[10, 20, 30], [40, 50, 60]])
    upright = {
        1: values, 2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1], 5: values.T, 6: values[::-1].T,
        7: values[::-1, ::-1].T, 8: values[:, ::-1].T,
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = values.astype(np.uint8) if depth == 8 else (values * 257).astype(np.uint16)
    picture = written(tmp_path, Image.fromarray(stored), "png", exif=exif)
    actual = pixels(picture, *upright.shape[::-1])
    torch.testing.assert_close(actual[..., 1], torch.tensor(upright.copy() / 255, dtype=torch.float32))


def test_deep_grey_is_scaled_without_leaving_its_range(tmp_path):
    """Lanczos overshoots at an edge."""
    edge = np.repeat([[0, 65535]], 8, 0).repeat(8, 1).astype(np.uint16)
    actual = pixels(written(tmp_path, Image.fromarray(edge), "png"), 48, 24)
    assert actual.min() == 0
    assert actual.max() == 1
    assert actual.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "values",
    [np.full((4, 4), 3.5, np.float32), np.full((4, 4), np.nan, np.float32), np.full((4, 4), -0.1, np.float32),
     np.full((4, 4), 70000, np.int32)],
)  # fmt: skip
def test_values_of_which_nobody_says_what_is_white_are_refused(values, tmp_path):
    picture = written(tmp_path, Image.fromarray(values), "tiff")
    assert "save it with 8 or 16 bits" in launch_pixels.check(picture)
    with pytest.raises(ValueError, match=r"a\.tiff cannot be read as a picture .*is white for this kind of file"):
        pixels(picture, 4, 4)


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp", "bmp", "tiff"])
def test_a_file_that_ends_too_early_is_found_by_the_check(image_format, tmp_path):
    content = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(content, image_format)
    for part in (0.1, 0.5, 0.9):
        (tmp_path / f"a.{image_format}").write_bytes(content.getvalue()[: int(len(content.getvalue()) * part)])
        (picture,) = find_pictures([tmp_path])
        assert launch_pixels.check(picture)
