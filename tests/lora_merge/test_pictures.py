"""Pictures on disk: readable by whoever opens them, marked, and replaced only where the mark says whose they are."""

import pytest
from PIL import Image, PngImagePlugin

from lcm_kit.lora_merge.disk.pictures import MARK, check_picture, write_picture

RED, BLUE = (Image.new("RGB", (5, 4), color) for color in ("red", "blue"))
ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".PNG": "PNG", ".Jpg": "JPEG"}


def is_red(path):
    with Image.open(path) as image:
        red, green, blue = image.convert("RGB").getpixel((2, 2))
    return red > 200 > 100 > max(green, blue)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_picture_is_of_the_kind_that_its_name_says_and_marked_as_that_kind_is(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    write_picture(RED, path, False)
    with Image.open(path) as image:
        assert (image.format, image.size) == (ENDINGS[ending], (5, 4))
        assert image.info.get("Software" if image.format == "PNG" else "comment") in (MARK, MARK.encode())
    assert is_red(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_only_a_picture_with_the_mark_is_replaced_unless_any_may_be(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    write_picture(RED, path, True)
    with pytest.raises(FileExistsError, match="exists already"):
        write_picture(BLUE, path, False)
    assert is_red(path)
    write_picture(BLUE, path, True)
    assert not is_red(path)
    other = PngImagePlugin.PngInfo()
    other.add_text("Software", "somebody's")
    RED.save(path, **({"pnginfo": other} if ending == ".png" else {"comment": b"\xffsomebody's"}))
    for theirs in (path.read_bytes(), b"no picture", b"", path.read_bytes()[:40]):
        path.write_bytes(theirs)
        for refusing in (lambda: check_picture(path, True), lambda: write_picture(BLUE, path, True)):
            with pytest.raises(FileExistsError, match="does not say that LCM Kit wrote it"):
                refusing()
        assert path.read_bytes() == theirs
    write_picture(BLUE, path, "any")
    assert not is_red(path)


def test_a_mark_in_a_file_of_another_kind_is_none(tmp_path):
    """Only the two kinds that are written are opened: each further reader of Pillow's is one that a stranger's file can reach."""
    path = tmp_path / "x.png"
    RED.save(path, format="GIF", comment=MARK.encode())
    with Image.open(path) as image:
        assert image.info["comment"] == MARK.encode()
    with pytest.raises(FileExistsError, match="does not say"):
        check_picture(path, True)


@pytest.mark.parametrize("name", ["x", "x.gif", "x.png.txt", "png"])
def test_a_name_of_another_kind_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"has to end in .png or .jpg"):
        write_picture(RED, tmp_path / name, "any")
    assert list(tmp_path.iterdir()) == []
