"""`python -m lcm_kit.distillation` as far as it goes without ComfyUI: what it reads, and what it refuses."""

import io
import subprocess
import sys
import tarfile
from dataclasses import asdict, fields, replace

import pytest
import torch
from PIL import Image

from lcm_kit.distillation.__main__ import main
from lcm_kit.distillation.engine import Alone
from lcm_kit.distillation.settings import Settings, Setup
from lcm_kit.launch import data as launch_data
from lcm_kit.launch.gathering import _labelled, texts_asked
from lcm_kit.launch.options import parsed
from lcm_kit.launch.pixels import pixels
from lcm_kit.launch.processes import processes
from lcm_kit.launch.run import _settings, _setup
from lcm_kit.tests.helpers import ROOT

# What the command cannot do without.
LEAST = ["--checkpoint", "x", "-o", "y", "--prompts", "z"]
RED = torch.tensor([1.0, 0.0, 0.0])


def png(colour="red", size=(4, 4), mode="RGB"):
    content = io.BytesIO()
    Image.new(mode, size, colour).save(content, "png")
    return content.getvalue()


@pytest.fixture
def pictures(tmp_path):
    """A folder with a red and a green picture and their captions, and a text file beside the folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in (("b", "red"), ("a", "lime")):
        (folder / f"{name}.png").write_bytes(png(colour))
        (folder / f"{name}.txt").write_text(f"a {colour} square\n")
    (tmp_path / "captions.txt").write_text("one\n\n two \n")
    return folder


def archive(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def command(folder, *more):
    return ["--checkpoint", "x.safetensors", "-o", str(folder / "lcm.safetensors"), "--comfyui", str(folder), *more]


def test_help_explains_with_examples_in_a_clone(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "distillation", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for part in ("examples:", "accelerate launch", "torchrun", "--resume FOLDER", "Exit status"):
        assert part in done.stdout


def test_defaults_are_those_of_the_settings():
    options = parsed(LEAST)
    assert _settings(options) == Settings()
    assert {name: getattr(options, name) for name in asdict(Setup())} == asdict(Setup())


OTHERS = {
    "steps": 9, "batch": 9, "accumulate": 9, "learning_rate": 0.5, "warmup": 9, "decay": 0.5, "weight_decay": 0.5,
    "betas": (0.5, 0.7), "clip": 0.5, "guidance_min": 2.5, "guidance_max": 9.5, "skip": 9, "original_steps": 9,
    "phases": 9,
    "huber_c": 0.5, "weighting": "v", "average": 0.5, "caption_dropout": 0.5, "seed": 9,
    "optimizer": "sgd", "decay_shape": "cosine",
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OTHERS.items())
def test_every_setting_has_its_flag(name, value):
    words = map(str, value if isinstance(value, tuple) else [value])
    given = parsed([*LEAST, f"--{name.replace('_', '-')}", *words])
    assert _settings(given) == replace(Settings(), **{name: value})


SETUPS = {
    "rank": 9, "alpha": 0.5, "samples": 9, "width": 72, "height": 72, "dtype": "bf16", "save_every": 9, "flip": 0.5, "repeats": 9,
}  # fmt: skip
SWITCHED = {"gradient_checkpointing": False, "buckets": True, "random_crop": True, "size_labels": False, "tf32": True,
            "compile": True}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), (SETUPS | SWITCHED).items())
def test_every_part_of_the_setup_has_its_flag(name, value):
    flag = name.replace("_", "-")
    words = [f"--{'' if value else 'no-'}{flag}"] if name in SWITCHED else [f"--{flag}", str(value)]
    assert _setup(parsed([*LEAST, *words])) == replace(Setup(), **{name: value})
    assert {one.name for one in fields(Setup) if one.metadata} == {*SETUPS, *SWITCHED}


def test_labels_multiply_prompts_no_more_than_they_differ():
    conds, uncond = [["c0", {"a": 1}], ["c1", {}]], ["u", {}]
    labels = [{"width": 5}, {"width": 5}, {"width": 6}, {"width": 5}]
    found = _labelled(conds, uncond, [0, 1, 1, 0], labels)
    assert found == (
        [["c0", {"a": 1, "width": 5}], ["c1", {"width": 5}], ["c1", {"width": 6}]],
        [["u", {"width": 5}], ["u", {"width": 6}]],
        [(0, 0), (1, 0), (2, 1), (0, 0)],
    )
    assert _labelled(conds, uncond, [1, 0], []) == (conds, [uncond], [(1, 0), (0, 0)])


def test_no_setting_is_left_without_a_flag():
    assert {one.name for one in fields(Settings) if one.metadata} == {*OTHERS, "average_target"}


def test_an_average_is_target_and_result_for_command_and_class_alike():
    alone, asked = (_settings(parsed([*LEAST, "--average", "0.95", *more])) for more in ([], ["--average-target"]))
    assert alone == asked == Settings(average=0.95)
    assert alone.kept()["average_target"] is True
    result_only = _settings(parsed([*LEAST, "--average", "0.95", "--no-average-target"]))
    assert result_only == Settings(average=0.95, average_target=False)
    assert Settings().kept()["average_target"] is False  # as checkpoints without an average have it


def test_names_and_defaults_need_no_torch():
    """A command line answers at once."""
    code = "import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_module('distillation', run_name='__main__')\n"
    code += "except SystemExit: assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_pictures_of_a_folder_come_by_name_with_their_captions(pictures):
    found = launch_data.find_pictures([pictures])
    assert [picture.name for picture in found] == ["a.png", "b.png"]
    assert launch_data.captions_of(found, None) == ["a lime square", "a red square"]
    image = pixels(found[1], 8, 16)
    assert image.shape == (16, 8, 3)
    torch.testing.assert_close(image, RED.expand(16, 8, 3))


def test_samples_of_a_tar_go_together_by_what_is_before_the_first_dot(tmp_path):
    shard = archive(
        tmp_path / "0.tar",
        [("a/2.png", png("red")), ("a/1.png", png("blue")), ("a/1.txt", b"blue"), ("a/2.txt", b"red"),
         ("a/2.json", b"{}"), ("a/2.depth.png", png())],
    )  # fmt: skip
    found = launch_data.find_pictures([shard])
    assert [(picture.name, picture.caption) for picture in found] == [
        ("0.tar/a/1.png", "blue"),
        ("0.tar/a/2.png", "red"),
    ]
    torch.testing.assert_close(pixels(found[1], 2, 2), RED.expand(2, 2, 3))


def test_transparent_parts_are_white(tmp_path):
    (tmp_path / "a.png").write_bytes(png((255, 0, 0, 0), mode="RGBA"))
    assert pixels(launch_data.find_pictures([tmp_path])[0], 2, 2).min() == 1


def test_each_caption_is_held_once(pictures):
    captions = str(pictures.parent / "captions.txt")
    data_free = texts_asked(parsed(command(pictures, "--prompts", captions, "--samples", "5")))
    assert (data_free.captions, data_free.which, data_free.pictures) == (["one", "two"], [0, 1, 0, 1, 0], [])
    with_pictures = texts_asked(parsed(command(pictures, "--prompts", captions, "--pictures", str(pictures))))
    assert (with_pictures.captions, with_pictures.which) == (["one", "two"], [0, 1])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pictures", "{here}/nowhere"], "nowhere is neither a folder nor a .tar file"),
        (["--pictures", "{here}/empty"], "empty holds no picture (png, jpg"),
        (["--pictures", "{here}/captions.txt"], "captions.txt is no whole, plain .tar file"),
        (["--pictures", "{here}/bare"], "1 of 1 picture have no caption beside them (a.png). Add NAME.txt files"),
        (["--pictures", "{here}/bare", "--prompts", "{here}/captions.txt"], "has 2 captions, but there are 1 picture"),
        (["--prompts", "{here}/blank.txt"], "blank.txt has no captions"),
        (["--prompts", "{here}/latin.txt"], "latin.txt is no UTF-8 text (invalid continuation byte at byte 3)"),
        (["--prompts", "{here}/nowhere.txt"], "nowhere.txt"),
        (["--prompts", "{here}/captions.txt"], "where there is no ComfyUI (no comfy/sd.py)"),
        (["--prompts", "{here}/captions.txt", "--guidance-min", "9"], "guidance_min is 9.0 and guidance_max is 8.5"),
        (["--prompts", "{here}/captions.txt", "--average-target"], "average_target needs a moving average"),
    ],
)
def test_bad_input_ends_with_one_line(more, message, pictures, capsys):
    here = pictures.parent
    (here / "empty").mkdir()
    (here / "bare").mkdir()
    (here / "bare" / "a.png").write_bytes(png())
    (here / "blank.txt").write_text("\n \n")
    (here / "latin.txt").write_bytes("caf\u00e9 noir".encode("latin-1"))
    assert main(command(here, *[text.format(here=here) for text in more])) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_nothing_to_learn_from_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(command(tmp_path))
    assert ended.value.code == 2
    assert "nothing to learn from: give --prompts FILE, or --pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "why"), [("0", "0 is below 1"), ("1.5", "'1.5' is no whole number"), ("x", "'x' is no whole number")]
)
def test_what_is_no_count_is_told(text, why, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(command(tmp_path, "--samples", text))
    assert ended.value.code == 2
    assert f"argument --samples: {why}" in capsys.readouterr().err


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a picture"):
        pixels(launch_data.find_pictures([tmp_path])[0], 8, 8)


@pytest.mark.parametrize("several", [True, False])
def test_a_launcher_that_has_started_one_process_of_several_is_told(several, monkeypatch, caplog):
    """The environment of accelerate 1.15's launcher of one process, which it takes for several on CPUs, too."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    if several:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    else:
        monkeypatch.delenv("MASTER_ADDR", raising=False)
    with processes(cpu=True) as engine:
        assert isinstance(engine, Alone)
    assert ("add --multi_gpu, on CPUs too" in caplog.text) == several


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    """EXIF orientation 6: the picture lies on its left side; upright, what was left is above."""
    picture = Image.new("RGB", (2, 1), "red")
    picture.putpixel((1, 0), (0, 255, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    image = pixels(launch_data.find_pictures([tmp_path])[0], 1, 2)
    torch.testing.assert_close(image[:, 0], torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
