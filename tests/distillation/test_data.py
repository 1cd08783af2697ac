"""Folders, archives and caption files as people have them: what is learnt of them, and what they are told of the rest."""

import io
import os
import sys
import tarfile

import pytest
import torch
from PIL import Image

from lcm_kit.distillation.settings import Setup
from lcm_kit.launch.data import FOREIGN, SUFFIXES, captions_of, find_pictures, read_captions
from lcm_kit.launch.latents import broken_pictures
from lcm_kit.launch.pixels import check, decoded, pixels
from lcm_kit.launch.report import broken_words
from lcm_kit.launch.views import size_of, views_of


def image(kind="png", colour="red", **options):
    made = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(made, kind, **options)
    return made.getvalue()


def archive(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def laid_out(folder, kind, files):
    """The same files as a folder or as a .tar file."""
    if kind == "tar":
        return archive(folder / "data.tar", files)
    for name, content in files.items():
        file = folder / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder / "data"


BOTH = pytest.mark.parametrize("kind", ["folder", "tar"])


@BOTH
def test_pictures_lie_in_nested_folders_under_any_name_and_hidden_copies_are_none(kind, tmp_path):
    seen = ["a.PNG", "deep/er/ünï 画像 🙂.png", "deep/b.png"]
    hidden = ["._a.png", ".hidden.png", ".thumbnails/a.png", "deep/.ipynb_checkpoints/b.png"]
    where = laid_out(tmp_path, kind, {name: image() for name in seen + hidden})
    found = find_pictures([where])
    assert sorted(picture.name.removeprefix("data.tar/") for picture in found) == sorted(seen)
    assert all(check(picture) is None and size_of(picture) == (8, 8) for picture in found)


@BOTH
@pytest.mark.parametrize("ending", FOREIGN)
def test_a_picture_for_other_programs_is_told(kind, ending, tmp_path, caplog):
    where = laid_out(tmp_path, kind, {"a.png": image(), f"b.{ending.upper()}": b"x", "notes.md": b"x"})
    (found,) = find_pictures([where])
    assert found.name.endswith("a.png")
    assert (
        f"1 file is not learnt, as only png, jpg, jpeg, jfif, webp, avif, bmp, gif, tif, tiff are read (b.{ending.upper()})."
        in caplog.text
    )
    assert ending not in SUFFIXES


def test_a_link_that_leads_nowhere_is_a_broken_picture(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "moved.png")
    (picture,) = find_pictures([tmp_path])
    assert "No such file" in check(picture)
    assert size_of(picture) is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(image())
    (tmp_path / "c.png").mkdir()
    assert [picture.name for picture in find_pictures([tmp_path])] == ["b.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are UTF-8 elsewhere")
def test_a_name_in_another_encoding_is_learnt_and_can_be_told(tmp_path):
    for name, content in ((b"caf\xe9.png", image()), (b"d\xe9j\xe0.png", b"")):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(content)
    pictures = find_pictures([tmp_path])
    views = views_of(pictures, {}, Setup(width=8, height=8, random_crop=True), seed=1)
    assert views[0].pixels().shape == (8, 8, 3)
    broken = broken_pictures(views, ["", ""], {})
    said = broken_words(broken, 2)
    said.encode("utf-8")
    assert said == r"1 of 2 pictures cannot be read: 'd\udce9j\udce0.png' (it is empty)."


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_caption_is_a_line_however_lines_end(end, mark, tmp_path):
    lines = ["a cat\u2028on a mat", " two ", "", "page\x0cbreak", "next\x85line"]
    (tmp_path / "captions.txt").write_bytes((mark + end.join(lines)).encode())
    assert read_captions(tmp_path / "captions.txt") == ["a cat\u2028on a mat", "two", "page\x0cbreak", "next\x85line"]


@pytest.mark.parametrize(
    ("content", "why"),
    [("cat".encode("utf-16-le"), "a zero at byte 1"), ("cat".encode("utf-16"), "invalid start byte at byte 0"),
     (b"\0\0", "a zero at byte 0"), ("café".encode("latin-1"), "unexpected end of data at byte 3")],
)  # fmt: skip
def test_a_caption_in_another_encoding_is_refused(content, why, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "a.png").write_bytes(image())
    for read in (lambda: read_captions(tmp_path / "a.txt"), lambda: find_pictures([tmp_path])):
        with pytest.raises(ValueError, match=rf"a\.txt is no UTF-8 text \({why}\); save it as UTF-8\."):
            read()


def test_an_empty_caption_is_told(tmp_path, caplog):
    for name in "abcde":
        (tmp_path / f"{name}.png").write_bytes(image())
        (tmp_path / f"{name}.txt").write_text("a cat\r\n" if name == "b" else " \n")
    assert captions_of(find_pictures([tmp_path]), None) == ["", "a cat", "", "", ""]
    assert "4 of 5 pictures have an empty caption (a.png, c.png, d.png, ...), and are learnt as" in caplog.text


# ---- what is in the files


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
@pytest.mark.parametrize("frames", [1, 3])
def test_what_moves_is_refused_and_what_stands_still_is_learnt(kind, frames, tmp_path):
    others = [Image.new("RGB", (8, 8), colour) for colour in ("blue", "lime")][: frames - 1]
    (tmp_path / f"a.{kind}").write_bytes(image(kind, save_all=True, append_images=others, duration=40))
    (picture,) = find_pictures([tmp_path])
    if frames > 1:
        assert check(picture) == "it moves, with 3 frames, and only still pictures are learnt"
    else:
        assert check(picture) is None
        expected = torch.tensor([1.0, 0.0, 0.0]).expand(8, 8, 3)
        torch.testing.assert_close(pixels(picture, 8, 8), expected, atol=0.02, rtol=0)


def test_a_photo_with_its_depth_or_thumbnail_beside_is_learnt(tmp_path):
    """MPO, a JPEG of several pictures, is what telephones write; pages of a TIFF are no movement either."""
    for name, kind in (("a.jpg", "mpo"), ("b.tif", "tiff")):
        other = Image.new("RGB", (4, 4), "blue")
        (tmp_path / name).write_bytes(image(kind, save_all=True, append_images=[other]))
    for picture in find_pictures([tmp_path]):
        assert check(picture) is None
        torch.testing.assert_close(pixels(picture, 4, 4)[..., 0], torch.ones(4, 4), atol=0.02, rtol=0)


def test_every_mode_that_can_be_in_a_file_is_learnt_or_found_by_the_check(tmp_path):
    """Found before anything is encoded, not when its turn comes."""
    made = 0
    for mode in (
        "1",
        "L",
        "LA",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBX",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
        "I",
        "F",
        "I;16",
        "I;16B",
    ):
        for kind in ("png", "tiff", "jpeg", "webp", "bmp", "gif"):
            try:
                Image.new(mode, (8, 8)).save(tmp_path / "a", kind)
            except (OSError, KeyError, ValueError):
                continue  # no such file exists
            (tmp_path / "a").rename(tmp_path / f"a.{kind}")
            (picture,) = find_pictures([tmp_path])
            if check(picture) is None:
                assert decoded((tmp_path / f"a.{kind}").read_bytes()).mode in ("RGB", "F"), (mode, kind)
            else:
                with pytest.raises(ValueError, match="cannot be read as a picture"):
                    pixels(picture, 8, 8)
            (tmp_path / f"a.{kind}").unlink()
            made += 1
    assert made > 20


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (3, 7)])
def test_pictures_of_any_shape_are_cut_and_scaled(size, tmp_path):
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    (picture,) = find_pictures([tmp_path])
    assert check(picture) is None
    for buckets in (False, True):
        (view,) = views_of([picture], {picture: size}, Setup(width=64, height=64, buckets=buckets), seed=0)
        made = view.pixels()
        assert made.shape == (view.height, view.width, 3)
        torch.testing.assert_close(made[..., 0], torch.ones(view.height, view.width))


def test_why_a_file_is_no_picture_is_said_without_the_machines_words(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert [check(picture) for picture in find_pictures([tmp_path])] == [
        "it is empty", "no kind of picture that is known here, whatever its ending says",
    ]  # fmt: skip
