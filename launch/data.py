"""Captions and pictures on disk: text files, folders, and webdataset's .tar files."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff")


@dataclass(frozen=True)
class Picture:
    """Where a picture is: `size` bytes of `file` from `offset` on. caption: None where none lies beside it."""

    name: str
    file: Path
    offset: int
    size: int
    caption: str | None


def read_captions(file: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises ValueError if there is none, OSError if it cannot be read."""
    lines = [line.strip() for line in _text(file.read_bytes(), str(file)).splitlines()]
    if not any(lines):
        raise ValueError(f"{file} has no captions; write one on each line.")
    return [line for line in lines if line]


def find_pictures(paths: Sequence[Path]) -> list[Picture]:
    """All pictures in these folders (and folders in them) and .tar files, in the order of their names.

    Raises ValueError for a path that is neither, or that holds no picture.
    """
    found: list[Picture] = []
    for path in paths:
        if path.is_dir():
            here = list(_in_folder(path))
        elif path.is_file():
            here = list(_in_tar(path))
        else:
            raise ValueError(f"{path} is neither a folder nor a .tar file; --pictures takes those.")
        if not here:
            raise ValueError(f"{path} holds no picture ({', '.join(SUFFIXES)}).")
        found += here
    return found


def _in_folder(folder: Path) -> Iterator[Picture]:
    for file in sorted(folder.rglob("*")):
        if file.suffix[1:].lower() in SUFFIXES and not file.name.startswith(".") and file.is_file():
            beside = file.with_suffix(".txt")
            caption = _text(beside.read_bytes(), str(beside)).strip() if beside.is_file() else None
            yield Picture(
                file.relative_to(folder).as_posix(), file=file, offset=0, size=file.stat().st_size, caption=caption
            )


def _in_tar(file: Path) -> Iterator[Picture]:
    """webdataset's rule: what is before the first dot of a file's name says to which sample it belongs."""
    try:
        with tarfile.open(file, "r:") as tar:
            members = [member for member in tar if member.isreg()]
            captions, pictures = {}, []
            for member in members:
                folder, _, name = member.name.rpartition("/")
                sample, _, suffix = name.partition(".")
                if suffix.lower() == "txt" and (content := tar.extractfile(member)) is not None:
                    captions[folder, sample] = _text(content.read(), f"{file}: {member.name}").strip()
                elif suffix.lower() in SUFFIXES and sample:
                    pictures.append(((folder, sample), member))
    except tarfile.TarError as error:
        raise ValueError(
            f"{file} is no whole, plain .tar file ({error}); unpack .tar.gz and the like first."
        ) from error
    for key, member in sorted(pictures, key=lambda pair: pair[1].name):
        yield Picture(
            f"{file.name}/{member.name}",
            file=file,
            offset=member.offset_data,
            size=member.size,
            caption=captions.get(key),
        )


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is no UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from error


def captions_of(pictures: Sequence[Picture], captions: Sequence[str] | None) -> list[str]:
    """One for each picture: its own, or from `captions`, which has one for all or one for each. Raises ValueError."""
    if captions is None:
        without = [picture.name for picture in pictures if picture.caption is None]
        if without:
            raise ValueError(
                f"{len(without)} of {len(pictures)} pictures have no caption beside them ({', '.join(without[:3])}"
                f"{', ...' if len(without) > 3 else ''}). Add NAME.txt files, or give --prompts."
            )
        return [picture.caption or "" for picture in pictures]
    if len(captions) not in (1, len(pictures)):
        raise ValueError(
            f"--prompts has {len(captions)} captions, but there are {len(pictures)} pictures. Give one for all, or one "
            "for each picture in the order of their names."
        )
    return [*captions] * (len(pictures) if len(captions) == 1 else 1)


def listing(pictures: Sequence[Picture]) -> str:
    """Changes with the names and sizes of the pictures: tells whether a run is resumed with others."""
    lines = [(picture.name, picture.size) for picture in pictures]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]
