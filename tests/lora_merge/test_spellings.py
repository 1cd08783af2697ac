import json
import re
from itertools import product

import pytest
import torch

from lcm_kit.lora_merge import Lora, merge
from lcm_kit.lora_merge.files import keys
from lcm_kit.tests.lora_merge.make import factors, kohya

ATTENTION = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
OUT = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0"
RESNET = "lora_unet_input_blocks_4_0_in_layers_2"
CLIP = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
CLIP_2 = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"

SPELLINGS = [
    (ATTENTION, "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", ".lora_up.weight", ".lora_down.weight"),
    (ATTENTION, "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", ".lora_up.weight", ".lora_down.weight"),
    (ATTENTION, "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", ".lora_up.weight", ".lora_down.weight"),
    (ATTENTION, "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", ".lora_up.weight", ".lora_down.weight"),
    (ATTENTION, f"unet.{BLOCK}.attn1.to_q", ".lora.up.weight", ".lora.down.weight"),
    (ATTENTION, f"unet.{BLOCK}.attn1.processor.to_q", "_lora.up.weight", "_lora.down.weight"),
    (ATTENTION, f"{BLOCK}.attn1.processor.to_q", "_lora.up.weight", "_lora.down.weight"),
    (ATTENTION, f"unet.{BLOCK}.attn1.to_q", ".lora_B.weight", ".lora_A.weight"),
    (ATTENTION, f"base_model.model.{BLOCK}.attn1.to_q", ".lora_B.weight", ".lora_A.weight"),
    (ATTENTION, f"unet.base_model.model.{BLOCK}.attn1.to_q", ".lora_B.default.weight", ".lora_A.default.weight"),
    (ATTENTION, f"{BLOCK}.attn1.to_q", ".lora_B.style.weight", ".lora_A.style.weight"),
    (ATTENTION, f"unet.{BLOCK}.attn1.to_q", ".lora_B", ".lora_A"),
    (OUT, f"unet.{BLOCK}.attn1.processor.to_out", "_lora.up.weight", "_lora.down.weight"),
    (OUT, f"unet.{BLOCK}.attn1.to_out.0", ".lora_B.weight", ".lora_A.weight"),
    (RESNET, "lora_unet_down_blocks_1_resnets_0_conv1", ".lora_up.weight", ".lora_down.weight"),
    (RESNET, "unet.down_blocks.1.resnets.0.conv1", ".lora.up.weight", ".lora.down.weight"),
    (CLIP, "lora_te_text_model_encoder_layers_0_self_attn_q_proj", ".lora_up.weight", ".lora_down.weight"),
    (CLIP, "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", ".lora_up.weight", ".lora_down.weight"),
    (CLIP, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", ".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (CLIP, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", ".lora_B.weight", ".lora_A.weight"),
    (CLIP, "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj", ".lora_up.weight", ".lora_down.weight"),
    (CLIP_2, "lora_te2_text_model_encoder_layers_0_mlp_fc1", ".lora_up.weight", ".lora_down.weight"),
    (CLIP_2, "text_encoder_2.text_model.encoder.layers.0.mlp.fc1", ".lora_B.weight", ".lora_A.weight"),
    ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_attn_qkv", ".lora_up.weight", ".lora_down.weight"),
    ("lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv", ".lora_B.weight", ".lora_A.weight"),
    ("lora_transformer_transformer_blocks_0_attn_to_q", "transformer.transformer_blocks.0.attn.to_q", ".lora_B.weight", ".lora_A.weight"),
    ("lora_transformer_transformer_blocks_0_attn_to_q", "lora_transformer_transformer_blocks_0_attn_to_q", ".lora_up.weight", ".lora_down.weight"),
    ("lora_unet_blocks_0_cross_attn_k", "lora_unet__blocks_0_cross_attn_k", ".lora_up.weight", ".lora_down.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("canonical", "module", "up_suffix", "down_suffix"), SPELLINGS)
def test_every_spelling_is_one_module(canonical, module, up_suffix, down_suffix):
    up, down = factors(6, 2, 5)
    lora = Lora.from_state_dict({module + up_suffix: up, module + down_suffix: down})
    assert list(lora.modules) == [canonical]
    assert torch.equal(lora.modules[canonical].up, up)
    assert torch.equal(lora.modules[canonical].down, down)


@pytest.mark.parametrize(("canonical", "module", "up_suffix", "down_suffix"), SPELLINGS)
def test_any_spelling_finds_the_module(canonical, module, up_suffix, down_suffix):
    lora = Lora.from_state_dict(kohya(canonical, *factors(6, 2, 5)))
    assert torch.equal(lora.delta(module), lora.delta(canonical))


@pytest.mark.parametrize("suffix", [".alpha", "_lora.alpha", ".lora.alpha", ".lora_linear_layer.alpha"])
def test_alpha_is_found_beside_every_spelling(suffix):
    up, down = factors(6, 2, 5)
    module = f"unet.{BLOCK}.attn1.to_q"
    lora = Lora.from_state_dict(
        {f"{module}.lora.up.weight": up, f"{module}.lora.down.weight": down, f"{module}{suffix}": torch.tensor(1.0)}
    )
    assert lora.modules[ATTENTION].scale == 0.5


def test_kohya_names_come_back_as_they_were_written():
    for module in (
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        "lora_unet_input_blocks_1_1_proj_in",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "diffusion_model.single_blocks.0.linear1_qkv",  # ComfyUI knows the fused part by its dots only
        "transformer.single_transformer_blocks.0.attn.to_q",
    ):
        state = Lora.from_state_dict(kohya(module, *factors(6, 2, 5), alpha=1)).to_state_dict()
        assert set(state) == set(kohya(module, *factors(6, 2, 5), alpha=1))


def test_diffusers_names_become_kohya_names():
    up, down = factors(6, 2, 5)
    lora = Lora.from_state_dict(
        {
            "unet.down_blocks.0.attentions.0.proj_in.lora_B.weight": up,
            "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": down,
        }
    )
    assert set(lora.to_state_dict()) == {
        f"lora_unet_down_blocks_0_attentions_0_proj_in.{end}" for end in ("lora_up.weight", "lora_down.weight", "alpha")
    }


def test_the_first_text_encoder_is_te1_when_there_are_two():
    up, down = factors(6, 2, 5)
    module = "text_model.encoder.layers.0.mlp.fc1"
    state = {f"{name}.{module}.lora_{ab}.weight": t for name in ("text_encoder", "text_encoder_2") for ab, t in (("B", up), ("A", down))}  # fmt: skip
    names = {key.partition(".")[0] for key in Lora.from_state_dict(state).to_state_dict()}
    assert names == {"lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_model_encoder_layers_0_mlp_fc1"}
    alone = Lora.from_state_dict({key: t for key, t in state.items() if key.startswith("text_encoder.")})
    assert all(key.startswith("lora_te_") for key in alone.to_state_dict())


def test_a_fused_weight_and_a_part_of_it_stay_apart():
    whole = Lora.from_state_dict(kohya("lora_unet_single_blocks_0_linear1", *factors(6, 2, 5)))
    part = Lora.from_state_dict(kohya("diffusion_model.single_blocks.0.linear1_qkv", *factors(3, 2, 5)))
    assert len(merge([(whole, 1.0), (part, 1.0)]).modules) == 2


def config(**values):
    return {"lora_adapter_metadata": json.dumps(values)}


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({}, 1.0),
        (config(**{"unet.r": 4, "unet.lora_alpha": 8}), 2.0),
        (config(**{"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True}), 4.0),  # 8 / sqrt(4)
        (config(**{"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}}), 0.5),
        (config(**{"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_q": 2}}), 2.0),
        (config(**{"text_encoder.lora_alpha": 8}), 1.0),
        ({"lora_alpha": "2", "r": "4"}, 0.5),
    ],
)
def test_scales_in_the_metadata_count(metadata, scale):
    up, down = factors(6, 4, 5)
    module = f"unet.{BLOCK}.attn1.to_q"
    lora = Lora.from_state_dict({f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down}, metadata=metadata)
    assert lora.modules[ATTENTION].scale == scale


def test_metadata_that_cannot_be_read_is_no_guess():
    up, down = factors(6, 4, 5)
    state = {f"unet.{BLOCK}.attn1.to_q.lora_B.weight": up, f"unet.{BLOCK}.attn1.to_q.lora_A.weight": down}
    with pytest.raises(ValueError, match=r"style: unet.*lora_adapter_metadata in the metadata is not JSON"):
        Lora.from_state_dict(state, metadata={"lora_adapter_metadata": "{"}, source="style")
    with pytest.raises(ValueError, match="lora_alpha in the metadata is 'much', but it has to be a number"):
        Lora.from_state_dict(state, metadata={"lora_alpha": "much"}, source="style")


def test_what_stands_before_alpha_is_the_module_without_one_word_for_lora():
    pattern = re.compile(r"(.+?)(?:_lora|\.lora|\.lora_linear_layer)?\.alpha")
    pieces = ["", "x", ".", "_lora", ".lora", ".lora_linear_layer", ".alpha", "\n"]
    found = 0
    for key in map("".join, product(pieces, pieces, pieces, [".alpha"])):
        match = pattern.fullmatch(key)
        assert keys.parse(key) == (match and (match[1], "alpha"))
        found += match is not None
    assert found > 100
