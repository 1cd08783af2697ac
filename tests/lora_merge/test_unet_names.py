"""Both names of every module of a UNet, from counting through its blocks as the two programs do."""

import random
from functools import cache
from itertools import product

import pytest

from lcm_kit.lora_merge.naming import names as all_names
from lcm_kit.lora_merge.naming import unet
from lcm_kit.lora_merge.naming.blocks import place
from lcm_kit.lora_merge.naming.unet import FAMILY, Layout, infer_layout, possible_res_blocks, to_diffusers, to_ldm

RESNET = {"norm1": "in_layers_0", "conv1": "in_layers_2", "time_emb_proj": "emb_layers_1", "norm2": "out_layers_0",
          "conv2": "out_layers_3", "conv_shortcut": "skip_connection"}  # fmt: skip
ATTENTION = ("norm", "proj_in", "proj_out", "transformer_blocks_0_attn1_to_q", "transformer_blocks_11_ff_net_0_proj")
OUTSIDE = {"conv_in": "input_blocks_0_0", "conv_norm_out": "out_0", "conv_out": "out_2",
           "time_embedding_linear_1": "time_embed_0", "time_embedding_linear_2": "time_embed_2",
           "add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}  # fmt: skip


@cache
def modules(levels, blocks, attentive):
    """{diffusers' name: ldm's} of a UNet of so many levels and residual blocks a level, attention on some of the levels.

    ldm numbers input_blocks from the first convolution on, one for each residual block and downsampler, and output_blocks
    likewise; an upsampler shares the number of the block that it follows.
    """
    found = dict(OUTSIDE)

    def block(theirs, number, folder, index, attends):
        found.update({f"{theirs}_resnets_{number}_{a}": f"{folder}_{index}_0_{b}" for a, b in RESNET.items()})
        if attends:
            found.update({f"{theirs}_attentions_{number}_{part}": f"{folder}_{index}_1_{part}" for part in ATTENTION})

    index = 1
    for level in range(levels):
        for number in range(blocks):
            block(f"down_blocks_{level}", number, "input_blocks", index, level in attentive)
            index += 1
        if level < levels - 1:
            found[f"down_blocks_{level}_downsamplers_0_conv"] = f"input_blocks_{index}_0_op"
            index += 1
    for number in (0, 1):
        for a, b in RESNET.items():
            found[f"mid_block_resnets_{number}_{a}"] = f"middle_block_{2 * number}_{b}"
    found.update({f"mid_block_attentions_0_{part}": f"middle_block_1_{part}" for part in ATTENTION})
    index = 0
    for level in range(levels):
        attends = levels - 1 - level in attentive
        for number in range(blocks + 1):
            block(f"up_blocks_{level}", number, "output_blocks", index, attends)
            index += 1
        if level < levels - 1:
            found[f"up_blocks_{level}_upsamplers_0_conv"] = f"output_blocks_{index - 1}_{2 if attends else 1}_conv"
    return found


UNETS = [
    (levels, blocks, frozenset(attentive))
    for levels, blocks in product((2, 3, 4), (1, 2, 3, 5))
    for attentive in [range(levels), range(1, levels), range(levels - 1), [1]]
]


def layout_of(levels, blocks, attentive):
    return Layout(blocks, levels, {level: 2 if levels - 1 - level in attentive else 1 for level in range(levels)})


@pytest.mark.parametrize("one", UNETS, ids=lambda one: f"{one[0]} levels, {one[1]} blocks, {sorted(one[2])}")
def test_every_name_is_its_counterpart_and_the_names_tell_the_layout(one):
    levels, blocks, _ = one
    both, layout = modules(*one), layout_of(*one)
    assert {name: to_ldm(name, layout) for name in both} == both
    assert {ldm: to_diffusers(ldm, layout) for ldm in both.values()} == {ldm: name for name, ldm in both.items()}
    for naming in (list(both), list(both.values())):
        assert blocks in possible_res_blocks(naming)
        found = infer_layout(naming, blocks)
        assert (found.res_blocks, found.levels) == (blocks, levels)
        assert [found.upsampler_slot(level) for level in range(levels - 1)] == [
            layout.upsampler_slot(level) for level in range(levels - 1)
        ]
    assert possible_res_blocks(both)[0] == infer_layout(both).res_blocks == blocks
    assert all(map(unet.is_diffusers, both))
    assert all(map(unet.is_ldm, both.values()))
    assert not any(map(unet.is_ldm, both))
    assert not any(map(unet.is_diffusers, both.values()))


@pytest.mark.parametrize("one", UNETS[::5], ids=lambda one: f"{one[0]} levels, {one[1]} blocks, {sorted(one[2])}")
def test_where_a_module_is_and_whether_its_kernel_is_wide(one):
    layout = layout_of(*one)
    for name, ldm in modules(*one).items():
        side, _, level, *_ = f"{name}__".split("_")
        block = f"{side}.{level}" if side in ("down", "up") else "mid" if side == "mid" else "in"
        block = "out" if name in ("conv_norm_out", "conv_out") else block
        for spelled in (name, ldm):
            found = place(f"lora_unet_{spelled}", layout)
            assert (found.part, found.block) == ("unet", block), spelled
        wide = name.endswith(("conv1", "conv2", "samplers_0_conv")) or name in ("conv_in", "conv_out")
        assert unet.is_wide_convolution(ldm) == wide, ldm
        assert all_names.kernel(f"lora_unet_{ldm}") == ((3, 3) if wide else ()), ldm


@cache
def every_name(blocks):
    """All names of a UNet of so many blocks and enough levels that no number is missing up to 40."""
    both = modules(41, blocks, frozenset(range(41)))
    return {*both, *both.values()} | {ldm.replace("_2_conv", "_1_conv") for ldm in both.values()}


def test_the_sizes_that_a_name_allows_are_those_of_the_unets_that_have_it():
    """Each name by itself, by looking for it in every UNet; with any of them, in all of the names together."""
    seen = [name for one in UNETS for both in modules(*one).items() for name in both]
    for name in sorted(set(seen)):
        wanted = {blocks for blocks in range(1, unet.MAX_RES_BLOCKS + 1) if name in every_name(blocks)}
        assert set(possible_res_blocks([name])) == wanted, name
    draw = random.Random(0)
    for one in UNETS:
        for naming in zip(*modules(*one).items(), strict=True):
            some = draw.sample(naming, 5)
            wanted = {n for n in range(1, unet.MAX_RES_BLOCKS + 1) if all(name in every_name(n) for name in some)}
            assert one[1] in wanted
            assert set(possible_res_blocks(some)) == wanted, some


def test_the_likeliest_size_is_what_both_ways_show_then_two_then_the_smallest():
    def down(*blocks):
        return [f"down_blocks_{level}_resnets_{block}_conv1" for level, block in enumerate(blocks)]

    def up(*blocks):
        return [f"up_blocks_{level}_attentions_{block}_proj_in" for level, block in enumerate(blocks)]

    assert possible_res_blocks([]) == [2, 1, 3, 4, 5, 6, 7, 8]
    # Of R blocks the way down shows 0 to R - 1, the way up 0 to R.
    assert possible_res_blocks(down(2, 2) + up(3, 3))[:3] == [3, 4, 5]
    assert possible_res_blocks(down(0, 0) + up(1, 1))[:4] == [1, 2, 3, 4]
    assert possible_res_blocks(down(3, 3) + up(4))[0] == 4
    # One way alone, or ways and levels that do not agree, tell nothing but what is impossible.
    assert possible_res_blocks(down(0, 0)) == [2, 1, 3, 4, 5, 6, 7, 8]
    assert possible_res_blocks(up(4, 4)) == [4, 5, 6, 7, 8]
    assert possible_res_blocks(down(0, 1) + up(1, 1))[:2] == [2, 3]
    assert possible_res_blocks(down(0, 0) + up(2, 2))[:3] == [2, 3, 4]
    assert possible_res_blocks(down(8)) == possible_res_blocks(["input_blocks_0_0_op"]) == []
    # The highest block of each level counts, wherever it stands.
    shuffled = [*down(2, 2), *up(3, 3), "down_blocks_0_resnets_0_conv1", "up_blocks_1_attentions_1_proj_in"]
    assert possible_res_blocks(shuffled)[0] == possible_res_blocks(shuffled[::-1])[0] == 3


def test_where_nothing_tells_the_upsampler_stands_as_in_the_published_unets():
    """SD1.5 and SD2 have four levels, the deepest without attention; SDXL has three, that one with it."""
    assert [Layout(levels=4).upsampler_slot(level) for level in range(4)] == [1, 2, 2, 2]
    assert [Layout(levels=3).upsampler_slot(level) for level in range(3)] == [2, 2, 2]
    assert Layout(levels=4, upsampler_slots={0: 2}).upsampler_slot(0) == 2
    assert Layout(levels=3, upsampler_slots={1: 1}).upsampler_slot(1) == 1
    assert infer_layout(["down_blocks_3_resnets_0_conv1"]) == Layout(2, 4, {})
    assert infer_layout(["up_blocks_1_resnets_0_conv1", "input_blocks_4_0_in_layers_2"]) == Layout(2, 2, {})
    assert infer_layout(["output_blocks_11_0_in_layers_2"]) == Layout(2, 4, {})
    assert infer_layout(["output_blocks_2_1_conv"]) == Layout(2, 1, {0: 1})
    assert infer_layout(["output_blocks_3_1_proj_in"]) == Layout(2, 2, {0: 1, 1: 2})
    assert infer_layout([]) == Layout()


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks_0_resnets_0_conv3", "up_blocks_0_resnets_0_", "mid_block_resnets_2_conv1", "mid_block_resnets_0_x",
        "down_blocks_1234_resnets_0_conv1", "down_blocks_0_attentions_0_proj", "down_blocks_0_upsamplers_0_conv",
        "up_blocks_0_downsamplers_0_conv", "input_blocks_1_2_proj_in", "input_blocks_1_0_in_layers_1", "output_blocks_2_3_conv",
        "middle_block_1_in_layers_2", "middle_block_0_proj_in", "double_blocks_0_img_attn_qkv", "time_embed_1", "",
    ],
)  # fmt: skip
def test_what_is_no_module_of_a_unet_has_no_other_name(name):
    assert to_ldm(name, Layout()) is None
    assert to_diffusers(name, Layout()) is None
    assert not unet.is_diffusers(name)
    assert not unet.is_ldm(name)
    assert not unet.is_wide_convolution(name)
    assert not FAMILY.recognises([f"lora_unet_{name}"])


DOTTED = [
    *(f"down_blocks.{level}.resnets.1.{part}" for level in range(4) for part in RESNET),
    *(f"down_blocks.{level}.downsamplers.0.conv" for level in range(3)),
    *(f"up_blocks.{level}.resnets.2.{part}" for level in range(4) for part in RESNET),
    *(f"up_blocks.{level}.upsamplers.0.conv" for level in range(3)),
    *(f"{place}.{part}" for place in ("down_blocks.2.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.2")
      for part in ("norm", "proj_in", "proj_out", "transformer_blocks.0.norm1", "transformer_blocks.11.ff.net.2",
                   "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.attn1.to_q", "transformer_blocks.9.attn2.to_out.0")),
    "mid_block.resnets.0.conv1", "mid_block.resnets.1.time_emb_proj",
    "conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1",
]  # fmt: skip


def test_diffusers_own_names_come_back_with_their_dots_from_either_naming():
    for name in DOTTED:
        kohya = f"lora_unet_{name.replace('.', '_')}"
        assert FAMILY.kohya_name(f"unet.{name}") == FAMILY.kohya_name(kohya) == kohya
        layout = Layout(2, 4)
        own = FAMILY.canonical(kohya, layout)
        assert own == f"lora_unet_{to_ldm(name.replace('.', '_'), layout)}"
        assert FAMILY.canonical(own, layout) is None
        assert FAMILY.dotted(kohya, layout) == FAMILY.dotted(own, layout) == f"unet.{name}"
    assert FAMILY.dotted("down_blocks_0_attentions_0_proj_in", Layout()) is None
    assert FAMILY.canonical("down_blocks_0_attentions_0_proj_in", Layout()) is None


def test_the_embedding_of_classes_has_the_place_of_the_added_one():
    for number in (1, 2):
        assert to_ldm(f"class_embedding_linear_{number}", Layout()) == OUTSIDE[f"add_embedding_linear_{number}"]
        assert unet.twin_outside_blocks(f"class_embedding_linear_{number}") == OUTSIDE[f"add_embedding_linear_{number}"]
    for name, ldm in OUTSIDE.items():
        assert (unet.twin_outside_blocks(name), unet.twin_outside_blocks(ldm)) == (ldm, name)
    assert unet.twin_outside_blocks("down_blocks_0_resnets_0_conv1") is None
    assert unet.is_diffusers("time_embedding_cond_proj")


def test_a_mix_of_both_namings_is_written_in_ldms_and_one_alone_as_it_came():
    theirs = {"lora_unet_input_blocks_1_1_proj_in": "lora_unet_down_blocks_0_attentions_0_proj_in"}
    own = {"lora_unet_middle_block_1_proj_in": "lora_unet_middle_block_1_proj_in"}
    text = {"lora_te1_x": "lora_te_x"}
    assert FAMILY.tidy(theirs | text) == theirs | text
    assert FAMILY.tidy(own | text) == own | text
    assert FAMILY.tidy(theirs | own | text) == {name: name for name in theirs | own} | text
