"""Which names may be of one weight: text encoders by every pair of their names, a model's modules by what is known of them."""

import itertools

import pytest

from lcm_kit.lora_merge.naming import aliases, unet
from lcm_kit.lora_merge.naming.aliases import (
    body,
    is_foreign,
    is_known,
    one_encoder,
    pattern,
    prefix_class,
    sites,
    slices_of,
    text_encoder,
)

CLIP, T5 = "text_model_encoder_layers_0_mlp_fc1", "encoder_block_0_layer_0_SelfAttention_q"
NAMES = ("te", "te1", "te2", "te3", "prior_te", "clip_l", "clip_h", "clip_g", "t5xxl", "")


def pairs(*groups):
    return {frozenset(pair) for group in groups for pair in itertools.combinations(group.split("|"), 2)}


# Names that may be one CLIP: kohya's first and ComfyUI's clip_l (clip_h in SD2), the second and clip_g, Stable Cascade's only
# one. What has no name may be any; a third encoder is never CLIP but by no name or a word of its own.
ONE_CLIP = (
    pairs("te|te1|clip_l|clip_h", "te2|clip_g", "prior_te|te", "prior_te|te2", "prior_te|te3", "prior_te|clip_g", "prior_te|t5xxl")
    | pairs("prior_te|", *(f"{name}|" for name in NAMES if name), *(f"{name}|t5xxl" for name in ("te", "te1", "te2", "te3")))
)  # fmt: skip


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(NAMES, 2)])
def test_names_of_a_clip_may_mean_one(first, second):
    everybody = frozenset({first, second, "te1"})
    wanted = frozenset((first, second)) in ONE_CLIP
    for a, b in ((first, second), (second, first)):
        assert one_encoder(a, b, CLIP, everybody) == one_encoder(a, b, "text_projection", everybody) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_its_own(name):
    assert one_encoder(name, name, CLIP, frozenset({"te1"}))
    assert one_encoder(name, name, T5, frozenset())


@pytest.mark.parametrize(
    ("others", "wanted"), [((), True), (("te3",), True), (("te1",), False), (("te2",), False), (("te1", "te2"), False)]
)
def test_a_lone_te_may_be_clip_g_where_no_number_is_named(others, wanted):
    everybody = frozenset({"te", "clip_g", *others})
    assert one_encoder("te", "clip_g", CLIP, everybody) is one_encoder("clip_g", "te", CLIP, everybody) is wanted


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(NAMES, 2)])
def test_of_other_encoders_a_number_or_no_name_may_be_any_and_two_words_are_two(first, second):
    wanted = not {first, second}.isdisjoint({"te", "te1", "te2", "te3", ""})
    assert one_encoder(first, second, T5, frozenset()) is one_encoder(second, first, T5, frozenset()) is wanted


@pytest.mark.parametrize(
    ("spelling", "found"),
    [
        ("lora_te_text_model_x", ("te", "text_model_x")),
        ("lora_te1_text_model_x", ("te1", "text_model_x")),
        ("lora_te3_encoder_block_0", ("te3", "encoder_block_0")),
        ("lora_te4_x", None),
        ("lora_prior_te_x", ("prior_te", "x")),
        ("text_encoders.t5xxl.transformer.encoder.block.0", ("t5xxl", "encoder_block_0")),
        ("text_encoders.transformer.encoder.block.0", ("", "encoder_block_0")),
        ("text_encoders.clip_l.logit.scale", ("clip_l", "logit_scale")),
        ("lora_te1_model_layers_0", ("te1", "layers_0")),
        ("text_encoders.llama.transformer.model.layers.0", ("llama", "layers_0")),
        ("text_encoders.x.transformer.bert.layers.0", ("x", "layers_0")),
        ("lora_unet_x", None),
        ("text_encoder.x", None),
    ],
)
def test_which_encoder_a_spelling_names(spelling, found):
    assert text_encoder(spelling) == found


@pytest.mark.parametrize(
    ("canonical", "foreign"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", False),
        ("lora_unet_something_new", False),
        ("lora_transformer_single_transformer_blocks_3_proj_out", True),  # diffusers' name of linear2, and no other's
        ("lora_transformer_single_transformer_blocks_3_proj_mlp", True),  # a slice
        ("lora_unet_anything_to_out_0", True),
        ("lora_unet_anything_to_out_1", False),
    ],
)
def test_a_name_of_diffusers_or_of_a_slice_is_foreign(canonical, foreign):
    assert is_foreign(canonical) == foreign
    if "proj_out" in canonical:
        assert sites(canonical) == {"single_blocks_3_linear2", "single_transformer_blocks_3_proj_out"}
        assert not slices_of(canonical)
    if "proj_mlp" in canonical:
        assert slices_of(canonical) == {"single_blocks_3_linear1"}


@pytest.mark.parametrize(
    ("canonical", "known"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", True),
        ("lora_unet_double_blocks_0_img_attn_qkv_bias", True),
        ("lora_transformer_single_transformer_blocks_3_proj_mlp", True),
        ("lora_unet_img_in", True),
        ("lora_unet_input_blocks_1_1_proj_in", True),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", True),
        ("lora_unet_double_blocks_0_img_attn_new", False),
        ("lora_unet_something_new", False),
        ("lora_unet_something_new_bias", False),
    ],
)
def test_whether_a_modules_other_names_are_known(canonical, known):
    assert is_known(canonical) == known


@pytest.mark.parametrize(
    "prefix", ["", "lora_prior_unet_", "lora_unet_", "lora_transformer_", "model_diffusion_model_"]
)
@pytest.mark.parametrize("word", ["", "model_", "decoder_"])
def test_one_prefix_is_taken_off_a_name_and_what_follows_is_its_own(prefix, word):
    for own in ("layers_0_x", "decoder_layers_0_x", "model_layers_0_x") if word else ("layers_0_x", "a_lora_unet_x"):
        assert body(f"{prefix}{word}{own}") == own


def test_numbers_of_a_name_are_alike_and_digits_inside_words_are_not_numbers():
    assert (
        pattern("lora_unet_blocks_12_attn2_to_q") == pattern("lora_unet_blocks_3_attn2_to_q") == "blocks_#_attn2_to_q"
    )
    assert pattern("lora_transformer_layers_0_ff_net_2") == "layers_#_ff_net_#"
    assert pattern("lora_unet_x_1a_2") == "x_1a_#"


@pytest.mark.parametrize(
    ("canonical", "prefix"),
    [
        ("lora_unet_a", "lora_unet_"),
        ("lora_transformer_a", "lora_transformer_"),
        ("lora_te1_a", ""),
        ("a_lora_unet_b", ""),
    ],
)
def test_namings_are_told_apart_by_their_prefix(canonical, prefix):
    assert prefix_class(canonical) == prefix


def test_no_transformer_has_a_block_that_is_called_as_an_ldm_unets():
    """So that such names need not be looked up among theirs."""
    names = ["_".join(filter(None, place)) for place in aliases._meanings()]
    assert names
    assert not [name for name in names if name.startswith(unet.LDM_BLOCKS)]
