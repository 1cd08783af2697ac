"""What is made once: found again by content, through stops at any moment, full disks and damaged files."""

import errno
import hashlib
import random

import pytest
import torch
from PIL import Image

from lcm_kit.distillation.kept import Kept, key_of
from lcm_kit.launch.data import find_pictures
from lcm_kit.launch.latents import AT_ONCE, View, broken_pictures, keys_of, latents_of
from lcm_kit.launch.report import broken_words
from lcm_kit.launch.texts import entries_of, zeros
from lcm_kit.lora_merge.disk import whole


def entry(number):
    return {"a": torch.full((2,), float(number)), "b": torch.tensor(number)}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor)


def test_what_was_added_is_there_for_the_next_process(tmp_path):
    kept = Kept(tmp_path / "kept")
    kept.add({"x": entry(1), "y": entry(2)})
    kept.add({"z": entry(3)})
    later = Kept(tmp_path / "kept")
    assert [key in later for key in "xyzw"] == [True, True, True, False]
    assert len(later) == 3
    for key, tensors in later.get("zyx").items():
        assert_same(tensors, entry("xyz".index(key) + 1))
    with pytest.raises(KeyError):
        later.get(["w"])
    assert later.size == sum(file.stat().st_size for file in (tmp_path / "kept").iterdir())


def test_without_a_folder_it_is_in_memory():
    kept = Kept()
    kept.add({"x": entry(1)})
    assert_same(kept.get(["x"])["x"], entry(1))
    kept.clear()
    assert "x" not in kept


def test_a_damaged_shard_is_made_again_beside_it(tmp_path, caplog):
    Kept(tmp_path).add({"x": entry(1)})
    (shard,) = tmp_path.iterdir()
    shard.write_bytes(shard.read_bytes()[:-4])
    kept = Kept(tmp_path)
    assert "is made again" in caplog.text
    assert "x" not in kept
    kept.add({"x": entry(1)})
    assert_same(Kept(tmp_path).get(["x"])["x"], entry(1))


def test_a_full_disk_is_told_and_the_work_goes_on(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = Kept(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(whole.os, "fsync", full)
        kept.add({"x": entry(1)})
    assert "is the disk full?" in caplog.text
    assert_same(kept.get(["x"])["x"], entry(1))
    assert list(tmp_path.iterdir()) == []
    assert "x" not in Kept(tmp_path)


def test_a_key_tells_its_parts_apart():
    parts = [("a", "bc"), ("ab", "c"), ("abc",), (b"a", "bc"), (1,), ("1",), (1.0,), ([1, 2],), (1, 2)]
    assert len({key_of(*each) for each in parts}) == len(parts)


def test_what_was_kept_is_found_by_later_versions(tmp_path):
    """Names as they are on people's disks: SHA-256 of each part with its length before it, and of the keys of a shard."""

    def named(*parts):
        content = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        return hashlib.sha256(content).hexdigest()[:32]

    assert key_of("a", b"bc", 1) == named(b"'a'", b"bc", b"1")
    shard = named(b"'x'", b"'y'")
    names = []
    for end in ("", "-1", "-2"):
        Kept(tmp_path).add({"y": entry(1), "x": entry(2)})
        names.append(f"{shard}{end}.safetensors")
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)


# ---- pictures


@pytest.fixture
def folder(tmp_path):
    """Twenty pictures, of which no two are equal."""
    here = tmp_path / "pictures"
    here.mkdir()
    for number in range(20):
        Image.new("L", (8, 8), number).save(here / f"{number:02}.png")
    return here


class Encoder:
    """What it makes of a picture depends on its place in the batch, as with a real one in the last digits."""

    def __init__(self, fail=None):
        self.made, self.fail = [], fail

    def __call__(self, images):
        if self.fail is not None and len(self.made) >= self.fail:
            raise KeyboardInterrupt
        self.made += [round(float(image.mean()) * 255) for image in images]
        return torch.stack([image.mean() + 0.001 * place for place, image in enumerate(images)]).view(-1, 1, 1, 1)


def views_of(folder, size=8):
    return [View(picture, size, size) for picture in find_pictures([folder])]


def latents(folder, store, encoder, size=8):
    views, kept = views_of(folder, size), Kept(store)
    return latents_of(views, keys_of(views, "vae"), encoder, kept)


def test_a_stopped_encoding_goes_on_to_the_same_latents_and_makes_none_twice(folder, tmp_path):
    whole_run = latents(folder, None, Encoder())
    made, draw = [], random.Random(2)
    for _ in range(20):
        encoder = Encoder(fail=draw.choice([0, 1, AT_ONCE + 1]))
        try:
            found = latents(folder, tmp_path / "kept", encoder)
        except KeyboardInterrupt:
            made += encoder.made
            continue
        break
    made += encoder.made
    assert torch.equal(torch.cat(found), torch.cat(whole_run))
    assert sorted(made) == list(range(20))


def test_latents_are_found_by_the_picture_and_not_by_its_name(folder, tmp_path):
    latents(folder, tmp_path / "kept", Encoder())
    (folder / "00.png").rename(folder / "zz.png")
    Image.new("L", (8, 8), 99).save(folder / "01.png")
    encoder = Encoder()
    latents(folder, tmp_path / "kept", encoder)
    assert encoder.made == [99]
    encoder = Encoder()
    latents(folder, tmp_path / "kept", encoder, size=16)
    assert len(encoder.made) == 20


def test_every_broken_picture_is_named_before_the_first_is_encoded(folder):
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:50])
    (folder / "19.png").write_bytes(b"")
    views = views_of(folder)
    keys = keys_of(views, "vae")
    broken = broken_pictures(views, keys, Kept())
    assert [picture.name for picture in broken] == ["03.png", "19.png"]
    assert broken_words(broken, 20).startswith("2 of 20 pictures cannot be read: 03.png (")
    # What is kept needs no check.
    kept = Kept()
    kept.add({key: {"latent": torch.zeros(1)} for key in keys})
    assert broken_pictures(views, keys, kept) == {}


# ---- captions


def conditioning(text):
    return [torch.full((1, 3, 2), float(len(text))), {"pooled_output": torch.ones(1, 2), "pooled": None, "number": 3}]


def test_captions_are_encoded_once_and_come_back_as_they_were(tmp_path):
    calls = []

    def encode(text):
        calls.append(text)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return conditioning(text)

    captions = ["a", "bb", "a", "ccc"]
    with pytest.raises(KeyboardInterrupt):
        entries_of(captions, encode, "clip", Kept(tmp_path))
    found = entries_of(captions, encode, "clip", Kept(tmp_path))
    assert calls == ["a", "bb", "ccc", "ccc"]
    for (cond, options), text in zip(found, captions, strict=True):
        assert torch.equal(cond, conditioning(text)[0])
        assert {name: value for name, value in options.items() if name != "pooled_output"} == {
            "pooled": None,
            "number": 3,
        }
        assert torch.equal(options["pooled_output"], torch.ones(1, 2))
    entries_of(captions, encode, "another clip", Kept(tmp_path))
    assert len(calls) == 7


@pytest.mark.parametrize("odd", [object(), (1, 2), {"a": torch.ones(1)}])
def test_what_a_file_cannot_hold_is_encoded_again_and_handed_on(odd, tmp_path):
    made = [torch.ones(1, 1), {"odd": odd}]
    for _ in range(2):
        (found,) = entries_of(["a"], lambda text: made, "clip", Kept(tmp_path))
        assert found is made


def test_zeros_are_those_of_core():
    cond, options = zeros(conditioning("abc"))
    assert not cond.any()
    assert not options["pooled_output"].any()
    assert options["number"] == 3
