"""Blocks and kinds of modules, and strengths by them."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcm_kit.lora_merge import Lora, merge, merge_with_account, parse_block_strengths
from lcm_kit.lora_merge.naming import block_lists, globs
from lcm_kit.lora_merge.naming.blocks import Place, place
from lcm_kit.lora_merge.recognise.transformers import TRANSFORMERS
from lcm_kit.lora_merge.settings import block_strengths, strengths
from lcm_kit.lora_merge.settings.strengths import for_inputs


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
        (
            "lora_transformer_single_transformer_blocks_3_attn_to_q",
            Place("unet", "single_transformer_blocks.3", "attention"),
        ),
        ("transformer_blocks_0_attn_to_q", Place("unet", "transformer_blocks.0", "attention")),
        ("lora_unet_vace_blocks_2_self_attn_q", Place("unet", "vace_blocks.2", "attention")),
        ("lora_unet_double_stream_blocks_1_block_attn1_to_q", Place("unet", "double_stream_blocks.1", "attention")),
        ("lora_unet_noise_refiner_0_attention_qkv", Place("unet", "noise_refiner.0", "attention")),
        (
            "lora_unet_txt_in_individual_token_refiner_blocks_0_self_attn_proj",
            Place("unet", "txt_in_individual_token_refiner_blocks.0", "attention"),
        ),
        ("lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0", Place("te3", "encoder_block.0", "other")),
        (
            "text_encoders_qwen25_7b_transformer_model_layers_4_self_attn_q_proj",
            Place("te", "layers.4", "attention"),
        ),
        ("something_else", Place("unet", "", "other")),
        ("first_stage_model_decoder_conv_in", Place("other", "", "conv")),
    ],
)
def test_known_modules_have_known_places(module, expected):
    assert place(module) == expected


def test_the_most_exact_block_holds_and_kinds_and_globs_multiply():
    strengths = parse_block_strengths("down=0.5, down.1=2; attention=0.1\nte=0, *attn2_to_k=3")
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("down", r"'down' is no NAME=NUMBER"),
        ("down=x", r"'down=x' is no NAME=NUMBER"),
        ("down=inf", r"'down=inf' is no NAME=NUMBER"),
        ("0.5", "a list of 1 numbers is for no model"),
        ("down=0.5, 0.3", r"'0\.3' is no NAME=NUMBER"),
        ("0.3, down=0.5", r"'0\.3' is no NAME=NUMBER"),
        ("down 1=1", "'down 1=1' is no NAME=NUMBER"),
        ("=1", "'=1' is no NAME=NUMBER"),
        ("mid=1, mid=2", "mid is given twice"),
        ("up.1=1, up_1=2", "up_1 is given twice"),
        (r"/(\w+)+!/=1", "is a regular expression, and these are not read"),
        ("*" * 201 + "=1", "longer than 200 letters"),
        (",".join(f"*{number}=1" for number in range(101)), "101 names have . or . in them; at most 100"),
        ("a" * 100_001, "the text has 100001 letters"),
        ("1,1,1,1,1,1,1,1\n1,1,1,1,1,1,1,1", "two lists"),
        (",".join("1" * 129), "a list of 129 numbers is for no model"),
    ],
)
def test_broken_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_block_strengths(text)


def lora(*modules, rank=2):
    g = torch.Generator().manual_seed(len(modules))
    state = {}
    for module in modules:
        state[f"{module}.lora_B.weight"] = torch.randn(8, rank, generator=g)
        state[f"{module}.lora_A.weight"] = torch.randn(rank, 8, generator=g)
    return Lora.from_state_dict(state, source="style.safetensors")


def factors(text, *modules):
    """How strong each module is after a merge with these block strengths, against before."""
    whole = lora(*modules)
    merged = merge([(whole, 1.0)], block_strengths=text)
    result = []
    for module in modules:
        before = whole.delta(module)
        try:
            after = merged.delta(module)
        except KeyError:
            after = torch.zeros_like(before)
        ratio = after.norm() / before.norm()
        torch.testing.assert_close(after, ratio * before)
        result.append(pytest.approx(float(ratio), abs=1e-6))
    return result


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model."])
@pytest.mark.parametrize(
    ("named", "other"),
    [
        ("transformer_blocks", "single_transformer_blocks"),
        ("blocks", "vace_blocks"),
        ("blocks", "single_stream_blocks"),
        ("blocks", "txt_in.individual_token_refiner.blocks"),
        ("layers", "noise_refiner"),
        ("layers", "context_refiner.layers"),
        ("double_blocks", "single_double_blocks"),
    ],
)
def test_a_name_matches_whole_path_segments(prefix, named, other):
    modules = [f"{prefix}{side}.{number}.attn.to_q" for side in (named, other) for number in (0, 1, 10)]
    for number, text in enumerate((f"{named}.0=0", f"{named}.1=0", f"{named}.10=0")):
        assert factors(text, *modules) == [0 if at == number else 1 for at in range(6)]
    assert factors(f"{named}=0.5", *modules) == [0.5] * 3 + [1] * 3
    assert factors(f"{other}.1=0", *modules) == [1, 1, 1, 1, 0, 1]
    assert factors(f"{named}.1?=0", *modules) == [1, 1, 0, 1, 1, 1]
    assert factors(f"{named}=0.5, {named}.1=2, {named}.1.attn=3", *modules) == [0.5, 3, 0.5, 1, 1, 1]


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("unet", "transformer_blocks.0.attn.to_q"),
        ("unet", "transformer.transformer_blocks.0.attn.to_q"),
        ("unet", "lycoris_transformer_blocks_0_attn_to_q"),
        ("unet", "lora_unet_double_blocks_0_img_attn_proj"),
        ("unet", "lora_unet_down_blocks_0_attentions_0_proj_in"),
        ("unet", "base_model.model.blocks.0.self_attn.q"),
        ("te", "text_encoders.qwen25_7b.transformer.model.layers.0.self_attn.q_proj"),
        ("te", "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"),
        ("te", "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"),
        ("te1", "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"),
        ("te2", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"),
        ("te3", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"),
        ("te", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("te", "text_model.encoder.layers.0.mlp.fc1"),
        ("layers.0", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("down.0", "lora_unet_down_blocks_0_attentions_0_proj_in"),
        ("down_blocks.0.attentions.0", "lora_unet_down_blocks_0_attentions_0_proj_in"),
        ("input_blocks.1", "lora_unet_down_blocks_0_attentions_0_proj_in"),
        ("lora_unet_double_blocks_0", "lora_unet_double_blocks_0_img_attn_proj"),
        ("final_layer", "diffusion_model.final_layer.linear"),
    ],
)
def test_parts_and_blocks_are_found_in_every_spelling(text, module):
    assert factors(f"{text}=0.25", module) == [0.25]


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("down=0", "There are double_blocks, unet, attention"),
        ("duble_blocks=0", "Near: double_blocks"),
        ("double_blocks.7=0", "Near: double_blocks.0"),
        ("blocks.0=0", "Near: double_blocks.0"),
        ("te=0", "There are"),
        ("conv=0", "There are"),
        ("*txt*=0", "There are"),
        (",".join("1" * 12), "the list of 12 numbers is no place in style.safetensors"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_what_is_near(text, near):
    with pytest.raises(ValueError, match=r"is no place in style\.safetensors") as error:
        factors(text, "diffusion_model.double_blocks.0.img_attn.proj")
    assert near in str(error.value)


def test_a_name_for_all_inputs_may_be_in_one_of_them_only():
    inputs = [(lora("diffusion_model.blocks.0.q"), 1.0), (lora("diffusion_model.vace_blocks.0.q"), 1.0)]
    merged = merge(inputs, block_strengths="blocks=0, vace_blocks=0.5")
    assert merged.delta("diffusion_model.blocks.0.q").norm() == 0
    torch.testing.assert_close(
        merged.delta("diffusion_model.vace_blocks.0.q"), 0.5 * inputs[1][0].delta("diffusion_model.vace_blocks.0.q")
    )
    with pytest.raises(ValueError, match="vace_blocks is no place"):
        merge(inputs, block_strengths=["vace_blocks=0", None])


SD = [f"lora_unet_input_blocks_{number}_1_transformer_blocks_0_attn1_to_q" for number in range(9)]
SD += ["lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"]
SD += [f"lora_unet_output_blocks_{number}_1_transformer_blocks_0_attn1_to_q" for number in range(9)]
SD += ["lora_te_text_model_encoder_layers_0_mlp_fc1"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "base"),
    [
        ((4, 5, 7, 8), range(6), 12),
        ((1, 2, 4, 5, 7, 8), range(3, 12), 17),
        (range(9), range(9), 20),
        (range(12), range(12), 26),
    ],
)
def test_lists_of_block_weights_are_read_as_their_makers_read_them(inputs, outputs, base):
    numbers = [0.5 + number / 64 for number in range(base)]
    order = ["te", *(f"input_blocks_{n}_" for n in inputs), "middle_block", *(f"output_blocks_{n}_" for n in outputs)]
    assert len(order) == base
    expected = [
        next((number for name, number in zip(order, numbers, strict=True) if f"lora_unet_{name}" in module), 1.0)
        for module in SD[:-1]
    ]
    assert factors(",".join(map(str, numbers)), *SD) == [*expected, numbers[0]]


@pytest.mark.parametrize(
    ("prefix", "double", "single"),
    [
        ("diffusion_model.", "double_blocks", "single_blocks"),
        ("transformer.", "transformer_blocks", "single_transformer_blocks"),
    ],
)
def test_lists_for_flux_are_read_in_both_namings(prefix, double, single):
    modules = [f"{prefix}{double}.{n}.a" for n in range(19)] + [f"{prefix}{single}.{n}.a" for n in range(38)]
    numbers = [0.5 + number / 64 for number in range(57)]
    assert factors(",".join(map(str, numbers)), *modules) == numbers
    assert factors(",".join(map(str, [0, 0, 0, *numbers, 0])), *modules) == numbers


def test_a_list_of_one_number_a_block_needs_one_for_every_block():
    modules = [f"diffusion_model.blocks.{number}.self_attn.q" for number in range(40)]
    numbers = [0.5 + number / 64 for number in range(40)]
    assert factors(",".join(map(str, numbers)), *modules) == numbers
    with pytest.raises(ValueError, match="the list of 30 numbers is no place"):
        factors(",".join("1" * 30), *modules)


def two_kinds(base):
    return [kind for kind in base.stacks if kind.startswith(("double_", "single_"))]


# Flux.1, and Chroma, have lists of their own.
@pytest.mark.parametrize(
    "base",
    [base for base in TRANSFORMERS if len(two_kinds(base)) == 2 and base.kin != "Flux.1"],
    ids=lambda base: base.name,
)
def test_a_list_for_two_kinds_of_blocks_has_the_double_ones_first(base):
    kinds = two_kinds(base)
    modules = [f"diffusion_model.{kind}.{n}.a" for kind in kinds for n in range(len(base.stacks[kind]))]
    numbers = [0.5 + number / 64 for number in range(len(modules))]
    assert factors(",".join(map(str, numbers)), *modules) == numbers
    # Of another model, with more blocks than there are numbers for.
    with pytest.raises(ValueError, match="is no place"):
        factors(",".join(map(str, numbers)), *modules, f"diffusion_model.{kinds[0]}.{len(base.stacks[kinds[0]])}.a")


@pytest.mark.parametrize("base", TRANSFORMERS, ids=lambda base: base.name)
def test_blocks_of_transformers_are_named_by_their_own_names(base):
    """Each block alone, in the name that compare shows; nothing else of a longer or shorter name moves with it."""
    modules = [f"lora_unet_{name}" for name in base.modules]
    for stack, blocks in base.stacks.items():
        for number in {0, len(blocks) // 2, len(blocks) - 1} - {n for n, block in enumerate(blocks) if not block}:
            strengths = parse_block_strengths(f"{stack}.{number}=0")
            changed = {name for name in modules if strengths.factor(name) == 0}
            assert changed == {f"lora_unet_{stack}_{number}_{module}" for module in blocks[number]}
        for module in blocks[-1]:
            assert place(f"lora_unet_{stack}_{len(blocks) - 1}_{module}").block == f"{stack}.{len(blocks) - 1}"
    whole = parse_block_strengths(", ".join(f"{stack}=0.5" for stack in base.stacks))
    assert {whole.factor(name) for name in modules} == {0.5}


@pytest.mark.parametrize("base", TRANSFORMERS, ids=lambda base: base.name)
def test_attention_and_feed_forward_of_transformers_are_known_as_such(base):
    words = {"attention": ("attn", "attention"), "ff": ("mlp", "ffn", "feed_forward", "_ff_")}
    for name in base.modules:
        kinds = [
            kind for kind, found in words.items() if any(word in name for word in found) and "modulation" not in name
        ]
        if len(kinds) == 1 and "_mod_" not in name:
            assert place(f"lora_unet_{name}").kind == kinds[0]


def test_blocks_of_a_branch_are_no_blocks_of_the_model():
    modules = [
        "lora_unet_blocks_0_self_attn_q",
        "lora_unet_vace_blocks_0_self_attn_q",
        "lora_unet_blocks_0_cross_attn_k_img",
    ]
    assert [parse_block_strengths("blocks.0=0").factor(name) for name in modules] == [0, 1, 0]
    assert [parse_block_strengths("vace_blocks=0").factor(name) for name in modules] == [1, 0, 1]
    assert [parse_block_strengths("*_img=0").factor(name) for name in modules] == [1, 1, 0]


def test_block_strengths_survive_their_text():
    for text in ("down=0.5, te=0.1, attention=2, *to_q=3", ",".join("1" * 20), ",".join("1" * 26) + "\nmid=0.5"):
        parsed = parse_block_strengths(text)
        assert parse_block_strengths(parsed.text) == parsed
    _, account = merge_with_account([(lora(*SD), 1.0)], block_strengths=",".join("1" * 20))
    assert parse_block_strengths(account.sources[0].block_strengths).listed == (1.0,) * 20


@given(st.text("ab_.*?", max_size=12), st.text("ab_.", max_size=12))
def test_globs_match_what_a_regular_expression_matches(glob, name):
    expression = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in glob)
    assert globs.matches(glob, name) == bool(re.fullmatch(expression, name))


def test_a_glob_takes_no_more_steps_than_lengths_multiplied():
    class Counted(str):
        steps = 0

        def __getitem__(self, at):
            Counted.steps += 1
            return super().__getitem__(at)

    glob, name = "*a" * 60 + "b", Counted("a" * 4000)
    assert not globs.matches(glob, name)
    assert Counted.steps <= 3 * len(glob) * len(name)


def test_globs_that_take_too_long_are_refused_before_they_are_tried():
    long = lora(*(f"diffusion_model.{'a.' * 200}{number}.q" for number in range(400)))
    text = ", ".join(f"{'*a' * 90}{number}=1" for number in range(50))
    with pytest.raises(ValueError, match=r"50 names with . or . take too long on the 400 modules"):
        merge([(long, 1.0)], block_strengths=text)


def test_globs_may_take_the_work_that_is_allowed_and_no_more(monkeypatch):
    """Their letters, in all, times those of the names."""
    one, text = lora("diffusion_model.a.q", "diffusion_model.bb.q"), "*q=0.5, *a*=0.5"
    work = len("*q*a*") * sum(map(len, one.spellings))
    monkeypatch.setattr(strengths, "MAX_WORK", work)
    assert merge([(one, 1.0), (one, 1.0)], block_strengths=[text, None])
    monkeypatch.setattr(strengths, "MAX_WORK", work - 1)
    with pytest.raises(ValueError, match=r"2 names with \* or \? take too long on the 2 modules"):
        merge([(one, 1.0), (one, 1.0)], block_strengths=[None, text])


def test_texts_names_and_globs_may_be_as_long_and_as_many_as_is_said():
    assert parse_block_strengths("mid=1".ljust(block_strengths.MAX_TEXT)).by_block == {"mid": 1.0}
    with pytest.raises(ValueError, match="the text has 100001 letters; at most 100000 are read"):
        parse_block_strengths("mid=1".ljust(block_strengths.MAX_TEXT + 1))
    assert len(parse_block_strengths(",".join(f"*{number}=1" for number in range(100))).by_glob) == 100
    assert parse_block_strengths("*" * 200 + "=1").by_glob == (("*" * 200, 1.0),)


@pytest.mark.parametrize("spelled", ["2:", "lora_2:", " 2 : ", "lora_2 :"])
def test_a_line_with_a_number_is_for_that_input_alone(spelled):
    text = f"down=0.5\n{spelled}up=0.3\n3: mid=2"
    said = [parse_block_strengths(one) for one in for_inputs(text, ["1", "2", "3"])]
    assert [one.by_block for one in said] == [{"down": 0.5}, {"down": 0.5, "up": 0.3}, {"down": 0.5, "mid": 2.0}]
    # Labels are what people see: after one was taken out there may be gaps.
    assert for_inputs("3:up=1", ["1", "3"]) == ["", "up=1"]
    with pytest.raises(ValueError, match="is for LoRA 2; there are 1, 3"):
        for_inputs("2:up=1", ["1", "3"])


def test_of_many_near_names_five_are_told():
    """Twelve blocks of which each is one letter off."""
    one = lora(*(f"lora_unet_double_blocks_{number}_img_attn_proj" for number in range(12)))
    with pytest.raises(ValueError, match="is no place in ") as error:
        merge([(one, 1.0)], block_strengths="double_blocks.77=0")
    near = str(error.value).split("Near: ")[1].split(". There are")[0].split(", ")
    assert len(near) == 5
    assert set(near) <= {"double_blocks", *(f"double_blocks.{number}" for number in range(12))}


def test_a_list_is_complete_for_the_blocks_that_it_names_and_for_no_others():
    every = range(block_lists.MIN_VALUES, block_lists.MAX_VALUES + 1)
    kinds = {kind for two in block_lists._TWO_KINDS.values() for kind, _ in two} | {*block_lists._ONE_KIND}
    for values in every:
        if values in block_lists._LISTS:
            assert block_lists.is_complete(values, {"blocks.999"})
            continue
        named = {name for names in block_lists.names_of_list(values) for name in names}
        for kind in kinds:
            held = {number for number in range(values + 2) if f"{kind}_{number}" in named}
            assert held == set(range(len(held)))
            for number in (0, len(held) - 1, len(held), values + 1):
                if number >= 0:
                    assert block_lists.is_complete(values, {f"{kind}.{number}"}) == (number in held), (values, kind)
        assert not block_lists.is_complete(values, {"blocks.0", f"blocks.{values}"})
        # What has no number, or is no block, needs none.
        assert block_lists.is_complete(values, {"in", "final.999", "blocks.0"})
