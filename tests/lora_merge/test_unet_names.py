"""The pairs below are the published block tables of SD1.5 and SDXL, written down by hand."""

import pytest
import torch

from lcm_kit.lora_merge import Lora
from lcm_kit.lora_merge.naming.unet import (
    Layout,
    infer_layout,
    is_diffusers,
    is_ldm,
    possible_res_blocks,
    to_diffusers,
    to_ldm,
)
from lcm_kit.tests.lora_merge.make import kohya

SD15 = Layout(res_blocks=2, levels=4)
SDXL = Layout(res_blocks=2, levels=3)

COMMON = [
    ("conv_in", "input_blocks_0_0"),
    ("conv_out", "out_2"),
    ("time_embedding_linear_1", "time_embed_0"),
    ("time_embedding_linear_2", "time_embed_2"),
    ("down_blocks_0_attentions_0_proj_in", "input_blocks_1_1_proj_in"),
    ("down_blocks_0_attentions_1_proj_out", "input_blocks_2_1_proj_out"),
    ("down_blocks_0_resnets_0_conv1", "input_blocks_1_0_in_layers_2"),
    ("down_blocks_0_downsamplers_0_conv", "input_blocks_3_0_op"),
    ("down_blocks_1_resnets_0_conv_shortcut", "input_blocks_4_0_skip_connection"),
    (
        "down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k",
        "input_blocks_5_1_transformer_blocks_0_attn2_to_k",
    ),
    ("down_blocks_2_resnets_1_conv2", "input_blocks_8_0_out_layers_3"),
    ("mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj", "middle_block_1_transformer_blocks_0_ff_net_0_proj"),
    ("mid_block_resnets_0_time_emb_proj", "middle_block_0_emb_layers_1"),
    ("mid_block_resnets_1_conv1", "middle_block_2_in_layers_2"),
    ("up_blocks_0_resnets_2_conv_shortcut", "output_blocks_2_0_skip_connection"),
    ("up_blocks_1_attentions_0_proj_in", "output_blocks_3_1_proj_in"),
    ("up_blocks_1_upsamplers_0_conv", "output_blocks_5_2_conv"),
    ("up_blocks_2_resnets_2_time_emb_proj", "output_blocks_8_0_emb_layers_1"),
]
ONLY_SD15 = [
    ("down_blocks_3_resnets_1_conv2", "input_blocks_11_0_out_layers_3"),
    ("down_blocks_2_downsamplers_0_conv", "input_blocks_9_0_op"),
    ("up_blocks_0_upsamplers_0_conv", "output_blocks_2_1_conv"),
    ("up_blocks_3_attentions_2_norm", "output_blocks_11_1_norm"),
]
ONLY_SDXL = [
    ("add_embedding_linear_1", "label_emb_0_0"),
    ("add_embedding_linear_2", "label_emb_0_2"),
    ("up_blocks_0_upsamplers_0_conv", "output_blocks_2_2_conv"),
]
PAIRS = [(*pair, layout) for layout, more in ((SD15, ONLY_SD15), (SDXL, ONLY_SDXL)) for pair in COMMON + more]


@pytest.mark.parametrize(("diffusers", "ldm", "layout"), PAIRS)
def test_both_ways(diffusers, ldm, layout):
    assert to_ldm(diffusers, layout) == ldm
    assert to_diffusers(ldm, layout) == diffusers


@pytest.mark.parametrize(("diffusers", "ldm", "layout"), PAIRS)
def test_a_name_belongs_to_one_scheme(diffusers, ldm, layout):
    assert is_diffusers(diffusers)
    assert not is_ldm(diffusers)
    assert is_ldm(ldm)
    assert not is_diffusers(ldm)


def test_one_residual_block_a_level():
    layout = Layout(res_blocks=1)
    assert to_ldm("down_blocks_1_attentions_0_proj_in", layout) == "input_blocks_3_1_proj_in"
    assert to_ldm("down_blocks_1_downsamplers_0_conv", layout) == "input_blocks_4_0_op"
    assert to_ldm("up_blocks_1_attentions_1_proj_in", layout) == "output_blocks_3_1_proj_in"


@pytest.mark.parametrize(
    "name", ["double_blocks_0_img_attn_qkv", "joint_blocks_3_x_block", "down_blocks_0_motion_modules_0_x", "out_5", ""]
)
def test_other_models_names_stay_as_they_are(name):
    assert to_ldm(name, SD15) is None
    assert to_diffusers(name, SD15) is None


def whole_unet(levels, res_blocks):
    for level in range(levels):
        yield from (f"down_blocks_{level}_attentions_{block}_proj_in" for block in range(res_blocks))
        yield from (f"up_blocks_{level}_attentions_{block}_proj_in" for block in range(res_blocks + 1))


@pytest.mark.parametrize("res_blocks", [1, 2, 3])
@pytest.mark.parametrize("levels", [2, 3, 4])
def test_a_whole_unet_tells_its_residual_blocks_in_diffusers_names(levels, res_blocks):
    assert infer_layout(whole_unet(levels, res_blocks)).res_blocks == res_blocks


@pytest.mark.parametrize("res_blocks", [1, 2, 3])
def test_a_whole_unet_tells_its_residual_blocks_in_ldm_names(res_blocks):
    layout = Layout(res_blocks=res_blocks)
    assert infer_layout(to_ldm(name, layout) for name in whole_unet(3, res_blocks)).res_blocks == res_blocks


def test_a_few_blocks_of_sdxl_are_read_as_sdxl():
    # B-LoRA trains two attention blocks of SDXL and nothing else
    layout = infer_layout(["up_blocks_0_attentions_0_proj_in", "up_blocks_0_attentions_1_proj_in"])
    assert layout.res_blocks == 2


def test_names_of_no_unet_leave_no_possibility():
    assert possible_res_blocks(["input_blocks_1_1_proj_in", "input_blocks_1_0_op"]) == []


def test_the_upsampler_follows_the_attention_if_there_is_one():
    layout = infer_layout(["up_blocks_1_attentions_0_proj_in", "down_blocks_2_resnets_0_conv1"])
    assert to_ldm("up_blocks_0_upsamplers_0_conv", layout) == "output_blocks_2_1_conv"
    assert to_ldm("up_blocks_1_upsamplers_0_conv", layout) == "output_blocks_5_2_conv"


@pytest.mark.parametrize("base", ["SD1.5", "SDXL", "SSD-1B"])
def test_names_of_all_modules_go_to_every_spelling_and_back(base):
    """kohya on diffusers names, kohya on ldm names and diffusers' own, for every weight of the real UNets."""
    pytest.importorskip("diffusers")
    from lcm_kit.tests.lora_merge.full_size import unet_weights

    factor = torch.ones(1, 1)
    dotted = [f"unet.{name}" for name in unet_weights(base)]
    assert len(dotted) > 280

    def written(lora, format):
        ends = {"kohya": "lora_up", "diffusers": "lora_B"}
        state = lora.to_state_dict(format=format)
        return [key.removesuffix(f".{ends[format]}.weight") for key in state if f".{ends[format]}." in key]

    def read(modules):
        return Lora.from_state_dict({k: v for module in modules for k, v in kohya(module, factor, factor).items()})

    on_diffusers = ["lora_unet_" + name.removeprefix("unet.").replace(".", "_") for name in dotted]
    lora = read(dotted)
    on_ldm = list(lora.modules)
    assert len(set(on_ldm)) == len(dotted)
    assert not any("resnets" in name or "attentions" in name for name in on_ldm)
    for spelled in (dotted, on_diffusers, on_ldm):
        one = read(spelled)
        assert list(one.modules) == on_ldm
        assert written(one, "diffusers") == dotted
        assert written(one, "kohya") == (on_diffusers if spelled is not on_ldm else on_ldm)
