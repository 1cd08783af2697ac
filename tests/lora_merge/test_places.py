"""Blocks and kinds of modules, and strengths by them."""

import pytest

from lcm_kit.lora_merge.naming.blocks import Place, parse_block_strengths, place


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k", Place("unet", "down.0", "attention")),
        ("lora_unet_input_blocks_4_0_in_layers_2", Place("unet", "down.1", "conv")),
        ("lora_unet_input_blocks_3_0_op", Place("unet", "down.0", "conv")),
        ("lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj", Place("unet", "mid", "ff")),
        ("lora_unet_output_blocks_5_2_conv", Place("unet", "up.1", "conv")),
        ("lora_unet_output_blocks_8_0_emb_layers_1", Place("unet", "up.2", "embedding")),
        ("lora_unet_output_blocks_3_1_proj_in", Place("unet", "up.1", "attention")),
        ("lora_unet_time_embed_0", Place("unet", "in", "embedding")),
        ("lora_unet_out_2", Place("unet", "out", "conv")),
        ("lora_te1_text_model_encoder_layers_11_self_attn_q_proj", Place("te1", "layers.11", "attention")),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", Place("te2", "layers.0", "ff")),
        ("lora_unet_double_blocks_7_img_attn_qkv", Place("unet", "double_blocks.7", "attention")),
        ("lora_unet_single_blocks_37_linear1", Place("unet", "single_blocks.37", "other")),
        ("something_else", Place("other", "", "other")),
    ],
)
def test_known_modules_have_known_places(module, expected):
    assert place(module) == expected


def test_the_most_exact_block_holds_and_kinds_and_patterns_multiply():
    strengths = parse_block_strengths("down=0.5, down.1=2; attention=0.1\nte=0, /attn2_to_k$/=3")
    factors = {
        "lora_unet_input_blocks_1_0_in_layers_2": 0.5,
        "lora_unet_input_blocks_4_0_in_layers_2": 2.0,
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": 0.2,
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k": 0.15,
        "lora_unet_middle_block_0_in_layers_2": 1.0,
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": 0.0,
    }
    for module, factor in factors.items():
        assert strengths.factor(module) == pytest.approx(factor), module


@pytest.mark.parametrize("text", ["", " \n,, ; "])
def test_blank_text_means_no_factors(text):
    assert parse_block_strengths(text) is None


def test_a_pattern_may_hold_commas_and_slashes():
    strengths = parse_block_strengths(r"/a{1,2}\/b/=0.5")
    assert strengths.factor("xaa/b") == 0.5
    assert strengths.factor("xb") == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("down", r"'down' is no NAME=NUMBER"),
        ("down=x", r"'down=x' is no NAME=NUMBER"),
        ("down=inf", r"'down=inf' is no NAME=NUMBER"),
        ("dwn=1", r"'dwn' is no block or kind of layer. Known: unet, te"),
        ("mid=1, mid=2", "mid is given twice"),
        ("/(/=1", r"/\(/ is no regular expression"),
    ],
)
def test_broken_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_block_strengths(text)
