import hashlib
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcm_kit.lora_merge import load
from lcm_kit.lora_merge.__main__ import main
from lcm_kit.lora_merge.cli import merge as cli_merge
from lcm_kit.lora_merge.recognise.catalogue import Published
from lcm_kit.lora_merge.recognise.identity import identify
from lcm_kit.tests.helpers import ROOT
from lcm_kit.tests.lora_merge.make import factors, kohya

MODULE = "lora_unet_conv_in"


@pytest.fixture
def files(tmp_path):
    for name, seed in (("style", 1), ("lcm", 2)):
        save_file(kohya(MODULE, *factors(6, 2, 5, seed=seed), alpha=1), tmp_path / f"{name}.safetensors")
    return tmp_path


def test_merge_adds_with_the_strengths_given(files, capsys):
    out = files / "out.safetensors"
    style, lcm = files / "style.safetensors", files / "lcm.safetensors"
    assert main(["merge", f"{style}:-0.8", str(lcm), "-o", str(out), "--dtype", "fp32"]) == 0
    wanted = -0.8 * load(style).delta(MODULE) + load(lcm).delta(MODULE)
    torch.testing.assert_close(load(out).delta(MODULE), wanted, rtol=1e-5, atol=1e-8)
    assert "style.safetensors * -0.8: 1 module, 1 shared" in capsys.readouterr().out


def test_what_does_not_add_up_stops_a_merge_or_is_left_out(files, capsys):
    dora = kohya(MODULE, *factors(6, 2, 5), alpha=1) | {f"{MODULE}.dora_scale": torch.ones(6, 1)}
    save_file(dora, files / "dora.safetensors")
    command = [
        "merge",
        f"{files / 'dora.safetensors'}:0.5",
        str(files / "lcm.safetensors"),
        "-o",
        str(files / "out.safetensors"),
    ]
    assert main(command) == 2
    assert "dora.safetensors has DoRA (1 module: lora_unet_conv_in)" in capsys.readouterr().err
    assert main([*command, "--leave-out"]) == 0
    assert "1 refused and left out" in capsys.readouterr().out


def test_info_describes(files, capsys):
    assert main(["info", str(files / "lcm.safetensors")]) == 0
    assert "rank: 2, scale (alpha / rank): 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "missing.safetensors"], "there is no such file"),
        (["merge", "lcm.safetensors:much", "-o", "out.safetensors"], "'much' after the colon is no number"),
        (["merge", "lcm.safetensors:nan", "-o", "out.safetensors"], "strength is nan"),
        (["merge", "lcm.safetensors", "-o", "lcm.safetensors"], "exists already"),
        (["merge", "lcm.safetensors", "-o", "out.safetensors", "--rank", "-2"], "rank is -2"),
    ],
)
def test_bad_input_is_one_line_and_status_two(files, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (files / "out.safetensors").exists()


def test_it_runs_as_a_module_from_the_repository():
    done = subprocess.run(
        [sys.executable, "-m", "lora_merge", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "merge" in done.stdout


COMMANDS = ("merge", "resize", "reproduce", "info", "compare", "extract")


@pytest.mark.parametrize("arguments", [["--help"], [], ["mege"]])
def test_what_the_commands_are_is_said_without_torch(arguments):
    code = (
        "import sys\nfrom lora_merge.__main__ import main\n"
        f"try: main({arguments})\nexcept SystemExit: pass\nprint('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.endswith("False\n")
    if arguments != []:
        assert all(command in done.stdout + done.stderr for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_how_it_is_used(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert exit_.value.code == 0
    assert f"usage: python -m lora_merge {command}" in said
    assert "example" in said


def test_the_package_has_what_it_says_and_no_more():
    import lcm_kit.lora_merge as package

    assert package.load is load
    assert {"load", "merge", "Lora", "METHODS"} <= set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = package.lode


def test_overwriting_is_asked_for_twice_where_somebody_elses_file_would_go(files, capsys):
    """The published file is no file of ours; the merge that takes its place is."""
    before = (files / "lcm.safetensors").read_bytes()
    command = ["merge", str(files / "lcm.safetensors"), "-o", str(files / "lcm.safetensors")]
    for word, status in ((None, 2), ("--overwrite", 2), ("--overwrite-any", 0), ("--overwrite", 0)):
        if status == 2:
            assert (files / "lcm.safetensors").read_bytes() == before
        assert main([*command, *([word] if word else [])]) == status
    assert "--overwrite-any" in capsys.readouterr().err


def test_auto_protects_a_lora_that_only_its_files_hash_tells(tmp_path, monkeypatch):
    """As the node does: a published LoRA for a transformer looks like any other."""
    module = "diffusion_model.blocks.0.self_attn.q"
    for name, seed in (("style", 1), ("fast", 2)):
        save_file(kohya(module, *factors(8, 2, 8, seed=seed)), tmp_path / f"{name}.safetensors")
    fast = tmp_path / "fast.safetensors"
    row = Published(
        "Test",
        "Wan 2.1/2.2 14B",
        "LCM",
        hashlib.sha256(fast.read_bytes()).hexdigest(),
        "a/b",
        bytes=fast.stat().st_size,
    )
    monkeypatch.setattr(cli_merge, "identify", partial(identify, catalogue=[row]))
    made = {}
    for protect in ("auto", "2", "none"):
        out = tmp_path / f"{protect}.safetensors"
        mu = [] if protect == "none" else ["--mu", "1"]
        command = ["merge", str(tmp_path / "style.safetensors"), str(fast), "-o", str(out), "--protect", protect, *mu]
        assert main(command) == 0
        made[protect] = load_file(out)
    assert all(torch.equal(made["auto"][key], made["2"][key]) for key in made["2"])
    assert not all(torch.equal(made["auto"][key], made["none"][key]) for key in made["none"])
