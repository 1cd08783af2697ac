"""A picture's bytes as numbers from 0 to 1, whatever mode and depth its file has."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..lora_merge.words import many
from .data import Picture, plain

# What PIL can say of bytes that are no picture, or not a whole one.
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
SIXTEEN_BITS = 65535
# Kinds of which a second frame is a movement; others keep a thumbnail or the depth there.
MOVING = ("GIF", "WEBP", "PNG", "AVIF")


def content_of(picture: Picture) -> bytes:
    """The picture's file, undecoded. Raises OSError."""
    with open(picture.file, "rb") as file:
        file.seek(picture.offset)
        return file.read(picture.size)


def decoded(content: bytes) -> Image.Image:
    """Upright, transparent parts white: of mode RGB, or F from 0 to 1 for grey of more than 8 bits.

    Raises one of BROKEN for what is no picture, and for one whose numbers have no known white.
    """
    with Image.open(io.BytesIO(content)) as opened:
        return _converted(ImageOps.exif_transpose(opened))


def _converted(image: Image.Image) -> Image.Image:
    if _is_deep(image):
        return _deep(image)
    image = (image.convert("RGB") if image.mode == "YCbCr" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _deep(image: Image.Image) -> Image.Image:
    """PIL's own conversion cuts these at 255, which makes nearly all of them white."""
    values = np.asarray(image).astype(np.float32)
    most = 1 if image.mode == "F" else SIXTEEN_BITS
    # Also when there are numbers that are none.
    if not (values.min() >= 0 and values.max() <= most):
        raise ValueError(
            f"its values go from {values.min():g} to {values.max():g}, where {most} is white for this kind of file "
            f"(mode {image.mode}); save it with 8 or 16 bits"
        )
    return Image.fromarray(values / np.float32(most))


def check(picture: Picture) -> str | None:
    """Why the picture cannot be learnt; None if it can. Reads all of it, a JPEG at an eighth of its size."""
    try:
        content = content_of(picture)
        if not content:
            return "it is empty"
        with Image.open(io.BytesIO(content)) as opened:
            if opened.format in MOVING and (frames := getattr(opened, "n_frames", 1)) > 1:
                return f"it moves, with {many(frames, 'frames')}, and only still pictures are learnt"
            opened.draft(None, (max(1, opened.width // 8), max(1, opened.height // 8)))
            opened.load()
            # Whether there is a way from its mode shows in one pixel, unless the values count.
            _converted(opened if _is_deep(opened) else opened.crop((0, 0, 1, 1)))
    except UnidentifiedImageError:
        return "no kind of picture that is known here, whatever its ending says"
    except BROKEN as error:
        return str(error)
    return None


def pixels(picture: Picture, width: int, height: int, centre: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """(height, width, 3) in [0, 1]: the largest part of the picture of that shape, scaled. Transparent parts are white.

    centre: where the part lies, 0 left or above to 1 right or below.   Raises ValueError for what is no picture.
    """
    try:
        image = decoded(content_of(picture))
    except BROKEN as error:
        raise ValueError(
            f"{plain(str(picture.file))}: {plain(picture.name)} cannot be read as a picture ({error})."
        ) from error
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=centre)
    if image.mode == "F":  # whose scaling may go beyond both ends
        return torch.from_numpy(np.asarray(image).clip(0, 1)[..., None].repeat(3, -1))
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)
