"""What is learnt of each picture: which part of it, in which size, mirrored or not, and how often."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from ..distillation.draws import CUTS, generator
from ..distillation.settings import Setup
from .data import Picture
from .pixels import content_of, pixels

ORIENTATION = 0x0112  # EXIF
LYING = range(5, 9)  # its values for pictures that are turned by a quarter
WIDEST = 4.0  # sides of a bucket, one to the other
COARSEST = 64  # pixels from one bucket's side to the next; small models have finer ones


@dataclasses.dataclass(frozen=True)
class View:
    """What the VAE gets of a picture, width x height pixels.

    across, down: where the part that is kept lies, 0 left or above, 1 right or below.   mirrored: left for right.
    """

    picture: Picture
    width: int
    height: int
    across: float = 0.5
    down: float = 0.5
    mirrored: bool = False

    def pixels(self) -> Tensor:
        image = pixels(self.picture, self.width, self.height, (self.across, self.down))
        return torch.flip(image, (1,)) if self.mirrored else image

    def label(self, size: tuple[int, int]) -> dict[str, int]:
        """What SDXL is told of a picture of this size: its own, and how much was cut off left and above once scaled."""
        scale = max(self.width / size[0], self.height / size[1])
        left, above = (
            round(max(0.0, side * scale - kept) * share)
            for side, kept, share in zip(size, (self.width, self.height), (self.across, self.down), strict=True)
        )
        return {
            "width": size[0], "height": size[1], "crop_w": left, "crop_h": above, "target_width": self.width,
            "target_height": self.height,
        }  # fmt: skip


def size_of(picture: Picture) -> tuple[int, int] | None:
    """(width, height), upright; None for what is no picture."""
    try:
        with Image.open(io.BytesIO(content_of(picture))) as image:
            lies = image.getexif().get(ORIENTATION) in LYING
            return image.size[::-1] if lies else image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def views_of(
    pictures: Sequence[Picture], sizes: Mapping[Picture, tuple[int, int] | None], setup: Setup, seed: int
) -> list[View]:
    """setup.repeats of each picture, one after the other. sizes: of `size_of`, needed for buckets alone.

    What is drawn hangs on the picture's name, the number of the repeat and the seed, not on the other pictures.
    """
    buckets = buckets_of(setup.width, setup.height)
    found = []
    for picture in pictures:
        width, height = setup.width, setup.height
        if setup.buckets and (size := sizes[picture]):
            width, height = min(buckets, key=lambda sides: abs(math.log(sides[0] * size[1] / sides[1] / size[0])))
        for repeat in range(setup.repeats):
            found.append(_drawn(View(picture=picture, width=width, height=height), setup, seed, repeat))
    return found


def _drawn(view: View, setup: Setup, seed: int, repeat: int) -> View:
    source = generator(
        seed, repeat, int.from_bytes(view.picture.name.encode("utf-8", "surrogateescape")[-64:], "big"), CUTS
    )
    across, down, mirror = torch.rand(3, generator=source, dtype=torch.float64).tolist()
    if setup.random_crop:
        view = dataclasses.replace(view, across=across, down=down)
    return dataclasses.replace(view, mirrored=mirror < setup.flip)


def buckets_of(width: int, height: int) -> list[tuple[int, int]]:
    """Sizes of about the area of width x height, itself first: for every width the height that comes nearest from below.

    Sides are multiples of an eighth of the shorter one, at most COARSEST and at least 8 pixels.
    """
    step = max(8, min(COARSEST, min(width, height) // 8 // 8 * 8))
    found = [(width, height)]
    for across in range(step, int(math.sqrt(width * height * WIDEST)) + 1, step):
        down = width * height // across // step * step
        if down and max(across / down, down / across) <= WIDEST and (across, down) not in found:
            found.append((across, down))
    return found
