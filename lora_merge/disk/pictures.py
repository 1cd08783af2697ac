"""Pictures of this pack on disk: written whole, and marked, so that only they are replaced by the next."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .overwriting import Overwrite, guard
from .whole import check_place, write_whole

MARK = "LCM Kit"
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


def check_picture(path: Path, overwrite: Overwrite) -> None:
    """Raises ValueError, FileNotFoundError or FileExistsError if `write_picture` would not write a file of that name."""
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"{path}: the name of a picture has to end in .png or .jpg.")
    check_place(path, guard(overwrite, _is_ours))


def write_picture(image: Image.Image, path: Path, overwrite: Overwrite) -> None:
    """Raises as check_picture does, and OSError if the disk takes no more; an old file is as it was then."""
    check_picture(path, overwrite)
    note = PngInfo()
    note.add_text("Software", MARK)
    marked = {"pnginfo": note} if _FORMATS[path.suffix.lower()] == "PNG" else {"comment": MARK.encode()}
    write_whole(
        path,
        lambda file: image.save(file, format=_FORMATS[path.suffix.lower()], **marked),
        guard(overwrite, _is_ours),
    )


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path, formats=["PNG", "JPEG"]) as image:
            return MARK in (image.info.get("Software"), image.info.get("comment", b"").decode("ascii", "replace"))
    except (OSError, SyntaxError, ValueError):
        return False
