"""Files that say how they were made, made again."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lcm_kit.lora_merge import Lora, MergeOptions, load, merge, save
from lcm_kit.lora_merge.__main__ import main
from lcm_kit.lora_merge.disk import tensor_file
from lcm_kit.lora_merge.merging import reproduce as reproducing
from lcm_kit.lora_merge.merging.reproduce import _difference, reproduce
from lcm_kit.tests.lora_merge.make import factors, kohya

MODULES = (
    "lora_unet_input_blocks_1_1_proj_in",
    "lora_unet_middle_block_1_proj_in",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "inputs").mkdir()
    for name, seed in (("style", 1), ("lcm", 2)):
        state = {}
        for number, module in enumerate(MODULES):
            state |= kohya(module, *factors(12, 4, 10, seed=10 * seed + number), alpha=2)
        save_file(state, tmp_path / "inputs" / f"{name}.safetensors")
    return tmp_path


def made(files, *more, command="merge", name="out"):
    style, lcm = (str(files / "inputs" / f"{one}.safetensors") for one in ("style", "lcm"))
    inputs = [f"{style}:0.8", lcm] if command == "merge" else [lcm]
    out = files / f"{name}.safetensors"
    assert main([command, *inputs, "-o", str(out), *more]) == 0
    return out


def test_no_file_is_mapped(files, monkeypatch, capsys):
    """One that is cut off meanwhile would end the process."""
    out, maps = made(files), []
    monkeypatch.setattr(tensor_file, "MAPPED_ABOVE", 0)
    monkeypatch.setattr(tensor_file.mmap, "mmap", lambda *_, **__: maps.append(1))
    assert main(["reproduce", str(out), "--inputs", str(files / "inputs")]) == 0
    assert not maps


CHOICES = [
    (),
    ("--rank", "3"),
    ("--retain", "0.9", "--balanced"),
    ("--max-mb", "0.006"),
    ("--method", "della_ties", "--density", "0.4", "--spread", "0.1", "--seed", "7"),
    ("--method", "breadcrumbs", "--outliers", "0.1", "--density", "0.5", "--dtype", "bf16"),
    ("--method", "ties", "--dense", "--rank", "4"),
    ("--method", "slerp", "--dtype", "fp32"),
    ("--protect", "2", "--mu", "0.5", "--format", "diffusers", "--dtype", "fp32"),
    ("--block-strengths", "down=0.5", "--block-strengths", "2: te=0, *middle*=-1"),
]


@pytest.mark.parametrize("choices", CHOICES)
def test_a_merge_is_made_again_bit_for_bit(files, choices, capsys):
    out = made(files, *choices)
    capsys.readouterr()
    assert main(["reproduce", str(out), "--inputs", str(files / "inputs"), "--workers", "2"]) == 0
    assert "is the same, bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize("choices", [("--rank", "2"), ("--keep", "0.8", "--dtype", "fp32"), ("--max-mb", "0.006")])
def test_so_is_a_smaller_one(files, choices):
    result = reproduce(made(files, *choices, command="resize"), [files])
    assert (result.identical, result.same, result.difference) == (True, True, 0.0)
    assert [path.name for path in result.inputs] == ["lcm.safetensors"]


def test_the_file_names_its_inputs_with_their_hashes(files, capsys):
    out = made(files, "--rank", "3")
    with safe_open(out, framework="pt") as file:
        notes = json.loads(file.metadata()["lcm_kit.merge"])
    for entry in notes["inputs"]:
        assert entry["sha256"] == hashlib.sha256((files / "inputs" / entry["name"]).read_bytes()).hexdigest()
    capsys.readouterr()
    assert main(["info", str(out)]) == 0
    text = capsys.readouterr().out
    assert "made from: rank 3" in text
    assert f"style.safetensors * 0.8, sha256 {notes['inputs'][0]['sha256']}" in text


def test_a_renamed_input_is_found_by_its_hash_and_a_changed_one_is_named(files, capsys):
    out = made(files)
    (files / "inputs" / "style.safetensors").rename(files / "inputs" / "other name.safetensors")
    assert reproduce(out).identical
    (files / "inputs" / "other name.safetensors").unlink()
    state = load_file(files / "inputs" / "lcm.safetensors")
    save_file({key: 2 * value for key, value in state.items()}, files / "inputs" / "lcm.safetensors")
    assert main(["reproduce", str(out)]) == 2
    error = capsys.readouterr().err
    assert "style.safetensors is not there" in error
    assert "lcm.safetensors is another file than the one it was made from" in error


def rewritten(path, change):
    """The file with another state dict and the same metadata."""
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
    save_file(change(load_file(path)), path, notes)


def test_a_file_that_was_changed_is_not_the_same(files, capsys):
    out = made(files, "--rank", "3", "--dtype", "fp32")
    key = f"{MODULES[0]}.lora_up.weight"
    rewritten(out, lambda state: state | {key: state[key] * (1 + 1e-6)})
    result = reproduce(out, [files])
    assert not result.identical
    assert result.same
    assert 0 < result.difference < 1e-5
    rewritten(out, lambda state: state | {key: state[key] * 1.1})
    assert main(["reproduce", str(out)]) == 1
    assert "NOT the same" in capsys.readouterr().out
    rewritten(out, lambda state: {name: value for name, value in state.items() if not name.startswith(MODULES[0])})
    assert main(["reproduce", str(out)]) == 2
    assert "was changed since it was made" in capsys.readouterr().err


def test_a_file_of_two_dtypes_is_compared_in_that_of_most_of_its_weights(files):
    """Alphas are float32 in any file, and count for nothing."""
    out = made(files, "--dtype", "fp32")
    rewritten(
        out,
        lambda state: {
            key: value if key.startswith(MODULES[0]) or key.endswith(".alpha") else value.half()
            for key, value in state.items()
        },
    )
    result = reproduce(out, [files])
    assert (result.identical, result.same) == (False, True)
    assert 1e-4 < result.difference < 2e-3


def test_the_difference_is_relative_to_what_the_file_holds(files):
    """Frobenius norm of what all updates differ by, of differences of whole weights too."""
    diff = f"{MODULES[1]}.diff_b"
    for name in ("style", "lcm"):
        file = files / "inputs" / f"{name}.safetensors"
        save_file(load_file(file) | {diff: torch.arange(5.0)}, file)
    out = made(files, "--dtype", "fp32")
    before, key = load(out), f"{MODULES[0]}.lora_up.weight"
    rewritten(out, lambda state: state | {key: 1.5 * state[key], diff: 3 * state[diff]})
    after = load(out)
    lost = [after.delta(module) - before.delta(module) for module in after.modules]
    lost += [after.diffs[one] - before.diffs[one] for one in after.diffs]
    whole = [after.delta(module) for module in after.modules] + [*after.diffs.values()]
    wanted = [torch.cat([one.flatten() for one in ones]).double().norm() for ones in (lost, whole)]
    assert reproduce(out, [files]).difference == pytest.approx(float(wanted[0] / wanted[1]), rel=1e-5)


def updates(scale, *, diff=None, seed=0):
    state = kohya(MODULES[0], *(scale * one for one in factors(6, 2, 5, seed=seed)), 2.0)
    return Lora.from_state_dict(state if diff is None else state | {f"{MODULES[0]}.diff_b": diff})


@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e10])
def test_a_relative_difference_is_the_same_at_any_size(scale):
    """(a, b) against (a + d, b + e): the root of (d^2 + e^2) / (a^2 + b^2), here with the squares of the scale."""
    bias = torch.arange(1.0, 7.0)
    first, second = updates(scale, diff=scale**2 * bias), updates(1.1 * scale, diff=0.5 * scale**2 * bias)
    own = float(updates(1.0).delta(MODULES[0]).double().square().sum())
    other = float(bias.double().square().sum())
    wanted = ((0.21**2 * own + 0.25 * other) / (own + other)) ** 0.5
    assert _difference(first, second) == pytest.approx(wanted, rel=1e-4)
    assert _difference(first, first) < 1e-6


@pytest.mark.parametrize("bias", [0.0, 1e-6, 0.5, 3.0])
def test_against_nothing_any_difference_is_all_of_it(bias):
    zero = updates(0.0, diff=torch.zeros(6))
    assert _difference(zero, updates(0.0, diff=torch.full((6,), bias))) == (1.0 if bias else 0.0)
    assert _difference(zero, updates(1e-3 * bias, diff=torch.zeros(6))) == (1.0 if bias else 0.0)


def test_a_file_without_a_recipe_is_refused(files, capsys):
    assert main(["reproduce", str(files / "inputs" / "lcm.safetensors")]) == 2
    assert "it does not say how it was made" in capsys.readouterr().err
    for notes in ("{", "[]", '{"version": 9}', '{"version": 2, "inputs": [], "options": {"rank": "x"}}'):
        state = load_file(files / "inputs" / "lcm.safetensors")
        save_file(state, files / "odd.safetensors", {"lcm_kit.merge": notes})
        assert main(["reproduce", str(files / "odd.safetensors")]) == 2
        assert "cannot be read" in capsys.readouterr().err
        assert main(["info", str(files / "odd.safetensors")]) == 0


def test_an_expression_in_a_recipe_is_not_run(files, capsys):
    """A recipe comes with a file, and `(\\w+)+!` would take longer than anybody waits."""
    out = made(files)
    with safe_open(out, framework="pt") as file:
        notes = file.metadata()
    recipe = json.loads(notes["lcm_kit.merge"])
    recipe["inputs"][0]["block_strengths"] = r"/(\w+)+!/=1"
    save_file(load_file(out), out, notes | {"lcm_kit.merge": json.dumps(recipe)})
    assert main(["reproduce", str(out), "--inputs", str(files)]) == 2
    assert "is a regular expression, and these are not read" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("choices", [{"keep": 0.9}, {"max_mb": 0.006}, {"rank": 3}, {}])
def test_a_merge_without_files_is_made_again_by_name(files, choices, dtype):
    """In a graph nobody knows the files' hashes, and a merge that was told no dtype counts 2 bytes a number in any file."""
    inputs = [(load(files / "inputs" / f"{name}.safetensors"), 1.0) for name in ("style", "lcm")]
    save(merge(inputs, **choices), files / "graph.safetensors", dtype=dtype)
    assert reproduce(files / "graph.safetensors").identical


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["merge", "lcm.safetensors", "-o", "x.safetensors", "--keep", "0.5", "--rank", "3"],
            "rank and keep are given",
        ),
        (
            ["merge", "lcm.safetensors", "-o", "x.safetensors", "--protect", "0"],
            "protect is 0, but the LoRAs are numbered 1",
        ),
        (
            ["merge", "lcm.safetensors", "-o", "x.safetensors", "--protect", "3", "--mu", "1"],
            "protect is 3, but the LoRAs are numbered 1",
        ),
        (["merge", "lcm.safetensors", "-o", "x.safetensors", "--block-strengths", "2: down=0"], "is for LoRA 2"),
        (["merge", "lcm.safetensors", "-o", "x.txt"], "has to end in .safetensors"),
        (["resize", "lcm.safetensors", "-o", "x.safetensors"], "how small the result is to be"),
        (["resize", "missing.safetensors", "-o", "x.safetensors", "--rank", "2"], "there is no such file"),
        (["resize", "lcm.safetensors", "-o", "x.safetensors", "--max-mb", "0.001"], "max_mb is 0.001"),
    ],
)
def test_bad_input_is_one_line_and_status_two(files, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(files / "inputs")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["merge", "resize", "reproduce", "info"])
def test_help_shows_examples(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"python -m lora_merge {command}" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(files, capsys):
    lcm = str(files / "inputs" / "lcm.safetensors")
    assert main(["merge", lcm, "-o", str(files / "x.safetensors"), "--device", "cuda"]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


def redated(path):
    """The same weights, said to be of another day: another file with another hash."""
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
    save_file(load_file(path), path, notes | {"modelspec.date": "2001-01-01"})


def test_an_input_that_was_made_again_on_another_day_is_known_by_its_weights(files):
    half = made(files, "--rank", "3", name="half")
    both = files / "both.safetensors"
    assert main(["merge", str(half), str(files / "inputs" / "lcm.safetensors"), "-o", str(both)]) == 0
    redated(half)
    assert reproduce(both, [files]).identical
    rewritten(half, lambda state: {key: 2 * value for key, value in state.items()})
    with pytest.raises(FileNotFoundError, match=r"half\.safetensors is another file than the one it was made from"):
        reproduce(both, [files])


def test_a_file_of_another_day_is_still_made_again(files):
    out = made(files, "--rank", "3", "--meta", "modelspec.title=x", "--meta", "modelspec.trigger_phrase=y")
    redated(out)
    assert reproduce(out, [files]).identical


def test_all_that_the_recipe_and_the_caller_say_is_handed_on(files, monkeypatch):
    out = made(files, "--rank", "3", "--block-strengths", "down=0.5")
    seen, steps = {}, []
    real = reproducing.merge_with_account
    monkeypatch.setattr(
        reproducing, "merge_with_account", lambda inputs, **options: (seen.update(options), real(inputs, **options))[1]
    )
    assert reproduce(out, [files], workers=2, progress=lambda done, total: steps.append((done, total))).identical
    assert (seen["workers"], seen["rank"], seen["model"]) == (2, 3, None)
    assert seen["block_strengths"] == ["down=0.5", "down=0.5"]
    assert seen.keys() >= vars(MergeOptions()).keys()
    assert steps == [(number, len(MODULES)) for number in range(1, len(MODULES) + 1)]


@pytest.mark.parametrize(("format", "keys"), [("kohya", 3), ("comfy", 2), ("diffusers", 2), ("auto", 2)])
def test_of_a_file_that_was_changed_the_keys_are_counted_that_it_lacks_of_its_own_format(files, format, keys):
    """Of Flux, whose names every format has in its own way; kohya's has an alpha."""
    state = {}
    for number in range(3):
        state |= kohya(f"lora_unet_double_blocks_{number}_img_attn_proj", *factors(6, 2, 6, seed=number), 1.0)
    save_file(state, files / "flux.safetensors")
    out = files / "merged.safetensors"
    save(merge([(load(files / "flux.safetensors"), 0.5)]), out, format=format)
    assert reproduce(out, [files]).identical
    first = next(iter(load_file(out))).rsplit(".", 2)[0]
    rewritten(out, lambda state: {key: tensor for key, tensor in state.items() if not key.startswith(f"{first}.")})
    with pytest.raises(ValueError, match=f"was changed since it was made: it differs in {keys} keys, "):
        reproduce(out, [files])
