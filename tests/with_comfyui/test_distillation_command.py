"""`python -m lcm_kit.distillation` on the embedded model: a stop and going on, two processes, captions alone."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lcm_kit.demo.prompts import FIGURE
from lcm_kit.distillation import checkpoint
from lcm_kit.distillation.log import read_table
from lcm_kit.lora_merge import load
from lcm_kit.tests.helpers import ROOT

MODELS = ROOT / "demo" / "models"
MODEL = ["--checkpoint", str(MODELS / "checkpoints" / "tiny_emoji.safetensors"),
         "--custom-nodes", str(ROOT / "demo" / "tiny_emoji"), "--comfyui", os.environ["COMFYUI_PATH"]]  # fmt: skip
VAE = ["--vae", str(MODELS / "vae" / "tiny_emoji_vae.safetensors")]
SMALL = ["--rank", "2", "--skip", "200", "--guidance-min", "3", "--guidance-max", "3", "--learning-rate", "1e-3",
         "--width", "64", "--height", "64", "--cpu", "--save-dtype", "fp32"]  # fmt: skip
QUICK = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of four pictures and their captions, and the same in a .tar file."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.linear_gradient("L").rotate(90 * number).resize((64, 64)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(FIGURE[number % 2])
    subprocess.run(["tar", "-cf", folder.with_suffix(".tar"), "-C", folder, "."], check=True)
    return folder


def command(*arguments, launcher=()):
    # In the repository's root, as from a clone.
    return [sys.executable, *launcher, "-m", "distillation", *MODEL, *VAE, *SMALL, *map(str, arguments)]


def run(*arguments, **options):
    done = subprocess.run(
        command(*arguments, **options), cwd=ROOT, env=QUICK, capture_output=True, text=True, timeout=300,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def in_process(distill_here):
    return lambda *arguments: distill_here([*MODEL, *SMALL, *map(str, arguments)])


@pytest.fixture(scope="module")
def whole(in_process, pictures, tmp_path_factory):
    """The LoRA file of three steps in one go, two pictures to each."""
    file = tmp_path_factory.mktemp("whole") / "lcm.safetensors"
    assert in_process("--pictures", pictures, *VAE, "--steps", 3, "--batch", 2, "-o", file) == 0
    return file


def test_a_run_makes_a_lora_file_and_a_report(in_process, whole, pictures, capsys):
    # The finished run once more: it goes on from its last step.
    assert in_process("--pictures", pictures, *VAE, "--steps", 3, "--batch", 2, "-o", whole, "--overwrite") == 0
    report = capsys.readouterr().out
    lora = load(whole)
    assert len(lora.modules) == 177
    assert all(float(layer.delta().norm()) > 0 for layer in lora.modules.values())
    assert '"steps": 3' in lora.metadata["lcm_kit.distillation"]
    assert "LCM-LoRA with 177 modules" in report
    assert "3 steps of 2 images from 4 pictures; guidance 3, skip 200" in report


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_to_the_same_lora(in_process, pictures, whole, tmp_path):
    file, kept = tmp_path / "lcm.safetensors", tmp_path / "kept"
    arguments = ["--pictures", pictures, "--batch", 2, "-o", file, "--resume", kept]
    with subprocess.Popen(
        command(*arguments, "--steps", 1000, "--save-every", 1), cwd=ROOT, env=QUICK, stderr=subprocess.PIPE, text=True,
        stdin=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 200
            while not (kept / "run.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, said[-3000:]
    assert said.endswith("stopped; the same command goes on from the last finished step\n")
    assert not file.exists()
    _, facts = checkpoint.read(kept / "run.safetensors")
    if facts["done"] >= 3:  # the machine was too busy to stop it earlier
        whole = tmp_path / "longer.safetensors"
        assert in_process(*arguments[:4], *VAE, "-o", whole, "--steps", facts["done"] + 1) == 0
    assert in_process(*arguments, *VAE, "--steps", max(3, facts["done"] + 1)) == 0
    actual, expected = load_file(file), load_file(whole)
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], id="torchrun"),
        pytest.param(
            ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"],
            id="accelerate",
            marks=pytest.mark.rare,
        ),
    ],
)
def test_two_processes_make_what_one_makes_with_their_batches_together(launcher, pictures, whole, tmp_path):
    pytest.importorskip("accelerate", reason="the engine for several processes: pip install -r tools/requirements.txt")
    file = tmp_path / "two.safetensors"
    shard = pictures.with_suffix(".tar")
    report = run("--pictures", shard, "--steps", 3, "--batch", 1, "-o", file, launcher=launcher)
    assert report.count("LCM-LoRA with") == 1
    assert "On 2 processes, 2 images to a step together." in report
    one, two = load(whole), load(file)
    assert one.modules.keys() == two.modules.keys()
    deltas = [torch.cat([lora.delta(name).flatten() for name in one.modules]) for lora in (one, two)]
    assert (deltas[1] - deltas[0]).norm() < 1e-4 * deltas[0].norm()  # sums in another order, then Adam: 5e-5


@pytest.mark.slow
def test_captions_alone_and_the_picture_of_the_course(in_process, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("\n".join(FIGURE))
    style = MODELS / "loras" / "tiny_emoji_ink_lora.safetensors"
    arguments = ["--prompts", tmp_path / "captions.txt", "--samples", 2, "--steps", 1, "--batch", 2, *VAE, "--lora",
                 f"{style}:0.5", "-o", tmp_path / "lcm.safetensors", "--picture", tmp_path / "course.png"]  # fmt: skip
    assert in_process(*arguments) == 0
    said = capsys.readouterr().out
    assert "1 step of 2 images from 2 pictures that the model made itself" in said
    with Image.open(tmp_path / "course.png") as picture:
        assert picture.width == 768
        assert picture.height > 256
    shards = [load_file(file) for file in (tmp_path / "lcm.run" / "kept").iterdir()]
    latents = [tensor for shard in shards for name, tensor in shard.items() if name.endswith("/latent")]
    assert [tensor.shape[::2] for tensor in latents] == [(1, 8), (1, 8)]

    assert in_process(*arguments) == 2  # the output is there
    assert "lcm.safetensors" in capsys.readouterr().err
    assert in_process(*arguments, "--overwrite", "--rank", 3) == 2
    assert "is the checkpoint of another training (" in capsys.readouterr().err
    assert in_process(*arguments, "--overwrite", "--lora", MODELS / "vae" / "tiny_emoji_vae.safetensors") == 2
    assert "changes nothing in" in capsys.readouterr().err


def test_broken_pictures_are_named_at_once_and_may_be_left_out(in_process, whole, pictures, tmp_path, capsys):
    """What is learnt then is what the rest alone teaches."""
    folder = tmp_path / "some broken"
    shutil.copytree(pictures, folder)
    for name in ("00", "9"):  # before the first and behind the last
        (folder / f"{name}.png").write_bytes((pictures / "0.png").read_bytes()[:40])
        (folder / f"{name}.txt").write_text("a caption of nothing")
    arguments = ["--pictures", folder, *VAE, "--steps", 3, "--batch", 2, "-o", tmp_path / "lcm.safetensors"]
    assert in_process(*arguments) == 2
    said = capsys.readouterr().err
    assert "error: 2 of 6 pictures cannot be read: 00.png (" in said
    assert "leave them out by --leave-out-broken" in said
    assert not (tmp_path / "lcm.run").exists()  # nothing was encoded
    assert in_process(*arguments, "--leave-out-broken") == 0
    assert "2 of 6 pictures cannot be read: 00.png (" in capsys.readouterr().out
    actual, expected = load_file(tmp_path / "lcm.safetensors"), load_file(whole)
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


def test_shapes_crops_flips_and_repeats_and_what_is_seen_on_the_way(in_process, tmp_path, capsys):
    folder, run = tmp_path / "pictures", tmp_path / "lcm.run"
    folder.mkdir()
    for number, size in enumerate([(64, 64), (200, 64), (190, 60), (40, 40)]):
        Image.linear_gradient("L").resize(size).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(FIGURE[number % 2])
    (tmp_path / "shown.txt").write_text("a\nb\nc\n")
    assert in_process(
        "--pictures", folder, *VAE, "--steps", 4, "--batch", 2, "--buckets", "--flip", 0.5, "--random-crop", "--repeats", 3,
        "--caption-dropout", 0.2, "--validation", tmp_path / "shown.txt", "--save-every", 2, "--keep-loras",
        "-o", tmp_path / "lcm.safetensors", "--picture", tmp_path / "course.png",
    ) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "4 steps of 2 images from 12 pictures" in said
    assert "1 of 4 pictures are smaller than what is learnt of them (3.png) and were scaled up" in said
    assert "Validation loss, always of the same pictures and noise:" in said
    shards = [load_file(file) for file in (run / "kept").iterdir()]
    shapes = [tensor.shape[2:] for shard in shards for name, tensor in shard.items() if name.endswith("/latent")]
    assert sorted(map(tuple, shapes)) == [(4, 13)] * 6 + [(8, 8)] * 6
    assert sorted(file.name for file in (run / "loras").iterdir()) == ["000002.safetensors", "000004.safetensors"]
    assert sorted(file.name for file in (run / "samples").iterdir()) == ["000002.png", "000004.png"]
    last, so_far, output = (
        load(file)
        for file in (run / "loras" / "000004.safetensors", run / "lora.safetensors", tmp_path / "lcm.safetensors")
    )
    for name, layer in output.modules.items():
        assert torch.equal(layer.delta(), last.modules[name].delta())
        assert torch.equal(layer.delta(), so_far.modules[name].delta())
    assert [row["step"] for row in read_table(run / "losses.csv")] == [0, 1, 2, 3, 4]


def test_a_training_begins_with_the_published_file(in_process, pictures, tmp_path, capsys):
    """At a rate of almost nothing the output is that LoRA, in the same names; a lower rank is refused."""
    published, output = MODELS / "loras" / "tiny_emoji_lcm_lora.safetensors", tmp_path / "lcm.safetensors"
    arguments = ["--pictures", pictures, *VAE, "--steps", 1, "--start-from", published, "-o", output]
    assert in_process(*arguments) == 2
    assert "error: start_from is tiny_emoji_lcm_lora.safetensors, of rank 32" in capsys.readouterr().err
    assert in_process(*arguments, "--rank", 32, "--learning-rate", 1e-7) == 0
    given, begun = load(published), load(output)
    assert begun.modules.keys() == given.modules.keys()
    for name, layer in begun.modules.items():
        torch.testing.assert_close(layer.delta(), given.modules[name].delta(), atol=1e-5, rtol=1e-4)


def test_loggers_that_are_not_installed_are_told_before_anything_is_loaded(in_process, pictures, tmp_path, capsys):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    output = tmp_path / "lcm.safetensors"
    assert in_process("--pictures", pictures, "-o", output, "--log-with", "wandb") == 2
    assert "error: --log-with wandb needs the package wandb: pip install wandb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--checkpoint", "nowhere.safetensors"], "nowhere.safetensors is no file, nor in ComfyUI's checkpoints ("),
        (["--checkpoint", "{vae}"], "tiny_emoji_vae.safetensors could not be loaded by ComfyUI ("),
        ([], "tiny_emoji.safetensors has no VAE to encode pictures with; give one by --vae."),
        (["--custom-nodes", "{pictures}/0.png"], "0.png, which is no folder"),
    ],
)
def test_bad_input_ends_with_one_line(more, message, in_process, pictures, tmp_path, capsys):
    more = [text.format(vae=VAE[1], pictures=pictures) for text in more]
    assert in_process("--pictures", pictures, "-o", tmp_path / "lcm.safetensors", *more) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.splitlines()[-1].startswith("error: ")
    assert [path for path in Path(tmp_path).iterdir() if path.suffix == ".safetensors"] == []


def test_samples_that_cannot_be_written_do_not_end_the_training(in_process, pictures, tmp_path, caplog, capsys):
    kept = tmp_path / "run"
    kept.mkdir()
    (kept / "samples").write_text("no folder")
    file = tmp_path / "lcm.safetensors"
    arguments = [
        "--pictures",
        pictures,
        *VAE,
        "--steps",
        1,
        "--batch",
        2,
        "--save-every",
        1,
        "--resume",
        kept,
        "-o",
        file,
    ]
    assert in_process(*arguments) == 0
    assert "No samples of step 1: " in caplog.text
    assert file.exists()
    assert capsys.readouterr().out.startswith("LCM-LoRA with 177 modules")


def test_the_report_begins_with_the_recipe(in_process, pictures, tmp_path, capsys):
    arguments = [
        "--pictures",
        pictures,
        *VAE,
        "--steps",
        1,
        "--batch",
        1,
        "--recipe",
        "SD1.5 on 12 GB",
        "--accumulate",
        1,
    ]
    assert in_process(*arguments, "-o", tmp_path / "lcm.safetensors") == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("Recipe SD1.5 on 12 GB: ")
    assert "Set by you: steps 1, batch 1, accumulate 1, width 64, height 64." in first
    assert second.startswith("LCM-LoRA with 177 modules")
