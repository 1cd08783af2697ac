import pytest
import torch

from lcm_kit.lora_merge import Lora
from lcm_kit.tests.lora_merge.make import factors, kohya

MODULE = "lora_unet_mid_block_attentions_0_proj_in"


def plain():
    return kohya(MODULE, *factors(6, 2, 5), alpha=1)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("lora_unet_x.hada_w3", "LoHa, LoKr or OFT of a kind that ComfyUI does not read"),
        ("lora_unet_x.oft_diag", "LoHa, LoKr or OFT of a kind that ComfyUI does not read"),
        ("lora_unet_x.on_input", "IA3"),
        ("unet.x.lora_B.bias", "LoRA with a bias of its own"),
        ("unet.x.lora_B.default.bias", "LoRA with a bias of its own"),
        ("unet.x.lora_embedding_A", "LoRA of an embedding"),
        ("something.else", "unknown"),
    ],
)
def test_what_no_loader_reads_is_refused_by_name(key, name):
    with pytest.raises(ValueError, match=f"style.safetensors: cannot be used.*{name} \\(1 keys: {key}\\)"):
        Lora.from_state_dict(plain() | {key: torch.ones(2)}, source="style.safetensors")


def test_one_message_names_all_formats_and_counts():
    keys = [f"lora_unet_{n}.{end}" for n in range(5) for end in ("on_input", "ia3_l")] + ["lora_unet_9.lora_B.bias"]
    with pytest.raises(ValueError, match=r"IA3 \(10 keys: .* and 7 more\); LoRA with a bias of its own \(1 keys"):
        Lora.from_state_dict(dict.fromkeys(keys, torch.ones(2)) | {"lora_unet_9.alpha": torch.tensor(1.0)})


@pytest.mark.parametrize("state", [{}, {"model.diffusion_model.conv_in.weight": torch.ones(2, 2)}])
def test_a_file_without_lora_says_so(state):
    with pytest.raises(ValueError, match="no LoRA in it"):
        Lora.from_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(f"{MODULE}.lora_up.weight"), "but no up"),
        (lambda state: state.pop(f"{MODULE}.lora_down.weight"), "but no down"),
        (lambda state: state.update({"lora_unet_y.alpha": torch.tensor(1.0)}), "lora_unet_y.alpha belongs to no factors"),
        (lambda state: state.update({f"{MODULE}.diff": torch.ones(6, 5)}), "another update of its weight"),
        (lambda state: state.update({f"{MODULE}.lora_B.weight": torch.ones(6, 2)}), "are the same thing"),
        (lambda state: state.update({f"{MODULE}.lora_up.weight": torch.ones(6, 3)}), "ranks 3 and 2 differ"),
        (lambda state: state.update({f"{MODULE}.alpha": torch.ones(2)}), "it has to be one number"),
        (lambda state: state.update({f"{MODULE}.lora_up.weight": torch.ones(6, 2, dtype=torch.int8)}), "int8.*not floating|not floating.*int8"),
    ],
)  # fmt: skip
def test_incomplete_or_contradictory_files_are_refused(change, message):
    state = plain()
    change(state)
    with pytest.raises(ValueError, match=message):
        Lora.from_state_dict(state)


def test_a_tensor_without_values_is_damage():
    with pytest.raises(ValueError, match=rf"1 tensors have no values, {MODULE}.lora_up.weight"):
        Lora.from_state_dict(plain() | {f"{MODULE}.lora_up.weight": torch.ones(6, 0)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_that_are_no_numbers_are_refused(value, dtype):
    up, down = factors(6, 2, 500, dtype=dtype)
    down[1, 313] = value
    with pytest.raises(ValueError, match=rf"broken: NaN or infinite values in {MODULE}.lora_down.weight"):
        Lora.from_state_dict(kohya(MODULE, up, down), source="broken")


def test_two_spellings_of_one_module_in_one_file_are_refused():
    state = plain() | kohya("lora_unet_middle_block_1_proj_in", *factors(6, 2, 5))
    with pytest.raises(ValueError, match="two spellings of one module"):
        Lora.from_state_dict(state)


def test_differences_of_weights_norms_and_biases_are_kept():
    state = plain() | {
        "lora_unet_mid_block_attentions_0_norm.w_norm": torch.ones(5),
        "lora_unet_mid_block_attentions_0_norm.b_norm": torch.ones(5),
        "lora_unet_conv_in.diff": torch.ones(3, 4, 3, 3),
        f"{MODULE}.diff_b": torch.ones(6),
    }
    lora = Lora.from_state_dict(state)
    assert set(lora.to_state_dict()) == set(state)
    assert torch.equal(lora.delta("lora_unet_conv_in"), torch.ones(3, 4, 3, 3))
    assert torch.equal(lora.delta("lora_unet_mid_block_attentions_0_norm"), torch.ones(5))


def test_eight_bit_floats_are_read():
    up, down = factors(6, 2, 5)
    up8, down8 = up.to(torch.float8_e4m3fn), down.to(torch.float8_e4m3fn)
    lora = Lora.from_state_dict(kohya(MODULE, up8, down8))
    assert torch.equal(lora.delta(MODULE), up8.float() @ down8.float())


def test_delta_of_an_unknown_module_is_an_error():
    lora = Lora.from_state_dict(plain(), source="style")
    with pytest.raises(KeyError, match="style has no module 'lora_unet_conv_in'"):
        lora.delta("lora_unet_conv_in")
    with pytest.raises(KeyError, match="changes the bias"):
        Lora.from_state_dict({"lora_unet_conv_in.diff_b": torch.ones(3)}).delta("lora_unet_conv_in")


def test_nothing_can_be_put_into_a_lora():
    lora = Lora.from_state_dict(plain())
    with pytest.raises(TypeError):
        lora.modules["x"] = lora.modules
    with pytest.raises(TypeError):
        lora.metadata["x"] = "y"


def test_writing_into_a_state_dict_leaves_the_lora_alone():
    state = plain()
    lora = Lora.from_state_dict(state)
    before = lora.delta(MODULE)
    for tensor in lora.to_state_dict().values():
        tensor.zero_()
    assert torch.equal(lora.delta(MODULE), before)


def test_a_state_dict_can_share_what_needs_no_conversion():
    state = plain()
    lora = Lora.from_state_dict(state)
    shared = lora.to_state_dict(copy=False)
    assert shared[f"{MODULE}.lora_up.weight"].data_ptr() == state[f"{MODULE}.lora_up.weight"].data_ptr()
    half = lora.to_state_dict(torch.float16, copy=False)
    assert torch.equal(half[f"{MODULE}.lora_up.weight"], state[f"{MODULE}.lora_up.weight"].half())


def test_trainable_tensors_come_out_as_plain_ones():
    up, down = factors(6, 2, 5)
    lora = Lora.from_state_dict(kohya(MODULE, torch.nn.Parameter(up), torch.nn.Parameter(down)))
    assert not any(tensor.requires_grad for tensor in lora.to_state_dict().values())
