"""Captions and pictures on disk: text files, folders, and webdataset's .tar files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..lora_merge.disk.file_names import shown
from ..lora_merge.words import many

logger = logging.getLogger(__name__)

SUFFIXES = ("png", "jpg", "jpeg", "jfif", "webp", "avif", "bmp", "gif", "tif", "tiff")
# Pictures too, for other programs; whoever has such files is to know that they are not learnt.
FOREIGN = (
    "apng", "arw", "cr2", "cr3", "dng", "exr", "hdr", "heic", "heif", "j2k", "jp2", "jpe", "jxl", "nef", "orf", "pbm", "pcx",
    "pgm", "ppm", "psd", "raf", "rw2", "svg", "tga",
)  # fmt: skip
NAMED = 3  # of many, in a message


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
    # Not splitlines, which takes letters that stand within a line, such as U+2028, for ends of it.
    lines = [line.strip() for line in _text(file.read_bytes(), str(file)).replace("\r", "\n").split("\n")]
    if not any(lines):
        raise ValueError(f"{file} has no captions; write one on each line.")
    return [line for line in lines if line]


def find_pictures(paths: Sequence[Path]) -> list[Picture]:
    """All pictures in these folders (and folders in them) and .tar files, in the order of their names.

    Warns of files that are pictures for other programs only. Raises ValueError for a path that is neither, or that holds
    no picture, and OSError for a folder that cannot be read.
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
    files = sorted(_files(folder))
    _tell_foreign(folder, [file.name for file in files])
    for file in files:
        # A link that leads nowhere is a picture that cannot be read, and is told as one.
        lost = file.is_symlink() and not file.exists()
        if file.suffix[1:].lower() in SUFFIXES and (lost or file.is_file()):
            beside = file.with_suffix(".txt")
            caption = _text(beside.read_bytes(), str(beside)).strip() if beside.is_file() else None
            size = 0 if lost else file.stat().st_size
            yield Picture(file.relative_to(folder).as_posix(), file=file, offset=0, size=size, caption=caption)


def _files(folder: Path) -> Iterator[Path]:
    """In it and in folders in it, but for hidden ones: there are thumbnails and copies. Raises OSError."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _hidden(folder: str) -> bool:
    return any(part.startswith(".") and part != "." for part in folder.split("/"))


def _tell_foreign(where: Path, names: Sequence[str]) -> None:
    left = [name for name in names if name.rpartition(".")[2].lower() in FOREIGN]
    if left:
        logger.warning(
            "%s: %s not learnt, as only %s are read (%s).",
            where, many(len(left), "files are", "file is"), ", ".join(SUFFIXES), listed(left),
        )  # fmt: skip


def _in_tar(file: Path) -> Iterator[Picture]:
    """webdataset's rule: what is before the first dot of a file's name says to which sample it belongs."""
    try:
        with tarfile.open(file, "r:") as tar:
            members = [member for member in tar if member.isreg()]
            captions, pictures = {}, []
            _tell_foreign(file, [member.name for member in members])
            for member in members:
                folder, _, name = member.name.rpartition("/")
                sample, _, suffix = name.partition(".")
                if suffix.lower() == "txt" and (content := tar.extractfile(member)) is not None:
                    captions[folder, sample] = _text(content.read(), f"{file}: {member.name}").strip()
                elif suffix.lower() in SUFFIXES and sample and not _hidden(folder):
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


def listed(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(map(plain, names[:NAMED])) + (", ..." if len(names) > NAMED else "")


def plain(name: str) -> str:
    """A name as it is, but for one that no terminal could show."""
    return name if name.isprintable() else shown(name)


def _text(content: bytes, name: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is no UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from error
    if "\0" in text:  # UTF-16 of plain letters is valid UTF-8
        raise ValueError(f"{name} is no UTF-8 text (a zero at byte {content.index(0)}); save it as UTF-8.")
    return text


def captions_of(pictures: Sequence[Picture], captions: Sequence[str] | None) -> list[str]:
    """One for each picture: its own, or from `captions`, which has one for all or one for each. Raises ValueError."""
    if captions is None:
        without = [picture.name for picture in pictures if picture.caption is None]
        if without:
            raise ValueError(
                f"{len(without)} of {many(len(pictures), 'pictures')} have no caption beside them ({listed(without)}). "
                "Add NAME.txt files, or give --prompts."
            )
        if empty := [picture.name for picture in pictures if not picture.caption]:
            logger.warning(
                "%d of %s have an empty caption (%s), and are learnt as what comes without a prompt.",
                len(empty), many(len(pictures), "pictures"), listed(empty),
            )  # fmt: skip
        return [picture.caption or "" for picture in pictures]
    if len(captions) not in (1, len(pictures)):
        raise ValueError(
            f"--prompts has {many(len(captions), 'captions')}, but there are {many(len(pictures), 'pictures')}. Give one for all, or one "
            "for each picture in the order of their names."
        )
    return [*captions] * (len(pictures) if len(captions) == 1 else 1)


def listing(pictures: Sequence[Picture]) -> str:
    """Changes with the names and sizes of the pictures: tells whether a run is resumed with others."""
    lines = [(picture.name, picture.size) for picture in pictures]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]
