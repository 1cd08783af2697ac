import json
import os
import stat
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lcm_kit.lora_merge import Lora, LoraLayer, load, merge, save
from lcm_kit.lora_merge.files.lora import _own
from lcm_kit.lora_merge.updates.unmade import Unmade
from lcm_kit.tests.lora_merge.make import factors, kohya, metadata, relative

SHAPES = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0": (8, 6, ()),
    "lora_unet_down_blocks_1_resnets_0_conv_shortcut": (8, 6, (1, 1)),
    "lora_unet_mid_block_resnets_1_time_emb_proj": (8, 6, ()),
    "lora_unet_up_blocks_1_upsamplers_0_conv": (8, 6, (3, 3)),
    "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj": (8, 6, ()),
    "lora_te1_text_model_encoder_layers_11_self_attn_out_proj": (9, 7, ()),
    "lora_te2_text_model_encoder_layers_0_mlp_fc2": (9, 7, ()),
}


def state_dict(rank=4, alpha=2.0, *, seed=0, dtype=torch.float32):
    state = {}
    for number, (module, (out, inputs, kernel)) in enumerate(SHAPES.items()):
        state |= kohya(module, *factors(out, rank, inputs, kernel, seed=seed + number, dtype=dtype), alpha)
    return state


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)],  # two factors of 24, 11 and 8 bits
)
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_what_is_saved_is_what_is_loaded(tmp_path, dtype, tolerance, format):
    lora = Lora.from_state_dict(state_dict())
    save(lora, tmp_path / "x.safetensors", dtype=dtype, format=format)
    again = load(tmp_path / "x.safetensors")
    assert set(again.modules) == set(lora.modules)
    for module, layer in again.modules.items():
        assert layer.up.dtype == dtype
        assert layer.shape == lora.modules[module].shape
        assert relative(layer.delta(), lora.delta(module)) < tolerance


def test_half_precision_files_come_back_bit_for_bit(tmp_path):
    state = state_dict(dtype=torch.float16)
    save_file(state, tmp_path / "a.safetensors")
    save(load(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", dtype=torch.float16)
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(state)
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in state.items())


def test_diffusers_names_are_diffusers_own(tmp_path):
    save(Lora.from_state_dict(state_dict()), tmp_path / "x.safetensors", format="diffusers")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        modules = {key.rpartition(".lora_")[0] for key in file.keys()}
    assert modules == {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "unet.down_blocks.1.resnets.0.conv_shortcut",
        "unet.mid_block.resnets.1.time_emb_proj",
        "unet.up_blocks.1.upsamplers.0.conv",
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "text_encoder.text_model.encoder.layers.11.self_attn.out_proj",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc2",
    }
    config = json.loads(metadata(tmp_path / "x.safetensors")["lora_adapter_metadata"])
    assert config["unet.r"] == config["unet.lora_alpha"] == 4
    assert len(config["unet.target_modules"]) == 5


def test_ldm_names_are_saved_as_diffusers_names_too(tmp_path):
    lora = Lora.from_state_dict(kohya("lora_unet_output_blocks_5_2_conv", *factors(8, 2, 6, (3, 3))))
    save(lora, tmp_path / "x.safetensors", format="diffusers")
    assert list(load(tmp_path / "x.safetensors").modules) == ["lora_unet_output_blocks_5_2_conv"]


def test_diffusers_format_refuses_what_it_cannot_name(tmp_path):
    odd = Lora.from_state_dict(kohya("lora_unet_odd_blocks_0_thing", *factors(8, 2, 6)), source="odd")
    with pytest.raises(ValueError, match=r"odd: 1 module has no known diffusers name.*use kohya"):
        save(odd, tmp_path / "x.safetensors", format="diffusers")
    bias = Lora.from_state_dict({"lora_unet_conv_in.diff_b": torch.ones(3)})
    with pytest.raises(ValueError, match="no place for weight differences"):
        save(bias, tmp_path / "x.safetensors", format="diffusers")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [1, 3, 4])
def test_of_many_that_diffusers_format_cannot_hold_the_first_three_are_named(count):
    named = [f"lora_unet_odd_blocks_{number}_thing" for number in range(count)]
    biases = {f"{name}.diff_b": torch.ones(3) for name in named}
    layers = {key: part for name in named for key, part in kohya(name, *factors(8, 2, 6)).items()}
    for state in (biases, layers):
        with pytest.raises(ValueError, match="use kohya") as error:
            Lora.from_state_dict(state).diffusers_spellings()
        assert [name in str(error.value) for name in named] == [number < 3 for number in range(count)]


def test_a_merge_tells_other_tools_and_its_own_story(tmp_path):
    style, lcm = (Lora.from_state_dict(state_dict(rank, seed=rank), source=f"{rank}.safetensors") for rank in (4, 8))
    save(merge([(style, 0.8), (lcm, 1.0)]), tmp_path / "both.safetensors")
    notes = metadata(tmp_path / "both.safetensors")
    assert notes["ss_network_module"] == "networks.lora"
    # The larger one keeps its numbers, and its scale goes into alpha.
    (scale,) = {layer.scale for layer in lcm.modules.values()}
    assert (notes["ss_network_dim"], notes["ss_network_alpha"]) == ("12", f"{12 * scale:g}")
    assert json.loads(notes["ss_network_args"]) == {"conv_dim": "12", "conv_alpha": f"{12 * scale:g}"}
    assert notes["modelspec.title"] == "both"
    assert notes["modelspec.merged_from"] == "4.safetensors, 8.safetensors"
    assert json.loads(notes["lcm_kit.merge"])["inputs"][0]["strength"] == 0.8


def test_the_same_merge_has_the_same_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(merge([(Lora.from_state_dict(state_dict()), 0.8)]), tmp_path / name / "x.safetensors")
    assert metadata(tmp_path / "a/x.safetensors") == metadata(tmp_path / "b/x.safetensors")
    with safe_open(tmp_path / "a/x.safetensors", "pt") as one, safe_open(tmp_path / "b/x.safetensors", "pt") as other:
        assert all(torch.equal(one.get_tensor(key), other.get_tensor(key)) for key in one.keys())


@pytest.mark.parametrize("alpha", [1, 2.0, -3, 0, 0.3])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
def test_alpha_is_written_in_float32_whatever_number_it_is_and_whatever_the_factors_are(alpha, dtype):
    one = Lora({"lora_unet_conv_in": LoraLayer(*factors(8, 2, 6, dtype=torch.bfloat16), alpha)})
    written = one.to_state_dict(dtype)["lora_unet_conv_in.alpha"]
    assert (written.dtype, written.shape) == (torch.float32, ())
    assert written.item() == torch.tensor(float(alpha)).item()


@pytest.mark.parametrize("format", ["diffusers", "comfy"])
@pytest.mark.parametrize("alpha", [None, 2.0, 0.3])
def test_what_is_too_small_for_float16_stays_its_size_in_keys_without_a_scale(format, alpha):
    """In kohya's keys alpha takes powers of two; where there is none they have to stay in the factors, to the few digits that
    float16 has so far down."""
    up, down = (3e-4 * factor for factor in factors(8, 2, 6))
    one = Lora({"lora_unet_conv_in": LoraLayer(up, down, alpha)}, spellings={"lora_unet_conv_in": "lora_unet_conv_in"})
    again = Lora.from_state_dict(one.to_state_dict(torch.float16, format=format))
    (layer,) = again.modules.values()
    assert relative(layer.delta(), one.delta("lora_unet_conv_in")) < 0.05


def test_alpha_is_never_rounded(tmp_path):
    lora = Lora.from_state_dict(kohya("lora_unet_conv_in", *factors(8, 2, 6), alpha=257.1))  # not in bfloat16
    save(lora, tmp_path / "x.safetensors", dtype=torch.bfloat16)
    assert load(tmp_path / "x.safetensors").modules["lora_unet_input_blocks_0_0"].alpha == pytest.approx(257.1)


def test_an_existing_file_is_safe_unless_told_otherwise(tmp_path):
    lora, path = Lora.from_state_dict(state_dict()), tmp_path / "x.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="exists already"):
        save(lora, path)
    with pytest.raises(FileExistsError, match="does not say that LCM Kit wrote it"):
        save(lora, path, overwrite=True)
    assert path.read_bytes() == b"precious"
    save(lora, path, overwrite="any")
    assert set(load(path).modules) == set(lora.modules)


def _theirs(notes):
    return lambda path: save_file(state_dict(), path, notes)


def _merged(path):
    save(merge([(Lora.from_state_dict(state_dict()), 0.5)]), path)


def _state(path):
    """All but the time of the last look, which looking changes."""
    state = os.lstat(path)
    return state.st_mode, state.st_ino, state.st_size, state.st_mtime_ns


@pytest.mark.parametrize(
    ("make", "ours"),
    [
        (lambda path: save(Lora.from_state_dict(state_dict()), path), True),
        (_merged, True),
        (lambda path: save(load(_theirs({"ss_output_name": "x"})(path) or path), path, overwrite="any"), True),
        (_theirs({"lcm_kit.distillation": "{}", "ss_network_module": "networks.lora"}), True),
        (_theirs(None), False),
        (_theirs({"ss_network_module": "networks.lora", "modelspec.title": "LCM Kit"}), False),
        (_theirs({"lcm_kit.distillation": "{}"}), False),  # the checkpoint of a training
        (_theirs({"lcm_kit.preset": "LCM"}), False),
        (lambda path: path.write_bytes(b""), False),
        (lambda path: path.write_bytes(b"PK\x03\x04 a pickle"), False),
        (lambda path: path.symlink_to("nowhere"), False),
        (lambda path: os.mkfifo(path), False),
    ],
)
def test_overwriting_replaces_what_save_wrote_and_nothing_else(tmp_path, make, ours):
    path = tmp_path / "x.safetensors"
    make(path)
    before = _state(path)
    other = Lora.from_state_dict(state_dict(rank=2))
    if ours:
        save(other, path, overwrite=True)
        assert {layer.rank for layer in load(path).modules.values()} == {2}
    else:
        with pytest.raises(FileExistsError, match="is not replaced"):
            save(other, path, overwrite=True)
        assert _state(path) == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_lora_replaces_its_own_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save(Lora.from_state_dict(state_dict()), path, dtype=torch.float32)
    lora = load(path)
    save(merge([(lora, 2.0)]), path, dtype=torch.float32, overwrite=True)
    again = load(path)
    for module, layer in lora.modules.items():
        assert relative(again.delta(module), 2 * layer.delta()) < 1e-6


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is no ordinary file"):
        load(tmp_path / "x.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_saved_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "other").touch()
    save(Lora.from_state_dict(state_dict()), tmp_path / "x.safetensors")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("other", "x.safetensors")}
    assert len(modes) == 1


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    huge = Lora.from_state_dict(kohya("lora_unet_conv_in", *(1e9 * f for f in factors(8, 2, 6))))
    with pytest.raises(ValueError, match="too large for float16"):
        save(huge, tmp_path / "x.safetensors")
    good = Lora.from_state_dict(state_dict())
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        save(good, tmp_path / "missing" / "x.safetensors")
    with pytest.raises(ValueError, match=r"has to end in \.safetensors"):
        save(good, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        save(good, tmp_path / "x.safetensors", dtype=torch.int8)
    with pytest.raises(ValueError, match="format is 'onnx'"):
        save(good, tmp_path / "x.safetensors", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"style\.safetensors: there is no such file"):
        load(tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match="this is a folder"):
        load(tmp_path)


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_a_truncated_file_says_that_it_is_cut_off(tmp_path, cut):
    path = tmp_path / "style.safetensors"
    save_file(state_dict(), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"style.safetensors: is (cut off|not a safetensors file)"):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(40), "is a pickle"),
        (b"\x80\x02}q\x00" + bytes(40), "is a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
        (struct.pack("<Q", 2) + b"[]", "is not a safetensors file"),
        (b"just some text that is no LoRA at all", "is not a safetensors file"),
    ],
)
def test_other_things_under_a_loras_name(tmp_path, content, message):
    path = tmp_path / "style.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"style.safetensors: {message}"):
        load(path)


def test_errors_name_the_file(tmp_path):
    save_file({"lora_unet_x.on_input": torch.ones(2)}, tmp_path / "ia3.safetensors")
    with pytest.raises(ValueError, match=r"ia3\.safetensors: no LoRA in it.*IA3"):
        load(tmp_path / "ia3.safetensors")


def test_peft_folders_keep_their_scale_beside_the_weights(tmp_path):
    up, down = factors(8, 4, 6)
    module = "base_model.model.mid_block.attentions.0.proj_in"
    save_file({f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down}, tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 8, "use_rslora": False, "alpha_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert load(tmp_path / "adapter_model.safetensors").modules["lora_unet_middle_block_1_proj_in"].scale == 2.0
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json: not JSON"):
        load(tmp_path / "adapter_model.safetensors")


def test_a_state_dicts_tensor_is_copied_where_it_is_the_loras_own_and_nowhere_else():
    mine, new = torch.ones(4, 3), torch.ones(4, 3)
    copied = _own(mine, mine)
    assert copied.data_ptr() != mine.data_ptr()
    assert torch.equal(copied, mine)
    assert _own(mine.T, mine).is_contiguous()
    unmade = Unmade(dtype=mine.dtype, shape=mine.shape, write=lambda place: place.copy_(mine), device=mine.device)
    for original in (mine, unmade, None):
        assert _own(new, original) is new
        assert _own(unmade, original) is unmade
